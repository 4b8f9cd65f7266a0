"""The filter's ioctl requests are compared with an independent list, encoded as in the kernel's headers.

Sources: asm-generic/ioctl.h and ioctls.h, linux/fs.h, sockios.h, nsfs.h and random.h of Linux 6.12. The encoding is the
same on both architectures.
"""

import errno

import pytest

from doubles.bpf_interpreter import ALLOW, errno_of, run_filter
from sandbox.runtimes import seccomp_filter, seccomp_sockopt_and_ioctl_rules

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
IOCTL = {"x86_64": 16, "aarch64": 29}
NONE, WRITE, READ, BOTH = 0, 1, 2, 3
TERMIOS2_BYTES, FSXATTR_BYTES, LABEL_BYTES, UUID_BYTES, TIME_BYTES = 44, 28, 256, 17, 16


def request(direction: int, type_: int | str, number: int, size: int) -> int:
    """Return the number of a request, as the kernel's `_IOC` macro computes it."""
    return direction << 30 | size << 16 | (ord(type_) if isinstance(type_, str) else type_) << 8 | number


TERMINALS = {
    "TCGETS": 0x01, "TCSETS": 0x02, "TCSETSW": 0x03, "TCSETSF": 0x04, "TCGETA": 0x05, "TCSETA": 0x06, "TCSETAW": 0x07,
    "TCSETAF": 0x08, "TCSBRK": 0x09, "TCXONC": 0x0A, "TCFLSH": 0x0B, "TIOCEXCL": 0x0C, "TIOCNXCL": 0x0D,
    "TIOCSCTTY": 0x0E, "TIOCGPGRP": 0x0F, "TIOCSPGRP": 0x10, "TIOCOUTQ": 0x11, "TIOCGWINSZ": 0x13, "TIOCSWINSZ": 0x14,
    "TIOCMGET": 0x15, "TIOCMBIS": 0x16, "TIOCMBIC": 0x17, "TIOCMSET": 0x18, "TIOCGSOFTCAR": 0x19, "TIOCSSOFTCAR": 0x1A,
    "FIONREAD": 0x1B, "TIOCPKT": 0x20, "FIONBIO": 0x21, "TIOCNOTTY": 0x22, "TIOCGETD": 0x24, "TCSBRKP": 0x25,
    "TIOCSBRK": 0x27, "TIOCCBRK": 0x28, "TIOCGSID": 0x29, "TIOCGPTPEER": 0x41, "FIONCLEX": 0x50, "FIOCLEX": 0x51,
    "FIOQSIZE": 0x60,
}  # fmt: skip
SOCKETS = {
    "FIOSETOWN": 0x01, "SIOCSPGRP": 0x02, "FIOGETOWN": 0x03, "SIOCGPGRP": 0x04, "SIOCATMARK": 0x05,
    "SIOCGSTAMP_OLD": 0x06, "SIOCGSTAMPNS_OLD": 0x07, "SIOCGIFNAME": 0x10, "SIOCGIFCONF": 0x12, "SIOCGIFFLAGS": 0x13,
    "SIOCGIFADDR": 0x15, "SIOCGIFDSTADDR": 0x17, "SIOCGIFBRDADDR": 0x19, "SIOCGIFNETMASK": 0x1B, "SIOCGIFMETRIC": 0x1D,
    "SIOCGIFMTU": 0x21, "SIOCGIFHWADDR": 0x27, "SIOCGIFINDEX": 0x33, "SIOCGIFCOUNT": 0x38, "SIOCGIFTXQLEN": 0x42,
    "SIOCOUTQNSD": 0x4B, "SIOCGIFMAP": 0x70,
}  # fmt: skip
ALLOWED = {
    **{name: request(NONE, "T", number, 0) for name, number in TERMINALS.items()},
    **{name: request(NONE, 0x89, number, 0) for name, number in SOCKETS.items()},
    "TCGETS2": request(READ, "T", 0x2A, TERMIOS2_BYTES),
    **{f"TCSETS2{how}": request(WRITE, "T", 0x2B + at, TERMIOS2_BYTES) for at, how in enumerate(("", "W", "F"))},
    "TIOCGPTN": request(READ, "T", 0x30, 4),
    "TIOCSPTLCK": request(WRITE, "T", 0x31, 4),
    "TIOCGDEV": request(READ, "T", 0x32, 4),
    "TIOCSIG": request(WRITE, "T", 0x36, 4),
    "TIOCGPKT": request(READ, "T", 0x38, 4),
    "TIOCGPTLCK": request(READ, "T", 0x39, 4),
    "TIOCGEXCL": request(READ, "T", 0x40, 4),
    "SIOCGSTAMP_NEW": request(READ, 0x89, 0x06, TIME_BYTES),
    "SIOCGSTAMPNS_NEW": request(READ, 0x89, 0x07, TIME_BYTES),
    "FIGETBSZ": request(NONE, 0, 2, 0),
    "FS_IOC_GETFLAGS": request(READ, "f", 1, 8),
    "FS_IOC32_GETFLAGS": request(READ, "f", 1, 4),
    "FS_IOC_GETVERSION": request(READ, "v", 1, 8),
    "FS_IOC_FSGETXATTR": request(READ, "X", 31, FSXATTR_BYTES),
    "FS_IOC_GETFSLABEL": request(READ, 0x94, 49, LABEL_BYTES),
    "FS_IOC_GETFSUUID": request(READ, 0x15, 0, UUID_BYTES),
    "NS_GET_USERNS": request(NONE, 0xB7, 1, 0),
    "NS_GET_PARENT": request(NONE, 0xB7, 2, 0),
    "NS_GET_NSTYPE": request(NONE, 0xB7, 3, 0),
    "NS_GET_OWNER_UID": request(NONE, 0xB7, 4, 0),
    "RNDGETENTCNT": request(READ, "R", 0, 4),
}
DENIED = {
    "TIOCSTI": 0x5412, "TIOCLINUX": 0x541C, "TIOCSETD": 0x5423, "SIOCGIFBR": 0x8940, "SIOCSIFBR": 0x8941,
    "SIOCADDDLCI": 0x8980, "SIOCDELDLCI": 0x8981, "SIOCGIFVLAN": 0x8982, "SIOCSIFVLAN": 0x8983, "SIOCBRADDBR": 0x89A0,
    "SIOCBRDELBR": 0x89A1, "SIOCBRADDIF": 0x89A2, "SIOCBRDELIF": 0x89A3,
}  # fmt: skip
UNKNOWN = {
    "FIBMAP": request(NONE, 0, 1, 0),
    "BLKDISCARD": request(NONE, 0x12, 119, 0),
    "FS_IOC_SETFLAGS": request(WRITE, "f", 2, 8),
    "FS_IOC32_SETFLAGS": request(WRITE, "f", 2, 4),
    "FS_IOC_FSSETXATTR": request(WRITE, "X", 32, FSXATTR_BYTES),
    "FS_IOC_FIEMAP": request(BOTH, "f", 11, 32),
    "FS_IOC_GETFSMAP": request(BOTH, "X", 59, 192),
    "FITRIM": request(BOTH, "X", 121, 24),
    "EXT4_IOC_MIGRATE": request(NONE, "f", 9, 0),
    "EXT4_IOC_ALLOC_DA_BLKS": request(NONE, "f", 12, 0),
    "EXT4_IOC_MOVE_EXT": request(BOTH, "f", 15, 40),
    "EXT4_IOC_PRECACHE_EXTENTS": request(NONE, "f", 18, 0),
    "EXT4_IOC_CLEAR_ES_CACHE": request(NONE, "f", 40, 0),
    "EXT4_IOC_GET_ES_CACHE": request(BOTH, "f", 42, 32),
    "FS_IOC_ENABLE_VERITY": request(WRITE, "f", 133, 128),
    "FS_IOC_SET_ENCRYPTION_POLICY": request(READ, "f", 19, 12),
    "FICLONE": request(WRITE, 0x94, 9, 4),
    "FICLONERANGE": request(WRITE, 0x94, 13, 32),
    "FIDEDUPERANGE": request(BOTH, 0x94, 54, 24),
    "BTRFS_IOC_SUBVOL_CREATE": request(WRITE, 0x94, 14, 4096),
    "PAGEMAP_SCAN": request(BOTH, "f", 16, 96),
    "PROCMAP_QUERY": request(BOTH, "f", 17, 104),
    "NS_MNT_GET_NEXT": request(READ, 0xB7, 11, 16),
    "EPIOCSPARAMS": request(WRITE, 0x8A, 1, 8),
    "PIDFD_GET_NET_NAMESPACE": request(NONE, 0xFF, 4, 0),
    "SIOCETHTOOL": 0x8946,
    "SIOCGSKNS": 0x894C,
    "IOC_WATCH_QUEUE_SET_SIZE": request(NONE, "W", 0x60, 0),
    "KVM_GET_API_VERSION": request(NONE, 0xAE, 0, 0),
    "KVM_SET_USER_MEMORY_REGION": request(WRITE, 0xAE, 0x46, 32),
    "a number that no kernel has": 0xFFFFFFFF,
}
TYPES = sorted({number >> 8 & 0xFF for number in (*ALLOWED.values(), *DENIED.values(), *UNKNOWN.values())})
every_architecture = pytest.mark.parametrize("architecture", AUDIT_ARCH)


def action(architecture: str, number: int, code: bytes | None = None) -> int:
    program = seccomp_filter.assemble_filter(architecture) if code is None else code
    return run_filter(
        program, audit_arch=AUDIT_ARCH[architecture], number=IOCTL[architecture], arguments=(3, number, 0x1000)
    )


@every_architecture
@pytest.mark.parametrize("name", ALLOWED)
def test_requests_of_ordinary_programs_are_allowed(architecture: str, name: str):
    assert action(architecture, ALLOWED[name]) == ALLOW
    assert action(architecture, ALLOWED[name] | 7 << 32) == ALLOW, "the kernel reads only the low half"


@every_architecture
@pytest.mark.parametrize("name", UNKNOWN)
def test_requests_that_are_not_examined_return_enotty(architecture: str, name: str):
    assert errno_of(action(architecture, UNKNOWN[name])) == errno.ENOTTY
    assert errno_of(action(architecture, UNKNOWN[name] | 7 << 32)) == errno.ENOTTY


@every_architecture
def test_only_listed_requests_are_allowed(architecture: str):
    code = seccomp_filter.assemble_filter(architecture)
    forms = {number & 0xFFFF0000 for number in (*ALLOWED.values(), *UNKNOWN.values())}
    numbers = {form | type_ << 8 | number for form in (0, *forms) for type_ in TYPES for number in (0, 1, 2, 9, 31)}
    numbers |= {type_ << 8 | number for type_ in TYPES for number in range(256)} | set(ALLOWED.values())
    assert {number for number in numbers if action(architecture, number, code) == ALLOW} == set(ALLOWED.values())


def test_each_request_in_the_filter_has_a_row_in_the_independent_list():
    assert set(seccomp_sockopt_and_ioctl_rules.ALLOWED_IOCTLS) == set(ALLOWED.values())
    assert set(seccomp_sockopt_and_ioctl_rules.DENIED_IOCTLS) == set(DENIED.values())


@every_architecture
@pytest.mark.parametrize("name", DENIED)
def test_requests_that_type_into_terminals_or_load_modules_return_eperm(architecture: str, name: str):
    assert errno_of(action(architecture, DENIED[name])) == errno.EPERM


@every_architecture
def test_requests_of_kvm_are_allowed_only_with_kvm(architecture: str):
    code = seccomp_filter.assemble_filter(architecture, allows_kvm=True)
    requests = {name: number for name, number in UNKNOWN.items() if name.startswith("KVM")}
    assert {action(architecture, number, code) for number in (*requests.values(), *ALLOWED.values())} == {ALLOW}
    others = {action(architecture, number, code) for name, number in UNKNOWN.items() if name not in requests}
    assert {errno_of(one) for one in others} == {errno.ENOTTY}
    assert {errno_of(action(architecture, number, code)) for number in DENIED.values()} == {errno.EPERM}
