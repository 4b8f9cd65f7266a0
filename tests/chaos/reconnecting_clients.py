"""Clients that reconnect whenever they lose the connection, and keep all received events."""

import asyncio
import contextlib
import json
import os
import sys

from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from sandbox.model.wire.event_conversion import log_stream_of

RECONNECT_SECONDS = 0.1
_CONNECTION_ERRORS = (OSError, asyncio.IncompleteReadError, WebSocketException, TimeoutError)


class Client:
    """Collects a task's `events`."""

    @staticmethod
    def is_delivered(event):
        """Return whether clients of this kind receive the event. By default, they receive output and log events."""
        return log_stream_of(event) is not None

    def __init__(self, deployment, task_id):
        self.deployment, self.task_id = deployment, task_id
        self.events, self.connections = [], 0

    @property
    def has_ended(self):
        return bool(self.events) and self.events[-1]["type"] == "end"

    @property
    def last_seq(self):
        return self.events[-1]["seq"] if self.events else 0

    async def follow(self):
        while not self.has_ended:
            with contextlib.suppress(*_CONNECTION_ERRORS):
                await self._receive()
            if not self.has_ended:
                await asyncio.sleep(RECONNECT_SECONDS)


class SseClient(Client):
    """Resumes with Last-Event-ID."""

    async def _receive(self):
        port = self.deployment.http.base_url.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4 * 1024 * 1024)
        try:
            lines = [f"GET /api/v1/tasks/{self.task_id}/logs?follow=true HTTP/1.0", "Host: localhost"]
            lines += [f"Last-Event-ID: {self.last_seq}"] if self.events else []
            writer.write("\r\n".join([*lines, "", ""]).encode())
            head = await reader.readuntil(b"\r\n\r\n")
            if head.split(b" ", 2)[1] != b"200":
                return  # the server is starting or stopping
            self.connections += 1
            while True:
                message = await reader.readuntil(b"\n\n")
                lines = [line for line in message.decode().split("\n") if line and not line.startswith(":")]
                fields = dict(line.split(": ", 1) for line in lines)
                if "data" in fields:
                    event = json.loads(fields["data"])
                    assert (str(event["seq"]), event["type"]) == (fields["id"], fields["event"])
                    self.events.append(event)
        finally:
            writer.transport.abort()


class WebSocketClient(Client):
    """Resumes with `after`."""

    @staticmethod
    def is_delivered(event):
        """Return True for all events except `usage`, whose values are also in progress and metrics events."""
        return event["type"] != "usage"

    async def _receive(self):
        base_url = self.deployment.server.ready_message["ws"]
        address = f"{base_url}/api/v1/tasks/stream?task_id={self.task_id}&after={self.last_seq}"
        async with connect(address, proxy=None, open_timeout=10, close_timeout=1) as socket:
            self.connections += 1
            async for message in socket:
                self.events.append(json.loads(message))


class CliClient(Client):
    """`sandbox task logs --follow` reconnects by itself, so it is started only once."""

    async def follow(self):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sandbox", "task", "logs", self.task_id, "--follow", "--format", "json"),
            env={"PATH": os.environ["PATH"], "SANDBOX_SERVER": self.deployment.server.ready_message["http"]},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=4 * 1024 * 1024,
        )
        try:
            async for line in process.stdout:
                self.events.append(json.loads(line))
            errors = await process.stderr.read()
            assert await process.wait() in (0, 1, 8), errors.decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
