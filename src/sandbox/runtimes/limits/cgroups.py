"""One control group per attempt: limits, counts and kills its processes. Supports cgroup v1 and v2.

Only writable hierarchies are used. A group is one directory in v2 and one per hierarchy in v1. The files in the
directories of a group show which operations the group supports, so the same code serves both versions: it tries the
file names of both.
"""

import errno
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec.structs import replace

from sandbox.interfaces.runtime import Stats
from sandbox.model.fixed_limits import (
    RECEIVED_BYTES_HEADROOM,
    SOCKET_BUFFER_BYTES_MAX,
    SOCKET_BUFFER_BYTES_MIN,
    VMA_BYTES_MAX,
)
from sandbox.runtimes import sandbox_processes
from sandbox.runtimes.limits import open_files, socket_memory
from sandbox.runtimes.limits.files_without_descriptors import (
    ClosingFilesMeter,
    PendingSyscallInterrupter,
    SyscallBufferMeter,
)
from sandbox.runtimes.limits.kernel_memory import (
    DENTRY_BYTES,
    GroupUsage,
    SlabMeter,
    count_machine_unreclaimable_bytes,
    count_negative_dentries,
    reclaimable_free_slab_bytes_max,
)
from sandbox.runtimes.limits.kernel_time import KernelLockMeters, TerminalMeter
from sandbox.runtimes.limits.memory_mappings import MappingMeter, SandboxProcesses
from sandbox.runtimes.limits.open_files import EpollCounter, LocksByOwner, count_locks_by_owner
from sandbox.runtimes.limits.socket_memory import SocketMemoryMeter
from sandbox.runtimes.limits.usage_limits import FileUsage, KernelUsage

PARENT_GROUP = "sandbox"
"""Parent directory of all attempts' groups."""

_PERIOD_MICROSECONDS = 100_000
_CONTROLLERS_V1 = frozenset({"memory", "pids", "cpu", "cpuacct"})
_CONTROLLERS_V2 = ("memory", "pids", "cpu")
_LIMIT_FILES = {
    "memory": ("memory.max", "memory.limit_in_bytes"),
    "cpus": ("cpu.max", "cpu.cfs_quota_us"),
    "processes": ("pids.max",),
    "sockets": ("memory.max", "memory.kmem.tcp.limit_in_bytes"),
}
_THREADS_FILES = ("cgroup.threads", "tasks")
_TCP_CONTROLLER_V1 = "memory.kmem.tcp"
_KERNEL_COMMAND_LINE = Path("/proc/cmdline")
_TCP_MEM_SYSCTL = Path("/proc/sys/net/ipv4/tcp_mem")
_DEFAULT_TCP_MEMORY_DIVISOR = 16
"""TCP may use 1/16 of the machine's memory before TCP is under memory pressure, unless tcp_mem was changed."""

_SOCKET_MEMORY_DIVISOR = 8
"""Socket buffers may use 1/8 of the sandbox's memory (vm.memory)."""
_UNMEASURED_SOCKETS_MAX = 64
"""Up to this number of sockets, receive queues are not measured.

Each queue can hold at most 1 MiB and 4096 half-open connections.
"""
_BUFFER_BYTES_PER_SOCKET_MAX = 2 << 20
"""Maximum size of both buffers of a socket."""

_SANDBOXES_AT_LIMIT_MIN = 8
"""Minimum number of sandboxes that together can exhaust all buffers. If they do, other sandboxes lose datagrams."""


_READ_BYTES = 64 * 1024

_NEGATIVE_DENTRIES_GROWTH_MAX = 1024 * 1024
"""Caches are reclaimed only if the number of negative dentries (names of nonexistent files) grew by more than this."""


class ControlGroup(msgspec.Struct, frozen=True):
    """The control group of one attempt. `directories` need not exist."""

    directories: Sequence[Path]

    def create(self, *, cpus: int, memory_bytes: int, processes_max: int) -> None:
        """Create the group and set the limits that its controllers support. Raises OSError."""
        for directory in self.directories:
            directory.parent.mkdir(exist_ok=True)
            _enable_controllers(directory.parent.parent)
            _enable_controllers(directory.parent)
            directory.mkdir(exist_ok=True)
            with suppress(PermissionError):  # another user may own it
                # From now on, the kernel updates this directory's time when a group is created or removed.
                os.utime(directory.parent)
            with suppress(PermissionError):
                _limit_socket_buffers(directory.parent, _total_socket_buffer_bytes())
            _limit_socket_buffers(directory, _fair_socket_buffer_bytes(memory_bytes))
        self._write("memory.max", memory_bytes)
        self._write("memory.swap.max", 0)
        self._write("memory.limit_in_bytes", memory_bytes)
        self._write("memory.memsw.limit_in_bytes", memory_bytes)
        self._write("pids.max", processes_max)
        self._write("cpu.max", f"{cpus * _PERIOD_MICROSECONDS} {_PERIOD_MICROSECONDS}")
        self._write("cpu.cfs_period_us", _PERIOD_MICROSECONDS)
        self._write("cpu.cfs_quota_us", cpus * _PERIOD_MICROSECONDS)

    def add(self, pid: int) -> None:
        """Move a process into the group. Its later children inherit the group. Raises OSError."""
        for directory in self.directories:
            _write(directory / "cgroup.procs", str(pid))

    def limits(self) -> frozenset[str]:
        """Return the enforced limits: `memory`, `cpus`, `processes` and `sockets` (buffers of TCP and UDP)."""
        limits = frozenset(
            name
            for name, files in _LIMIT_FILES.items()
            if any((directory / f).exists() for directory in self.directories for f in files)
        )
        return limits - {"sockets"} if self._is_unified and _is_socket_accounting_disabled() else limits

    def process_ids(self) -> frozenset[int]:
        """Return the processes in the group. The kernel omits zombies."""
        listings = (_read(f"{directory}/cgroup.procs") for directory in self.directories)
        return frozenset(int(pid) for listing in listings for pid in listing.split())

    def kill(self) -> None:
        """Send SIGKILL to every process once. Without `cgroup.kill`, this may miss a process that is being forked."""
        if self._write("cgroup.kill", 1):
            return
        for pid in self.process_ids():
            sandbox_processes.send_signal(pid, signal.SIGKILL, self._contains)

    def reclaim_if_many_negative_dentries(self, negative_dentries_before: int) -> None:
        """Reclaim the group's memory if it may contain many negative dentries (names of nonexistent files).

        Names in the host's directories would outlive the group, and the names from many sandboxes would add up. Call
        this once no process is left. Takes 0.5 s of CPU time for a million names.

        negative_dentries_before: the machine's number of names of nonexistent files before the sandbox started.
        """
        usage, growth = self._group_usage(), count_negative_dentries() - negative_dentries_before
        if usage is None or min(growth, usage.kernel_bytes // DENTRY_BYTES) <= _NEGATIVE_DENTRIES_GROWTH_MAX:
            return
        reclaim_memory(self)

    def was_oom_killed(self) -> bool:
        """Return whether the kernel killed a process in the group because the group's memory was exhausted."""
        return bool(self.oom_kills())

    def oom_kills(self) -> int:
        """Return the number of OOM kills since the group was created."""
        return (
            self._read_number("memory.events", "oom_kill") or self._read_number("memory.oom_control", "oom_kill") or 0
        )

    def stats(self) -> Stats:
        """Return the current usage. Memory excludes inactive file pages, which the kernel can drop immediately."""
        used = _first_known(self._read_number("memory.current"), self._read_number("memory.usage_in_bytes"))
        cached = (
            self._read_number("memory.stat", "total_inactive_file")
            or self._read_number("memory.stat", "inactive_file")
            or 0
        )
        count = _first_known(self._read_number("pids.current"), len(self.process_ids()) if self.directories else None)
        return Stats(
            cpu_seconds=self._cpu_seconds(),
            memory_bytes=None if used is None else max(0, used - cached),
            processes=count,
            oom_kills=self.oom_kills(),
            fork_failures=self._read_number("pids.events", "max") or 0,
        )

    def kernel_usage(
        self,
        pid: int,
        memory_bytes: int,
        socket_meter: SocketMemoryMeter | None = None,
        slab_meter: SlabMeter | None = None,
        mapping_meter: MappingMeter | None = None,
        syscall_buffer_meter: SyscallBufferMeter | None = None,
        closing_files_meter: ClosingFilesMeter | None = None,
    ) -> KernelUsage:
        """Return the kernel usage of the group, and of the network namespace of its process `pid`. May take 0.1 s.

        In v1, the kernel limits socket buffers; in v2, it counts them as memory. memory_bytes: the limit that the group
        was created with. socket_meter: measures the sockets of that network namespace. syscall_buffer_meter,
        closing_files_meter: None for a sandbox with a separate kernel.
        """
        sockets = socket_memory.count_sockets(pid)
        buffer_bytes, buffer_bytes_max = self._socket_buffers(memory_bytes)
        unread, fragment_bytes = None, None
        if socket_meter is not None:
            counts_received = (sockets or 0) > _UNMEASURED_SOCKETS_MAX
            unread, fragment_bytes = socket_meter.measure(pid, buffer_bytes, counts_received=counts_received)
        slabs = slab_meter.measure(self._group_usage(), self._group_usage_of_others) if slab_meter else None
        vma_bytes = None
        if slabs is not None and mapping_meter is not None:
            vma_bytes = mapping_meter.measure(slabs, self.process_ids, self._all_sandboxes)
        are_sockets_bounded = (sockets or 0) <= _bounded_sockets_max(buffer_bytes_max)
        is_vma_growth_within_limit = slabs is None or slabs.vma_bytes_upper_bound <= VMA_BYTES_MAX
        return KernelUsage(
            sockets=None if sockets is None else sockets + (unread.half_open if unread else 0),
            udp_sockets_on_port=unread.udp_sockets_on_port if unread else None,
            received_bytes=unread.received_bytes if unread else None,
            received_bytes_max=socket_buffer_bytes_max(memory_bytes) + RECEIVED_BYTES_HEADROOM,
            page_fragment_bytes=fragment_bytes,
            buffer_bytes=buffer_bytes,
            buffer_bytes_max=buffer_bytes_max,
            netlink_bytes=socket_memory.count_netlink_bytes(pid),
            unreclaimable_free_slab_bytes=slabs.unreclaimable_free_bytes if slabs else None,
            reclaimable_free_slab_bytes=slabs.reclaimable_free_bytes if slabs else None,
            reclaimable_free_slab_bytes_max=reclaimable_free_slab_bytes_max(),
            anon_vma_chain_bytes=slabs.anon_vma_chain_bytes if slabs else None,
            vma_bytes=vma_bytes,
            dentries=slabs.dentry_bytes // DENTRY_BYTES if slabs else None,
            oom_kills=self.oom_kills(),
            syscall_buffer_bytes=syscall_buffer_meter.measure(self.process_ids) if syscall_buffer_meter else None,
            closing_files_bytes=closing_files_meter.measure(self._thread_ids) if closing_files_meter else None,
            is_bounded_while_idle=are_sockets_bounded and is_vma_growth_within_limit,
        )

    def _socket_buffers(self, memory_bytes: int) -> tuple[int | None, int | None]:
        """Return the bytes in socket buffers, and their limit if the kernel does not enforce one."""
        if self._is_unified:
            return self._read_number("memory.stat", "sock"), socket_buffer_bytes_max(memory_bytes)
        return self._read_number(f"{_TCP_CONTROLLER_V1}.usage_in_bytes"), None

    def basic_file_usage(self) -> FileUsage:
        """Return the number of files and directories that the group's processes have open; unknown without a cgroup."""
        return open_files.count_files(self.process_ids(), counts_locks=False) if self.directories else FileUsage()

    def detailed_file_usage(self, epoll_counter: EpollCounter | None = None) -> FileUsage:
        """Return the open files of the group's processes; unknown without a cgroup. Reads many files in /proc.

        epoll_counter: counts this group's epoll entries; None to omit them.
        """
        if not self.directories:
            return FileUsage()
        usage = open_files.count_files(self.process_ids())
        if epoll_counter is None:
            return usage
        entries = epoll_counter.count(self.process_ids(), self._process_ids_of_others)
        return replace(usage, epoll_entries=entries, was_cut_short=usage.was_cut_short or epoll_counter.was_cut_short)

    def release_files_of_blocked_threads(self, interrupters: Sequence[PendingSyscallInterrupter]) -> None:
        """Free kernel objects that only the group's blocked threads keep open, if the machine has many new ones."""
        for one in interrupters:
            one.interrupt_if_grown(self.process_ids)

    def directory_usage(self, *, descriptors_per_directory: int) -> FileUsage:
        """Count only the open directories, for a sandbox whose kernel is a program in the group."""
        return open_files.count_directories(self.process_ids(), descriptors_per_directory=descriptors_per_directory)

    def _thread_ids(self) -> frozenset[int]:
        """Return the threads in the group, even the last exiting thread of a process whose first thread has ended."""
        listings = (_read(f"{directory}/{name}") for directory in self.directories for name in _THREADS_FILES)
        return frozenset(int(thread) for listing in listings for thread in listing.split())

    def _all_sandboxes(self) -> Iterator[SandboxProcesses]:
        for group in (self, *self._siblings().values()):
            if (usage := group._group_usage()) is not None:
                yield SandboxProcesses(group.process_ids(), usage.kernel_bytes)

    def _process_ids_of_others(self) -> Iterator[frozenset[int]]:
        return (group.process_ids() for group in self._siblings().values())

    def _group_usage_of_others(self) -> Mapping[str, GroupUsage]:
        """Return the usage of this group's siblings, keyed by name.

        The parent group's usage is not used, because it includes groups that were removed.
        """
        parents = [str(directory.parent) for directory in self.directories]  # `pathlib` would double the time
        directories = {name: [f"{parent}/{name}" for parent in parents] for name in self._sibling_names()}
        usages = {name: _read_group_usage(each) for name, each in directories.items()}
        return {name: usage for name, usage in usages.items() if usage is not None}

    def _siblings(self) -> Mapping[str, "ControlGroup"]:
        parents = [directory.parent for directory in self.directories]
        return {name: ControlGroup([parent / name for parent in parents]) for name in self._sibling_names()}

    def _sibling_names(self) -> set[str]:
        names = {name for directory in self.directories for name in _list_groups(directory.parent)}
        return names - {directory.name for directory in self.directories}

    def _group_usage(self) -> GroupUsage | None:
        return _read_group_usage(self.directories)

    def _cpu_seconds(self) -> float | None:
        return _read_cpu_seconds(self.directories)

    @property
    def _is_unified(self) -> bool:
        return any(os.access(f"{directory}/memory.max", os.F_OK) for directory in self.directories)

    def remove(self) -> bool:
        """Remove the group's directories. Returns False if one cannot be removed yet."""
        for directory in self.directories:
            try:
                directory.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return False
        return True

    def _contains(self, pid: int) -> bool:
        return any(str(pid) in _read(directory / "cgroup.procs").split() for directory in self.directories)

    def _write(self, name: str, value: int | str) -> bool:
        written = [
            _write(directory / name, str(value)) for directory in self.directories if (directory / name).exists()
        ]
        return bool(written)

    def _read_number(self, name: str, key: str = "") -> int | None:
        """Return the only number in a file, or the number after `key`."""
        return _read_number(self.directories, name, key)


_hierarchy_index_by_file: dict[str, int] = {}
"""The index of the hierarchy in which each file was last found. This hierarchy is tried first."""


def _read_number(directories: Sequence[Path | str], name: str, key: str = "") -> int | None:
    """Return the only number in a file of one of a group's directories, or the number after `key`."""
    first = _hierarchy_index_by_file.get(name, 0)
    for index in (first, *(other for other in range(len(directories)) if other != first)):
        text = _read(f"{directories[index]}/{name}") if index < len(directories) else ""
        match = re.search(rf"^{key} ?(\d+)$", text, re.MULTILINE)
        if match:
            _hierarchy_index_by_file[name] = index
            return int(match[1])
    return None


def _read_group_usage(directories: Sequence[Path | str]) -> GroupUsage | None:
    charged, reclaimable_bytes = _read_number(directories, "memory.kmem.usage_in_bytes"), 0
    if charged is None:  # v2; the statistics of v1 do not include the reclaimable memory
        charged = _read_number(directories, "memory.stat", "kernel")
        reclaimable_bytes = _read_number(directories, "memory.stat", "slab_reclaimable") or 0
    if charged is None:
        return None
    return GroupUsage(charged, _read_cpu_seconds(directories) or 0.0, reclaimable_bytes)


def _read_cpu_seconds(directories: Sequence[Path | str]) -> float | None:
    nanoseconds = _read_number(directories, "cpuacct.usage")
    if nanoseconds is not None:
        return nanoseconds / 1e9
    microseconds = _read_number(directories, "cpu.stat", "usage_usec")
    return None if microseconds is None else microseconds / 1e6


def count_kernel_bytes_outside_cgroup(group: ControlGroup) -> int | None:
    """Return the machine's unreclaimable kernel memory that is not charged to the group; None if unknown. Takes 0.1 ms.

    On cgroup v1, the group's reclaimable memory is subtracted as well, because its size is unknown.
    """
    total, usage = count_machine_unreclaimable_bytes(), group._group_usage()
    return None if total is None or usage is None else total - (usage.kernel_bytes - usage.reclaimable_bytes)


def count_file_locks(group: ControlGroup) -> LocksByOwner:
    """Return the file locks of the group's sandbox, and those that no running process took."""
    return count_locks_by_owner(group.process_ids())


def read_sibling_stamp(group: ControlGroup) -> int | None:
    """Return a number that changes whenever another group is created or removed.

    None while another group exists, or if the number is unknown. See `ControlGroup.create`.
    """
    if not group.directories or group._sibling_names():
        return None
    try:
        return max(directory.parent.stat().st_mtime_ns for directory in group.directories)
    except OSError:
        return None


def reclaim_memory(group: ControlGroup) -> None:
    """Make the kernel free its caches for the group. Call this once no process is left."""
    with suppress(OSError):  # the kernel reports an error if something remains
        if not group._write("memory.force_empty", 0):
            group._write("memory.reclaim", group._read_number("memory.current") or 0)


def read_shared_and_kernel_bytes(group: ControlGroup) -> tuple[int, int]:
    """Return the bytes of files in memory (tmpfs, memfd) and of kernel memory, including the kernel's caches.

    0 if unknown. The kernel's counters may lag behind by up to 256 KiB for each of the machine's processors.
    """
    shared = _first_known(group._read_number("memory.stat", "total_shmem"), group._read_number("memory.stat", "shmem"))
    usage = group._group_usage()
    return shared or 0, usage.kernel_bytes if usage else 0


def read_group_cpu_seconds(group: ControlGroup) -> float | None:
    """Return the CPU time that the group's processes have used; None if unknown. Takes 0.02 ms."""
    return group._cpu_seconds()


def measure_terminal_usage(group: ControlGroup, meter: TerminalMeter) -> KernelUsage:
    """Return only the usage of the group's terminals. Takes 1 ms while programs write to the terminals."""
    return KernelUsage(terminal_cpu_seconds=meter.measure(group.process_ids, group._process_ids_of_others))


def measure_kernel_lock_usage(group: ControlGroup, lock_meters: KernelLockMeters) -> KernelUsage:
    """Return only the time for which the group's programs hold locks that the machine needs."""
    return KernelUsage(
        terminal_lock_seconds=lock_meters.terminals.measure(group._thread_ids),
        network_lock_seconds=lock_meters.network_devices.measure(group._thread_ids),
        nested_epoll_lock_seconds=lock_meters.nested_epoll.measure(group._thread_ids),
        host_inode_lock_seconds=lock_meters.host_inode_locks.measure(group._thread_ids),
    )


class Hierarchies(msgspec.Struct, frozen=True):
    """The writable cgroup hierarchies of this machine; empty if there are none."""

    roots: Sequence[Path]

    def group(self, attempt_id: str) -> ControlGroup:
        """Return the group of an attempt. The group need not exist."""
        return ControlGroup([root / PARENT_GROUP / attempt_id for root in self.roots])

    def attempt_ids(self) -> frozenset[str]:
        """Return the attempts that have a group."""
        parents = [root / PARENT_GROUP for root in self.roots if (root / PARENT_GROUP).is_dir()]
        return frozenset(entry.name for parent in parents for entry in parent.iterdir() if entry.is_dir())


def find_hierarchies(
    mountinfo: Path = Path("/proc/self/mountinfo"), own_cgroup: Path = Path("/proc/self/cgroup")
) -> Hierarchies:
    """Return the writable hierarchies: those of v1 for the required controllers, or that of v2 if v1 is unused."""
    v1_mount_points, v2_mount_points = [], []
    for line in mountinfo.read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        mount_point = Path(before.split()[4])
        if kind == "cgroup" and _CONTROLLERS_V1 & set(options.split()[-1].split(",")):
            v1_mount_points.append(mount_point)
        elif kind == "cgroup2":
            v2_mount_points.append(mount_point)
    if v1_mount_points:
        return Hierarchies([point for point in dict.fromkeys(v1_mount_points) if _is_writable(point)])
    hierarchy_roots = (_topmost_writable(point, own_cgroup) for point in v2_mount_points[:1])
    return Hierarchies([top for top in hierarchy_roots if top is not None])


def _topmost_writable(mount_point: Path, own_cgroup: Path) -> Path | None:
    """Return the highest ancestor of this process's group in which this user may create groups."""
    line = next((one for one in own_cgroup.read_text().splitlines() if one.startswith("0::")), "0::/")
    group_directory = mount_point / line[3:].lstrip("/")
    candidates = [one for one in (group_directory, *group_directory.parents) if one.is_relative_to(mount_point)]
    return next((one for one in reversed(candidates) if _is_writable(one)), None)


def _is_writable(directory: Path) -> bool:
    return os.access(directory, os.W_OK) and os.access(directory / "cgroup.procs", os.W_OK)


def socket_buffer_bytes_max(memory_bytes: int) -> int:
    """Return the maximum total size, in bytes, of the socket buffers in a sandbox with `memory_bytes` of memory."""
    return min(max(memory_bytes // _SOCKET_MEMORY_DIVISOR, SOCKET_BUFFER_BYTES_MIN), SOCKET_BUFFER_BYTES_MAX)


def _bounded_sockets_max(buffer_bytes_max: int | None) -> int:
    """Return the number of sockets up to which received data cannot exceed a limit while no program runs.

    buffer_bytes_max: the limit on the buffers of all sockets in bytes; None if the kernel enforces it.
    """
    if buffer_bytes_max is None:
        return _UNMEASURED_SOCKETS_MAX
    return min(_UNMEASURED_SOCKETS_MAX, buffer_bytes_max // _BUFFER_BYTES_PER_SOCKET_MAX)


def _limit_socket_buffers(directory: Path, buffer_bytes: int) -> None:
    """Limit socket buffers (v1).

    The kernel rejects a limit that the group's usage exceeds. In that case, the group already has a limit.
    """
    path = directory / f"{_TCP_CONTROLLER_V1}.limit_in_bytes"
    if not path.exists():
        return
    try:
        _write(path, str(buffer_bytes))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise


def _total_socket_buffer_bytes() -> int:
    """Return the total limit for all sandboxes: half of the memory that TCP may use without pressure.

    Only the initial network namespace has tcp_mem; in a container the kernel's default is used.
    """
    try:
        pressure_pages = int(_TCP_MEM_SYSCTL.read_text().split()[1])
    except FileNotFoundError:
        pressure_pages = os.sysconf("SC_PHYS_PAGES") // _DEFAULT_TCP_MEMORY_DIVISOR
    return pressure_pages // 2 * os.sysconf("SC_PAGE_SIZE")


def _fair_socket_buffer_bytes(memory_bytes: int) -> int:
    fair = max(_total_socket_buffer_bytes() // _SANDBOXES_AT_LIMIT_MIN, SOCKET_BUFFER_BYTES_MIN)
    return min(socket_buffer_bytes_max(memory_bytes), fair)


def _is_socket_accounting_disabled() -> bool:
    """Return whether the machine was booted with cgroup.memory=nosocket, which applies to v2."""
    options = re.findall(r"cgroup\.memory=(\S+)", _read(_KERNEL_COMMAND_LINE))
    return any("nosocket" in one.split(",") for one in options)


def _enable_controllers(directory: Path) -> None:
    """Enable the controllers for child groups (v2). They are unavailable if the group itself contains processes."""
    for controller in _CONTROLLERS_V2 if (directory / "cgroup.subtree_control").exists() else ():
        with suppress(OSError):
            _write(directory / "cgroup.subtree_control", f"+{controller}")


def _list_groups(parent: Path) -> list[str]:
    try:
        with os.scandir(parent) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _first_known(*numbers: int | None) -> int | None:
    return next((number for number in numbers if number is not None), None)


def _write(path: Path, text: str) -> bool:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
    return True


def _read(path: Path | str) -> str:
    """Return the text of a file; empty if it cannot be read. `pathlib` is too slow for 300 calls per second."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    content = bytearray()
    try:
        while chunk := os.read(descriptor, _READ_BYTES):
            content += chunk
    except OSError:
        return ""
    finally:
        os.close(descriptor)
    return content.decode(errors="replace")


def parse_control_group(text: str) -> ControlGroup:
    """Parse the group from a handle. Raises ValueError for a path that is not an attempt's group."""
    return ControlGroup([_parse_group_path(line) for line in text.splitlines()])


def format_control_group(group: ControlGroup) -> str:
    """Return the text that represents the group in a handle."""
    return "\n".join(map(str, group.directories))


def _parse_group_path(line: str) -> Path:
    path = Path(line)
    if not path.is_absolute() or ".." in path.parts or path.parent.name != PARENT_GROUP:
        raise ValueError(f"{line} is not the control group of an attempt")
    return path
