"""The seccomp filter, assembled without a library.

System calls are allowed unless listed here. Calls that agents never need and that have been used to escape from
sandboxes fail with EPERM. Calls for which programs have a fallback fail with ENOSYS.
"""

import errno
import struct
from collections.abc import Sequence

import msgspec

from sandbox.model.fixed_limits import SOCKETS_MAX
from sandbox.runtimes import seccomp_sockopt_and_ioctl_rules

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
ALLOWED_FAMILIES = (AF_UNIX, AF_INET, AF_INET6, AF_NETLINK)
INTERNET_FAMILIES = (AF_INET, AF_INET6)
TYPE_MASK = 0xF
ALLOWED_INTERNET_TYPES = (1, 2)
"""SOCK_STREAM and SOCK_DGRAM. SOCK_PACKET would turn an AF_INET socket into a packet socket."""
ALLOWED_INTERNET_PROTOCOLS = (0, 6, 17)
"""The type's default, TCP and UDP. For any other protocol, the kernel tries to load a module of the host."""

MSG_MORE, SPLICE_F_MORE = 0x8000, 0x4
"""Flags that hold back a datagram of up to 64 KiB per socket, which is not charged to any control group.

TCP_CORK concerns only streams.
"""

_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_SET, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_AND = 0x54
_NR_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16
_ALLOW, _TRAP, _ERRNO = 0x7FFF0000, 0x00030000, 0x00050000
"""SECCOMP_RET_ALLOW, SECCOMP_RET_TRAP, SECCOMP_RET_ERRNO.

The signal of SECCOMP_RET_TRAP ends a program that has no handler for it. SECCOMP_RET_KILL_PROCESS would write a record
to the machine's audit log each time.
"""

_CLONE_NAMESPACES = 0x7E020000
_CLONE_FILES, _CLONE_HANDLERS, _CLONE_THREAD = 0x400, 0x800, 0x10000
"""CLONE_FILES, CLONE_SIGHAND, CLONE_THREAD.

All threads of a process share its open files, which are counted from outside. Only threads may share signal handlers:
a signal for a process group walks all waiters of a signalfd once for each process that shares the handlers. During the
walk, the kernel holds a lock that the machine needs to start and end processes. With 30,000 waiters, 60 processes take
0.1 s.
"""
_CLONE_NEWTIME = 0x80
_X32_BIT = 0x40000000
_SIGN_BIT = 0x80000000
_SYSCALL_NUMBER_MAX = 462
"""The highest system call number that the filter allows (mseal). Higher ones fail with ENOSYS."""

_DATA_SEARCHES = (3, 4)
"""SEEK_DATA, SEEK_HOLE: they walk all extents of a file, without interruption, to find the next data or hole.

Programs that copy sparse files read the holes instead.
"""

_FALLOCATE_MODES, _PUNCH_HOLE, _FALLOCATE_BYTES_MAX = 0x13, 0x2, 1 << 30
"""FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, and the maximum size of one allocation.

Finding the 262,144 extents of 1 GiB takes 0.4 s. Other modes are refused: they move all extents after the range, or
their cost is unknown.
"""

_ALLOWED_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF)
"""0x40000: ADDR_NO_RANDOMIZE, which concerns only the program itself. ThreadSanitizer and `setarch -R` need it."""

# System call numbers from 424 on are the same on every architecture.
_DENIED_ON_ALL_ARCHITECTURES = {
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "pidfd_getfd": 438, "mount_setattr": 442, "quotactl_fd": 443, "set_mempolicy_home_node": 450,
}  # fmt: skip
_CLOSE_RANGE, _PROCESS_MADVISE = 436, 440
_ENOSYS_CALLS = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "clone3": 435,
    "landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446, "memfd_secret": 447,
}  # fmt: skip
"""Calls that fail with ENOSYS, as on a kernel without them, so that programs fall back to other calls.

clone3 has its flags in memory, which a filter cannot read; the C library falls back to clone.

Landlock logs refused accesses in the machine's audit log, with names that the program chooses.

memfd_secret removes pages from the kernel's direct map, which slows the whole machine down and prevents hibernation.
"""

_MAP_HUGETLB, _MFD_HUGETLB, _SHM_HUGETLB = 0x40000, 0x4, 0x800
"""Huge pages come from a pool of the whole machine, and the memory control group does not count them.

memfd_create fails with EINVAL, as with unknown flags: Chromium calls it with all flags and exits on any other error.
"""

_OFD_LOCKS = (36, 37, 38)
"""F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW: locks that no process owns, so they cannot be attributed to a sandbox."""

_F_SETFL, _O_ASYNC = 4, 0x2000
_SIGNALLING_COMMANDS = (1024, 1026)
"""F_SETFL, O_ASYNC; F_SETLEASE, F_NOTIFY: signals for events on files.

For one event, the kernel signals every process of the owner's group, once for each open file, without interruption. The
time is charged to the cause of the event: a process of the host that reads a directory of /usr, or, for terminals, a
kernel thread.
"""

_F_ADD_SEALS, _REFUSED_SEALS = 1033, 0x28
"""F_ADD_SEALS; F_SEAL_WRITE and F_SEAL_EXEC, which empty caches of all processors, see `Architecture`."""

_IDLE_POLICIES = (5, 0x40000005)
"""SCHED_IDLE, without and with SCHED_RESET_ON_FORK.

A low-priority program does not run while other programs in the sandbox are busy. If it holds a kernel lock during that
time, the whole machine waits. Therefore, priorities are never lowered. sched_setattr is denied, because its policy
argument is in memory, which a filter cannot read.
"""

_CLOSE_RANGE_UNSHARE = 0x2
"""CLOSE_RANGE_UNSHARE: gives a single thread its own table of open files."""

_SECCOMP_SET_MODES = (0, 1)
"""SECCOMP_SET_MODE_STRICT, SECCOMP_SET_MODE_FILTER.

A program's own filter can write every call to the machine's audit log (SECCOMP_RET_LOG), which an outer filter cannot
prevent. Compiled filters come from a pool of the machine (net.core.bpf_jit_limit), and a listener keeps a filter in the
pool after its process has ended.
"""

_NOTIFICATION_PIPE = 0x80
"""O_NOTIFICATION_PIPE: a pipe for key events with up to 64 KiB of pages that are not charged to any control group."""

_RLIMIT_CORE = 4
"""The core dump limit, which is one byte.

If the machine's core_pattern is a pipe, the kernel starts its program as the host's root for each crash, with the
memory of the crashed process as input. Only a limit of one byte prevents that: zero and all other limits do not.
"""

POLLED_FILES_MAX = 1024
"""Maximum number of files in one call of poll or select, equal to the limit of select in the C library.

For each event, the kernel walks all calls that wait for the file, without interruption: 26 ms for 500 threads. One call
can cause many events, such as one for each line written to a terminal. Each file in a call also uses 72 uncharged bytes
of kernel memory.
"""

POLLED_FILES_OF_QEMU_MAX = 2 * SOCKETS_MAX
"""The maximum number of polled files for QEMU, which polls a socket for each connection of the guest.

QEMU waits forever if a poll fails.
"""

_SEMAPHORE_OPERATIONS_MAX = 32
"""Maximum number of operations in one semop.

Each call retries the operations of all waiting threads: 80 ms for 480 threads with 500 operations each.
"""

_MERGEABLE, _COLLAPSE, _ADVICE_MAX, _FILE_NOT_NEEDED = 12, 25, 101, 4
"""MADV_MERGEABLE, MADV_COLLAPSE, the highest allowed advice value, and POSIX_FADV_DONTNEED.

MADV_MERGEABLE makes a kernel thread search for equal pages, which needs 64 bytes per page that are not charged to any
control group. Since Linux 6.13, a process can give itself any advice with process_madvise.

MADV_COLLAPSE empties caches of all processors, see `Architecture`.
Higher advice values fail, as on a kernel that lacks them. The first one above the maximum is MADV_GUARD_INSTALL: one
call changes the page tables of a whole mapping without interruption. A call for 64 GiB takes 0.3 s and needs 128
MiB of memory. The C library falls back to mprotect.
"""

_PR_SET_SECCOMP = 22

_PROCESS_OPTIONS = (
    62,  # PR_SCHED_CORE: blocks the sibling of each used processor for all other programs
    67,  # PR_SET_MEMORY_MERGE: MADV_MERGEABLE for the whole process
)
_PROCESS_OPTION_MAX, _NAMED_PROCESS_OPTIONS = 77, (0x41555856, 0x59616D61)
"""The highest allowed option of prctl, and PR_GET_AUXV and PR_SET_PTRACER. Others fail as on a kernel without them.

The first option above the maximum is PR_FUTEX_HASH (78): the kernel initializes a table of up to 1 GiB without
interruption, which takes 0.6 s for 256 MiB. PR_SET_VMA (0x53564D41) names mappings with up to 80 bytes each, which are
not charged to any control group.
"""

_ARG0, _ARG1, _ARG2, _ARG3, _ARG4, _ARG5 = range(_ARGS_OFFSET, _ARGS_OFFSET + 48, 8)


class Architecture(msgspec.Struct, frozen=True):
    """System call numbers of one architecture. `audit`: its AUDIT_ARCH value.

    io_setup: refused with ENOSYS, because its contexts count toward a machine-wide limit (fs.aio-max-nr). splice,
    vmsplice, sendfile: refused, because the pages that they put into a pipe or socket belong to the host or are not
    charged to any control group. A socket counts only the used bytes of a page. Programs fall back to copying.

    setxattr_calls: refused, as on a file system without extended attributes. A file in memory can have any number of
    attributes, and the kernel lists or removes them without interruption: 20 million take 2.3 s to list and 4.6 s to
    remove. Moreover, access control lists are not charged to any control group.

    sched_setaffinity: succeeds without effect. A call that moves a running thread wakes up a kernel thread with the
    highest priority, whose time is charged to no control group. 400 threads that move themselves between two processors
    stop all other programs on both for 8 s at a time.

    fadvise64: the advice that a file's pages are not needed succeeds without effect. To follow it, the kernel would
    empty caches of all processors with a lock that mounts need too, and remove the host's /usr from memory.
    sync_calls: sync and syncfs succeed without effect, because sync holds locks of all file systems of the machine.
    """

    audit: int
    clone: int
    unshare: int
    socket: int
    socketpair: int
    setsockopt: int
    getsockopt: int
    sendto: int
    sendmsg: int
    sendmmsg: int
    splice: int
    vmsplice: int
    sendfile: int
    seccomp: int
    pipe2: int
    setxattr_calls: tuple[int, ...]
    mmap: int
    madvise: int
    memfd_create: int
    shmget: int
    fcntl: int
    prctl: int
    poll_calls: tuple[int, ...]
    select_calls: tuple[int, ...]
    semop_calls: tuple[int, ...]
    ioctl: int
    personality: int
    setpriority: int
    setrlimit: int
    prlimit64: int
    sched_setscheduler: int
    sched_setaffinity: int
    ioprio_set: int
    io_setup: int
    lseek: int
    mincore: int
    fallocate: int
    fadvise64: int
    sync_calls: tuple[int, ...]
    denied: dict[str, int]


_X86_64 = Architecture(
    audit=0xC000003E, clone=56, unshare=272, socket=41, socketpair=53, setsockopt=54, getsockopt=55, sendto=44,
    sendmsg=46, sendmmsg=307, splice=275, vmsplice=278, sendfile=40, seccomp=317, pipe2=293,
    setxattr_calls=(188, 189, 190), mmap=9, madvise=28, memfd_create=319, shmget=29, fcntl=72, prctl=157,
    poll_calls=(7, 271), select_calls=(23, 270), semop_calls=(65, 220), ioctl=16, personality=135, io_setup=206,
    lseek=8, mincore=27, fallocate=285, fadvise64=221, sync_calls=(162, 306),
    setpriority=141, setrlimit=160, prlimit64=302, sched_setscheduler=144, sched_setaffinity=203, ioprio_set=251,
    denied={
        "ptrace": 101, "syslog": 103, "uselib": 134, "ustat": 136, "sysfs": 139, "vhangup": 153, "pivot_root": 155,
        "_sysctl": 156, "adjtimex": 159, "chroot": 161, "acct": 163, "settimeofday": 164, "mount": 165,
        "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170, "setdomainname": 171,
        "iopl": 172, "ioperm": 173, "create_module": 174, "init_module": 175, "delete_module": 176,
        "get_kernel_syms": 177, "query_module": 178, "quotactl": 179, "nfsservctl": 180, "lookup_dcookie": 212,
        "clock_settime": 227, "mbind": 237, "set_mempolicy": 238, "kexec_load": 246, "add_key": 248,
        "request_key": 249, "keyctl": 250, "migrate_pages": 256, "move_pages": 279, "perf_event_open": 298,
        "fanotify_init": 300, "name_to_handle_at": 303, "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "sched_setattr": 314,
        "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323,
    },
)  # fmt: skip

_AARCH64 = Architecture(
    audit=0xC00000B7, clone=220, unshare=97, socket=198, socketpair=199, setsockopt=208, getsockopt=209, sendto=206,
    sendmsg=211, sendmmsg=269, splice=76, vmsplice=75, sendfile=71, seccomp=277, pipe2=59,
    setxattr_calls=(5, 6, 7), mmap=222, madvise=233, memfd_create=279, shmget=194, fcntl=25, prctl=167,
    poll_calls=(73,), select_calls=(72,), semop_calls=(193, 192), ioctl=29, personality=92, io_setup=0,
    lseek=62, mincore=232, fallocate=47, fadvise64=223, sync_calls=(81, 267),
    setpriority=140, setrlimit=164, prlimit64=261, sched_setscheduler=119, sched_setaffinity=122, ioprio_set=30,
    denied={
        "lookup_dcookie": 18, "umount2": 39, "mount": 40, "pivot_root": 41, "nfsservctl": 42, "chroot": 51,
        "vhangup": 58, "quotactl": 60, "acct": 89, "kexec_load": 104, "init_module": 105, "delete_module": 106,
        "clock_settime": 112, "syslog": 116, "ptrace": 117, "reboot": 142, "sethostname": 161, "setdomainname": 162,
        "settimeofday": 170, "adjtimex": 171, "add_key": 217, "request_key": 218, "keyctl": 219, "swapon": 224,
        "swapoff": 225, "mbind": 235, "set_mempolicy": 237, "migrate_pages": 238, "move_pages": 239,
        "perf_event_open": 241, "fanotify_init": 262, "name_to_handle_at": 264, "open_by_handle_at": 265,
        "clock_adjtime": 266, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272,
        "finit_module": 273, "sched_setattr": 274, "bpf": 280, "userfaultfd": 282, "kexec_file_load": 294,
    },
)  # fmt: skip

ARCHITECTURES = {"x86_64": _X86_64, "aarch64": _AARCH64}
_FORKS = {"x86_64": (57, 58)}  # fork, vfork


def assemble_filter(
    machine: str,
    *,
    allows_filters: bool = False,
    allows_kvm: bool = False,
    polled_files_max: int = POLLED_FILES_MAX,
) -> bytes:
    """Assemble the seccomp filter for a machine as named by `os.uname`.

    allows_filters: whether programs can install additional filters. QEMU and virtiofsd do so; a guest has its own
    kernel. allows_kvm: whether programs can use /dev/kvm. polled_files_max: maximum number of files in one call of
    poll or select. Raises KeyError for an unknown architecture.
    """
    architecture = ARCHITECTURES[machine]
    program = [
        *(_load(_ARCH_OFFSET), _instruction(_JUMP_EQUAL, architecture.audit, 1, 0), _return(_TRAP)),
        _load(_NR_OFFSET),
        *_refuse_enosys_calls(architecture),
        *_refuse_denied_calls(architecture),
        *_refuse_flags(architecture.clone, _ARG0, _CLONE_NAMESPACES, errno.EPERM),
        *_refuse_flags(architecture.unshare, _ARG0, _CLONE_NAMESPACES | _CLONE_NEWTIME | _CLONE_FILES, errno.EPERM),
        *_restrict_sharing(architecture.clone),
        *_refuse_flags(_CLOSE_RANGE, _ARG2, _CLOSE_RANGE_UNSHARE, errno.EINVAL),
        *_refuse_calls((architecture.splice, architecture.vmsplice, architecture.sendfile), errno.EINVAL),
        *_refuse_calls(architecture.setxattr_calls, errno.EOPNOTSUPP),
        *_refuse_calls(architecture.sync_calls, 0),
        *(() if allows_filters else _refuse_filters(architecture)),
        *_refuse_flags(architecture.pipe2, _ARG1, _NOTIFICATION_PIPE, errno.ENOPKG),
        *_refuse_flags(architecture.mmap, _ARG3, _MAP_HUGETLB, errno.ENOMEM),
        *_restrict_advice(architecture),
        *_refuse_values(architecture.prctl, _ARG0, _PROCESS_OPTIONS, errno.EINVAL),
        *_refuse_unknown_process_options(architecture.prctl),
        *_refuse_flags(architecture.memfd_create, _ARG1, _MFD_HUGETLB, errno.EINVAL),
        *_refuse_flags(architecture.shmget, _ARG2, _SHM_HUGETLB, errno.ENOMEM),
        *_refuse_values(architecture.fcntl, _ARG1, (*_OFD_LOCKS, *_SIGNALLING_COMMANDS), errno.EINVAL),
        *_refuse_fcntl_flags(architecture.fcntl, _F_SETFL, _O_ASYNC),
        *_refuse_fcntl_flags(architecture.fcntl, _F_ADD_SEALS, _REFUSED_SEALS),
        *_ignore_scheduling_changes(architecture),
        *_ignore_core_limit_changes(architecture),
        *_refuse_long_lists(architecture, polled_files_max),
        *_restrict_sockets(architecture.socket),
        *_restrict_sockets(architecture.socketpair),
        *_restrict_socket_use(architecture),
        *_restrict_requests(architecture.ioctl, allows_kvm=allows_kvm),
        *_refuse_extent_walks(architecture),
        *_for_call(architecture.personality, [_load(_ARG0), *_refuse_unless_in(_ALLOWED_PERSONALITIES, errno.EPERM)]),
        _return(_ALLOW),
    ]
    return b"".join(program)


def _refuse_long_lists(architecture: Architecture, polled_files_max: int) -> list[bytes]:
    limits = (
        (architecture.poll_calls, _ARG1, polled_files_max, errno.EINVAL),
        (architecture.select_calls, _ARG0, polled_files_max, errno.EINVAL),
        (architecture.semop_calls, _ARG2, _SEMAPHORE_OPERATIONS_MAX, errno.E2BIG),
        ((architecture.mincore,), _ARG1 + 4, 3, errno.ENOMEM),  # below 16 GiB: 0.14 s to look up all pages of a file
    )
    return [word for calls, *limit in limits for call in calls for word in _refuse_above(call, *limit)]


def _refuse_extent_walks(architecture: Architecture) -> list[bytes]:
    """Refuse calls that walk all of a file's extents without interruption. A punched hole may have any size."""
    load_length = [_load(_ARG3 + 4), _instruction(_JUMP_GREATER, 0, 2, 0), _load(_ARG3)]
    error = _return_errno(errno.EOPNOTSUPP)
    refuse_long = [*load_length, _instruction(_JUMP_GREATER, _FALLOCATE_BYTES_MAX, 0, 1), error]
    refuse_modes = [_load(_ARG1), _instruction(_JUMP_SET, 0xFFFFFFFF & ~_FALLOCATE_MODES, 0, 1), error]
    refuse = [*refuse_modes, _instruction(_JUMP_SET, _PUNCH_HOLE, len(refuse_long), 0), *refuse_long]
    return [
        *_refuse_values(architecture.lseek, _ARG2, _DATA_SEARCHES, errno.EINVAL),
        *_for_call(architecture.fallocate, refuse),
    ]


def _restrict_requests(call: int, *, allows_kvm: bool) -> list[bytes]:
    """Allow only the listed ioctl requests. Other requests fail as on a kernel that does not support them."""
    mask, kvm_type = seccomp_sockopt_and_ioctl_rules.IOCTL_TYPE_MASK, seccomp_sockopt_and_ioctl_rules.KVM_IOCTL_TYPE
    kvm = [_instruction(_AND, mask), *_refuse_unless_in((kvm_type,), errno.ENOTTY)]
    rules = [
        *_skip_unless_in(seccomp_sockopt_and_ioctl_rules.DENIED_IOCTLS, [_return_errno(errno.EPERM)]),
        *_skip_unless_in(seccomp_sockopt_and_ioctl_rules.IGNORED_IOCTLS, [_return_errno(0)]),
    ]
    others = kvm if allows_kvm else [_return_errno(errno.ENOTTY)]
    return _for_call(call, [_load(_ARG1), *rules, *_skip_if_in(seccomp_sockopt_and_ioctl_rules.ALLOWED_IOCTLS, others)])


def _refuse_fcntl_flags(fcntl: int, command: int, flags: int) -> list[bytes]:
    with_flags = [_load(_ARG2), _instruction(_JUMP_SET, flags, 0, 1), _return_errno(errno.EINVAL)]
    return _for_call(fcntl, [_load(_ARG1), *_skip_unless_in((command,), with_flags)])


def _ignore_scheduling_changes(architecture: Architecture) -> list[bytes]:
    """Let requests to lower a priority, or to select processors, succeed without effect.

    Refuse requests to raise a priority, as the kernel would.
    """
    return [
        *_refuse_flags(architecture.setpriority, _ARG2, _SIGN_BIT, errno.EACCES),
        *_refuse_calls((architecture.setpriority, architecture.ioprio_set, architecture.sched_setaffinity), 0),
        *_refuse_values(architecture.sched_setscheduler, _ARG1, _IDLE_POLICIES, 0),
    ]


def _ignore_core_limit_changes(architecture: Architecture) -> list[bytes]:
    """Let changes to the core dump limit succeed without effect. Refuse a change that also reads the old limit."""
    change = [*_skip_if_null(_ARG3, [_return_errno(errno.EPERM)]), _return_errno(0)]
    changed = _skip_if_null(_ARG2, change)
    return [
        *_refuse_values(architecture.setrlimit, _ARG0, (_RLIMIT_CORE,), 0),
        *_for_call(architecture.prlimit64, [_load(_ARG1), *_skip_unless_in((_RLIMIT_CORE,), changed)]),
    ]


def _skip_if_null(pointer: int, body: Sequence[bytes]) -> list[bytes]:
    """Run `body` unless a pointer is null."""
    return [
        _load(pointer),
        _instruction(_JUMP_EQUAL, 0, 0, 2),
        _load(pointer + 4),
        _instruction(_JUMP_EQUAL, 0, len(body), 0),
        *body,
    ]


def _refuse_filters(architecture: Architecture) -> list[bytes]:
    return [
        *_refuse_values(architecture.seccomp, _ARG0, _SECCOMP_SET_MODES, errno.EINVAL),
        *_refuse_values(architecture.prctl, _ARG0, (_PR_SET_SECCOMP,), errno.EINVAL),
    ]


def assemble_socket_and_extent_filter(machine: str) -> bytes:
    """Assemble only the rules for sockets and extents, for sandboxes whose kernel uses the host's sockets and extents.

    Raises KeyError for an unknown architecture.
    """
    rules = [word for build in (_restrict_socket_use, _refuse_extent_walks) for word in build(ARCHITECTURES[machine])]
    return b"".join([_load(_NR_OFFSET), *rules, _return(_ALLOW)])


def assemble_thread_filter(machine: str) -> bytes:
    """Assemble an additional filter that allows new threads, but no new processes. Raises KeyError."""
    only_threads = [_load(_ARG0), _instruction(_JUMP_SET, _CLONE_THREAD, 1, 0), _return_errno(errno.EPERM)]
    clone = _for_call(ARCHITECTURES[machine].clone, only_threads)
    return b"".join([_load(_NR_OFFSET), *_refuse_calls(_FORKS.get(machine, ()), errno.EPERM), *clone, _return(_ALLOW)])


def _instruction(code: int, value: int, when_true: int = 0, when_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, when_true, when_false, value)


def _load(offset: int) -> bytes:
    return _instruction(_LOAD, offset)


def _return(action: int) -> bytes:
    return _instruction(_RETURN, action)


def _return_errno(number: int) -> bytes:
    return _return(_ERRNO | number)


def _for_call(call: int, body: Sequence[bytes]) -> list[bytes]:
    """Run `body` for one call. `body` may change the accumulator; afterwards, the call's number is reloaded."""
    whole = [*body, _load(_NR_OFFSET)]
    return [_instruction(_JUMP_EQUAL, call, 0, len(whole)), *whole]


def _refuse_enosys_calls(architecture: Architecture) -> list[bytes]:
    """Make the calls in `_ENOSYS_CALLS`, io_setup, and numbers above the last known one fail with ENOSYS.

    The x32 calls of x86_64 are among these numbers, because a high bit is set in them.
    """
    assert _X32_BIT > _SYSCALL_NUMBER_MAX
    unknown = [_instruction(_JUMP_GREATER, _SYSCALL_NUMBER_MAX, 0, 1), _return_errno(errno.ENOSYS)]
    return [*unknown, *_refuse_calls((*_ENOSYS_CALLS.values(), architecture.io_setup), errno.ENOSYS)]


def _refuse_calls(calls: Sequence[int], error: int) -> list[bytes]:
    return [word for call in calls for word in (_instruction(_JUMP_EQUAL, call, 0, 1), _return_errno(error))]


def _refuse_denied_calls(architecture: Architecture) -> list[bytes]:
    numbers = sorted({**architecture.denied, **_DENIED_ON_ALL_ARCHITECTURES}.values())
    checks = [_instruction(_JUMP_EQUAL, number, len(numbers) - index, 0) for index, number in enumerate(numbers)]
    skip = _instruction(_JUMP_GREATER, 0, 1, 1)
    return [*checks, skip, _return_errno(errno.EPERM)]


def _refuse_flags(call: int, argument: int, flags: int, error: int) -> list[bytes]:
    return _for_call(call, [_load(argument), _instruction(_JUMP_SET, flags, 0, 1), _return_errno(error)])


def _restrict_sharing(call: int) -> list[bytes]:
    """Refuse threads that do not share the process's open files, and other processes that share signal handlers."""
    refuse_thread = [_instruction(_JUMP_SET, _CLONE_FILES, 1, 0), _return_errno(errno.EPERM)]
    refuse_process = [_instruction(_JUMP_SET, _CLONE_HANDLERS, 0, 1), _return_errno(errno.EPERM)]
    return _for_call(
        call,
        [
            _load(_ARG0),
            *(_instruction(_JUMP_SET, _CLONE_THREAD, 0, len(refuse_thread)), *refuse_thread),
            *(_instruction(_JUMP_SET, _CLONE_THREAD, len(refuse_process), 0), *refuse_process),
        ],
    )


def _refuse_above(call: int, argument: int, value_max: int, error: int) -> list[bytes]:
    return _for_call(call, [_load(argument), _instruction(_JUMP_GREATER, value_max, 0, 1), _return_errno(error)])


def _refuse_values(call: int, argument: int, values: Sequence[int], error: int) -> list[bytes]:
    return _for_call(call, [_load(argument), *_skip_unless_in(values, [_return_errno(error)])])


def _restrict_advice(architecture: Architecture) -> list[bytes]:
    rules = _refuse_values(architecture.fadvise64, _ARG3, (_FILE_NOT_NEEDED,), 0)
    for call, argument in ((architecture.madvise, _ARG2), (_PROCESS_MADVISE, _ARG3)):
        rules += _refuse_values(call, argument, (_MERGEABLE, _COLLAPSE), errno.EINVAL)
        rules += _refuse_above(call, argument, _ADVICE_MAX, errno.EINVAL)
    return rules


def _refuse_unknown_process_options(call: int) -> list[bytes]:
    refuse = _refuse_unless_in(_NAMED_PROCESS_OPTIONS, errno.EINVAL)
    return _for_call(call, [_load(_ARG0), _instruction(_JUMP_GREATER, _PROCESS_OPTION_MAX, 0, len(refuse)), *refuse])


def _restrict_sockets(call: int) -> list[bytes]:
    """Allow only ALLOWED_FAMILIES with their types and protocols. Other families would make the kernel load modules."""
    only_route = [_load(_ARG2), *_refuse_unless_in((0,), errno.EPROTONOSUPPORT)]
    return _for_call(
        call,
        [
            _load(_ARG0),
            *_refuse_unless_in(ALLOWED_FAMILIES, errno.EAFNOSUPPORT),
            *_skip_unless_in(INTERNET_FAMILIES, _restrict_internet_sockets()),
            _load(_ARG0),
            *_skip_unless_in((AF_NETLINK,), only_route),
        ],
    )


def _restrict_internet_sockets() -> list[bytes]:
    return [
        _load(_ARG1),
        _instruction(_AND, TYPE_MASK),
        *_refuse_unless_in(ALLOWED_INTERNET_TYPES, errno.EPERM),
        _load(_ARG2),
        *_refuse_unless_in(ALLOWED_INTERNET_PROTOCOLS, errno.EPROTONOSUPPORT),
    ]


def _restrict_socket_use(architecture: Architecture) -> list[bytes]:
    """Refuse operations for which the kernel allocates memory that it does not charge to the control group."""
    return [
        *_restrict_socket_options(architecture.setsockopt),
        *_refuse_getsockopts(architecture.getsockopt),
        *_refuse_flags(architecture.sendto, _ARG3, MSG_MORE, errno.EOPNOTSUPP),
        *_refuse_flags(architecture.sendmsg, _ARG2, MSG_MORE, errno.EOPNOTSUPP),
        *_refuse_flags(architecture.sendmmsg, _ARG3, MSG_MORE, errno.EOPNOTSUPP),
        *_refuse_flags(architecture.splice, _ARG5, SPLICE_F_MORE, errno.EINVAL),
    ]


def _restrict_socket_options(call: int) -> list[bytes]:
    """Let ignored options succeed without effect, and report unlisted levels and options as unsupported."""
    levels: list[bytes] = []
    for level, options in seccomp_sockopt_and_ioctl_rules.ALLOWED_SOCKOPTS.items():
        ignored = seccomp_sockopt_and_ioctl_rules.IGNORED_SOCKOPTS.get(level, ())
        rules = [_load(_ARG2), *(_skip_unless_in(ignored, [_return_errno(0)]) if ignored else ())]
        rules += [*_refuse_unless_in(sorted(options), errno.ENOPROTOOPT), _return(_ALLOW)]
        levels += _skip_unless_in((level,), rules)
    return _for_call(call, [_load(_ARG1), *levels, _return_errno(errno.ENOPROTOOPT)])


def _refuse_getsockopts(call: int) -> list[bytes]:
    levels: list[bytes] = []
    for level, options in seccomp_sockopt_and_ioctl_rules.REFUSED_GETSOCKOPTS.items():
        refused = [_load(_ARG2), *_skip_unless_in(options, [_return_errno(errno.ENOPROTOOPT)]), _return(_ALLOW)]
        levels += _skip_unless_in((level,), refused)
    return _for_call(call, [_load(_ARG1), *levels])


def _refuse_unless_in(values: Sequence[int], error: int) -> list[bytes]:
    """Refuse unless the accumulator is one of `values`."""
    return _skip_if_in(values, [_return_errno(error)])


def _skip_if_in(values: Sequence[int], body: Sequence[bytes]) -> list[bytes]:
    """Run `body` unless the accumulator is one of `values`."""
    last = len(values) - 1
    checks = [_instruction(_JUMP_EQUAL, one, last - index + len(body), 0) for index, one in enumerate(values)]
    return [*checks, *body]


def _skip_unless_in(values: Sequence[int], body: Sequence[bytes]) -> list[bytes]:
    """Run `body` only if the accumulator is one of `values`. The accumulator is not restored after `body`."""
    last = len(values) - 1
    checks = [
        _instruction(_JUMP_EQUAL, one, last - index, len(body) if index == last else 0)
        for index, one in enumerate(values)
    ]
    return [*checks, *body]
