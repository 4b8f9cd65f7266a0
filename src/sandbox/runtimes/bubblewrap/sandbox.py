"""One sandbox made by bubblewrap, from `ready` to its end."""

import asyncio
import os
import signal
import socket
from contextlib import suppress

import msgspec

from sandbox.contracts.runtime import (
    Command,
    Exit,
    Listeners,
    SandboxHandle,
    SandboxSpec,
    Stats,
    Terminal,
    TerminalSize,
)
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.limits import KILL_SECONDS
from sandbox.runtimes import processes
from sandbox.runtimes.bubblewrap.arguments import build_payload
from sandbox.runtimes.cgroups import ControlGroup
from sandbox.runtimes.join import JoinedTerminal, join
from sandbox.runtimes.launch import Launch, wait_readable
from sandbox.runtimes.output import read_from

_START_SECONDS = 30.0
_BIRTH_SECONDS = 2.0
_POLL_SECONDS = 0.002
_CHILD, _EXIT_CODE = "child-pid", "exit-code"  # the names in bubblewrap's reports
_FORCED = 128 + signal.SIGKILL


class BubblewrapSandbox:
    """Made by BubblewrapRuntime.create."""

    def __init__(
        self,
        handle: SandboxHandle,
        spec: SandboxSpec,
        program: str,
        group: ControlGroup,
        launch: Launch,
        listeners: Listeners,
    ) -> None:
        self.handle = handle
        self.listeners = listeners
        self._spec = spec
        self._program = program
        self._group = group
        self._launch = launch
        self._transports: list[asyncio.Transport] = []
        self._status: asyncio.StreamReader | None = None
        self._reading = asyncio.Lock()
        self._reports: dict[str, int] = {}
        self._init_descriptor: int | None = None
        self._was_killed = False
        self._exit: asyncio.Task[Exit] | None = None
        self._terminals: list[JoinedTerminal] = []

    async def start(self, command: Command) -> tuple[asyncio.StreamReader, asyncio.StreamReader]:
        """Run the one command. Raises AttemptError (provision_failed) when bubblewrap does not begin."""
        if self._status is not None:
            raise AttemptError(FailureCode.PROVISION_FAILED, "A sandbox runs one command; make another one.")
        status, status_inside = socket.socketpair()
        with status_inside:
            self._status = await self._read(status)
            self._execute(command, status_inside)
        output, errors = await self._read(self._launch.output), await self._read(self._launch.errors)
        await self._begin(self._status, errors)
        self._watch()
        return output, errors

    def _execute(self, command: Command, status: socket.socket) -> None:
        payload = build_payload(self._program, self._spec, command, os.dup(status.fileno()))
        try:
            self._launch.execute(payload.argv, command.stdin, payload.descriptors)
        except OSError as error:
            raise AttemptError(FailureCode.PROVISION_FAILED, f"The sandbox is gone: {error.strerror}.") from error
        finally:
            payload.close()

    async def open_terminal(self, command: Command, size: TerminalSize) -> Terminal:
        """By a process that joins the sandbox's namespaces. Raises AttemptError (sandbox_lost)."""
        init_pid = self._reports.get(_CHILD)
        # Before the command has begun the sandbox is half made, and the host's files may still be in sight.
        if init_pid is None or await self._find_command(init_pid) is None or self._init_descriptor is None:
            raise AttemptError(FailureCode.SANDBOX_LOST, "Nothing runs in the sandbox any more.")
        # A copy, because this one is closed as soon as the sandbox ends.
        init_descriptor = os.dup(self._init_descriptor)
        try:
            opened = await join(self.handle.attempt_id, init_descriptor, self._add_to_group, command, size)
        finally:
            os.close(init_descriptor)
        terminal = JoinedTerminal(*opened, self._group.has_killed_for_memory)
        self._terminals = [one for one in self._terminals if not one.has_ended] + [terminal]
        return terminal

    def _add_to_group(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            self._group.add(pid)

    async def signal(self, signal_number: int) -> None:
        """To the command's own process. A command that is being born is waited for."""
        init_pid = self._reports.get(_CHILD)
        pid = None if init_pid is None else await self._find_command(init_pid)
        if init_pid is not None and pid is not None:
            processes.send_signal(pid, signal_number, lambda one: processes.find_first_command(init_pid) == one)

    async def _find_command(self, init_pid: int) -> int | None:
        """The command's own process; None when it does not begin, or has ended."""
        deadline = asyncio.get_running_loop().time() + _BIRTH_SECONDS
        while (pid := processes.find_first_command(init_pid)) is None and self._is_running():
            if asyncio.get_running_loop().time() > deadline:
                return None
            await asyncio.sleep(_POLL_SECONDS)
        return pid

    async def kill(self) -> None:
        """Everything inside at once: with init its process namespace dies, with the group whatever there is beside."""
        if self._is_running():
            self._was_killed = True
            if self._init_descriptor is not None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._init_descriptor, signal.SIGKILL)
            self._launch.kill()
            self._group.kill()

    async def wait(self) -> Exit:
        """How the command ended, once nothing is left inside."""
        return await asyncio.shield(self._watch())

    async def stats(self) -> Stats:
        """What the control group counts."""
        return self._group.stats()

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
        doors = self.listeners
        for one in (doors.model, doors.proxy, doors.names_udp, doors.names_tcp, *doors.transparent.values()):
            one.close()

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

    async def _begin(self, status: asyncio.StreamReader, errors: asyncio.StreamReader) -> None:
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._read_report(status)
        except TimeoutError:
            raise AttemptError(FailureCode.PROVISION_FAILED, "bubblewrap did not begin in time.") from None
        if _CHILD not in self._reports:
            reason = (await errors.read(4096)).decode(errors="replace").strip()
            raise AttemptError(FailureCode.PROVISION_FAILED, f"bubblewrap did not begin: {reason}.")

    async def _read_report(self, status: asyncio.StreamReader) -> bool:
        """One line of bubblewrap's; False at the end. Its init is held by a descriptor from here on."""
        async with self._reading:
            line = await status.readline()
        with suppress(msgspec.DecodeError):
            self._reports.update(msgspec.json.decode(line))
        init_pid = self._reports.get(_CHILD)
        if self._init_descriptor is None and init_pid is not None:
            with suppress(ProcessLookupError):
                self._init_descriptor = os.pidfd_open(init_pid)
        return bool(line)

    async def _await_end(self) -> Exit:
        """bubblewrap's end, then its init's: the kernel lets that one end only when nothing else is left inside.

        bubblewrap reports no exit code when the command could not be run or it was ended itself.
        """
        await self._launch.ended()
        while self._status is not None and await self._read_report(self._status):
            pass
        if self._init_descriptor is not None:
            await wait_readable(self._init_descriptor)
            os.close(self._init_descriptor)
            self._init_descriptor = None
        code = self._reports.get(_EXIT_CODE, _FORCED if self._was_killed else None)
        return Exit(code, out_of_memory=code != 0 and self._group.has_killed_for_memory())
