"""What the host says about its processes and its kernel, read from /proc and /sys."""

import os
import re
from pathlib import Path
from typing import NamedTuple

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
PROTECTED = ("/", "/etc", "/usr", "/proc", "/sys", "/root", "/home", "/dev")
ETC = ("passwd", "group", "shadow", "ld.so.preload", "hosts", "resolv.conf")
DIRECTORIES = ("", "etc", "usr/bin", "usr/local/bin", "root", "tmp", "dev", "dev/shm", "var/tmp")
SETTINGS = (
    *("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/sys/kernel/uevent_helper"),
    *("/proc/sys/kernel/hostname", "/proc/sys/kernel/domainname", "/proc/sys/kernel/sysrq"),
    *("/proc/sys/kernel/panic", "/proc/sys/kernel/kptr_restrict", "/proc/sys/kernel/randomize_va_space"),
    *("/proc/sys/vm/overcommit_memory", "/proc/sys/vm/drop_caches", "/proc/sys/fs/suid_dumpable"),
    "/sys/kernel/mm/transparent_hugepage/enabled",
)
_PF_EXITING = 0x4
_ORDINARY_POLICIES = {0, 3, 5}  # SCHED_OTHER, SCHED_BATCH, SCHED_IDLE


class Process(NamedTuple):
    """One process; `nice` is the lowest of its threads, `policies` are those that are not ordinary."""

    start: str
    uid: int
    namespaces: dict[str, str]
    root: str
    mounts: frozenset[str]
    nice: int
    policies: frozenset[int]
    groups: str
    terminals: int
    score: int


def read_process(pid):
    """None for one that is gone, or that ends while it is read: one that exits is shown in no control group."""
    directory = Path("/proc", str(pid))
    try:
        threads = [_stat(path) for path in (directory / "task").iterdir()]
        process = Process(
            start=_stat(directory)[19],
            uid=int(re.search(r"(?m)^Uid:\s+(\d+)", _read(directory / "status"))[1]),
            namespaces={kind: _link(directory / "ns" / kind) for kind in NAMESPACES},
            root=_link(directory / "root"),
            mounts=frozenset(line for line in mount_table(pid) if line.split()[4] in PROTECTED),
            nice=min(int(words[16]) for words in threads),
            policies=frozenset(int(words[38]) for words in threads) - _ORDINARY_POLICIES,
            groups=_read(directory / "cgroup"),
            terminals=sum(map(_is_terminal, (directory / "fd").iterdir())),
            score=int(_read(directory / "oom_score_adj")),
        )
        return None if int(_stat(directory)[6]) & _PF_EXITING else process
    except (OSError, IndexError, ValueError):
        return None


def _stat(directory):
    """The fields after the name, from the state on."""
    return _read(directory / "stat").rpartition(") ")[2].split()


def _read(path):
    """A small file of /proc in one piece: with a text stream it takes three times as long."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 65536).decode(errors="replace")
    finally:
        os.close(fd)


def _link(path):
    return str(path.readlink())


def _is_terminal(descriptor):
    try:
        return _link(descriptor).startswith(("/dev/pts/", "/dev/ptmx", "/dev/tty"))
    except OSError:
        return False


def mount_table(pid):
    """The lines of a process's mount table; without any when it is gone."""
    try:
        return Path("/proc", str(pid), "mountinfo").read_text().splitlines()
    except OSError:
        return []


def mount_namespaces():
    """`{namespace: a process in it}`, of the whole machine."""
    found = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                found.setdefault(_link(directory / "ns/mnt"), int(directory.name))
            except OSError:
                continue
    return found


def read_etc(root):
    """The files of /etc that decide about rights and names, by name."""
    return {name: (root / "etc" / name).read_bytes() for name in ETC if (root / "etc" / name).exists()}


def names_below(root):
    """Paths in the directories where an attack would leave something."""
    found = set()
    for directory in DIRECTORIES:
        try:
            with os.scandir(root / directory) as entries:
                found.update(f"/{directory}/{entry.name}" for entry in entries)
        except OSError:
            continue
    return found


def read_settings():
    """Of the host's kernel, by path."""
    return {path: Path(path).read_text() for path in SETTINGS if os.access(path, os.R_OK)}


def socket_buffer_bytes():
    """What TCP and UDP sockets of the whole machine hold, in all network namespaces."""
    pages = re.findall(r"(?m)^(?:TCP|UDP):.* mem (\d+)", _read(Path("/proc/net/sockstat")))
    return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE")


def filter_bytes():
    """What compiled filters and programs take. 0 where the kernel does not list it."""
    try:
        lines = _read(Path("/proc/vmallocinfo")).splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if "bpf" in line)


def aio_events():
    """In use on the whole machine."""
    return int(Path("/proc/sys/fs/aio-nr").read_text())


def keys_of(uid):
    """How many keys of the host's kernel a user has."""
    found = re.search(rf"(?m)^\s*{uid}:\s+\d+ (\d+)/", Path("/proc/key-users").read_text())
    return int(found[1]) if found else 0


def key_names():
    """The keys that the host's root can see, as the kernel describes them."""
    return Path("/proc/keys").read_text().splitlines()


def control_groups():
    """The paths of all control groups."""
    return [path for path, _, _ in os.walk("/sys/fs/cgroup")]
