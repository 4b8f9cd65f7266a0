"""What a sandbox says waits while its runner's CPU budget is spent, and nothing of it is lost."""

import asyncio

import pytest

from sandbox.bootstrap.clock import SystemClock
from sandbox.model.limits import RUNNER_CPU_BURST_SECONDS
from sandbox.runner.agent_output import AgentOutput, OutputQuota, redacted_chunks
from sandbox.system.cpu_throttle import CpuThrottle

SAID = b"".join(b"line %d\n" % number for number in range(3000))
LINES_OF_A_TURN = 100


class Process:
    """A runner whose clocks are set by hand."""

    def __init__(self):
        self.now = self.used = 0.0
        self.throttle = CpuThrottle(lambda: self.now, lambda: self.used)

    def spend(self):
        self.used = RUNNER_CPU_BURST_SECONDS + self.now + 0.1


@pytest.fixture
def process(monkeypatch):
    real = asyncio.sleep
    monkeypatch.setattr("sandbox.system.cpu_throttle.asyncio.sleep", lambda seconds: real(min(seconds, 0.02)))
    return Process()


def reader():
    made = asyncio.StreamReader()
    made.feed_data(SAID)
    made.feed_eof()
    return made


def output(process, written):
    return AgentOutput(
        written.append,
        lambda _: None,
        lambda _: None,
        redaction=None,
        stdout_stream="stdout",
        quota=OutputQuota(SystemClock()),
        queue=process.throttle.queue(),
    )


def text(written):
    return b"".join(event.data if isinstance(event.data, bytes) else event.data.encode() for event in written)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_lines_wait_for_the_budget_and_all_of_them_come(process, stream):
    async def story():
        written = []
        agent = output(process, written)
        take = agent.read_stdout if stream == "stdout" else agent.read_stderr
        process.spend()
        taking = asyncio.create_task(take(reader()))
        await asyncio.sleep(0.05)
        assert written == []
        process.now += 1000
        await taking
        assert text(written) == SAID

    asyncio.run(story())


def test_a_flood_of_lines_stops_as_soon_as_the_budget_is_spent(process):
    async def story():
        written = []

        def record(event):
            written.append(event)
            if len(written) == 1000:
                process.spend()

        agent = output(process, written)
        agent._record = record
        taking = asyncio.create_task(agent.read_stdout(reader()))
        for _ in range(100):
            await asyncio.sleep(0.01)
        assert 1000 <= len(written) <= 1000 + LINES_OF_A_TURN
        process.now += 1000
        await taking
        assert text(written) == SAID

    asyncio.run(story())


def test_what_a_terminal_shows_waits_too(process):
    async def story():
        shown = []

        async def show():
            async for chunk in redacted_chunks(reader(), None, process.throttle.queue()):
                shown.append(chunk)

        process.spend()
        showing = asyncio.create_task(show())
        await asyncio.sleep(0.05)
        assert shown == []
        process.now += 1000
        await showing
        assert b"".join(shown) == SAID

    asyncio.run(story())
