"""The seccomp filters of both architectures, evaluated by a small interpreter."""

import errno
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.runtimes import seccomp_filter

ALLOW, TRAP = 0x7FFF0000, 0x00030000
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
UNSHARE = {"x86_64": 272, "aarch64": 97}
SOCKET = {"x86_64": 41, "aarch64": 198}
IOCTL = {"x86_64": 16, "aarch64": 29}
LSEEK = {"x86_64": 8, "aarch64": 62}
PERSONALITY = {"x86_64": 135, "aarch64": 92}
PTRACE = {"x86_64": 101, "aarch64": 117}
READ = {"x86_64": 0, "aarch64": 63}
EXECVE = {"x86_64": 59, "aarch64": 221}
SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
SETSOCKOPT = {"x86_64": 54, "aarch64": 208}
GETSOCKOPT = {"x86_64": 55, "aarch64": 209}
SENDTO = {"x86_64": 44, "aarch64": 206}
SENDMSG = {"x86_64": 46, "aarch64": 211}
SENDMMSG = {"x86_64": 307, "aarch64": 269}
SPLICE = {"x86_64": 275, "aarch64": 76}
VMSPLICE = {"x86_64": 278, "aarch64": 75}
SENDFILE = {"x86_64": 40, "aarch64": 71}
MMAP = {"x86_64": 9, "aarch64": 222}
MEMFD_CREATE = {"x86_64": 319, "aarch64": 279}
SHMGET = {"x86_64": 29, "aarch64": 194}
SKIPPED = 0
"""The call succeeds and does nothing."""
IO_SETUP = {"x86_64": 206, "aarch64": 0}
IO_DESTROY = {"x86_64": 207, "aarch64": 1}
Assemble = Callable[[str], bytes]
all_architectures = pytest.mark.parametrize("architecture", seccomp_filter.ARCHITECTURES)


def evaluate(
    architecture: str, number: int, *arguments: int, audit_arch: int | None = None, code: bytes | None = None
) -> int:
    """Return the kernel's decision: ALLOW, TRAP, an errno or SKIPPED. `code` replaces the sandbox filter."""
    padded = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack(
        "=IIQ6Q", number & 0xFFFFFFFF, AUDIT_ARCH[architecture] if audit_arch is None else audit_arch, 0, *padded
    )
    program = list(struct.iter_unpack("=HBBI", seccomp_filter.assemble_filter(architecture) if code is None else code))
    accumulator, at = 0, 0
    while True:
        operation, when_true, when_false, value = program[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif operation == 0x54:
            accumulator &= value
        elif operation == 0x06:
            return value & 0xFFFF if value >> 16 == 5 else value
        else:
            holds = {0x15: accumulator == value, 0x25: accumulator > value, 0x45: bool(accumulator & value)}[operation]
            at += when_true if holds else when_false


@all_architectures
def test_ordinary_calls_are_allowed(architecture: str):
    for number in (READ[architecture], EXECVE[architecture]):
        assert evaluate(architecture, number, 1, 2, 3) == ALLOW


@all_architectures
def test_only_the_guest_filter_allows_installing_filters(architecture: str):
    guest = seccomp_filter.assemble_filter(architecture, allows_filters=True)
    seccomp_call, prctl = {"x86_64": (317, 157), "aarch64": (277, 167)}[architecture]
    for number, operation in ((seccomp_call, 0), (seccomp_call, 1), (prctl, 22)):
        assert evaluate(architecture, number, operation) == errno.EINVAL
        assert evaluate(architecture, number, operation, code=guest) == ALLOW
    assert evaluate(architecture, prctl, 67, code=guest) == errno.EINVAL  # PR_SET_MEMORY_MERGE


@all_architectures
def test_thread_filter_allows_threads_and_refuses_processes(architecture: str):
    code = seccomp_filter.assemble_thread_filter(architecture)
    clone, forks = CLONE[architecture], {"x86_64": (57, 58), "aarch64": ()}[architecture]
    assert evaluate(architecture, clone, 0x3D0F00, code=code) == ALLOW  # a thread created by the C library
    for number, flags in ((clone, 0x1200011), (clone, 0x4111), *((fork, 0) for fork in forks)):
        assert evaluate(architecture, number, flags, code=code) == errno.EPERM
    for number in (READ[architecture], EXECVE[architecture]):
        assert evaluate(architecture, number, 17, code=code) == ALLOW


@all_architectures
def test_calls_of_another_architecture_are_trapped(architecture: str):
    other = next(audit_arch for name, audit_arch in AUDIT_ARCH.items() if name != architecture)
    assert evaluate(architecture, READ[architecture], audit_arch=other) == TRAP
    assert evaluate(architecture, READ[architecture], audit_arch=0x40000003) == TRAP  # 32-bit x86


@all_architectures
@pytest.mark.parametrize(
    "number", [425, 426, 427, 435, 444, 445, 446, 447, 463, 500, 0x40000000, 0x40000000 + 59, 0xFFFFFFFF]
)
def test_calls_with_a_fallback_and_unknown_calls_return_enosys(architecture: str, number: int):
    assert evaluate(architecture, number) == errno.ENOSYS


@all_architectures
def test_io_setup_returns_enosys(architecture: str):
    assert evaluate(architecture, IO_SETUP[architecture], 1, 0x1000) == errno.ENOSYS
    assert evaluate(architecture, IO_DESTROY[architecture], 0x1000) == ALLOW
    other = next(number for name, number in IO_SETUP.items() if name != architecture)
    assert evaluate(architecture, other, 3, 0x1000, 8) == ALLOW  # sendto on aarch64, read on x86_64


@all_architectures
def test_denied_calls_return_eperm(architecture: str):
    table = {**seccomp_filter.ARCHITECTURES[architecture].denied, "mount_setattr": 442, "pidfd_getfd": 438}
    assert {evaluate(architecture, number) for number in table.values()} == {errno.EPERM}
    assert evaluate(architecture, PTRACE[architecture]) == errno.EPERM


@all_architectures
@given(number=st.integers(0, 462))
def test_each_known_call_is_allowed_or_in_a_table(architecture: str, number: int):
    numbers = seccomp_filter.ARCHITECTURES[architecture]
    enosys = {*range(425, 428), 435, *range(444, 448), IO_SETUP[architecture]}
    zero_copy = {SPLICE[architecture], VMSPLICE[architecture], SENDFILE[architecture]}
    refused = {*numbers.denied.values(), *range(428, 434), 438, 442, 443, 450, *enosys, *zero_copy}
    refused |= {*numbers.setxattr_calls, *numbers.sync_calls}
    refused |= {numbers.setpriority, numbers.ioprio_set, numbers.sched_setaffinity}
    harmless = {numbers.socket: (1,), numbers.socketpair: (1,), numbers.setsockopt: (3, 1, 2)}
    harmless[numbers.ioctl] = (3, 0x5401)  # TCGETS
    harmless[numbers.seccomp] = (2,)  # SECCOMP_GET_ACTION_AVAIL
    assert (evaluate(architecture, number, *harmless.get(number, (0,))) == ALLOW) == (number not in refused)


@all_architectures
@pytest.mark.parametrize("flag", [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000])
def test_new_namespaces_are_denied(architecture: str, flag: int):
    assert evaluate(architecture, CLONE[architecture], flag | 17) == errno.EPERM
    assert evaluate(architecture, UNSHARE[architecture], flag) == errno.EPERM


@all_architectures
def test_threads_and_processes_are_allowed(architecture: str):
    assert evaluate(architecture, CLONE[architecture], 0x3D0F00) == ALLOW  # a thread created by the C library
    assert evaluate(architecture, CLONE[architecture], 0x1200011) == ALLOW  # a fork by the C library
    assert evaluate(architecture, UNSHARE[architecture], 0x200) == ALLOW  # a working directory per thread
    assert evaluate(architecture, UNSHARE[architecture], 0x80) == errno.EPERM  # a new time namespace


@all_architectures
@pytest.mark.parametrize("call", [SOCKET, SOCKETPAIR], ids=["socket", "socketpair"])
def test_socket_families_and_types_and_protocols_are_limited(architecture: str, call: dict[str, int]):
    number = call[architecture]
    assert {family for family in range(64) if evaluate(architecture, number, family, 1, 0) == ALLOW} == {1, 2, 10, 16}
    assert evaluate(architecture, number, 17, 3, 0) == errno.EAFNOSUPPORT
    for family in (2, 10):
        types = {
            socket_type for socket_type in range(16) if evaluate(architecture, number, family, socket_type, 0) == ALLOW
        }
        assert types == {1, 2}
        protocols = {
            protocol for protocol in range(300) if evaluate(architecture, number, family, 1, protocol) == ALLOW
        }
        assert protocols == {0, 6, 17}
        assert evaluate(architecture, number, family, 10, 0) == errno.EPERM  # SOCK_PACKET
        assert evaluate(architecture, number, family, 1 | 0x80000 | 0x800, 6) == ALLOW  # SOCK_CLOEXEC, SOCK_NONBLOCK
        assert evaluate(architecture, number, family, 10 | 0x80000, 0) == errno.EPERM
    assert evaluate(architecture, number, 1, 5, 1) == ALLOW
    assert evaluate(architecture, number, 16, 3, 0) == ALLOW
    assert evaluate(architecture, number, 16, 3, 12) == errno.EPROTONOSUPPORT


SOCKET_OPTION_FILTERS = {
    "sandbox": seccomp_filter.assemble_filter,
    "socket": seccomp_filter.assemble_socket_and_extent_filter,
}
both_filters = pytest.mark.parametrize("assemble", SOCKET_OPTION_FILTERS.values(), ids=SOCKET_OPTION_FILTERS)


@all_architectures
@both_filters
@pytest.mark.parametrize(
    ("level", "option"),
    # SO_REUSEADDR, SO_KEEPALIVE, SO_REUSEPORT, SO_RCVTIMEO, SO_RCVTIMEO_NEW; IP_TTL,
    # IP_MTU_DISCOVER, IP_ADD_MEMBERSHIP; TCP_NODELAY, TCP_CORK, TCP_USER_TIMEOUT; UDP_SEGMENT; IPV6_V6ONLY,
    # IPV6_RECVPKTINFO; NETLINK_EXT_ACK
    [(1, 2), (1, 9), (1, 15), (1, 20), (1, 66), (0, 2), (0, 10), (0, 35), (6, 1), (6, 3), (6, 18),
     (17, 103), (41, 26), (41, 49), (270, 11)],
)  # fmt: skip
def test_ordinary_socket_options_are_allowed(architecture: str, assemble: Assemble, level: int, option: int):
    assert evaluate(architecture, SETSOCKOPT[architecture], 3, level, option, code=assemble(architecture)) == ALLOW


@all_architectures
@both_filters
@pytest.mark.parametrize(
    ("level", "option"),
    # SO_RCVLOWAT, SO_ATTACH_FILTER, SO_DETACH_FILTER, SO_TIMESTAMPING_OLD, SO_TIMESTAMPING_NEW, SO_LOCK_FILTER,
    # SO_ATTACH_BPF, SO_ATTACH_REUSEPORT_CBPF, SO_ATTACH_REUSEPORT_EBPF, SO_RESERVE_MEM, SO_ZEROCOPY;
    # IP_OPTIONS, IP_MINTTL, IP_IPSEC_POLICY, IP_ADD_SOURCE_MEMBERSHIP, IP_MSFILTER, MCAST_JOIN_SOURCE_GROUP,
    # IPT_SO_SET_REPLACE; TCP_MD5SIG, TCP_ULP, TCP_REPAIR, TCP_FASTOPEN_KEY; UDP_CORK, UDP_ENCAP; IPV6_ADDRFORM,
    # IPV6_JOIN_GROUP, IPV6_JOIN_ANYCAST, IPV6_FLOWLABEL_MGR, IPV6_HOPOPTS, IPV6_MINHOPCOUNT; unknown levels
    [(1, 18), (1, 26), (1, 27), (1, 37), (1, 65), (1, 44), (1, 50), (1, 51), (1, 52), (1, 73), (1, 60),
     (0, 4), (0, 21), (0, 16), (0, 39), (0, 41), (0, 46),
     (0, 64), (6, 14), (6, 31), (6, 19), (6, 33), (17, 1), (17, 100), (41, 1), (41, 20), (41, 27), (41, 32), (41, 54),
     (41, 73), (132, 0), (255, 1), (263, 1), (279, 1), (284, 1)],
)  # fmt: skip
def test_unlisted_socket_options_return_enoprotoopt(architecture: str, assemble: Assemble, level: int, option: int):
    assert (
        evaluate(architecture, SETSOCKOPT[architecture], 3, level, option, code=assemble(architecture))
        == errno.ENOPROTOOPT
    )


@all_architectures
@both_filters
@pytest.mark.parametrize(("level", "option"), [(1, 8), (1, 13), (0, 11), (6, 9), (41, 25)])
def test_some_socket_options_succeed_without_effect(architecture: str, assemble: Assemble, level: int, option: int):
    assert evaluate(architecture, SETSOCKOPT[architecture], 3, level, option, code=assemble(architecture)) == SKIPPED
    # TCP_LINGER2
    assert evaluate(architecture, SETSOCKOPT[architecture], 3, 6, 8, code=assemble(architecture)) == ALLOW


@all_architectures
@both_filters
def test_getsockopt_is_allowed_except_for_a_few_options(architecture: str, assemble: Assemble):
    code = assemble(architecture)
    # TCP_ZEROCOPY_RECEIVE, IP_MSFILTER, MCAST_MSFILTER, NETLINK_LIST_MEMBERSHIPS
    for level, option in ((6, 35), (0, 41), (0, 48), (41, 48), (270, 9)):
        assert evaluate(architecture, GETSOCKOPT[architecture], 3, level, option, code=code) == errno.ENOPROTOOPT
    # TCP_INFO, TCP_NODELAY, SO_ERROR, SO_TIMESTAMPNS, IP_RECVTOS, IPV6_V6ONLY, NETLINK_EXT_ACK
    for level, option in ((6, 11), (6, 1), (1, 4), (1, 35), (0, 13), (41, 26), (270, 11)):
        assert evaluate(architecture, GETSOCKOPT[architecture], 3, level, option, code=code) == ALLOW


@all_architectures
@both_filters
def test_msg_more_is_not_supported(architecture: str, assemble: Assemble):
    code = assemble(architecture)
    msg_more, msg_fastopen = 0x8000, 0x20000000
    for flags, expected in (
        (0, ALLOW),
        (0x4000, ALLOW),
        (msg_fastopen, ALLOW),
        (msg_more, errno.EOPNOTSUPP),
        (msg_more | 0x40, 95),
    ):
        assert evaluate(architecture, SENDTO[architecture], 3, 0, 9, flags, code=code) == expected
        assert evaluate(architecture, SENDMSG[architecture], 3, 0, flags, code=code) == expected
        assert evaluate(architecture, SENDMMSG[architecture], 3, 0, 9, flags, code=code) == expected
    assert evaluate(architecture, SPLICE[architecture], 3, 0, 4, 0, 9, 5, code=code) == errno.EINVAL


@all_architectures
def test_zero_copy_calls_return_einval(architecture: str):
    for number in (SPLICE[architecture], VMSPLICE[architecture], SENDFILE[architecture]):
        assert evaluate(architecture, number, 3, 0, 4, 0, 9, 1) == errno.EINVAL
    copy_file_range = {"x86_64": 326, "aarch64": 285}[architecture]
    assert evaluate(architecture, copy_file_range, 3, 0, 4, 0, 9) == ALLOW
    assert (
        evaluate(
            architecture,
            SPLICE[architecture],
            3,
            0,
            4,
            0,
            9,
            1,
            code=seccomp_filter.assemble_socket_and_extent_filter(architecture),
        )
        == ALLOW
    )


@all_architectures
def test_threads_must_share_open_files(architecture: str):
    thread, files, memory = 0x10000, 0x400, 0x800 | 0x100
    assert evaluate(architecture, CLONE[architecture], thread | memory) == errno.EPERM
    assert evaluate(architecture, CLONE[architecture], thread | memory | files) == ALLOW
    assert evaluate(architecture, CLONE[architecture], files | 0x100 | 17) == ALLOW
    assert evaluate(architecture, CLONE[architecture], 0x4111) == ALLOW  # vfork
    assert evaluate(architecture, UNSHARE[architecture], files) == errno.EPERM
    assert [evaluate(architecture, 436, 3, 0xFFFFFFFF, flags) for flags in (0, 4, 2, 6)] == [ALLOW, ALLOW, 22, 22]


@all_architectures
def test_processes_cannot_share_signal_handlers(architecture: str):
    """Otherwise, a signal to a process group would notify the same waiters once per process."""
    thread, files, handlers, memory = 0x10000, 0x400, 0x800, 0x100
    assert evaluate(architecture, CLONE[architecture], handlers | memory | 17) == errno.EPERM
    assert evaluate(architecture, CLONE[architecture], handlers | memory | files | 17) == errno.EPERM
    assert evaluate(architecture, CLONE[architecture], handlers | memory | files | thread) == ALLOW
    assert evaluate(architecture, CLONE[architecture], memory | 0x4000 | 17) == ALLOW  # vfork
    number_of_fcntl, set_lock = {"x86_64": 72, "aarch64": 25}[architecture], 37
    assert evaluate(architecture, CLONE[architecture], number_of_fcntl, set_lock) == ALLOW  # flags, not a call number


@all_architectures
def test_socket_filter_allows_the_calls_that_the_full_filter_rejects(architecture: str):
    code = seccomp_filter.assemble_socket_and_extent_filter(architecture)
    for number in (
        *seccomp_filter.ARCHITECTURES[architecture].denied.values(),
        SOCKET[architecture],
        MMAP[architecture],
        CLONE[architecture],
    ):
        assert evaluate(architecture, number, 0x7FFFFFFF, 17, 17, 0x7FFF7FFF, code=code) == ALLOW


@all_architectures
def test_huge_pages_are_refused(architecture: str):
    assert evaluate(architecture, MMAP[architecture], 0, 4096, 3, 0x22) == ALLOW
    assert evaluate(architecture, MMAP[architecture], 0, 4096, 3, 0x22 | 0x40000) == errno.ENOMEM
    assert evaluate(architecture, MMAP[architecture], 0, 4096, 3, 0x22 | 0x40000 | 21 << 26) == errno.ENOMEM
    assert evaluate(architecture, MEMFD_CREATE[architecture], 1, 3) == ALLOW
    assert evaluate(architecture, MEMFD_CREATE[architecture], 1, 4) == errno.EINVAL
    assert evaluate(architecture, MEMFD_CREATE[architecture], 1, 0xFFFFFFFF) == errno.EINVAL  # as Chromium does
    assert evaluate(architecture, SHMGET[architecture], 0, 4096, 0o1600) == ALLOW
    assert evaluate(architecture, SHMGET[architecture], 0, 4096, 0o1601) == ALLOW
    assert evaluate(architecture, SHMGET[architecture], 0, 4096, 0o1600 | 0o4000) == errno.ENOMEM


@all_architectures
def test_memory_advice_and_process_options_that_burden_the_kernel_are_denied(architecture: str):
    prctl, madvise = {"x86_64": (157, 28), "aarch64": (167, 233)}[architecture]
    # PR_SCHED_CORE, PR_SET_MEMORY_MERGE, PR_FUTEX_HASH, PR_SET_VMA; the other numbers are not yet assigned
    for option in (62, 67, 78, 79, 0x53564D41, 0x59616D60, 0x59616D62, 0xFFFFFFFF):
        assert evaluate(architecture, prctl, option, 1) == errno.EINVAL
    # PR_SET_PDEATHSIG, PR_SET_NAME, PR_GET_SECCOMP, PR_SET_NO_NEW_PRIVS, the highest allowed number in the main range,
    # PR_GET_AUXV, PR_SET_PTRACER
    for option in (1, 15, 21, 38, 77, 0x41555856, 0x59616D61):
        assert evaluate(architecture, prctl, option, 1) == ALLOW
    # MADV_MERGEABLE, MADV_COLLAPSE, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE; the other numbers are not yet assigned
    for advice in (12, 25, 102, 103, 104, 0xFFFFFFFF):
        assert evaluate(architecture, madvise, 0, 4096, advice) == errno.EINVAL
        assert evaluate(architecture, 440, 3, 0, 1, advice, 0) == errno.EINVAL
    assert {evaluate(architecture, 440, 3, 0, 1, advice, 0) for advice in (4, 20)} == {ALLOW}
    # MADV_DONTNEED, MADV_FREE, MADV_UNMERGEABLE, MADV_HUGEPAGE, MADV_DONTDUMP, MADV_HWPOISON, MADV_SOFT_OFFLINE
    assert {evaluate(architecture, madvise, 0, 4096, advice) for advice in (4, 8, 13, 14, 16, 100, 101)} == {ALLOW}


@all_architectures
def test_page_table_scans_return_enotty(architecture: str):
    assert evaluate(architecture, IOCTL[architecture], 3, 0xC0606610, 0x1000) == errno.ENOTTY  # PAGEMAP_SCAN
    # FS_IOC_GETFLAGS, FIONREAD
    assert {evaluate(architecture, IOCTL[architecture], 3, one) for one in (0x80086601, 0x541B)} == {ALLOW}


@all_architectures
def test_calls_that_walk_all_extents_of_a_file_are_refused(architecture: str):
    ioctl, lseek = IOCTL[architecture], LSEEK[architecture]
    for request in (0x40086602, 0x40046602, 0xC020660B, 0xC0C0583B):  # FS_IOC_SETFLAGS (two), _FIEMAP, _GETFSMAP
        assert evaluate(architecture, ioctl, 3, request) == errno.ENOTTY
    # EXT4_IOC_MIGRATE, _ALLOC_DA_BLKS, _MOVE_EXT, _PRECACHE_EXTENTS, _CLEAR_ES_CACHE, _GET_ES_CACHE
    for request in (0x6609, 0x660C, 0xC028660F, 0x6612, 0x6628, 0xC020662A):
        assert evaluate(architecture, ioctl, 3, request) == errno.ENOTTY
    assert [evaluate(architecture, lseek, 3, 0, whence) for whence in (3, 4)] == [errno.EINVAL] * 2  # SEEK_DATA, _HOLE
    assert {evaluate(architecture, lseek, 3, 1 << 40, whence) for whence in (0, 1, 2)} == {ALLOW}


@all_architectures
def test_fallocate_is_limited_in_length_and_modes(architecture: str):
    def allocate(mode: int, size: int) -> int:
        return evaluate(architecture, {"x86_64": 285, "aarch64": 47}[architecture], 3, mode, 1 << 40, size)

    for mode in (0, 1, 0x10, 0x11):  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE
        sizes = (1, 1 << 30, (1 << 30) + 1, 1 << 32, 1 << 62)
        assert [allocate(mode, size) for size in sizes] == [ALLOW] * 2 + [errno.EOPNOTSUPP] * 3
    assert {allocate(3, size) for size in (4096, 1 << 40)} == {ALLOW}  # FALLOC_FL_PUNCH_HOLE
    # FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE, FALLOC_FL_UNSHARE_RANGE; the last two are newer than the filter
    assert {allocate(mode, 4096) for mode in (0x08, 0x20, 0x40, 0x80, 0x80000000)} == {errno.EOPNOTSUPP}


@all_architectures
def test_length_of_mincore_is_limited(architecture: str):
    mincore = {"x86_64": 27, "aarch64": 232}[architecture]
    assert {evaluate(architecture, mincore, 1 << 40, size, 0) for size in (4096, (16 << 30) - 1)} == {ALLOW}
    assert {evaluate(architecture, mincore, 4096, size, 0) for size in (16 << 30, 1 << 46, 1 << 63)} == {errno.ENOMEM}


@all_architectures
def test_socket_filter_limits_extent_walks(architecture: str):
    code = seccomp_filter.assemble_socket_and_extent_filter(architecture)
    fallocate = {"x86_64": 285, "aarch64": 47}[architecture]
    assert evaluate(architecture, fallocate, 3, 0, 0, 1 << 31, code=code) == errno.EOPNOTSUPP
    assert evaluate(architecture, fallocate, 3, 0, 0, 1 << 20, code=code) == ALLOW
    assert evaluate(architecture, LSEEK[architecture], 3, 0, 3, code=code) == errno.EINVAL


@all_architectures
def test_naming_a_mapping_returns_einval(architecture: str):
    assert evaluate(architecture, {"x86_64": 157, "aarch64": 167}[architecture], 0x53564D41, 0) == errno.EINVAL


@all_architectures
def test_installing_a_filter_returns_einval(architecture: str):
    prctl, seccomp_call = {"x86_64": (157, 317), "aarch64": (167, 277)}[architecture]
    assert {evaluate(architecture, prctl, 22, mode) for mode in (1, 2)} == {errno.EINVAL}
    assert {evaluate(architecture, seccomp_call, mode, 0) for mode in (0, 1)} == {errno.EINVAL}
    assert {evaluate(architecture, seccomp_call, operation, 0) for operation in (2, 3)} == {ALLOW}


@all_architectures
def test_open_file_description_locks_return_einval(architecture: str):
    fcntl = {"x86_64": 72, "aarch64": 25}[architecture]
    assert {evaluate(architecture, fcntl, 3, command) for command in (36, 37, 38)} == {errno.EINVAL}
    # F_DUPFD, F_SETFL, F_SETLK, F_SETLKW, F_DUPFD_CLOEXEC, F_ADD_SEALS
    assert {evaluate(architecture, fcntl, 3, command) for command in (0, 4, 6, 7, 1030, 1033)} == {ALLOW}


@all_architectures
def test_write_and_exec_seals_return_einval(architecture: str):
    fcntl = {"x86_64": 72, "aarch64": 25}[architecture]
    # F_SEAL_WRITE, F_SEAL_EXEC, all seals
    assert {evaluate(architecture, fcntl, 3, 1033, seals) for seals in (8, 0x20, 0x3F)} == {errno.EINVAL}
    # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_FUTURE_WRITE; F_GET_SEALS
    assert {evaluate(architecture, fcntl, 3, 1033, seals) for seals in (0, 1, 2, 4, 7, 0x10)} == {ALLOW}
    assert evaluate(architecture, fcntl, 3, 1034, 8) == ALLOW


@all_architectures
def test_poll_and_select_counts_are_limited(architecture: str):
    polls, selects = {"x86_64": ((7, 271), (23, 270)), "aarch64": ((73,), (72,))}[architecture]
    for number in polls:
        assert [evaluate(architecture, number, 1, count) for count in (1, 1024, 1025)] == [ALLOW, ALLOW, errno.EINVAL]
    for number in selects:
        assert [evaluate(architecture, number, count) for count in (1, 1024, 1025)] == [ALLOW, ALLOW, errno.EINVAL]


@all_architectures
def test_guest_jail_may_poll_more_files(architecture: str):
    ppoll, limit = {"x86_64": 271, "aarch64": 73}[architecture], 16384
    assert limit == seccomp_filter.POLLED_FILES_OF_QEMU_MAX
    jail = seccomp_filter.assemble_filter(architecture, polled_files_max=limit)
    assert [evaluate(architecture, ppoll, 1, count, code=jail) for count in (limit, limit + 1)] == [ALLOW, errno.EINVAL]


@all_architectures
def test_ioctls_that_load_modules_are_denied(architecture: str):
    for request in (0x8940, 0x8941, 0x8980, 0x8981, 0x8982, 0x8983, 0x89A0, 0x89A1, 0x89A2, 0x89A3):
        assert evaluate(architecture, IOCTL[architecture], 3, request) == errno.EPERM
    assert evaluate(architecture, IOCTL[architecture], 3, 0x5423) == errno.EPERM  # TIOCSETD
    # TIOCGSID, SIOCGIFCONF, SIOCGIFFLAGS, SIOCGIFHWADDR, FIONREAD
    for request in (0x5429, 0x8912, 0x8913, 0x8927, 0x541B):
        assert evaluate(architecture, IOCTL[architecture], 3, request) == ALLOW


@all_architectures
def test_upper_32_bits_of_arguments_are_ignored(architecture: str):
    assert evaluate(architecture, SOCKET[architecture], (1 << 32) | 17, 3, 0) == errno.EAFNOSUPPORT
    assert evaluate(architecture, IOCTL[architecture], 0, (7 << 32) | 0x5412) == errno.EPERM


@all_architectures
def test_terminal_injection_ioctls_are_denied(architecture: str):
    assert [evaluate(architecture, IOCTL[architecture], 0, request) for request in (0x5412, 0x541C)] == [
        errno.EPERM
    ] * 2
    assert evaluate(architecture, IOCTL[architecture], 0, 0x5413) == ALLOW


@all_architectures
def test_personality_may_be_queried_and_may_disable_address_randomization(architecture: str):
    assert evaluate(architecture, PERSONALITY[architecture], 0xFFFFFFFF) == ALLOW
    assert evaluate(architecture, PERSONALITY[architecture], 0x0040000) == ALLOW
    assert evaluate(architecture, PERSONALITY[architecture], 0x0400000) == errno.EPERM  # READ_IMPLIES_EXEC


def test_unknown_architecture_has_no_filter():
    with pytest.raises(KeyError):
        seccomp_filter.assemble_filter("riscv64")
