"""The system call filter is compared with an independent list of numbers from the kernel's headers.

Sources: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux 6.12. Each new row in
the filter's table needs a row here.
"""

import errno
import struct

import pytest

from doubles.bpf_interpreter import ALLOW, TRAP, errno_of, run_filter
from sandbox.runtimes import seccomp_filter

# Name: numbers on x86_64 and on aarch64; None if the architecture lacks the call.
DENIED: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117), "syslog": (103, 116), "uselib": (134, None), "ustat": (136, None), "sysfs": (139, None),
    "vhangup": (153, 58), "pivot_root": (155, 41), "_sysctl": (156, None), "adjtimex": (159, 171),
    "chroot": (161, 51), "acct": (163, 89), "settimeofday": (164, 170), "mount": (165, 40), "umount2": (166, 39),
    "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "sethostname": (170, 161),
    "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None), "create_module": (174, None),
    "init_module": (175, 105), "delete_module": (176, 106), "get_kernel_syms": (177, None),
    "query_module": (178, None), "quotactl": (179, 60), "nfsservctl": (180, 42), "lookup_dcookie": (212, 18),
    "clock_settime": (227, 112), "mbind": (237, 235), "set_mempolicy": (238, 237), "kexec_load": (246, 104),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "perf_event_open": (298, 241), "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "clock_adjtime": (305, 266),
    "setns": (308, 268), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "finit_module": (313, 273), "kexec_file_load": (320, 294), "bpf": (321, 280), "userfaultfd": (323, 282),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "pidfd_getfd": (438, 438), "mount_setattr": (442, 442),
    "quotactl_fd": (443, 443), "set_mempolicy_home_node": (450, 450), "sched_setattr": (314, 274),
}  # fmt: skip
ENOSYS: dict[str, tuple[int | None, int | None]] = {
    "io_setup": (206, 0), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "clone3": (435, 435), "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446), "memfd_secret": (447, 447),
}  # fmt: skip
ZERO_COPY: dict[str, tuple[int | None, int | None]] = {
    "sendfile": (40, 71), "splice": (275, 76), "vmsplice": (278, 75),
}  # fmt: skip
ATTRIBUTES: dict[str, tuple[int | None, int | None]] = {
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
}  # fmt: skip
WITHOUT_EFFECT: dict[str, tuple[int | None, int | None]] = {"setpriority": (141, 140), "ioprio_set": (251, 30)}
SYNC: dict[str, tuple[int | None, int | None]] = {"sync": (162, 81), "syncfs": (306, 267)}
AFFINITY: dict[str, tuple[int | None, int | None]] = {"sched_setaffinity": (203, 122)}
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "openat": (257, 56), "stat": (4, None),
    "newfstatat": (262, None), "statx": (332, 291), "mprotect": (10, 226), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "pread64": (17, 67), "pwrite64": (18, 68), "dup3": (292, 24), "nanosleep": (35, 101),
    "getpid": (39, 172), "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "exit": (60, 93), "exit_group": (231, 94), "wait4": (61, 260), "waitid": (247, 95), "kill": (62, 129),
    "tgkill": (234, 131), "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83),
    "ftruncate": (77, None), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "renameat2": (316, 276),
    "mkdirat": (258, 34), "unlinkat": (263, 35), "linkat": (265, 37), "symlinkat": (266, 36), "readlinkat": (267, 78),
    "fchmodat": (268, 53), "fchownat": (260, 54), "umask": (95, 166), "getuid": (102, 174), "setuid": (105, 146),
    "setgid": (106, 144), "setgroups": (116, 159), "capget": (125, 90), "capset": (126, 91),
    "arch_prctl": (158, None), "set_tid_address": (218, 96), "set_robust_list": (273, 99), "futex": (202, 98),
    "gettid": (186, 178), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21), "epoll_pwait": (281, 22), "eventfd2": (290, 19), "timerfd_create": (283, 85),
    "signalfd4": (289, 74), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27), "fanotify_mark": (301, 263),
    "connect": (42, 203), "accept4": (288, 242), "bind": (49, 200), "listen": (50, 201),
    "recvfrom": (45, 207), "recvmsg": (47, 212), "shutdown": (48, 210), "getsockopt": (55, 209),
    "getrandom": (318, 278),
    "copy_file_range": (326, 285), "fgetxattr": (193, 10), "flistxattr": (196, 13), "fremovexattr": (199, 16),
    "getrusage": (98, 165), "getrlimit": (97, 163), "sysinfo": (99, 179), "times": (100, 153),
    "clock_gettime": (228, 113), "clock_nanosleep": (230, 115),
    "rseq": (334, 293),
    "openat2": (437, 437), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "faccessat2": (439, 439), "io_destroy": (207, 1), "io_getevents": (208, 4), "io_submit": (209, 2),
    "get_mempolicy": (239, 236), "mlock": (149, 228), "membarrier": (324, 283),
    "mseal": (462, 462), "msgsnd": (69, 189),
    "mq_open": (240, 180),
}  # fmt: skip

# Calls whose arguments are checked, with common arguments.
ORDINARY_ARGUMENTS = {
    "clone": (0x3D0F00,),  # a thread
    "ioctl": (0, 0x5401),  # TCGETS
    "personality": (0xFFFFFFFF,),
    "setsockopt": (3, 1, 2),  # SOL_SOCKET, SO_REUSEADDR
    "socket": (1, 1, 0),  # AF_UNIX, SOCK_STREAM
    "socketpair": (1, 1, 0),
    "unshare": (0x200,),  # CLONE_FS
    "mmap": (0, 4096, 3, 0x22),  # MAP_PRIVATE | MAP_ANONYMOUS
    "fcntl": (3, 6),  # F_SETLK
    "sendto": (3, 0, 5, 0x4000),  # MSG_NOSIGNAL
    "sendmsg": (3, 0, 0x4000),
    "sendmmsg": (3, 0, 5, 0x4000),
    "memfd_create": (1, 3),  # MFD_CLOEXEC | MFD_ALLOW_SEALING
    "shmget": (0, 4096, 0o1600),
    "ppoll": (1, 1024),
    "close_range": (3, 100, 4),  # CLOSE_RANGE_CLOEXEC
    "seccomp": (2, 0),  # SECCOMP_GET_ACTION_AVAIL
    "pipe2": (0, 0x84800),  # O_CLOEXEC | O_NONBLOCK | O_DIRECT
    "pselect6": (1024,),
    "prlimit64": (0, 7, 1, 0),  # RLIMIT_NOFILE
    "setrlimit": (7, 1),
    "sched_setscheduler": (0, 0),  # SCHED_OTHER
    "lseek": (3, 0, 2),  # SEEK_END
    "mincore": (0, 16 << 20),
    "fallocate": (3, 1, 0, 4096),  # FALLOC_FL_KEEP_SIZE
    "fadvise64": (3, 0, 0, 3),  # POSIX_FADV_WILLNEED
    "semop": (1, 1, 32),
    "semtimedop": (1, 1, 32, 1),
    "prctl": (38, 1),  # PR_SET_NO_NEW_PRIVS
    "madvise": (0, 4096, 4),  # MADV_DONTNEED
    "process_madvise": (3, 0, 1, 20, 0),  # MADV_COLD
}
CHECKED_CALLS: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220), "ioctl": (16, 29), "personality": (135, 92), "setsockopt": (54, 208), "socket": (41, 198),
    "socketpair": (53, 199), "unshare": (272, 97), "mmap": (9, 222), "fcntl": (72, 25), "sendto": (44, 206),
    "sendmsg": (46, 211), "sendmmsg": (307, 269), "memfd_create": (319, 279), "shmget": (29, 194),
    "ppoll": (271, 73), "pselect6": (270, 72), "prlimit64": (302, 261), "setrlimit": (160, 164),
    "close_range": (436, 436), "seccomp": (317, 277), "pipe2": (293, 59),
    "sched_setscheduler": (144, 119), "semop": (65, 193), "semtimedop": (220, 192),
    "prctl": (157, 167), "madvise": (28, 233), "process_madvise": (440, 440), "lseek": (8, 62), "fallocate": (285, 47),
    "mincore": (27, 232), "fadvise64": (221, 223),
}  # fmt: skip

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LAST_KNOWN = 462  # mseal
SKIPPED = 0x00050000  # SECCOMP_RET_ERRNO without an errno
PROGRAMS = {architecture: seccomp_filter.assemble_filter(architecture) for architecture in AUDIT_ARCH}


def call_number(architecture: str, numbers: tuple[int | None, int | None]) -> int | None:
    return numbers[list(AUDIT_ARCH).index(architecture)]


def rows(*tables: dict[str, tuple[int | None, int | None]]) -> list[tuple[str, str, int]]:
    """Return the architecture, name and number of each call, for the architectures that have the call."""
    numbered = [
        (architecture, name, call_number(architecture, numbers))
        for architecture in AUDIT_ARCH
        for table in tables
        for name, numbers in table.items()
    ]
    return [(architecture, name, number) for architecture, name, number in numbered if number is not None]


def action(architecture: str, number: int, *arguments: int) -> int:
    return run_filter(PROGRAMS[architecture], audit_arch=AUDIT_ARCH[architecture], number=number, arguments=arguments)


@pytest.mark.parametrize(("architecture", "name", "number"), rows(DENIED))
def test_denied_call_returns_eperm(architecture: str, name: str, number: int):
    assert errno_of(action(architecture, number)) == errno.EPERM, name
    assert errno_of(action(architecture, number, *[0xFFFFFFFFFFFFFFFF] * 6)) == errno.EPERM, name


@pytest.mark.parametrize(("architecture", "name", "number"), rows(ENOSYS))
def test_call_fails_with_enosys(architecture: str, name: str, number: int):
    assert errno_of(action(architecture, number)) == errno.ENOSYS, name


@pytest.mark.parametrize(("architecture", "name", "number"), rows(ZERO_COPY))
def test_zero_copy_call_returns_einval(architecture: str, name: str, number: int):
    assert errno_of(action(architecture, number, 3, 4, 0, 4096)) == errno.EINVAL, name


@pytest.mark.parametrize(("architecture", "name", "number"), rows(ATTRIBUTES))
def test_call_that_sets_an_extended_attribute_returns_eopnotsupp(architecture: str, name: str, number: int):
    for size in (0, 256, 65536):
        assert errno_of(action(architecture, number, 3, 0x1000, 0x2000, size, 0)) == errno.EOPNOTSUPP, name


@pytest.mark.parametrize(("architecture", "name", "number"), rows(WITHOUT_EFFECT))
def test_call_that_lowers_a_priority_succeeds(architecture: str, name: str, number: int):
    for priority in (0, 5, 19, 3 << 13):
        assert action(architecture, number, 1, 0, priority) == SKIPPED, name


@pytest.mark.parametrize(("architecture", "name", "number"), rows(AFFINITY))
def test_call_that_moves_a_thread_to_another_processor_succeeds_without_effect(
    architecture: str, name: str, number: int
):
    for process in (0, 1, 100):
        assert action(architecture, number, process, 8, 0x1000) == SKIPPED, name


@pytest.mark.parametrize(("architecture", "name", "number"), rows(SYNC))
def test_call_that_writes_a_file_system_succeeds_without_effect(architecture: str, name: str, number: int):
    for file in (0, 3, 0xFFFFFFFF):
        assert action(architecture, number, file) == SKIPPED, name


@pytest.mark.parametrize("architecture", AUDIT_ARCH)
def test_higher_priority_is_denied(architecture: str):
    number = call_number(architecture, WITHOUT_EFFECT["setpriority"])
    assert number is not None
    for priority in (-1, -20):
        assert errno_of(action(architecture, number, 0, 0, priority & 0xFFFFFFFF)) == errno.EACCES


@pytest.mark.parametrize("architecture", AUDIT_ARCH)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sched_setscheduler", (0, 5)),  # SCHED_IDLE
        ("sched_setscheduler", (0, 0x40000005)),  # with SCHED_RESET_ON_FORK
        ("ioctl", (3, 0x5452)),  # FIOASYNC
        ("fadvise64", (3, 0, 0, 4)),  # POSIX_FADV_DONTNEED
        ("setrlimit", (4, 0x1000)),  # RLIMIT_CORE
        ("prlimit64", (0, 4, 0x1000, 0)),
        ("prlimit64", (0, 4, 1 << 32, 0)),
    ],
)
def test_argument_without_effect_succeeds(architecture: str, name: str, arguments: tuple[int, ...]):
    number = call_number(architecture, CHECKED_CALLS[name])
    assert number is not None
    assert action(architecture, number, *arguments) == SKIPPED


@pytest.mark.parametrize("architecture", AUDIT_ARCH)
def test_core_dump_limit_can_be_read_but_not_changed(architecture: str):
    number = call_number(architecture, CHECKED_CALLS["prlimit64"])
    assert number is not None
    assert action(architecture, number, 0, 4, 0, 0x1000) == ALLOW
    for old in (0x1000, 1 << 32):
        assert errno_of(action(architecture, number, 0, 4, 0x1000, old)) == errno.EPERM
        assert action(architecture, number, 0, 7, 0x1000, old) == ALLOW


@pytest.mark.parametrize(("architecture", "name", "number"), rows(ALLOWED, CHECKED_CALLS))
def test_common_call_is_allowed(architecture: str, name: str, number: int):
    assert action(architecture, number, *ORDINARY_ARGUMENTS.get(name, ())) == ALLOW, name


@pytest.mark.parametrize(("architecture", "name", "number"), rows(ALLOWED))
def test_arguments_of_calls_without_an_argument_rule_are_not_checked(architecture: str, name: str, number: int):
    for argument in (0xFFFFFFFFFFFFFFFF, 0x10000000, 0x5412, 17):
        assert action(architecture, number, *[argument] * 6) == ALLOW, name


@pytest.mark.parametrize("architecture", AUDIT_ARCH)
@pytest.mark.parametrize("other", CHECKED_CALLS)
def test_argument_is_not_mistaken_for_a_call_number(architecture: str, other: str):
    argument = call_number(architecture, CHECKED_CALLS[other])
    for name, arguments in (("clone", (argument,)), ("unshare", (argument,)), ("mmap", (5, argument))):
        if not (name == "unshare" and argument & 0x80):
            number = call_number(architecture, CHECKED_CALLS[name])
            assert action(architecture, number, *arguments, 99, 99) == ALLOW, name


@pytest.mark.parametrize("architecture", AUDIT_ARCH)
def test_calls_that_are_not_listed_as_rejected_are_allowed(architecture: str):
    ordinary = {
        call_number(architecture, CHECKED_CALLS[name]): arguments for name, arguments in ORDINARY_ARGUMENTS.items()
    }
    refused = {
        number for number in range(LAST_KNOWN + 1) if action(architecture, number, *ordinary.get(number, ())) != ALLOW
    }
    assert refused == {
        number
        for row_architecture, _, number in rows(DENIED, ENOSYS, ZERO_COPY, ATTRIBUTES, WITHOUT_EFFECT, SYNC, AFFINITY)
        if row_architecture == architecture
    }


@pytest.mark.parametrize("architecture", AUDIT_ARCH)
def test_unknown_calls_return_enosys(architecture: str):
    assert {errno_of(action(architecture, number)) for number in range(LAST_KNOWN + 1, LAST_KNOWN + 100)} == {
        errno.ENOSYS
    }


@pytest.mark.parametrize("architecture", AUDIT_ARCH)
def test_filter_traps_calls_of_other_architectures(architecture: str):
    for audit_arch in (*AUDIT_ARCH.values(), 0x40000003, 0x40000028, 0):  # 32-bit x86, 32-bit ARM
        decision = run_filter(PROGRAMS[architecture], audit_arch=audit_arch, number=LAST_KNOWN)
        assert decision == (ALLOW if audit_arch == AUDIT_ARCH[architecture] else TRAP)


@pytest.mark.parametrize("architecture", AUDIT_ARCH)
def test_each_row_of_the_filter_has_a_row_in_the_independent_list(architecture: str):
    table = seccomp_filter.ARCHITECTURES[architecture].denied | seccomp_filter._DENIED_ON_ALL_ARCHITECTURES
    assert table == {
        name: number for row_architecture, name, number in rows(DENIED) if row_architecture == architecture
    }
    enosys_calls = seccomp_filter._ENOSYS_CALLS | {"io_setup": seccomp_filter.ARCHITECTURES[architecture].io_setup}
    assert enosys_calls == {
        name: number for row_architecture, name, number in rows(ENOSYS) if row_architecture == architecture
    }


# Allowed arguments, and rejected arguments with their error. Add rows when the filter checks more arguments.
ALLOWED_ARGUMENTS = [
    *[("personality", (persona,)) for persona in (0x0, 0x8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF)],
    *[("socket", (family, 1, 0)) for family in (1, 2, 10, 16)],
    ("mmap", (0, 4096, 3, 0x1)),  # MAP_SHARED
    ("mmap", (0, 4096, 3, 0xFBFFFF & ~0x40000)),
    *[("ioctl", (0, request)) for request in (0x5401, 0x5411, 0x5413, 0x541B, 0x5421)],
    ("clone", (0x1200011,)),
    *[("fcntl", (3, 4, flags)) for flags in (0, 0x800, 0xC00, 0x4800)],  # F_SETFL: O_NONBLOCK, O_APPEND, O_DIRECT
    ("fcntl", (3, 4, 0xFFFFDFFF)),  # F_SETFL with all flags except O_ASYNC
    # F_DUPFD F_SETFD F_GETFL F_SETOWN F_DUPFD_CLOEXEC F_ADD_SEALS
    *[("fcntl", (3, command, 0x2000)) for command in (0, 2, 3, 8, 1030, 1033)],
    *[("sched_setscheduler", (0, policy)) for policy in (0, 1, 2, 3)],  # the kernel denies real-time policies
    *[("unshare", (flags,)) for flags in (0x1, 0x200, 0x7F)],  # the kernel checks the other flags
]
REFUSED_ARGUMENTS = [
    *[("personality", (persona,), errno.EPERM) for persona in (0x1, 0x9, 0x60000, 0x400000, 0x20009, 0xFFFFFFFE)],
    *[("socket", (family, 3, 0), errno.EAFNOSUPPORT) for family in (0, 3, 9, 11, 15, 17, 31, 38, 40, 44)],
    *[("socket", (16, 3, protocol), errno.EPROTONOSUPPORT) for protocol in (1, 12, 15, 16)],
    *[("ioctl", (0, request), errno.EPERM) for request in (0x5412, 0x541C)],
    *[("ioctl", (0, request), errno.ENOTTY) for request in (0x541D, 0x40086602)],  # TIOCCONS, FS_IOC_SETFLAGS
    *[
        (name, (flag,), errno.EPERM)
        for name in ("clone", "unshare")
        for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x10000011)
    ],
    ("unshare", (0x80,), errno.EPERM),
    ("mmap", (0, 4096, 3, 0x40022), errno.ENOMEM),
    ("mmap", (0, 4096, 3, 0x40000), errno.ENOMEM),
    *[("memfd_create", (1, flags), errno.EINVAL) for flags in (4, 0xFFFFFFFF)],
    ("shmget", (0, 4096, 0o5600), errno.ENOMEM),
    *[("fcntl", (3, command), errno.EINVAL) for command in (36, 37, 38)],
    *[("fcntl", (3, command), errno.EINVAL) for command in (1024, 1026)],  # F_SETLEASE, F_NOTIFY
    *[("fcntl", (3, 4, flags), errno.EINVAL) for flags in (0x2000, 0x2800)],  # F_SETFL with O_ASYNC
    ("sendto", (3, 0, 5, 0x8000), errno.EOPNOTSUPP),
    ("sendmsg", (3, 0, 0x8000), errno.EOPNOTSUPP),
    ("sendmmsg", (3, 0, 5, 0x8000), errno.EOPNOTSUPP),
    ("ppoll", (1, 1025), errno.EINVAL),
    *[(name, (1, 1, count), errno.E2BIG) for name in ("semop", "semtimedop") for count in (33, 500)],
    ("close_range", (3, 100, 2), errno.EINVAL),
    *[("seccomp", (mode, flags), errno.EINVAL) for mode in (0, 1) for flags in (0, 1, 2, 8)],
    ("pipe2", (0, 0x80080), errno.ENOPKG),
    ("unshare", (0x400,), errno.EPERM),
    ("clone", (0x3D0F00 & ~0x400,), errno.EPERM),  # a thread with its own open files
    ("pselect6", (4097,), errno.EINVAL),
    *[("socket", (family, 10, 0), errno.EPERM) for family in (2, 10)],
    *[("socket", (family, 1, protocol), errno.EPROTONOSUPPORT) for family in (2, 10) for protocol in (33, 132, 262)],
    *[("socketpair", (family, 1, 0), errno.EAFNOSUPPORT) for family in (17, 38, 40, 44)],
    *[("setsockopt", (3, 1, option), errno.ENOPROTOOPT) for option in (18, 26, 50, 51, 52)],
]


@pytest.mark.parametrize("architecture", AUDIT_ARCH)
@pytest.mark.parametrize(("name", "arguments"), ALLOWED_ARGUMENTS)
def test_common_arguments_are_allowed(architecture: str, name: str, arguments: tuple[int, ...]):
    number = call_number(architecture, CHECKED_CALLS[name])
    assert number is not None
    assert action(architecture, number, *arguments) == ALLOW


@pytest.mark.parametrize("architecture", AUDIT_ARCH)
@pytest.mark.parametrize(("name", "arguments", "error"), REFUSED_ARGUMENTS)
def test_dangerous_arguments_are_rejected(architecture: str, name: str, arguments: tuple[int, ...], error: int):
    number = call_number(architecture, CHECKED_CALLS[name])
    assert number is not None
    assert errno_of(action(architecture, number, *arguments)) == error
    high = tuple(argument | 7 << 32 for argument in arguments)
    assert errno_of(action(architecture, number, *high)) == error, "the kernel reads only the low half of these"


@pytest.mark.parametrize("architecture", AUDIT_ARCH)
def test_filter_is_valid_bpf(architecture: str):
    instructions = list(struct.iter_unpack("=HBBI", PROGRAMS[architecture]))
    loads = [value for code, _, _, value in instructions if code == 0x20]
    assert set(loads) <= {*range(0, 64, 4)}, "within struct seccomp_data"
    for at, (code, when_true, when_false, _) in enumerate(instructions):
        is_jump = code in (0x15, 0x25, 0x45)
        assert is_jump or (code in (0x20, 0x06, 0x54) and (when_true, when_false) == (0, 0))
        assert at + 1 + max(when_true, when_false) < len(instructions) or code == 0x06
    assert instructions[-1] == (0x06, 0, 0, ALLOW)


SETSOCKOPT = {"x86_64": 54, "aarch64": 208}
SO, IP, TCP, UDP, IPV6, NETLINK = 1, 0, 6, 17, 41, 270
ALLOWED_SOCKET_OPTIONS = {
    SO: {
        "REUSEADDR": 2, "TYPE": 3, "ERROR": 4, "DONTROUTE": 5, "BROADCAST": 6, "KEEPALIVE": 9,
        "OOBINLINE": 10,
        "NO_CHECK": 11, "PRIORITY": 12, "REUSEPORT": 15, "PASSCRED": 16, "SNDLOWAT": 19,
        "RCVTIMEO_OLD": 20,
        "SNDTIMEO_OLD": 21, "BINDTODEVICE": 25, "TIMESTAMP_OLD": 29, "PASSSEC": 34, "TIMESTAMPNS_OLD": 35,
        "RXQ_OVFL": 40,
        "PEEK_OFF": 42, "INCOMING_CPU": 49, "TIMESTAMP_NEW": 63, "TIMESTAMPNS_NEW": 64,
        "RCVTIMEO_NEW": 66, "SNDTIMEO_NEW": 67, "PASSPIDFD": 76,
    },
    IP: {
        "TOS": 1, "TTL": 2, "RECVOPTS": 6, "RETOPTS": 7, "PKTINFO": 8, "MTU_DISCOVER": 10, "RECVTTL": 12, "RECVTOS": 13,
        "FREEBIND": 15, "RECVORIGDSTADDR": 20, "CHECKSUM": 23, "BIND_ADDRESS_NO_PORT": 24, "RECVFRAGSIZE": 25,
        "RECVERR_RFC4884": 26, "MULTICAST_IF": 32, "MULTICAST_TTL": 33, "MULTICAST_LOOP": 34, "ADD_MEMBERSHIP": 35,
        "DROP_MEMBERSHIP": 36, "MULTICAST_ALL": 49, "UNICAST_IF": 50, "LOCAL_PORT_RANGE": 51,
    },
    TCP: {
        "NODELAY": 1, "MAXSEG": 2, "CORK": 3, "KEEPIDLE": 4, "KEEPINTVL": 5, "KEEPCNT": 6, "SYNCNT": 7, "LINGER2": 8,
        "WINDOW_CLAMP": 10, "QUICKACK": 12, "CONGESTION": 13, "THIN_LINEAR_TIMEOUTS": 16, "THIN_DUPACK": 17,
        "USER_TIMEOUT": 18, "FASTOPEN": 23, "NOTSENT_LOWAT": 25, "FASTOPEN_CONNECT": 30, "FASTOPEN_NO_COOKIE": 34,
        "INQ": 36,
    },
    UDP: {"SEGMENT": 103},
    IPV6: {
        "2292PKTINFO": 2, "2292HOPLIMIT": 8, "FLOWINFO": 11, "UNICAST_HOPS": 16, "MULTICAST_IF": 17,
        "MULTICAST_HOPS": 18,
        "MULTICAST_LOOP": 19, "DROP_MEMBERSHIP": 21, "MTU_DISCOVER": 23, "MTU": 24, "V6ONLY": 26, "MULTICAST_ALL": 29,
        "RECVERR_RFC4884": 31, "FLOWINFO_SEND": 33, "RECVPKTINFO": 49, "RECVHOPLIMIT": 51, "RECVPATHMTU": 60,
        "DONTFRAG": 62, "RECVTCLASS": 66, "TCLASS": 67, "AUTOFLOWLABEL": 70, "ADDR_PREFERENCES": 72,
        "RECVORIGDSTADDR": 74, "UNICAST_IF": 76, "FREEBIND": 78,
    },
    NETLINK: {
        "ADD_MEMBERSHIP": 1, "DROP_MEMBERSHIP": 2, "PKTINFO": 3, "NO_ENOBUFS": 5, "CAP_ACK": 10, "EXT_ACK": 11,
        "GET_STRICT_CHK": 12,
    },
}  # fmt: skip
"""Options by level, from the kernel's headers (asm-generic/socket.h, linux/in.h, tcp.h, udp.h, in6.h, netlink.h)."""

IGNORED_SOCKET_OPTIONS = {SO: {7, 8, 13, 47}, IP: {11}, TCP: {9}, UDP: {104}, IPV6: {25}}
"""The call succeeds without effect.

SO_SNDBUF, SO_RCVBUF, SO_LINGER, SO_MAX_PACING_RATE; IP_RECVERR; TCP_DEFER_ACCEPT; UDP_GRO; IPV6_RECVERR.
"""


@pytest.mark.parametrize("level", ALLOWED_SOCKET_OPTIONS)
@pytest.mark.parametrize("architecture", AUDIT_ARCH)
def test_only_listed_socket_options_are_allowed(architecture: str, level: int):
    calls = {option: action(architecture, SETSOCKOPT[architecture], 3, level, option) for option in range(128)}
    assert {option for option, result in calls.items() if result == ALLOW} == set(
        ALLOWED_SOCKET_OPTIONS[level].values()
    )
    assert {option for option, result in calls.items() if result == SKIPPED} == IGNORED_SOCKET_OPTIONS.get(level, set())
