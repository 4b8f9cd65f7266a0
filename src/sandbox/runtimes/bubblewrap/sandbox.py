"""One sandbox made by bubblewrap, from `ready` to its end."""

import asyncio
import os
import signal
from contextlib import suppress

import msgspec

from sandbox.contracts.runtime import Command, Exit, FileUse, Stats, Terminal, TerminalSize
from sandbox.model.decoding import DECODE_ERRORS
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.runtimes import processes
from sandbox.runtimes.bubblewrap.arguments import build_payload
from sandbox.runtimes.join import JoinedTerminal, join
from sandbox.runtimes.launch import has_ended
from sandbox.runtimes.launched import FORCED, LaunchedSandbox, Made
from sandbox.runtimes.payload import Payload

_START_SECONDS = 30.0
_BIRTH_SECONDS = 2.0
_POLL_SECONDS = 0.002
_CHILD, _EXIT_CODE = "child-pid", "exit-code"  # the names in bubblewrap's reports


class BubblewrapSandbox(LaunchedSandbox):
    """Made by BubblewrapRuntime.create."""

    def __init__(self, made: Made) -> None:
        super().__init__(made)
        self._status: asyncio.StreamReader | None = None
        self._reading = asyncio.Lock()
        self._reports: dict[str, int] = {}
        self._init_descriptor: int | None = None

    async def start(self, command: Command) -> tuple[asyncio.StreamReader, asyncio.StreamReader]:
        """Run the one command. Raises AttemptError (provision_failed, sandbox_lost) when bubblewrap does not begin."""
        self._status = await self._execute(command)
        output, errors = await self._read(self._launch.output), await self._read(self._launch.errors)
        await self._begin(self._status, errors)
        self._watch()
        return output, errors

    def _build_payload(self, command: Command, reports: int) -> Payload:
        return build_payload(self._program, self._spec, command, reports)

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
        return self._keep(JoinedTerminal(*opened, self._group.has_killed_for_memory))

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
        """With init its process namespace dies."""
        if self._is_running() and self._init_descriptor is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init_descriptor, signal.SIGKILL)
        await super().kill()

    async def stats(self) -> Stats:
        """What the control group counts."""
        return self._group.stats()

    async def file_use(self) -> FileUse:
        """Of all processes inside, which the host's kernel has."""
        return await asyncio.to_thread(self._group.file_use)

    async def _begin(self, status: asyncio.StreamReader, errors: asyncio.StreamReader) -> None:
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._read_report(status)
        except TimeoutError:
            raise AttemptError(FailureCode.PROVISION_FAILED, "bubblewrap did not begin in time.") from None
        if _CHILD not in self._reports:
            await self._launch.refuse_killed()
            reason = (await errors.read(4096)).decode(errors="replace").strip()
            raise AttemptError(FailureCode.PROVISION_FAILED, f"bubblewrap did not begin: {reason}.")

    async def _read_report(self, status: asyncio.StreamReader) -> bool:
        """One line of bubblewrap's; False at the end. Its init is held by a descriptor from here on."""
        async with self._reading:
            line = await status.readline()
        with suppress(*DECODE_ERRORS):
            self._reports.update(msgspec.json.decode(line))
        init_pid = self._reports.get(_CHILD)
        if self._init_descriptor is None and init_pid is not None:
            with suppress(ProcessLookupError):
                self._init_descriptor = os.pidfd_open(init_pid)
        return bool(line)

    async def _await_end(self) -> Exit:
        """bubblewrap's end, then its init's: the kernel lets that one end only when nothing else is left inside.

        Waits KILL_SECONDS for processes that do not end on KILL; the command's exit code is kept.
        bubblewrap reports no exit code when the command could not be run or it was ended itself.
        """
        await self._launch.ended()
        while self._status is not None and await self._read_report(self._status):
            pass
        if self._init_descriptor is not None:
            if not await has_ended(self._init_descriptor):
                self._group.kill()
            os.close(self._init_descriptor)
            self._init_descriptor = None
        code = self._reports.get(_EXIT_CODE, FORCED if self._was_killed else None)
        return Exit(code, out_of_memory=code != 0 and self._group.has_killed_for_memory())
