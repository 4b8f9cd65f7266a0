"""One sandbox made by bubblewrap, from `ready` to its end."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import msgspec

from sandbox.interfaces.layout import UID
from sandbox.interfaces.runtime import Command, Exit, FileUse, SandboxSpec, Stats, Terminal, TerminalSize
from sandbox.model.errors import DECODE_ERRORS, AttemptError, FailureCode
from sandbox.runtimes import bwrap, launcher_client, processes
from sandbox.runtimes.base_sandbox import FORCED, LaunchedSandbox, Made
from sandbox.runtimes.disk_layout import PLACES
from sandbox.runtimes.exec_client import JoinedTerminal, join
from sandbox.runtimes.launcher_client import Payload, has_ended, refuse_nul
from sandbox.runtimes.programs import launcher
from sandbox.runtimes.rootfs import Root, describe_root


def staged_paths(spec: SandboxSpec) -> dict[str, Path]:
    """Names below the launcher's stage, and the host paths that are laid there."""
    paths: dict[str, Path] = {name: spec.disk / name for name in PLACES}
    paths.update({f"program-{index}": path for index, path in enumerate(describe_root(spec).parts)})
    return paths if spec.image is None else {**paths, "image": spec.image}


def build_payload(program: str, spec: SandboxSpec, command: Command, status: int) -> Payload:
    """Everything for one start. `status` is the descriptor of bubblewrap's reports, taken over.

    Raises AttemptError (provision_failed) for NUL characters.
    """
    payload = Payload()
    try:
        words = list(_arguments(payload, spec, command, payload.place(status)))
        refuse_nul([*words, *command.argv])
        text = "".join(f"{word}\0" for word in words).encode(errors="surrogateescape")
        number = payload.place(launcher_client.write_memory("arguments", text))
    except BaseException:
        payload.close()
        raise
    payload.argv = [program, launcher_client.mark_attempt(spec.attempt_id), "--args", number, "--", *command.argv]
    return payload


def _arguments(payload: Payload, spec: SandboxSpec, command: Command, status: str) -> Iterator[str]:
    yield from ("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
    yield from ("--disable-userns", "--uid", str(UID), "--gid", str(UID), "--hostname", spec.attempt_id)
    yield from ("--new-session", "--die-with-parent", "--cap-drop", "ALL")
    yield from ("--json-status-fd", status)
    yield from bwrap.filter_arguments(payload)
    root = describe_root(spec)
    yield from _root(root)
    yield from _system(spec)
    yield from _writable_places()
    yield from _files(payload, root)
    for index, inside in enumerate(root.parts.values()):
        yield from ("--ro-bind", f"{launcher.STAGE}/program-{index}", inside)
    for place in ("/", *root.covered):
        yield from ("--remount-ro", place)
    yield from ("--chdir", command.directory, "--clearenv")
    for name, value in command.environment.items():
        yield from ("--setenv", name, value)


def _root(root: Root) -> Iterator[str]:
    if root.image is not None:
        yield from ("--ro-bind", f"{launcher.STAGE}/image", "/")
    for place in root.covered:
        yield from ("--perms", "0755", "--tmpfs", place)
    for directory in root.directories:
        yield from ("--perms", "0755", "--dir", directory)
    for link, target in root.links.items():
        yield from ("--symlink", target, link)
    for path in root.host_paths:
        yield from ("--ro-bind-try", path, path)


def _system(spec: SandboxSpec) -> Iterator[str]:
    # A uid of 0 could write /proc/sys even without capabilities; ours is never 0, so this is the second lock.
    yield from bwrap.PROC
    # pid 1 is bubblewrap, of the agent's uid: whoever can write its memory can forge the command's exit code.
    yield from ("--perms", "0555", "--tmpfs", "/proc/1", "--remount-ro", "/proc/1", *bwrap.READ_ONLY_PROC)
    yield from (*bwrap.DEVICES, "--size", str(spec.memory_bytes // 2))
    yield from ("--perms", "1777", "--tmpfs", "/dev/shm")  # noqa: S108


def _writable_places() -> Iterator[str]:
    for name, inside in PLACES.items():
        yield from ("--bind", f"{launcher.STAGE}/{name}", inside)


def _files(payload: Payload, root: Root) -> Iterator[str]:
    """An image is read-only, so a file is mounted over the one that it has there."""
    how = "--file" if root.image is None else "--ro-bind-data"
    for path, content in root.files.items():
        number = payload.place(launcher_client.write_memory(PurePosixPath(path).name, content))
        yield from ("--perms", "0644", how, number, path)


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
