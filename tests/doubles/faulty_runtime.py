"""A runtime double that fails on demand, in the same ways as real runtimes."""

import asyncio
import signal
from asyncio import StreamReader
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from sandbox.interfaces.runtime import (
    Command,
    ConfinementSpec,
    ExitStatus,
    Listeners,
    RuntimeProbe,
    SandboxHandle,
    SandboxSpec,
    Stats,
    Terminal,
    TerminalSize,
)
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.workspace.no_confinement import NoConfinement


@dataclass
class RuntimeFaults:
    """The faults of a runtime.

    start_error: starting the command fails with this reason. exits_without_report: the sandbox ends without an exit
    code soon after the command has started. create_hangs, start_hangs: `create` or `start` does not return.
    slow_stop_seconds: SIGTERM is ignored, and SIGKILL takes effect after this time. slow_destroy_seconds: the duration
    of `destroy`.
    """

    start_error: str = ""
    exits_without_report: bool = False
    create_hangs: bool = False
    start_hangs: bool = False
    slow_reason: str | None = None
    slow_stop_seconds: float = 0.0
    slow_destroy_seconds: float = 0.0
    recorded_calls: list[str] = field(default_factory=list)


class FaultySandbox:
    """A sandbox whose command runs until it gets a signal."""

    def __init__(self, handle: SandboxHandle, faults: RuntimeFaults) -> None:
        self.handle = handle
        self.listeners = cast("Listeners", None)  # used only by gateways that are test doubles
        self.slow_reason = faults.slow_reason
        self._faults = faults
        self._readers = (StreamReader(), StreamReader())
        self._exit: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()

    async def start(self, command: Command) -> tuple[StreamReader, StreamReader]:
        self._faults.recorded_calls.append("start")
        if self._faults.start_hangs:
            await asyncio.Event().wait()
        if self._faults.start_error:
            raise AttemptError(FailureCode.PROVISION_FAILED, self._faults.start_error)
        self._readers[0].feed_data(b"half a line")
        if self._faults.exits_without_report:
            asyncio.get_running_loop().call_later(0.05, self._end, None)
        return self._readers

    async def open_terminal(self, command: Command, size: TerminalSize) -> Terminal:
        raise AttemptError(FailureCode.SANDBOX_LOST, "No terminals.")

    async def signal(self, signal_number: int) -> None:
        self._faults.recorded_calls.append(signal.Signals(signal_number).name)
        if not self._faults.slow_stop_seconds:
            self._end(128 + signal_number)

    async def kill(self) -> None:
        self._faults.recorded_calls.append("kill")
        asyncio.get_running_loop().call_later(self._faults.slow_stop_seconds, self._end, 128 + signal.SIGKILL)

    async def wait(self) -> ExitStatus:
        return await asyncio.shield(self._exit)

    async def stats(self) -> Stats:
        return Stats(None, None, None)

    async def wait_for_exceeded_limit(self) -> str:
        return await asyncio.get_running_loop().create_future()

    def _end(self, code: int | None) -> None:
        if not self._exit.done():
            self._exit.set_result(ExitStatus(code))
            for reader in self._readers:
                reader.feed_eof()


class FaultyRuntime:
    """A runtime whose probe always succeeds."""

    name = "faulty"
    tier = "namespaces"

    def __init__(self, faults: RuntimeFaults) -> None:
        self._faults = faults

    async def probe(self) -> RuntimeProbe:
        return RuntimeProbe(self.name, is_available=True, tier=self.tier, strength=0)

    def prepare(self, attempt_id: str) -> SandboxHandle:
        return SandboxHandle(self.name, attempt_id)

    async def create(self, handle: SandboxHandle, spec: SandboxSpec) -> FaultySandbox:
        self._faults.recorded_calls.append("create")
        if self._faults.create_hangs:
            await asyncio.Event().wait()
        return FaultySandbox(handle, self._faults)

    @asynccontextmanager
    async def confine(self, handle: SandboxHandle, spec: ConfinementSpec) -> AsyncIterator[NoConfinement]:
        yield NoConfinement()

    async def destroy(self, handle: SandboxHandle, disk: Path | None) -> None:
        self._faults.recorded_calls.append("destroy")
        await asyncio.sleep(self._faults.slow_destroy_seconds)

    def unfreed_bytes(self, attempt_id: str) -> int:
        return 0

    def attempt_ids(self) -> Sequence[str]:
        return ()
