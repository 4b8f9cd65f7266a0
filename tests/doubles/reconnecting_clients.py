"""Followers of one task by server-sent events who go away and come back, as lean as Python allows."""

import asyncio
import hashlib
import random
import re
import time

_SEQ = re.compile(rb"^id: (\d+)\n", re.MULTILINE)
_KEEP_ALIVE = b": keep-alive\n\n"
PAUSES_SECONDS, PAUSE_WEIGHTS = (0, 0.05, 0.3, 4.0), (10, 10, 10, 1)
LIFETIME_LOG10 = (0.0, 7.3)
"""What a connection is good for: from one byte to 20 MB, small numbers as likely as large ones. Less on average, or
longer pauses, and followers would fall further and further behind a busy task."""

_READ_BYTES = 256 * 1024
_CONNECT_SECONDS = 30.0


class Follower:
    """Reads until the event `end`; what it has is `seqs` in the order that they came, and a digest of every byte.

    chance: decides when it leaves and for how long; without one it stays. logarithms: decimal ones of the bytes that a
    connection is good for, the least and the most. heard: told of events that came together (their seqs, their text)
    and when the connection was made that brought them (seconds since 1970).
    """

    def __init__(self, port, task_id, *, rng=None, lifetime_log10=LIFETIME_LOG10, on_events=None):
        self._port, self._task_id, self._rng, self._on_events = port, task_id, rng, on_events
        self._lifetime_log10 = lifetime_log10
        self.seqs, self.reconnects, self.has_ended = [], 0, False
        self.started = asyncio.Event()
        self._digest = hashlib.sha256()
        self._connected_at = 0.0

    @property
    def digest(self):
        return self._digest.hexdigest()

    async def follow(self):
        await self._connect()
        while not self.has_ended:
            self.reconnects += 1
            await asyncio.sleep(self._pause_seconds())
            await self._connect()

    def _pause_seconds(self):
        """Now and then so long that what was missed is no longer in the server's memory."""
        return self._rng.choices(PAUSES_SECONDS, PAUSE_WEIGHTS)[0] if self._rng else 0

    def _allowed_bytes(self):
        """The first connection is a short one, so that everybody comes back at least once."""
        if self._rng is None:
            return None
        return int(10 ** self._rng.uniform(*self._lifetime_log10 if self.seqs else (0, 3)))

    async def _connect(self):
        """One connection, which ends at some byte, in the middle of an event or not."""
        allowed = self._allowed_bytes()
        async with asyncio.timeout(_CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=4 * _READ_BYTES)
        try:
            writer.write(self._request())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.split(b" ", 2)[1] == b"200", head
            self._connected_at = time.time()
            await self._read(reader, allowed)
        finally:
            if self._rng and self._rng.random() < 0.5:
                writer.transport.abort()
            writer.close()

    def _request(self):
        lines = [f"GET /api/v1/tasks/{self._task_id}/logs?follow=true HTTP/1.0", "Host: localhost"]
        if self.seqs:
            lines.append(f"Last-Event-ID: {self.seqs[-1]}")
        return "\r\n".join([*lines, "", ""]).encode()

    async def _read(self, reader, allowed):
        rest = b""
        while chunk := await reader.read(min(_READ_BYTES, allowed) if allowed else _READ_BYTES):
            told, end, rest = (rest + chunk).rpartition(b"\n\n")
            self._take(told + end)
            if allowed is not None:
                allowed -= len(chunk)
                if allowed <= 0:
                    return

    def _take(self, told):
        """Whole events, all at once: two hundred followers at a thousand lines a second leave 5 µs for each."""
        told = told.replace(_KEEP_ALIVE, b"")
        seqs = [int(seq) for seq in _SEQ.findall(told)]
        if not seqs:
            return
        self.seqs += seqs
        self._digest.update(told)
        self.has_ended = told.rfind(b"\nevent: end\n") > told.rfind(b"\nid: ")
        self.started.set()
        if self._on_events is not None:
            self._on_events(seqs, told, self._connected_at)


def restless(count, port, task_id, *, seed, **others):
    """So many of them; the same seed leads to the same decisions."""
    return [Follower(port, task_id, rng=random.Random(f"{seed} {n}"), **others) for n in range(count)]
