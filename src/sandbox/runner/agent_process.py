"""Starts and stops the agent's process in its sandbox, waits for its exit and drains its output."""

import asyncio
import contextlib
import math
import signal
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import NoReturn, Protocol

import msgspec

from sandbox.interfaces.runtime import Command, ExitStatus, Sandbox, Terminal, TerminalSize
from sandbox.model.events import Event, Gap
from sandbox.model.failure import BUSY_KERNEL_MESSAGE, AttemptError, FailureCode
from sandbox.model.fixed_limits import (
    KILL_TIMEOUT_SECONDS,
    OUTPUT_DRAIN_IDLE_TIMEOUT_SECONDS,
    OUTPUT_DRAIN_TIMEOUT_SECONDS,
    TERM_GRACE_SECONDS,
)
from sandbox.primitives.concurrency import run_until_first_complete
from sandbox.primitives.runner_cpu_throttle import CpuQueue
from sandbox.runner.agent_output import AgentOutput
from sandbox.runner.attempt_recorder import StopRequest
from sandbox.runner.terminals import PAUSE_COMMAND

OutputReader = Callable[[], Coroutine[None, None, None]]
"""Reads one stream of the agent's output to its end."""

_DRAIN_CHECKS = 5
"""Draining stops after this many consecutive checks without new output."""
_INITIAL_SIZE = TerminalSize(rows=24, columns=80)
"""Size of a terminal until a client connects."""


class AgentProcess(Protocol):
    """An agent that was started."""

    async def wait(self) -> ExitStatus:
        """Return how the agent ended, or how its sandbox ended if the sandbox ended first."""
        ...

    async def terminate(self) -> None:
        """Ask the agent to exit. It may finish its work first."""
        ...


class HeadlessAgentProcess(msgspec.Struct, frozen=True):
    """An agent without a terminal, which runs as the command of its sandbox."""

    sandbox: Sandbox

    async def wait(self) -> ExitStatus:
        """See `AgentProcess.wait`."""
        return await self.sandbox.wait()

    async def terminate(self) -> None:
        """Send SIGTERM."""
        await self.sandbox.signal(signal.SIGTERM)


async def start_headless_agent(
    sandbox: Sandbox, command: Command, output: AgentOutput
) -> tuple[HeadlessAgentProcess, Sequence[OutputReader]]:
    """Start the agent. Raises AttemptError (provision_failed, sandbox_lost)."""
    stdout, stderr = await sandbox.start(command)
    return HeadlessAgentProcess(sandbox), [partial(output.read_stdout, stdout), partial(output.read_stderr, stderr)]


class TerminalAgentProcess(msgspec.Struct, frozen=True):
    """An agent on a terminal. The command of its sandbox is PAUSE_COMMAND."""

    sandbox: Sandbox
    terminal: Terminal

    async def wait(self) -> ExitStatus:
        """See `AgentProcess.wait`."""
        return await run_until_first_complete(self.terminal.wait(), self._wait_for_sandbox())

    async def _wait_for_sandbox(self) -> ExitStatus:
        return ExitStatus(None, was_oom_killed=(await self.sandbox.wait()).was_oom_killed)

    async def terminate(self) -> None:
        """Hang up the terminal. For an agent on a terminal, this is the equivalent of SIGTERM."""
        await self.terminal.hang_up()


async def start_terminal_agent(sandbox: Sandbox, command: Command) -> TerminalAgentProcess:
    """Start the agent on a terminal. Raises AttemptError (provision_failed, sandbox_lost)."""
    await sandbox.start(PAUSE_COMMAND)
    return TerminalAgentProcess(sandbox, await sandbox.open_terminal(command, _INITIAL_SIZE))


class SandboxKiller:
    """Kills the processes of one sandbox and waits a limited time for their exit."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._killed = asyncio.Event()

    async def kill(self) -> None:
        """Kill every process, within KILL_TIMEOUT_SECONDS. Can be called repeatedly."""
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._sandbox.kill(), KILL_TIMEOUT_SECONDS)
        finally:
            self._killed.set()

    async def stop_on(self, stop_request: StopRequest, agent: AgentProcess) -> None:
        """Wait for the signal, then terminate the agent. Kill it after TERM_GRACE_SECONDS, or immediately if forced."""
        await stop_request.requested.wait()
        if not stop_request.is_forced:
            await agent.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop_request.forced.wait(), TERM_GRACE_SECONDS)
        await self.kill()

    async def wait_for_exit(self, agent: AgentProcess) -> ExitStatus:
        """Wait for the agent's exit.

        Raises AttemptError (sandbox_lost) if it does not exit within KILL_TIMEOUT_SECONDS after `kill`.
        """
        return await run_until_first_complete(agent.wait(), self._fail_after_kill())

    async def _fail_after_kill(self) -> NoReturn:
        await self._killed.wait()
        await asyncio.sleep(KILL_TIMEOUT_SECONDS)
        raise AttemptError(FailureCode.SANDBOX_LOST, BUSY_KERNEL_MESSAGE)


async def drain_output(
    readers: Sequence["asyncio.Task[None]"],
    output: AgentOutput,
    cpu_queue: CpuQueue,
    record: Callable[[Event], object],
    is_forced: Callable[[], bool],
) -> None:
    """Let the output readers finish after the agent has ended; record a gap if they cannot.

    is_forced: returns whether the task must end soon. If so, the output gets less time.
    Raises the error of a reader that failed.
    """
    missing = await _wait_for_output(readers, output, cpu_queue, is_forced)
    done, late = await asyncio.wait(readers, timeout=0)
    for reader in late:
        reader.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    if late:
        record(Gap(0, 0, f"The end of the output is missing: {missing} after the agent ended."))
    for reader in done:
        reader.result()


async def _wait_for_output(
    readers: Sequence["asyncio.Task[None]"], output: AgentOutput, cpu_queue: CpuQueue, is_forced: Callable[[], bool]
) -> str:
    """Drain the output pipes; return the reason if draining stopped early.

    A stall of the host counts as a single check, so output that is ready afterwards is not lost. Output that is waiting
    for the CPU budget does not count as silence.
    """
    check_seconds = OUTPUT_DRAIN_IDLE_TIMEOUT_SECONDS / _DRAIN_CHECKS
    silent_checks = 0
    for check in range(math.ceil(OUTPUT_DRAIN_TIMEOUT_SECONDS / check_seconds)):
        if is_forced() and check >= _DRAIN_CHECKS:
            return f"the task was cancelled, and the output did not end within {OUTPUT_DRAIN_IDLE_TIMEOUT_SECONDS:g} s"
        previous_count = output.progress_count
        _, late = await asyncio.wait(readers, timeout=check_seconds)
        is_silent = output.progress_count == previous_count and not cpu_queue.is_busy
        silent_checks = silent_checks + 1 if is_silent else 0
        if not late or silent_checks == _DRAIN_CHECKS:
            return f"nothing was received for {OUTPUT_DRAIN_IDLE_TIMEOUT_SECONDS:g} s"
    return f"the output did not end within {OUTPUT_DRAIN_TIMEOUT_SECONDS:g} s"
