"""Hostile output takes long to redact. Meanwhile, the runner's limits and its gateway continue to work."""

import asyncio
import contextlib
import itertools
import threading
import time

import pytest

from sandbox.bootstrap.clock import SystemClock
from sandbox.primitives.runner_cpu_throttle import CpuThrottle
from sandbox.runner.agent_output import AgentOutput, OutputQuota, StdoutProcessing, redacted_chunks

LARGE, SMALL = b"x" * 5000 + b"\n", b"short\n"
_TIMEOUT_SECONDS = 5.0


class SlowStream:
    """Redacts a large piece only while other coroutines run, and holds back the last bytes until the end."""

    def __init__(self):
        self.pending_bytes = 0
        self.other_coroutines_run = threading.Event()

    def feed(self, chunk):
        self.pending_bytes = len(chunk)
        return self._redact(chunk[:-3])

    def flush_lines(self):
        return b""

    def flush(self):
        return self._redact(b"z!\n")

    def _redact(self, data):
        if self.pending_bytes > 1000:
            self.other_coroutines_run.clear()
            assert self.other_coroutines_run.wait(_TIMEOUT_SECONDS), "redaction blocks the event loop"
        return data


class SlowRedactor:
    unsearchable_secret_names = ()

    def __init__(self):
        self.slow_stream = SlowStream()

    def stream(self):
        return self.slow_stream


@contextlib.asynccontextmanager
async def running_repeatedly(call):
    async def repeat():
        while True:
            call()
            await asyncio.sleep(0)

    task = asyncio.create_task(repeat())
    yield
    task.cancel()


def reader(data):
    stream = asyncio.StreamReader()
    stream.feed_data(data)
    stream.feed_eof()
    return stream


def agent_output(record, *, redactor=None, parse_line=lambda _: None, on_event=lambda _: None):
    return AgentOutput(
        record,
        lambda _: None,
        StdoutProcessing("stdout", parse_line, on_event, marks_parsed=False),
        redactor=redactor,
        quota=OutputQuota(SystemClock()),
        cpu_queue=CpuThrottle().queue(),
    )


@pytest.mark.parametrize("data", [LARGE, SMALL])
async def test_output_is_redacted_without_blocking_the_event_loop(data):
    written, redactor = [], SlowRedactor()
    async with running_repeatedly(redactor.slow_stream.other_coroutines_run.set):
        await agent_output(written.append, redactor=redactor).read_stdout(reader(data))
    assert b"".join(event.data for event in written) == data[:-3] + b"z!\n"


@pytest.mark.parametrize("data", [LARGE, SMALL])
async def test_terminal_output_is_redacted_without_blocking_the_event_loop(data):
    redactor = SlowRedactor()
    async with running_repeatedly(redactor.slow_stream.other_coroutines_run.set):
        chunks = [chunk async for chunk in redacted_chunks(reader(data), redactor, CpuThrottle().queue())]
    assert b"".join(chunks) == data[:-3] + b"z!\n"


async def test_other_coroutines_run_between_slow_events():
    """Each event is redacted when it is recorded."""
    calls = []

    def record_slowly(_):
        calls.append("event")
        time.sleep(0.06)

    output = agent_output(lambda _: None, parse_line=lambda _: ["event"] * 4, on_event=record_slowly)
    async with running_repeatedly(lambda: calls.append("other")):
        await output.read_stdout(reader(b"line\n"))
    following = [next_call for call, next_call in itertools.pairwise(calls) if call == "event"]
    assert following.count("other") >= 3
