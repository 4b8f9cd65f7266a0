"""What the sandboxes that the launcher becomes have in common, from `ready` to their end."""

import asyncio
import signal
import socket
from abc import ABC, abstractmethod
from contextlib import suppress

import msgspec

from sandbox.interfaces.runtime import Command, Exit, FileUse, KernelUse, Listeners, SandboxHandle, SandboxSpec
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.limits import KILL_SECONDS
from sandbox.runtimes.exec_client import JoinedTerminal
from sandbox.runtimes.launcher_client import Launch, Payload, read_from
from sandbox.runtimes.limits.cgroups import ControlGroup

FORCED = 128 + signal.SIGKILL


class Made(msgspec.Struct, frozen=True):
    """A sandbox in `ready`. program: what the launcher becomes."""

    handle: SandboxHandle
    spec: SandboxSpec
    program: str
    group: ControlGroup
    launch: Launch
    listeners: Listeners


class LaunchedSandbox(ABC):
    """A runtime adds how its command begins, how it is told of its end, and what ends everything inside."""

    def __init__(self, made: Made) -> None:
        self.handle = made.handle
        self.listeners = made.listeners
        self.slow_because = None
        self._spec = made.spec
        self._program = made.program
        self._group = made.group
        self._launch = made.launch
        self._transports: list[asyncio.Transport] = []
        self._has_started = False
        self._was_killed = False
        self._exit: asyncio.Task[Exit] | None = None
        self._terminals: list[JoinedTerminal] = []

    @abstractmethod
    async def _await_end(self) -> Exit:
        """How the command ended, once nothing is left inside."""

    @abstractmethod
    def _build_payload(self, command: Command, reports: int) -> Payload:
        """What the launcher becomes. `reports` is the descriptor for what the program tells, taken over."""

    async def _execute(self, command: Command) -> asyncio.StreamReader:
        """Have the launcher become the sandbox; gives what its program reports. Raises AttemptError."""
        if self._has_started:
            raise AttemptError(FailureCode.PROVISION_FAILED, "A sandbox runs one command; make another one.")
        self._has_started = True
        reports, reports_inside = socket.socketpair()
        with reports_inside:
            reader = await self._read(reports)
            payload = self._build_payload(command, reports_inside.dup().detach())
            try:
                self._launch.execute(payload.argv, command.stdin, payload.descriptors)
            except OSError as error:
                raise AttemptError(FailureCode.SANDBOX_LOST, f"The sandbox is gone: {error.strerror}.") from error
            finally:
                payload.close()
        return reader

    async def kill(self) -> None:
        """Everything inside at once: with its program the sandbox dies, with the group whatever there is beside."""
        if self._is_running():
            self._was_killed = True
            self._launch.kill()
            self._group.kill()

    async def wait(self) -> Exit:
        """How the command ended, once nothing is left inside."""
        return await asyncio.shield(self._watch())

    async def kernel_use(self) -> KernelUse:
        """Of its control group, and of the network namespace that the launcher made."""
        launch, memory_bytes = self._launch, self._spec.memory_bytes
        return await asyncio.to_thread(self._group.kernel_use, launch.pid, memory_bytes, launch.counter, launch.slabs)

    @abstractmethod
    async def file_use(self) -> FileUse:
        """As far as it is held by the host's kernel."""

    async def close(self) -> None:
        """End it and let go of everything. Raises AttemptError (sandbox_lost) when it does not end within 10 s."""
        await self.kill()
        try:
            async with asyncio.timeout(KILL_SECONDS):
                await self.wait()
        except TimeoutError:
            raise AttemptError(
                FailureCode.SANDBOX_LOST, "The sandbox's processes do not end; restart the machine."
            ) from None
        for terminal in self._terminals:
            await terminal.hang_up()
            await terminal.wait()
        for transport in self._transports:
            transport.abort()
        self._launch.close()
        self.listeners.close()

    def _keep(self, terminal: JoinedTerminal) -> JoinedTerminal:
        """To be closed with the sandbox."""
        self._terminals = [one for one in self._terminals if not one.has_ended] + [terminal]
        return terminal

    def _add_to_group(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            self._group.add(pid)

    def _is_running(self) -> bool:
        return self._exit is None or not self._exit.done()

    def _watch(self) -> asyncio.Task[Exit]:
        if self._exit is None:
            self._exit = asyncio.create_task(self._await_end())
        return self._exit

    async def _read(self, source: socket.socket) -> asyncio.StreamReader:
        reader, transport = await read_from(source)
        self._transports.append(transport)
        return reader
