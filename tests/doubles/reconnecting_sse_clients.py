"""Lightweight clients that follow a task through server-sent events, and disconnect and reconnect."""

import asyncio
import hashlib
import random
import re
import time

_SEQ = re.compile(rb"^id: (\d+)\n", re.MULTILINE)
_KEEP_ALIVE = b": keep-alive\n\n"
PAUSES_SECONDS, PAUSE_WEIGHTS = (0, 0.05, 0.3, 4.0), (10, 10, 10, 1)
CONNECTION_BYTES_LOG10 = (0.0, 7.3)
"""Base-10 logarithms of the minimum and maximum number of bytes that a client reads before it closes a connection. The
number is log-uniform. With a lower average, or longer pauses, clients would fall behind a busy task."""

_READ_BYTES = 256 * 1024
_CONNECT_SECONDS = 30.0


class ReconnectingClient:
    """Reads until the event `end`; stores `seqs` in the received order, and a digest of all bytes.

    rng: chooses when to disconnect and for how long; None for a single connection.
    connection_bytes_log10: the range of the base-10 logarithm of the bytes read per connection.
    on_events: called with events that arrived together (their seqs, their text) and the time when the connection was
    opened (seconds since 1970).
    """

    def __init__(self, port, task_id, *, rng=None, connection_bytes_log10=CONNECTION_BYTES_LOG10, on_events=None):
        self._port, self._task_id, self._rng, self._on_events = port, task_id, rng, on_events
        self._connection_bytes_log10 = connection_bytes_log10
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
        """Return a pause that is sometimes so long that the server no longer caches the missed events."""
        return self._rng.choices(PAUSES_SECONDS, PAUSE_WEIGHTS)[0] if self._rng else 0

    def _connection_bytes(self):
        """Return how many bytes to read. The first connection is short, so that every client reconnects."""
        if self._rng is None:
            return None
        return int(10 ** self._rng.uniform(*self._connection_bytes_log10 if self.seqs else (0, 3)))

    async def _connect(self):
        """Open one connection, which may end in the middle of an event."""
        remaining_bytes = self._connection_bytes()
        async with asyncio.timeout(_CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=4 * _READ_BYTES)
        try:
            writer.write(self._request())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.split(b" ", 2)[1] == b"200", head
            self._connected_at = time.time()
            await self._read(reader, remaining_bytes)
        finally:
            if self._rng and self._rng.random() < 0.5:
                writer.transport.abort()
            writer.close()

    def _request(self):
        lines = [f"GET /api/v1/tasks/{self._task_id}/logs?follow=true HTTP/1.0", "Host: localhost"]
        if self.seqs:
            lines.append(f"Last-Event-ID: {self.seqs[-1]}")
        return "\r\n".join([*lines, "", ""]).encode()

    async def _read(self, reader, remaining_bytes):
        partial = b""
        while chunk := await reader.read(min(_READ_BYTES, remaining_bytes) if remaining_bytes else _READ_BYTES):
            text, end, partial = (partial + chunk).rpartition(b"\n\n")
            self._record(text + end)
            if remaining_bytes is not None:
                remaining_bytes -= len(chunk)
                if remaining_bytes <= 0:
                    return

    def _record(self, text):
        """Record all complete events together, because 200 clients at 1000 lines per second leave 5 µs per event."""
        text = text.replace(_KEEP_ALIVE, b"")
        seqs = [int(seq) for seq in _SEQ.findall(text)]
        if not seqs:
            return
        self.seqs += seqs
        self._digest.update(text)
        self.has_ended = text.rfind(b"\nevent: end\n") > text.rfind(b"\nid: ")
        self.started.set()
        if self._on_events is not None:
            self._on_events(seqs, text, self._connected_at)


def make_clients(count, port, task_id, *, seed, **options):
    """Make `count` clients. With the same seed, the clients make the same decisions."""
    return [ReconnectingClient(port, task_id, rng=random.Random(f"{seed} {n}"), **options) for n in range(count)]
