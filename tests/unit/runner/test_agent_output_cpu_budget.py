"""Agent output waits while the runner's CPU budget is exhausted, and no output is lost."""

import asyncio

import pytest

from sandbox.bootstrap.clock import SystemClock
from sandbox.model.fixed_limits import RUNNER_CPU_BURST_SECONDS
from sandbox.primitives.runner_cpu_throttle import CpuThrottle
from sandbox.runner.agent_output import AgentOutput, OutputQuota, StdoutProcessing, redacted_chunks

OUTPUT = b"".join(b"line %d\n" % number for number in range(3000))
LINES_PER_LOOP_ITERATION = 100


class ThrottleHarness:
    """A throttle whose clocks the test sets."""

    def __init__(self):
        self.now = self.used = 0.0
        self.throttle = CpuThrottle(lambda: self.now, lambda: self.used)

    def spend(self):
        self.used = RUNNER_CPU_BURST_SECONDS + self.now + 0.1


@pytest.fixture
def harness(monkeypatch):
    original_sleep = asyncio.sleep
    monkeypatch.setattr(
        "sandbox.primitives.runner_cpu_throttle.asyncio.sleep", lambda seconds: original_sleep(min(seconds, 0.02))
    )
    return ThrottleHarness()


def reader():
    stream = asyncio.StreamReader()
    stream.feed_data(OUTPUT)
    stream.feed_eof()
    return stream


def output(harness, written):
    return AgentOutput(
        written.append,
        lambda _: None,
        StdoutProcessing("stdout", lambda _: None, lambda _: None, marks_parsed=True),
        redactor=None,
        quota=OutputQuota(SystemClock()),
        cpu_queue=harness.throttle.queue(),
    )


def text(written):
    return b"".join(event.data if isinstance(event.data, bytes) else event.data.encode() for event in written)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_lines_wait_for_the_budget_without_loss(harness, stream):
    written = []
    agent = output(harness, written)
    read = agent.read_stdout if stream == "stdout" else agent.read_stderr
    harness.spend()
    reading = asyncio.create_task(read(reader()))
    await asyncio.sleep(0.05)
    assert written == []
    harness.now += 1000
    await reading
    assert text(written) == OUTPUT


async def test_reading_pauses_as_soon_as_the_budget_is_spent(harness):
    written = []

    def record(event):
        written.append(event)
        if len(written) == 1000:
            harness.spend()

    agent = output(harness, written)
    agent._record = record
    reading = asyncio.create_task(agent.read_stdout(reader()))
    for _ in range(100):
        await asyncio.sleep(0.01)
    assert 1000 <= len(written) <= 1000 + LINES_PER_LOOP_ITERATION
    harness.now += 1000
    await reading
    assert text(written) == OUTPUT


async def test_terminal_output_waits_for_the_budget(harness):
    received = []

    async def collect():
        async for chunk in redacted_chunks(reader(), None, harness.throttle.queue()):
            received.append(chunk)

    harness.spend()
    task = asyncio.create_task(collect())
    await asyncio.sleep(0.05)
    assert received == []
    harness.now += 1000
    await task
    assert b"".join(received) == OUTPUT
