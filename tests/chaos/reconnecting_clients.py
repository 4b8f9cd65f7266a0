"""Followers who lose their server again and again, come back, and keep all that they heard."""

import asyncio
import contextlib
import json
import os
import sys

from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from sandbox.model.wire.events import log_stream_of

AGAIN_SECONDS = 0.1
_LOST = (OSError, asyncio.IncompleteReadError, WebSocketException, TimeoutError)


class Follower:
    """`frames` has what it heard."""

    @staticmethod
    def is_told(frame):
        """Of logs: output and events."""
        return log_stream_of(frame) is not None

    def __init__(self, machine, task_id):
        self.machine, self.task_id = machine, task_id
        self.frames, self.connections = [], 0

    @property
    def has_ended(self):
        return bool(self.frames) and self.frames[-1]["type"] == "end"

    @property
    def last_seq(self):
        return self.frames[-1]["seq"] if self.frames else 0

    async def follow(self):
        while not self.has_ended:
            with contextlib.suppress(*_LOST):
                await self._listen()
            if not self.has_ended:
                await asyncio.sleep(AGAIN_SECONDS)


class SseFollower(Follower):
    """Resumes with Last-Event-ID."""

    async def _listen(self):
        port = self.machine.http.base_url.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4 * 1024 * 1024)
        try:
            lines = [f"GET /api/v1/tasks/{self.task_id}/logs?follow=true HTTP/1.0", "Host: localhost"]
            lines += [f"Last-Event-ID: {self.last_seq}"] if self.frames else []
            writer.write("\r\n".join([*lines, "", ""]).encode())
            head = await reader.readuntil(b"\r\n\r\n")
            if head.split(b" ", 2)[1] != b"200":
                return  # it is starting or stopping
            self.connections += 1
            while True:
                event = await reader.readuntil(b"\n\n")
                lines = [line for line in event.decode().split("\n") if line and not line.startswith(":")]
                fields = dict(line.split(": ", 1) for line in lines)
                if "data" in fields:
                    frame = json.loads(fields["data"])
                    assert (str(frame["seq"]), frame["type"]) == (fields["id"], fields["event"])
                    self.frames.append(frame)
        finally:
            writer.transport.abort()


class WebSocketFollower(Follower):
    """Resumes with `after`."""

    @staticmethod
    def is_told(frame):
        """Of progress and measurements too, which have what `usage` says."""
        return frame["type"] != "usage"

    async def _listen(self):
        address = f"{self.machine.server.said['ws']}/api/v1/tasks/stream?task_id={self.task_id}&after={self.last_seq}"
        async with connect(address, proxy=None, open_timeout=10, close_timeout=1) as socket:
            self.connections += 1
            async for message in socket:
                self.frames.append(json.loads(message))


class CommandFollower(Follower):
    """`sandbox task logs --follow` resumes by itself; nobody starts it again."""

    async def follow(self):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sandbox", "task", "logs", self.task_id, "--follow", "--format", "json"),
            env={"PATH": os.environ["PATH"], "SANDBOX_SERVER": self.machine.server.said["http"]},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=4 * 1024 * 1024,
        )
        try:
            async for line in process.stdout:
                self.frames.append(json.loads(line))
            errors = await process.stderr.read()
            assert await process.wait() in (0, 1, 8), errors.decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
