"""The files of attempts on this machine, and what killed attempts left behind: sandboxes, sockets and disks.

A probe is a sandbox without a task that tests what the host supports. The leftovers of killed probes are removed too.
"""

import asyncio
import fcntl
import os
import re
import stat
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from sandbox.interfaces.disks import RemovePaths
from sandbox.interfaces.placement import AttemptLocation, Leftover, LeftoverScan, LeftoverSource
from sandbox.interfaces.runtime import Runtime, SandboxHandle
from sandbox.interfaces.task_file_layout import (
    ATTEMPT_ID_PATTERN,
    AttemptLayout,
    TaskLayout,
    probe_directory,
    tasks_root,
)
from sandbox.model.errors import DECODE_ERRORS, SandboxError, error_reason
from sandbox.model.fixed_limits import PROBE_CLEANUP_TIMEOUT_SECONDS, SANDBOX_TEARDOWN_SECONDS
from sandbox.primitives.concurrency import run_in_daemon_thread
from sandbox.primitives.secret_digests import matches_fingerprint


class LocalAttemptFiles:
    """Implements `interfaces.placement.AttemptFiles` for one data directory.

    leftover_sources: in the order in which their leftovers are removed; files are removed last.
    """

    def __init__(self, data_dir: Path, leftover_sources: Sequence[LeftoverSource], remove: RemovePaths) -> None:
        self._data_dir = data_dir
        self._leftover_sources = leftover_sources
        self._remove = remove

    def has_disk(self, location: AttemptLocation) -> bool:
        """Return whether the disk exists, as a directory or as an image. Implements `AttemptFiles.has_disk`."""
        return has_disk(self._layout(location))

    def has_disk_or_handle(self, location: AttemptLocation) -> bool:
        """Implements `AttemptFiles.has_disk_or_handle`."""
        return has_disk_or_handle(self._layout(location))

    def has_same_secrets(self, location: AttemptLocation, secrets: Mapping[str, str]) -> bool:
        """Compare the secrets with the fingerprint next to the disk. Implements `AttemptFiles.has_same_secrets`."""
        return matches_fingerprint(self._layout(location).secret_fingerprint, secrets)

    def has_sandbox_handle(self, task_id: str) -> bool:
        """Return whether any attempt has a handle. Implements `AttemptFiles.has_sandbox_handle`."""
        return any(layout.handle.exists() for layout in TaskLayout(self._data_dir, task_id).attempts())

    async def scan(self) -> LeftoverScan:
        """Scan the host, then the directories. Implements `AttemptFiles.scan`.

        This order ensures that no leftover of a new attempt looks unowned: an attempt's directory is the first thing
        that is created.
        """
        # Use daemon threads: a program in a sandbox can block reads of its arguments in /proc until its task ends.
        found = {
            source.kind: frozenset(await run_in_daemon_thread(source.attempt_ids)) for source in self._leftover_sources
        }
        return await asyncio.to_thread(self._scan_directories, found)

    def _scan_directories(self, found: Mapping[str, Collection[str]]) -> LeftoverScan:
        failures: list[str] = []
        attempts = dict(_list_attempts(self._data_dir, failures))
        leftovers = []
        for attempt_id, (task_id, has_files) in attempts.items():
            kinds = [kind for kind, attempt_ids in found.items() if attempt_id in attempt_ids]
            if has_files or kinds:
                location = AttemptLocation(task_id, attempt_id, "")
                leftovers.append(Leftover(location, kinds, self._layout(location).handle.exists()))
        own_kinds = [source.kind for source in self._leftover_sources if source.belongs_to_this_server and not failures]
        return LeftoverScan(leftovers, {kind: found[kind] - attempts.keys() for kind in own_kinds}, failures)

    async def clean_up(self, leftover: Leftover, *, keeps_disk: bool) -> None:
        """Clean up leftovers of all kinds, even those that the scan did not find.

        For example, some parts of a sandbox can be identified only by its handle. Implements `AttemptFiles.clean_up`.
        """
        layout = self._layout(leftover.location)
        for source in self._leftover_sources:
            await source.clean_up(leftover.location.attempt_id, layout)
        if not keeps_disk:
            kept = (layout.runner_log, layout.handle)
            await self._remove([path for path in layout.root.iterdir() if path not in kept])
        layout.handle.unlink(missing_ok=True)

    async def clean_up_unowned(self, kind: str, attempt_id: str) -> None:
        """Implements `AttemptFiles.clean_up_unowned`."""
        layout = TaskLayout(self._data_dir, attempt_id).attempt(attempt_id)
        for source in self._leftover_sources:
            if source.kind == kind:
                await source.clean_up(attempt_id, layout)

    async def remove_preserved(self, layout: AttemptLayout) -> None:
        """Remove the preserved files of an attempt.

        The handle and then the lock are removed last: without the lock, a debug session could start on half-removed
        files. A handle belongs to a debug session whose runner was killed. Its sandbox is destroyed first.
        """
        for source in self._leftover_sources if layout.handle.exists() else ():
            await source.clean_up(layout.root.name, layout)
        removed_last = (layout.handle, layout.preserved_disk_lock, layout.runner_log)
        paths = await asyncio.to_thread(lambda: list(layout.root.iterdir()))
        await self._remove([path for path in paths if path not in removed_last])
        layout.handle.unlink(missing_ok=True)
        layout.preserved_disk_lock.unlink(missing_ok=True)

    def _layout(self, location: AttemptLocation) -> AttemptLayout:
        return TaskLayout(self._data_dir, location.task_id).attempt(location.attempt_id)


def has_disk(layout: AttemptLayout) -> bool:
    """Return whether an attempt has a disk, as a directory or as an image."""
    return layout.disk.exists() or layout.disk_image.exists()


def has_disk_or_handle(layout: AttemptLayout) -> bool:
    """Return whether an attempt has a disk or a handle."""
    return layout.handle.exists() or has_disk(layout)


def _list_attempts(data_dir: Path, failures: list[str]) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Yield each attempt's id, its task's id, and whether it has files other than its log. Read errors are collected.

    Uses strings instead of paths for speed: most attempts ended long ago and left nothing.
    """
    layout = TaskLayout(data_dir, "")
    root, attempts, log = str(tasks_root(data_dir)), layout.attempts_root.name, layout.attempt("").runner_log.name
    for task_id in _list_names(root):
        try:
            for attempt_id in _list_names(f"{root}/{task_id}/{attempts}"):
                yield attempt_id, (task_id, _list_names(f"{root}/{task_id}/{attempts}/{attempt_id}") not in ([], [log]))
        except OSError as error:
            failures.append(f"the attempts of task {task_id}: {error}")


def _list_names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208  (a hot path)
    except (FileNotFoundError, NotADirectoryError):
        return []


_ATTEMPT_SOCKET = re.compile(rf"({ATTEMPT_ID_PATTERN})\.(sock|files)")
"""A runner's control socket, and the socket for a guest's files, which exists briefly while the guest is created."""


class SocketLeftovers:
    """Implements `interfaces.placement.LeftoverSource` for the run directory of a single data directory."""

    kind = "socket"
    belongs_to_this_server = True

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def attempt_ids(self) -> Collection[str]:
        """Return the attempts that have a socket, even if no process listens on it. Probes are not included.

        A probe is recognized by its directory, which is created before its socket.
        """
        found = {attempt_id for attempt_id, _ in self._sockets()}
        return {attempt_id for attempt_id in found if not probe_directory(self._run_dir, attempt_id).exists()}

    async def clean_up(self, attempt_id: str, layout: AttemptLayout) -> None:
        """Remove the attempt's sockets."""
        await asyncio.to_thread(self._remove, attempt_id)

    def _remove(self, attempt_id: str) -> None:
        for each, path in self._sockets():
            if each == attempt_id:
                path.unlink(missing_ok=True)

    def _sockets(self) -> Iterator[tuple[str, Path]]:
        try:
            paths = list(self._run_dir.iterdir())
        except FileNotFoundError:  # the directory was removed as an old temporary file
            return
        for path in paths:
            found = _ATTEMPT_SOCKET.fullmatch(path.name)
            if found and _is_socket(path):
                yield found[1], path


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return False


_POLL_SECONDS = 0.05


@contextmanager
def probe_lock(run_dir: Path) -> Iterator[None]:
    """Hold a shared lock during a probe, so the cleanup does not remove the probe.

    Blocks while a server removes leftovers of earlier probes. Raises TimeoutError after PROBE_CLEANUP_TIMEOUT_SECONDS.
    """
    with _open_directory(run_dir) as descriptor:
        for _ in _poll_shared_lock(descriptor, run_dir):
            time.sleep(_POLL_SECONDS)
        yield


@asynccontextmanager
async def probe_lock_async(run_dir: Path) -> AsyncIterator[None]:
    """Like `probe_lock`, but does not block the event loop, because the cleanup may run on the same loop."""
    with _open_directory(run_dir) as descriptor:
        for _ in _poll_shared_lock(descriptor, run_dir):
            await asyncio.sleep(_POLL_SECONDS)
        yield


def _poll_shared_lock(descriptor: int, run_dir: Path) -> Iterator[None]:
    """Yield before each retry; return once the lock is held."""
    deadline = time.monotonic() + PROBE_CLEANUP_TIMEOUT_SECONDS
    while not _try_lock(descriptor, fcntl.LOCK_SH):
        if time.monotonic() > deadline:
            raise TimeoutError(f"The server that uses {run_dir} is busy; try again.")
        yield


class ProbeCleanup:
    """Removes the probes in a run directory, and everything on the host that has their ids."""

    def __init__(self, run_dir: Path, leftover_sources: Sequence[LeftoverSource], remove: RemovePaths) -> None:
        self._run_dir = run_dir
        self._leftover_sources = leftover_sources
        self._remove = remove

    async def sweep(self) -> None:
        """Remove all leftovers, unless a probe is running.

        A failure does not stop the rest; raises OSError at the end.
        """
        try:
            with _open_directory(self._run_dir) as descriptor:
                if _try_lock(descriptor, fcntl.LOCK_EX):
                    await self._sweep()
        except FileNotFoundError:  # the directory was removed as an old temporary file
            return

    async def _sweep(self) -> None:
        prefix = probe_directory(self._run_dir, "").name
        failures: list[str] = []
        for directory in [path for path in self._run_dir.iterdir() if path.name.startswith(prefix)]:
            try:
                async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                    await self._remove_probe(directory, directory.name.removeprefix(prefix))
            except (SandboxError, OSError, ValueError, TimeoutError) as error:
                failures.append(f"{directory.name}: {error_reason(error)}")
        if failures:
            raise OSError("; ".join(failures))

    async def _remove_probe(self, directory: Path, probe_id: str) -> None:
        for source in self._leftover_sources if probe_id.isalnum() else ():
            await source.clean_up(probe_id, AttemptLayout(directory))
        await self._remove([directory])


@contextmanager
def _open_directory(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class SandboxLeftovers:
    """Finds and destroys leftover sandboxes. Implements `interfaces.placement.LeftoverSource`.

    One runtime suffices for the sandboxes of all runtimes, which are named, marked and killed in the same way.
    """

    kind = "sandbox"
    belongs_to_this_server = False

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def attempt_ids(self) -> Collection[str]:
        """Return the attempts that have a control group or a marked process."""
        return self._runtime.attempt_ids()

    async def clean_up(self, attempt_id: str, layout: AttemptLayout) -> None:
        """Destroy the sandbox, using its handle on disk or a recovered one. On return, the caller owns the disk."""
        # Use a separate event loop: scanning all processes on the machine would block the server's event loop.
        await run_in_daemon_thread(lambda: asyncio.run(self._destroy(attempt_id, layout)))

    async def _destroy(self, attempt_id: str, layout: AttemptLayout) -> None:
        handle = _read_handle(layout.handle) or self._runtime.recover_handle(attempt_id)
        await self._runtime.destroy(handle, layout.disk)


def _read_handle(path: Path) -> SandboxHandle | None:
    """Return the stored handle, or None if it is missing or unreadable: the sandbox may be found without a handle."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=SandboxHandle)
    except (OSError, *DECODE_ERRORS):
        return None
