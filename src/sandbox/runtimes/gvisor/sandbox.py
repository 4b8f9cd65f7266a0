"""One sandbox made by runsc, from `ready` to its end."""

import asyncio
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from sandbox.interfaces.runtime import Command, Exit, FileUse, Stats, Terminal, TerminalSize
from sandbox.model.errors import DECODE_ERRORS, AttemptError, FailureCode
from sandbox.model.limits import KILL_SECONDS
from sandbox.runtimes import processes
from sandbox.runtimes.base_sandbox import FORCED, LaunchedSandbox, Made
from sandbox.runtimes.exec_client import JoinedTerminal
from sandbox.runtimes.gvisor import bundle, exec_client
from sandbox.runtimes.gvisor.bundle import STATE
from sandbox.runtimes.launcher_client import Payload

_OF_A_LOST_PROCESS = ("input/output error", "eof", "broken pipe", "connection reset by peer")


class _Kernel(msgspec.Struct):
    pid: int = 0


class State(msgspec.Struct):
    """Of runsc's state file; `sandbox` is the process that is the sandbox's kernel."""

    status: str = ""
    sandbox: _Kernel = msgspec.field(default_factory=_Kernel)

    @property
    def is_running(self) -> bool:
        """The command has begun."""
        return self.status == "running" and self.sandbox.pid > 0


class _Message(msgspec.Struct):
    msg: str = ""
    level: str = ""


def read_state(runsc_pid: int, attempt_id: str) -> State:
    """As it is now; empty as long as there is none, or it is being written, or runsc has gone."""
    path = Path(f"/proc/{runsc_pid}/root{STATE}/{attempt_id}_sandbox:{attempt_id}.state")
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, *DECODE_ERRORS):
        return State()


def is_of_a_lost_process(error: str) -> bool:
    """Whether runsc broke off because another of gVisor's processes had gone: somebody ended that one."""
    return error.casefold().endswith(_OF_A_LOST_PROCESS)


def last_error(log: bytes) -> str:
    """The last error in a log of JSON lines; empty when there is none."""
    found = ""
    for line in log.splitlines():
        try:
            message = msgspec.json.decode(line, type=_Message)
        except DECODE_ERRORS:
            continue
        if message.level == "error":
            found = message.msg
    return found


_START_SECONDS = 30.0
_POLL_SECONDS = 0.002
_MEMORY_CHECK_SECONDS = 0.5
_DESCRIPTORS_OF_DIRECTORY = 2
"""For a directory that is open inside: one to find what is in it, one to list it."""

_FAILED = 128
"""What runsc ends with when it could not do its work. A command can end so too; then no error is in the log."""


class GvisorSandbox(LaunchedSandbox):
    """Made by GvisorRuntime.create."""

    def __init__(self, made: Made) -> None:
        super().__init__(made)
        self._log: asyncio.StreamReader | None = None
        self._runsc_fd: int | None = None
        self._has_begun = False
        self._failure = "it ended without a word"

    async def start(self, command: Command) -> tuple[asyncio.StreamReader, asyncio.StreamReader]:
        """Run the one command. Raises AttemptError (provision_failed, sandbox_lost) when it does not begin."""
        self._log = await self._execute(command)
        output, errors = await self._read(self._launch.output), await self._read(self._launch.errors)
        self._watch()
        await self._begin()
        return output, errors

    def _build_payload(self, command: Command, reports: int) -> Payload:
        self._runsc_fd = os.pidfd_open(self._launch.pid)
        return bundle.build_payload(self._program, self._spec, command, reports)

    async def _begin(self) -> None:
        """runsc writes down that the command runs. One that is over sooner than that is seen has begun too."""
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        while self._is_running() and not self._has_begun:
            if asyncio.get_running_loop().time() > deadline:
                raise AttemptError(FailureCode.PROVISION_FAILED, "gVisor did not begin in time.")
            self._has_begun = read_state(self._launch.pid, self.handle.attempt_id).is_running
            await asyncio.sleep(_POLL_SECONDS)
        if not self._has_begun and (await self.wait()).code is None:
            await self._launch.refuse_killed()
            code = FailureCode.SANDBOX_LOST if is_of_a_lost_process(self._failure) else FailureCode.PROVISION_FAILED
            raise AttemptError(code, f"gVisor did not begin: {self._failure}.")

    async def open_terminal(self, command: Command, size: TerminalSize) -> Terminal:
        """By a further runsc, whose terminal is in the launcher's mounts. Raises AttemptError (sandbox_lost)."""
        if self._runsc_fd is None or not self._has_begun or not self._is_running():
            raise AttemptError(FailureCode.SANDBOX_LOST, "Nothing runs in the sandbox any more.")
        numbers = (exec_client.PROCESS_NUMBER, exec_client.MESSAGES_NUMBER, exec_client.BEGUN_NUMBER)
        words = bundle.execute_words(self._program, self.handle.attempt_id, *numbers)
        runsc_fd = os.dup(self._runsc_fd)  # this one is closed as soon as the sandbox ends
        try:
            opened = await exec_client.call_on_terminal(
                self.handle.attempt_id, runsc_fd, self._add_to_group, words, bundle.encode_process(command), size
            )
        finally:
            os.close(runsc_fd)
        return self._keep(JoinedTerminal(*opened, self._group.has_killed_for_memory))

    async def signal(self, signal_number: int) -> None:
        """To the command's own process, by a further runsc."""
        if self._runsc_fd is None or not self._has_begun or not self._is_running():
            return
        runsc_fd = os.dup(self._runsc_fd)
        try:
            words = bundle.signal_words(self._program, self.handle.attempt_id, signal_number)
            with suppress(OSError):
                await exec_client.call(self.handle.attempt_id, runsc_fd, words)
        finally:
            os.close(runsc_fd)

    async def stats(self) -> Stats:
        """What the control group counts; not the processes, because it counts those of gVisor's kernel."""
        counted = self._group.stats()
        return Stats(counted.cpu_seconds, counted.memory_bytes, None, memory_kills=counted.memory_kills)

    async def file_use(self) -> FileUse:
        """Directories that gVisor has open on the host; what other open files hold is charged."""
        return await asyncio.to_thread(self._group.directory_use, descriptors_each=_DESCRIPTORS_OF_DIRECTORY)

    async def _await_end(self) -> Exit:
        """runsc's end, then that of everything that it started, KILL_SECONDS at most."""
        await self._ended_or_broken()
        deadline = asyncio.get_running_loop().time() + KILL_SECONDS
        while self._rest() and asyncio.get_running_loop().time() < deadline:
            self._group.kill()
            await asyncio.sleep(_POLL_SECONDS)
        if self._runsc_fd is not None:
            os.close(self._runsc_fd)
            self._runsc_fd = None
        code = await self._command_code()
        is_out_of_memory = code != 0 and self._group.has_killed_for_memory()
        return Exit(FORCED if code is None and is_out_of_memory else code, out_of_memory=is_out_of_memory)

    async def _ended_or_broken(self) -> None:
        """A process of gVisor's own that the host ended for memory leaves the others waiting for it for ever."""
        ended = asyncio.ensure_future(self._launch.ended())
        try:
            while not ended.done():
                await asyncio.wait({ended}, timeout=_MEMORY_CHECK_SECONDS)
                if not ended.done() and self._group.has_killed_for_memory():
                    self._launch.kill()
                    self._group.kill()
        finally:
            ended.cancel()

    def _rest(self) -> bool:
        uid = self.handle.details.get("kernel_uid")
        return bool(
            self._group.process_ids() if self._group.directories or uid is None else processes.find_by_uid(int(uid))
        )

    async def _command_code(self) -> int | None:
        """The command's exit code; none when runsc itself failed or was ended."""
        code = self._launch.code
        if code is None or code < 0 or self._log is None:
            return FORCED if self._was_killed else None
        self._failure = last_error(await self._log.read()) if code == _FAILED else ""
        return None if self._failure else code
