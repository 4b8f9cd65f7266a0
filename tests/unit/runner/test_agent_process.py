"""An agent is terminated, then killed after a grace period. The wait for its exit is limited."""

import asyncio

import pytest

from sandbox.interfaces.runtime import ExitStatus
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.state_machine import StopAttempt
from sandbox.runner.agent_process import SandboxKiller
from sandbox.runner.attempt_recorder import StopRequest


class FakeSandbox:
    """A sandbox that also acts as its agent. It exits when killed, or when terminated if `exits_on_term` is set."""

    def __init__(self, *, exits_on_term=False, exits_on_kill=True):
        self.exits_on_term, self.exits_on_kill = exits_on_term, exits_on_kill
        self.calls, self.ended = [], asyncio.Event()

    async def kill(self):
        self.calls.append("kill")
        if self.exits_on_kill:
            self.ended.set()

    async def terminate(self):
        self.calls.append("terminate")
        if self.exits_on_term:
            self.ended.set()

    async def wait(self):
        await self.ended.wait()
        return ExitStatus(137)


@pytest.mark.parametrize(("is_forced", "calls"), [(False, ["terminate", "kill"]), (True, ["kill"])])
async def test_stop_signal_terminates_and_then_kills_the_agent(monkeypatch, is_forced, calls):
    monkeypatch.setattr("sandbox.runner.agent_process.TERM_GRACE_SECONDS", 0.01)
    sandbox, stop_request = FakeSandbox(), StopRequest()
    killer = SandboxKiller(sandbox)
    stopping = asyncio.create_task(killer.stop_on(stop_request, sandbox))
    await asyncio.sleep(0)
    assert not stopping.done()
    stop_request.apply_effect(StopAttempt(force=is_forced))
    assert await asyncio.wait_for(killer.wait_for_exit(sandbox), 10) == ExitStatus(137)
    await stopping
    assert sandbox.calls == calls


async def test_forced_stop_shortens_the_grace_period():
    sandbox, stop_request = FakeSandbox(), StopRequest()
    stopping = asyncio.create_task(SandboxKiller(sandbox).stop_on(stop_request, sandbox))
    stop_request.apply_effect(StopAttempt(force=False))
    await asyncio.sleep(0.01)
    assert sandbox.calls == ["terminate"]
    stop_request.apply_effect(StopAttempt(force=True))
    await asyncio.wait_for(stopping, 10)
    assert sandbox.calls == ["terminate", "kill"]


async def test_agent_that_survives_sigkill_is_reported_as_a_lost_sandbox(monkeypatch):
    monkeypatch.setattr("sandbox.runner.agent_process.KILL_TIMEOUT_SECONDS", 0.01)
    sandbox = FakeSandbox(exits_on_kill=False)
    killer = SandboxKiller(sandbox)
    await killer.kill()
    with pytest.raises(AttemptError) as caught:
        await asyncio.wait_for(killer.wait_for_exit(sandbox), 10)
    assert caught.value.failure.code is FailureCode.SANDBOX_LOST
