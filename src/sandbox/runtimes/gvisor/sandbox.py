"""One sandbox made by runsc, from `ready` to its end."""

import asyncio
import os
import signal
import socket
from contextlib import suppress

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
from sandbox.runtimes.cgroups import ControlGroup
from sandbox.runtimes.gvisor import arguments, bundle, entering
from sandbox.runtimes.gvisor.state import last_error, read_state
from sandbox.runtimes.join import JoinedTerminal
from sandbox.runtimes.launch import Launch
from sandbox.runtimes.output import read_from

_START_SECONDS = 30.0
_POLL_SECONDS = 0.002
_FORCED = 128 + signal.SIGKILL
_FAILED = 128
"""What runsc ends with when it could not do its work. A command can end so too; then no error is in the log."""


class GvisorSandbox:
    """Made by GvisorRuntime.create."""

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
        self._log: asyncio.StreamReader | None = None
        self._runsc_fd: int | None = None
        self._has_begun = False
        self._was_killed = False
        self._failure = "it ended without a word"
        self._exit: asyncio.Task[Exit] | None = None
        self._terminals: list[JoinedTerminal] = []

    async def start(self, command: Command) -> tuple[asyncio.StreamReader, asyncio.StreamReader]:
        """Run the one command. Raises AttemptError (provision_failed) when it does not begin."""
        if self._log is not None:
            raise AttemptError(FailureCode.PROVISION_FAILED, "A sandbox runs one command; make another one.")
        log, log_inside = socket.socketpair()
        with log_inside:
            self._log = await self._read(log)
            self._execute(command, log_inside)
        output, errors = await self._read(self._launch.output), await self._read(self._launch.errors)
        self._watch()
        await self._begin()
        return output, errors

    def _execute(self, command: Command, log: socket.socket) -> None:
        payload = arguments.build_payload(self._program, self._spec, command, os.dup(log.fileno()))
        try:
            self._runsc_fd = os.pidfd_open(self._launch.pid)
            self._launch.execute(payload.argv, command.stdin, payload.descriptors)
        except OSError as error:
            raise AttemptError(FailureCode.PROVISION_FAILED, f"The sandbox is gone: {error.strerror}.") from error
        finally:
            payload.close()

    async def _begin(self) -> None:
        """runsc writes down that the command runs. One that is over sooner than that is seen has begun too."""
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        while self._is_running() and not self._has_begun:
            if asyncio.get_running_loop().time() > deadline:
                raise AttemptError(FailureCode.PROVISION_FAILED, "gVisor did not begin in time.")
            self._has_begun = read_state(self._launch.pid, self.handle.attempt_id).is_running
            await asyncio.sleep(_POLL_SECONDS)
        if not self._has_begun and (await self.wait()).code is None:
            raise AttemptError(FailureCode.PROVISION_FAILED, f"gVisor did not begin: {self._failure}.")

    async def open_terminal(self, command: Command, size: TerminalSize) -> Terminal:
        """By a further runsc, whose terminal is in the launcher's mounts. Raises AttemptError (sandbox_lost)."""
        if self._runsc_fd is None or not self._has_begun or not self._is_running():
            raise AttemptError(FailureCode.SANDBOX_LOST, "Nothing runs in the sandbox any more.")
        numbers = (entering.PROCESS_NUMBER, entering.MESSAGES_NUMBER)
        words = arguments.execute_words(self._program, self.handle.attempt_id, *numbers)
        runsc_fd = os.dup(self._runsc_fd)  # this one is closed as soon as the sandbox ends
        try:
            opened = await entering.call_on_terminal(
                self.handle.attempt_id, runsc_fd, self._add_to_group, words, bundle.encode_process(command), size
            )
        finally:
            os.close(runsc_fd)
        terminal = JoinedTerminal(*opened, self._group.has_killed_for_memory)
        self._terminals = [one for one in self._terminals if not one.has_ended] + [terminal]
        return terminal

    def _add_to_group(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            self._group.add(pid)

    async def signal(self, signal_number: int) -> None:
        """To the command's own process, by a further runsc."""
        if self._runsc_fd is None or not self._has_begun or not self._is_running():
            return
        runsc_fd = os.dup(self._runsc_fd)
        try:
            words = arguments.signal_words(self._program, self.handle.attempt_id, signal_number)
            with suppress(OSError):
                await entering.call(self.handle.attempt_id, runsc_fd, words)
        finally:
            os.close(runsc_fd)

    async def kill(self) -> None:
        """Everything at once: runsc, with which the sandbox's kernel dies, and whatever else is in the group."""
        if self._is_running():
            self._was_killed = True
            self._launch.kill()
            self._group.kill()

    async def wait(self) -> Exit:
        """How the command ended, once nothing is left inside."""
        return await asyncio.shield(self._watch())

    async def stats(self) -> Stats:
        """What the control group counts; not the processes, because it counts those of gVisor's kernel."""
        counted = self._group.stats()
        return Stats(counted.cpu_seconds, counted.memory_bytes, None, memory_kills=counted.memory_kills)

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

    async def _await_end(self) -> Exit:
        """runsc's end, then that of everything that it started."""
        await self._launch.ended()
        while self._rest():
            self._group.kill()
            await asyncio.sleep(_POLL_SECONDS)
        if self._runsc_fd is not None:
            os.close(self._runsc_fd)
            self._runsc_fd = None
        code = await self._command_code()
        is_out_of_memory = code != 0 and self._group.has_killed_for_memory()
        return Exit(_FORCED if code is None and is_out_of_memory else code, out_of_memory=is_out_of_memory)

    def _rest(self) -> bool:
        uid = self.handle.details.get("kernel_uid")
        return bool(
            self._group.process_ids() if self._group.directories or uid is None else processes.find_by_uid(int(uid))
        )

    async def _command_code(self) -> int | None:
        """The command's exit code; none when runsc itself failed or was ended."""
        code = self._launch.code
        if code is None or code < 0 or self._log is None:
            return _FORCED if self._was_killed else None
        self._failure = last_error(await self._log.read()) if code == _FAILED else ""
        return None if self._failure else code
