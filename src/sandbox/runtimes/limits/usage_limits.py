"""The kernel resources that a sandbox uses on the host, and their limits."""

import msgspec

from sandbox.model.fixed_limits import (
    ANON_VMA_CHAIN_BYTES_MAX,
    CACHED_EXTENTS_MAX,
    CLOSING_FILES_BYTES_MAX,
    DENTRIES_MAX,
    DISK_DIRECTORIES_MAX,
    EPOLL_ENTRIES_MAX,
    FILE_LOCKS_MAX,
    FREE_SLAB_BYTES_MAX,
    HOST_INODE_LOCK_SECONDS_MAX,
    KERNEL_LOCK_HOLD_SECONDS_MAX,
    LOCKS_ON_HOST_FILES_MAX,
    NETLINK_BYTES_MAX,
    OOM_KILLS_MAX,
    OPEN_DIRECTORIES_MAX,
    OPEN_FILES_OF_SANDBOX_MAX,
    PAGE_FRAGMENT_BYTES_MAX,
    SOCKET_BUFFER_BYTES_MAX,
    SOCKETS_MAX,
    SYSCALL_BUFFER_BYTES_MAX,
    TERMINAL_CPU_SECONDS_MAX,
    UDP_SOCKETS_ON_PORT_MAX,
    VMA_BYTES_MAX,
)


class KernelUsage(msgspec.Struct, frozen=True):
    """Kernel resources that a sandbox uses on the host, apart from its memory.

    A value is None if it was not measured.
    sockets: number of sockets of all kinds and in all states.
    buffer_bytes: memory used by the buffers of TCP and UDP sockets.
    buffer_bytes_max: the limit on buffer_bytes if the kernel does not enforce one.
    netlink_bytes: unread data in netlink sockets.
    received_bytes: unread data in TCP and UDP sockets, including errors and time stamps.
    received_bytes_max: the limit on received_bytes.
    page_fragment_bytes: memory that small packets in TCP and UDP sockets keep allocated, without their charged memory.
    unreclaimable_free_slab_bytes: memory that is still allocated for freed kernel objects of unreclaimable kinds.
    reclaimable_free_slab_bytes: the same for reclaimable kinds, such as cached inodes and file names.
    reclaimable_free_slab_bytes_max: the limit on reclaimable_free_slab_bytes.
    anon_vma_chain_bytes: memory used by the links between the anonymous mappings of processes and their ancestors.
    vma_bytes: memory used by the mappings of processes.
    dentries: number of file names that the kernel has cached, including names of nonexistent files.
    file_locks: number of locks on files, of any kind and with or without a descriptor; 0 while the machine has few.
    udp_sockets_on_port: number of UDP sockets on the port with the most sockets.
    syscall_buffer_bytes: buffers of system calls in progress; 0 while the kernel's memory has not grown.
    closing_files_bytes: memory of files that ending processes take long to close; 0 while the kernel's memory has not
        grown.
    cached_extents: number of extents and holes of the disk's files that the kernel has cached.
    disk_directories: number of directories on the disk; 0 while the disk has few files.
    terminal_cpu_seconds: CPU time of the kernel threads that process what the sandbox writes to terminals, beyond half
        a processor; 0 while it writes nothing.
    terminal_lock_seconds: time for which the sandbox held the lock for opening terminals while the machine waited for
        it.
    network_lock_seconds: the same for the lock for network devices.
    nested_epoll_lock_seconds: the same for the lock for nested epoll instances.
    host_inode_lock_seconds: time for which a program waited for its own memory while it listed or searched a
        directory of the host, or read a file of the host without the page cache.
    oom_kills: how many times a process was killed for lack of memory.
    is_bounded_while_idle: whether the usage cannot grow beyond a limit while no program of the sandbox runs, unless the
        machine's kernel memory changes.
    """

    sockets: int | None = None
    buffer_bytes: int | None = None
    buffer_bytes_max: int | None = None
    netlink_bytes: int | None = None
    received_bytes: int | None = None
    received_bytes_max: int | None = None
    page_fragment_bytes: int | None = None
    unreclaimable_free_slab_bytes: int | None = None
    reclaimable_free_slab_bytes: int | None = None
    reclaimable_free_slab_bytes_max: int | None = None
    anon_vma_chain_bytes: int | None = None
    vma_bytes: int | None = None
    dentries: int | None = None
    file_locks: int | None = None
    udp_sockets_on_port: int | None = None
    syscall_buffer_bytes: int | None = None
    closing_files_bytes: int | None = None
    cached_extents: int | None = None
    disk_directories: int | None = None
    terminal_cpu_seconds: float | None = None
    terminal_lock_seconds: float | None = None
    network_lock_seconds: float | None = None
    nested_epoll_lock_seconds: float | None = None
    host_inode_lock_seconds: float | None = None
    oom_kills: int = 0
    is_bounded_while_idle: bool = False

    def find_exceeded_limit(self) -> str:
        """Return why the sandbox must end (human-readable); empty while everything is within limits."""
        return (
            self._find_socket_violation()
            or self._find_memory_violation()
            or self._find_file_violation()
            or self._find_lock_violation()
        )

    def _find_socket_violation(self) -> str:
        if self.sockets is not None and self.sockets > SOCKETS_MAX:
            return (
                f"The sandbox had {self.sockets} sockets; the limit is {SOCKETS_MAX}. Close unused "
                "connections, and accept incoming ones."
            )
        if self.buffer_bytes and self.buffer_bytes_max is not None and self.buffer_bytes > self.buffer_bytes_max:
            # The limit grows with vm.memory, but not beyond SOCKET_BUFFER_BYTES_MAX.
            remedy = ", or raise vm.memory." if self.buffer_bytes_max < SOCKET_BUFFER_BYTES_MAX else "."
            return (
                f"The sandbox's sockets held {self.buffer_bytes >> 20} MiB in their buffers; the limit is "
                f"{self.buffer_bytes_max >> 20} MiB. Read received data{remedy}"
            )
        if self.netlink_bytes is not None and self.netlink_bytes > NETLINK_BYTES_MAX:
            return f"The sandbox left {self.netlink_bytes >> 20} MiB unread in netlink sockets; read or close them."
        received, received_max = self.received_bytes, self.received_bytes_max
        if received is not None and received_max is not None and received > received_max:
            return (
                f"The sandbox left {received >> 20} MiB unread in TCP and UDP sockets, including errors and time "
                f"stamps of sent data; the limit is {received_max >> 20} MiB. Read or close these sockets."
            )
        if self.page_fragment_bytes is not None and self.page_fragment_bytes > PAGE_FRAGMENT_BYTES_MAX:
            return (
                f"Small packets in the sandbox's sockets kept {self.page_fragment_bytes >> 20} MiB of kernel memory; "
                f"the limit is {PAGE_FRAGMENT_BYTES_MAX >> 20} MiB. Read received data, or close these sockets."
            )
        if self.udp_sockets_on_port is not None and self.udp_sockets_on_port > UDP_SOCKETS_ON_PORT_MAX:
            return (
                f"The sandbox had {self.udp_sockets_on_port} UDP sockets on one port; the limit is "
                f"{UDP_SOCKETS_ON_PORT_MAX}. Bind them to different ports."
            )
        return ""

    def _find_memory_violation(self) -> str:
        unreclaimable = self.unreclaimable_free_slab_bytes
        if unreclaimable is not None and unreclaimable > FREE_SLAB_BYTES_MAX:
            return (
                f"The sandbox left {unreclaimable >> 20} MiB of kernel memory in partly used slabs. Close "
                "files and sockets in the order in which they were opened."
            )
        reclaimable, reclaimable_max = self.reclaimable_free_slab_bytes, self.reclaimable_free_slab_bytes_max
        if reclaimable is not None and reclaimable_max is not None and reclaimable > reclaimable_max:
            return (
                f"The sandbox left {reclaimable >> 20} MiB of kernel memory in partly used slabs of inodes and file "
                f"names; the limit is {reclaimable_max >> 20} MiB. Close files in the order in which they were created."
            )
        if self.anon_vma_chain_bytes is not None and self.anon_vma_chain_bytes > ANON_VMA_CHAIN_BYTES_MAX:
            return (
                f"The kernel held {self.anon_vma_chain_bytes >> 20} MiB to link mappings of the sandbox's processes "
                f"with those of their parents; the limit is {ANON_VMA_CHAIN_BYTES_MAX >> 20} MiB. Split fewer "
                "mappings, or start fewer generations of processes."
            )
        if self.vma_bytes is not None and self.vma_bytes > VMA_BYTES_MAX:
            return (
                f"The kernel held {self.vma_bytes >> 20} MiB to describe the memory mappings of the sandbox's "
                f"processes; the limit is {VMA_BYTES_MAX >> 20} MiB. Map fewer files, or start fewer processes."
            )
        if self.syscall_buffer_bytes is not None and self.syscall_buffer_bytes > SYSCALL_BUFFER_BYTES_MAX:
            return (
                f"The kernel held {self.syscall_buffer_bytes >> 20} MiB for threads of the sandbox that read /proc/sys "
                "or sent netlink requests; use smaller buffers, or fewer threads."
            )
        if self.closing_files_bytes is not None and self.closing_files_bytes > CLOSING_FILES_BYTES_MAX:
            return (
                f"The kernel may have held {self.closing_files_bytes >> 20} MiB for files of the sandbox's ending "
                "processes; "
                f"the limit is {CLOSING_FILES_BYTES_MAX >> 20} MiB. Close directories before a process ends."
            )
        if self.oom_kills > OOM_KILLS_MAX:
            return (
                f"Processes of the sandbox were killed {self.oom_kills} times for lack of memory; the limit is "
                f"{OOM_KILLS_MAX}. Raise vm.memory."
            )
        return ""

    def _find_file_violation(self) -> str:
        if self.dentries is not None and self.dentries > DENTRIES_MAX:
            return (
                f"The kernel had cached {self.dentries} file names for the sandbox; the limit is "
                f"{DENTRIES_MAX}. Look up fewer names that do not exist, and create fewer hard links."
            )
        if self.file_locks is not None and self.file_locks > FILE_LOCKS_MAX:
            return _too_many_locks(self.file_locks)
        if self.cached_extents is not None and self.cached_extents > CACHED_EXTENTS_MAX:
            return (
                f"The kernel had cached {self.cached_extents} extents and holes of the sandbox's files; the limit is "
                f"{CACHED_EXTENTS_MAX}. Write files without so many holes."
            )
        if self.disk_directories is not None and self.disk_directories > DISK_DIRECTORIES_MAX:
            return (
                f"The sandbox had {self.disk_directories} directories on its disk; the limit is "
                f"{DISK_DIRECTORIES_MAX}. Remove unused ones."
            )
        if self.terminal_cpu_seconds is not None and self.terminal_cpu_seconds > TERMINAL_CPU_SECONDS_MAX:
            return (
                "Kernel threads used more than half a processor for input that the sandbox wrote to its own "
                "terminals. Write less to terminals, or write to pipes."
            )
        return ""

    def _find_lock_violation(self) -> str:
        if self.terminal_lock_seconds is not None and self.terminal_lock_seconds > KERNEL_LOCK_HOLD_SECONDS_MAX:
            return (
                "Programs of the sandbox opened or closed terminals so slowly that no other program on the machine "
                "could open one. Open fewer terminals, or start fewer busy programs at the same time."
            )
        if self.network_lock_seconds is not None and self.network_lock_seconds > KERNEL_LOCK_HOLD_SECONDS_MAX:
            return (
                "Programs of the sandbox listed network interfaces or joined multicast groups so slowly that no other "
                "program on the machine could use network devices. Start fewer busy programs at the same time."
            )
        if self.nested_epoll_lock_seconds is not None and self.nested_epoll_lock_seconds > KERNEL_LOCK_HOLD_SECONDS_MAX:
            return (
                "Programs of the sandbox used nested epoll instances so slowly that no other program on the machine "
                "could use them. Start fewer busy programs at the same time."
            )
        if self.host_inode_lock_seconds is not None and self.host_inode_lock_seconds > HOST_INODE_LOCK_SECONDS_MAX:
            return (
                "A program of the sandbox listed or searched a directory of the host, or read a file with O_DIRECT, "
                f"and waited {self.host_inode_lock_seconds:.0f} s for its own memory. Meanwhile, the host could not "
                "change the directory or file. Start fewer busy programs at the same time, or use less memory."
            )
        return ""


def _too_many_locks(count: int) -> str:
    return f"The sandbox had {count} locks on files; the limit is {FILE_LOCKS_MAX}. Release unused ones."


class FileUsage(msgspec.Struct, frozen=True):
    """The open files of a sandbox; None if the host does not count them.

    open_files: descriptors of all its processes.
    directories, posix_locks: open directories and POSIX file locks. Each is 0 while it cannot exceed its limit.
    locks_on_host_files: locks of any kind on files that the host uses too.
    epoll_entries: pairs of an epoll instance and a descriptor that it watches; 0 if there are few.
    was_cut_short: whether counting took too long, so the other numbers may be too low.
    """

    open_files: int | None = None
    directories: int = 0
    posix_locks: int = 0
    locks_on_host_files: int = 0
    epoll_entries: int = 0
    was_cut_short: bool = False

    def find_exceeded_limit(self) -> str:
        """Return why the sandbox must end (human-readable); empty while everything is within limits."""
        if self.open_files is not None and self.open_files > OPEN_FILES_OF_SANDBOX_MAX:
            return (
                f"The sandbox's processes had {self.open_files} open files; the limit is "
                f"{OPEN_FILES_OF_SANDBOX_MAX}. Close unused ones."
            )
        if self.directories > OPEN_DIRECTORIES_MAX:
            return f"The sandbox had more than {OPEN_DIRECTORIES_MAX} open directories; close unused ones."
        if self.posix_locks > FILE_LOCKS_MAX:
            return _too_many_locks(self.posix_locks)
        if self.locks_on_host_files > LOCKS_ON_HOST_FILES_MAX:
            return (
                f"The sandbox had more than {LOCKS_ON_HOST_FILES_MAX} locks on devices or system files; "
                "lock files in the workspace instead."
            )
        if self.was_cut_short:
            return "The sandbox's open files took too long to count; open, lock and watch fewer files."
        if self.epoll_entries > EPOLL_ENTRIES_MAX:
            return (
                f"The sandbox had more than {EPOLL_ENTRIES_MAX} epoll entries; watch each file with one epoll instance."
            )
        return ""
