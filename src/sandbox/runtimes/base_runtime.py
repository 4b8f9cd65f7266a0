"""Shared implementation of the runtimes that start sandboxes through the launcher.

A runtime adds a `RuntimeDriver`, which implements the operations that differ between runtimes.
"""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence, Set
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from sandbox.interfaces.runtime import ConfinementSpec, Listeners, Sandbox, SandboxHandle, SandboxSpec
from sandbox.model.failure import BUSY_KERNEL_MESSAGE, AttemptError, FailureCode, unfreed_memory_message
from sandbox.model.fixed_limits import KILL_TIMEOUT_SECONDS
from sandbox.runtimes import sandbox_filesystem, sandbox_processes
from sandbox.runtimes.bubblewrap_confinement import BubblewrapConfinement, exposed_paths, require_bwrap
from sandbox.runtimes.kernel_uid_pool import SANDBOX_UIDS, KernelUidPool
from sandbox.runtimes.launcher_client import LauncherProcess, attempt_marker, start_launcher
from sandbox.runtimes.limits import cgroups
from sandbox.runtimes.limits.cgroups import ControlGroup, count_kernel_bytes_outside_cgroup
from sandbox.runtimes.limits.files_without_descriptors import ClosingFilesMeter, SyscallBufferMeter
from sandbox.runtimes.limits.measurement_scheduling import measure_in_thread, wait_for_exceeded_limit
from sandbox.runtimes.sandbox_filesystem import chown_disk, create_disk_directories, restore_disk_ownership
from sandbox.runtimes.sandbox_processes import Subreaper

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.001

_UNFREED_BYTES_MAX = 1024 * 1024
"""Up to this amount of shared memory, files in transit are not searched for.

On a machine with two processors, the kernel's counter can lag behind by half of this amount.
"""
_UNFREED_KERNEL_BYTES_MAX = 16 * 1024 * 1024
"""The same for kernel memory. It includes the kernel's caches, which are large if a sandbox had many files.

16,384 sockets use more than this.
"""
_UNMOUNT_SECONDS = 0.1
"""The kernel unmounts a sandbox's tmpfs a few milliseconds after the last process has ended."""
_SOCKET_COLLECTION_SECONDS = 1.0
"""If the kernel frees sockets in transit that no process can receive, it does so within a few milliseconds."""
_ATTEMPT_MARKER_PREFIX = attempt_marker("")


class ClosableSandbox(Sandbox, Protocol):
    """A sandbox that its runtime can close."""

    async def close(self) -> None:
        """End the sandbox and release its resources. Raises AttemptError (sandbox_lost) after KILL_TIMEOUT_SECONDS."""
        ...


class RuntimeDriver(Protocol):
    """The operations that differ between the runtimes."""

    @property
    def name(self) -> str:
        """The runtime's name."""
        ...

    def find_program(self) -> str:
        """Return the program that the launcher executes. Raises AttemptError (provision_failed) if it is missing."""
        ...

    def files_uid(self, kernel_uid: int) -> int:
        """Return the uid that owns the disk while the sandbox exists."""
        ...

    def host_threads_max(self, processes_max: int) -> int:
        """Return the number of host threads needed for `processes_max` processes in the sandbox."""
        ...

    def start_launcher(self, spec: SandboxSpec, kernel_uid: int | None) -> LauncherProcess:
        """Start the launcher. Raises OSError."""
        ...

    def create_sandbox(
        self,
        handle: SandboxHandle,
        spec: SandboxSpec,
        group: ControlGroup,
        launcher: LauncherProcess,
        listeners: Listeners,
    ) -> ClosableSandbox:
        """Create the sandbox object for a launcher that is ready."""
        ...


class BaseRuntime:
    """Creates and destroys the sandboxes of one runtime. Implements `Runtime` except for `probe`.

    uid_range: kernel uids reserved for sandboxes. As root, each sandbox gets its own uid; as an ordinary user, all
    sandboxes run under that user's uid. The kernel kills a sandbox when the thread that created it ends, so create
    sandboxes from a thread that lives as long as the process.
    """

    def __init__(self, driver: RuntimeDriver, uid_range: range = SANDBOX_UIDS) -> None:
        self.hierarchies = cgroups.find_hierarchies()
        self._driver = driver
        self._uids = KernelUidPool(uid_range) if os.getuid() == 0 else None
        self._sandboxes: dict[str, ClosableSandbox] = {}
        self._subreaper = Subreaper()
        self._unfreed_bytes: dict[str, int] = {}

    def prepare(self, attempt_id: str) -> SandboxHandle:
        """Claim a kernel uid if this process is root, and return the handle. Raises AttemptError (provision_failed)."""
        return self._build_handle(attempt_id, None if self._uids is None else self._uids.claim(attempt_id))

    def recover_handle(self, attempt_id: str) -> SandboxHandle:
        """Return a handle with the kernel uid whose latest claim names the attempt."""
        return self._build_handle(attempt_id, None if self._uids is None else self._uids.find_uid(attempt_id))

    def _build_handle(self, attempt_id: str, uid: int | None) -> SandboxHandle:
        if not (attempt_id.isascii() and attempt_id.isalnum() and len(attempt_id) <= 32):
            reason = "An attempt id consists of at most 32 ASCII letters and digits."
            raise AttemptError(FailureCode.PROVISION_FAILED, reason)
        details = {"cgroups": cgroups.format_control_group(self.hierarchies.group(attempt_id))}
        if uid is not None:
            details["kernel_uid"] = str(uid)
        return SandboxHandle(runtime=self._driver.name, attempt_id=attempt_id, details=details)

    async def create(self, handle: SandboxHandle, spec: SandboxSpec) -> Sandbox:
        """Start the launcher. While it starts up, move it into its new control group and chown the disk."""
        group, uid = _group_of(handle), _uid_of(handle)
        self._driver.find_program()
        self._require_prepared(handle)
        launcher: LauncherProcess | None = None
        try:
            self._subreaper.acquire(handle.attempt_id)
            create_disk_directories(spec.disk)
            launcher = self._driver.start_launcher(spec, uid)
            files_uid = None if uid is None else self._driver.files_uid(uid)
            host_threads_max = self._driver.host_threads_max(spec.processes_max)
            await _run_uncancellable(partial(_assign_sandbox, group, launcher.pid, spec, host_threads_max, files_uid))
            listeners = await launcher.wait_ready()
        except BaseException as error:
            await self._clean_up(handle, spec.disk, launcher)
            if isinstance(error, OSError):
                reason = f"The sandbox could not be created: {error}. Run 'sandbox doctor' for help."
                raise AttemptError(FailureCode.PROVISION_FAILED, reason) from error
            raise
        sandbox = self._driver.create_sandbox(handle, spec, group, launcher, listeners)
        self._sandboxes[handle.attempt_id] = sandbox
        return sandbox

    @asynccontextmanager
    async def confine(self, handle: SandboxHandle, spec: ConfinementSpec) -> AsyncIterator[BubblewrapConfinement]:
        """Run confined programs as children of a launcher.

        Of the launcher's listeners, only the proxy listener stays open.
        """
        self._require_prepared(handle)
        program = require_bwrap()
        launcher: LauncherProcess | None = None
        watch: asyncio.Task[None] | None = None
        remaining = self._find_processes(handle, _group_of(handle))
        try:
            self._subreaper.acquire(handle.attempt_id)
            # Zombies of an ended sandbox count toward the limit of its control group until they are reaped.
            sandbox_processes.reap_orphans(_uid_of(handle))
            try:
                launcher = self._start_confinement(handle, spec)
                await _run_uncancellable(
                    partial(_assign_confinement, _group_of(handle), launcher.pid, spec.directories, _uid_of(handle))
                )
                listeners = await launcher.wait_ready()
            except OSError as error:
                reason = f"Programs could not be confined: {error}. Run 'sandbox doctor' for help."
                raise AttemptError(FailureCode.PROVISION_FAILED, reason) from error
            watch = asyncio.create_task(_kill_on_excess(launcher, _group_of(handle), spec.memory_bytes))
            with listeners.proxy.dup() as proxy:
                listeners.close()
                parts = (launcher, proxy, spec, _group_of(handle), _uid_of(handle))
                yield BubblewrapConfinement(handle.attempt_id, program, *parts)
        finally:
            if watch is not None:
                watch.cancel()
            await self._end_confinement(handle, launcher, remaining)

    def _start_confinement(self, handle: SandboxHandle, spec: ConfinementSpec) -> LauncherProcess:
        group = _group_of(handle)
        group.create(cpus=spec.cpus, memory_bytes=spec.memory_bytes, processes_max=spec.processes_max)
        return start_launcher(handle.attempt_id, _uid_of(handle), exposed_paths(spec), transparent_ports=())

    async def _end_confinement(
        self, handle: SandboxHandle, launcher: LauncherProcess | None, remaining: Set[int]
    ) -> None:
        """Stop the launcher and the confined programs.

        remaining: processes that existed before the confinement and that SIGKILL does not end. `destroy` reports them.
        """
        if launcher is not None:
            await launcher.end()
        await self._kill_all(handle, remaining)
        self._subreaper.release(handle.attempt_id)

    async def destroy(self, handle: SandboxHandle, disk: Path | None) -> None:
        """Close the sandbox if this process created it; kill its processes by control group, kernel uid or marker."""
        sandbox = self._sandboxes.get(handle.attempt_id)
        if sandbox is not None:
            await sandbox.close()
        await self._kill_all(handle)
        await self._restore_disk(handle, disk)
        self._sandboxes.pop(handle.attempt_id, None)
        self._subreaper.release(handle.attempt_id)
        if self._uids is not None:
            await _run_uncancellable(partial(self._uids.release, handle.attempt_id))

    def unfreed_bytes(self, attempt_id: str) -> int:
        """Return the memory in bytes that the kernel keeps for the attempt's ended sandbox and confinements."""
        return self._unfreed_bytes.get(attempt_id, 0)

    def attempt_ids(self) -> Sequence[str]:
        """Return the attempts that have a control group or, without control groups, a process with their marker."""
        if self.hierarchies.roots:
            return sorted(self.hierarchies.attempt_ids())
        marked = (
            marker.removeprefix(_ATTEMPT_MARKER_PREFIX)
            for marker in sandbox_processes.list_markers(_ATTEMPT_MARKER_PREFIX, self._is_sandbox_uid)
        )
        return sorted(marked)

    def _require_prepared(self, handle: SandboxHandle) -> None:
        if self._uids is not None and not self._uids.holds_claim(_uid_of(handle), handle.attempt_id):
            raise AttemptError(
                FailureCode.PROVISION_FAILED, "This process has not prepared the sandbox; prepare it first."
            )

    def _is_sandbox_uid(self, uid: int) -> bool:
        return uid == os.getuid() if self._uids is None else uid in self._uids

    async def _clean_up(self, handle: SandboxHandle, disk: Path, launcher: LauncherProcess | None) -> None:
        if launcher is not None:
            await launcher.end()
        await self._kill_all(handle)
        await self._restore_disk(handle, disk)
        self._subreaper.release(handle.attempt_id)

    async def _restore_disk(self, handle: SandboxHandle, disk: Path | None) -> None:
        if _uid_of(handle) is not None and disk is not None and disk.is_dir():
            await _run_uncancellable(partial(restore_disk_ownership, disk))

    async def _kill_all(self, handle: SandboxHandle, ignored: Set[int] = frozenset()) -> None:
        """Send SIGKILL until no process is left, then remove the control group.

        ignored: processes that are not waited for; if there are any, the control group remains. Raises AttemptError
        (sandbox_lost) after KILL_TIMEOUT_SECONDS.
        """
        group = _group_of(handle)
        deadline = asyncio.get_running_loop().time() + KILL_TIMEOUT_SECONDS
        # With a zombie of the uid, each search would examine all processes of the machine.
        sandbox_processes.reap_orphans(_uid_of(handle))
        unfreed_bytes: int | None = None
        while True:
            if self._kill_processes(handle, group) <= ignored:
                if ignored:
                    break
                if unfreed_bytes is None:  # the size is unknown once the group is removed
                    unfreed_bytes = await self._measure_unfreed_memory(handle, group)
                if group.remove():
                    break
            if asyncio.get_running_loop().time() > deadline:
                raise AttemptError(FailureCode.SANDBOX_LOST, BUSY_KERNEL_MESSAGE)
            await asyncio.sleep(_POLL_SECONDS)
        sandbox_processes.reap_orphans(_uid_of(handle))
        if unfreed_bytes:
            self._unfreed_bytes[handle.attempt_id] = self.unfreed_bytes(handle.attempt_id) + unfreed_bytes
            _log.error("Attempt %s: %s", handle.attempt_id, unfreed_memory_message(unfreed_bytes))

    async def _measure_unfreed_memory(self, handle: SandboxHandle, group: ControlGroup) -> int:
        """Return the memory in bytes that is left after the last process has ended; 0 if it will be freed.

        Some kernels never free sockets that were sent through each other, nor what was sent with them. Files of the
        sandbox on a tmpfs of the host also remain charged to the group, so the uid must have files in transit.
        """
        uid = _uid_of(handle)
        if self._uids is None or uid is None or uid not in self._uids:
            return 0
        for is_freed, timeout_seconds in (
            (_is_shared_memory_freed, _UNMOUNT_SECONDS),
            (_is_memory_freed, _SOCKET_COLLECTION_SECONDS),
        ):
            await _wait_until(partial(is_freed, group), timeout_seconds)
            if _is_memory_freed(group):
                return 0
            if not await asyncio.to_thread(self._uids.has_files_in_transit, uid, handle.attempt_id):
                return 0
        await asyncio.to_thread(cgroups.reclaim_memory, group)
        return 0 if _is_memory_freed(group) else sum(cgroups.read_shared_and_kernel_bytes(group))

    def _find_processes(self, handle: SandboxHandle, group: ControlGroup) -> Set[int]:
        """Return the sandbox's processes, found by control group if there is one, otherwise by kernel uid or marker."""
        if group.directories:
            return group.process_ids()
        uid = _uid_of(handle)
        return (
            _find_by_marker(attempt_marker(handle.attempt_id)) if uid is None else {*sandbox_processes.find_by_uid(uid)}
        )

    def _kill_processes(self, handle: SandboxHandle, group: ControlGroup) -> Set[int]:
        """Send SIGKILL to the sandbox's processes. Returns their ids."""
        if pids := group.process_ids():
            group.kill()
            return pids
        uid = _uid_of(handle)
        if uid is not None:
            return self._kill_by_uid(uid, handle.attempt_id)
        return frozenset() if group.directories else _kill_by_marker(attempt_marker(handle.attempt_id))

    def _kill_by_uid(self, uid: int, attempt_id: str) -> Set[int]:
        """Kill the uid's processes, but only while this attempt owns the uid.

        If another attempt has claimed the uid in the meantime, no process of this attempt was left at that time.
        """
        if self._uids is None or uid not in self._uids:
            return frozenset()
        with self._uids.lock_if_unclaimed(uid, attempt_id) as is_owned:
            pids = sandbox_processes.find_by_uid(uid) if is_owned() else []
            for pid in pids:
                sandbox_processes.send_signal(
                    pid, signal.SIGKILL, lambda one: is_owned() and uid in sandbox_processes.read_uids(one)
                )
        return frozenset(pids)


def _group_of(handle: SandboxHandle) -> ControlGroup:
    return cgroups.parse_control_group(handle.details.get("cgroups", ""))


def _uid_of(handle: SandboxHandle) -> int | None:
    uid = handle.details.get("kernel_uid")
    return None if uid is None else int(uid)


def _is_shared_memory_freed(group: ControlGroup) -> bool:
    shared_bytes, _ = cgroups.read_shared_and_kernel_bytes(group)
    return shared_bytes <= _UNFREED_BYTES_MAX


def _is_memory_freed(group: ControlGroup) -> bool:
    shared_bytes, kernel_bytes = cgroups.read_shared_and_kernel_bytes(group)
    return shared_bytes <= _UNFREED_BYTES_MAX and kernel_bytes <= _UNFREED_KERNEL_BYTES_MAX


async def _wait_until(condition: Callable[[], bool], timeout_seconds: float) -> None:
    """Wait until the condition is true, or until the timeout."""
    deadline = asyncio.get_running_loop().time() + timeout_seconds
    while True:
        if condition() or asyncio.get_running_loop().time() > deadline:
            return
        await asyncio.sleep(timeout_seconds / 20)


def _find_by_marker(marker: str) -> Set[int]:
    own = os.getuid()
    return frozenset(pid for pid in sandbox_processes.find_by_marker(marker) if own in sandbox_processes.read_uids(pid))


def _kill_by_marker(marker: str) -> Set[int]:
    pids = _find_by_marker(marker)
    for pid in pids:
        sandbox_processes.send_signal(pid, signal.SIGKILL, lambda one: one in sandbox_processes.find_by_marker(marker))
    return pids


def _assign_sandbox(
    group: ControlGroup, launcher_pid: int, spec: SandboxSpec, host_threads_max: int, files_uid: int | None
) -> None:
    """Create the group, move the launcher into it and chown the disk.

    The launcher does not move itself: moving a process takes the kernel 10 ms, during which the launcher starts up.
    """
    group.create(cpus=spec.cpus, memory_bytes=spec.memory_bytes, processes_max=host_threads_max)
    with suppress(ProcessLookupError):
        group.add(launcher_pid)
    if files_uid is not None:
        chown_disk(spec.disk, files_uid, was_used=spec.is_disk_reused)


def _assign_confinement(group: ControlGroup, launcher_pid: int, directories: Sequence[Path], uid: int | None) -> None:
    with suppress(ProcessLookupError):
        group.add(launcher_pid)
    if uid is not None:
        for directory in directories:
            sandbox_filesystem.chown_tree(str(directory), uid)


async def _kill_on_excess(launcher: LauncherProcess, group: ControlGroup, memory_bytes: int) -> None:
    """Kill confined programs when the kernel uses too much memory for them, or when this memory cannot be measured."""
    meters = SyscallBufferMeter(), ClosingFilesMeter()
    try:
        await wait_for_exceeded_limit(
            lambda: measure_in_thread(launcher.kernel_usage, group, memory_bytes, *meters),
            lambda: measure_in_thread(group.basic_file_usage),
            lambda: measure_in_thread(group.detailed_file_usage, launcher.epoll_counter),
            partial(count_kernel_bytes_outside_cgroup, group),
        )
    except Exception:
        _log.exception(
            "The kernel resources that the confined programs use could not be measured; killing the programs."
        )
    launcher.kill()


async def _run_uncancellable(work: Callable[[], None]) -> None:
    """Run `work` in a thread and wait for it even if cancelled: `destroy` must not run while file owners change."""
    task = asyncio.create_task(asyncio.to_thread(work))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
