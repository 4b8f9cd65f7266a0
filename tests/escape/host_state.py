"""Reads the state of the host's processes and kernel from /proc and /sys."""

import contextlib
import ctypes
import os
import re
import threading
from pathlib import Path
from typing import NamedTuple

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
WATCHED_MOUNT_POINTS = ("/", "/etc", "/usr", "/proc", "/sys", "/root", "/home", "/dev")
WATCHED_ETC_FILES = ("passwd", "group", "shadow", "ld.so.preload", "hosts", "resolv.conf")
WATCHED_DIRECTORIES = ("", "etc", "usr/bin", "usr/local/bin", "root", "tmp", "dev", "dev/shm", "var/tmp")
KERNEL_SETTING_FILES = (
    *("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/sys/kernel/uevent_helper"),
    *("/proc/sys/kernel/hostname", "/proc/sys/kernel/domainname", "/proc/sys/kernel/sysrq"),
    *("/proc/sys/kernel/panic", "/proc/sys/kernel/kptr_restrict", "/proc/sys/kernel/randomize_va_space"),
    *("/proc/sys/vm/overcommit_memory", "/proc/sys/vm/drop_caches", "/proc/sys/fs/suid_dumpable"),
    "/sys/kernel/mm/transparent_hugepage/enabled",
)
_PF_EXITING = 0x4
_CLONE_NEWIPC = 0x08000000
_ORDINARY_POLICIES = {0, 3, 5}  # SCHED_OTHER, SCHED_BATCH, SCHED_IDLE
_libc = ctypes.CDLL(None)


class Process(NamedTuple):
    """One process.

    nice: the lowest nice value of its threads; policies: its scheduling policies other than the ordinary one.
    processors: the sets of processors on which its threads may run.
    """

    start: str
    uid: int
    namespaces: dict[str, str]
    root: str
    mounts: frozenset[str]
    nice: int
    policies: frozenset[int]
    processors: frozenset[frozenset[int]]
    cgroups: str
    terminals: int
    oom_score: int


def read_process(pid):
    """Read one process. Return None if it has ended or is exiting, since an exiting process has no control group."""
    directory = Path("/proc", str(pid))
    try:
        threads = [_stat(path) for path in (directory / "task").iterdir()]
        process = Process(
            start=_stat(directory)[19],
            uid=int(re.search(r"(?m)^Uid:\s+(\d+)", _read(directory / "status"))[1]),
            namespaces={kind: _link(directory / "ns" / kind) for kind in NAMESPACES},
            root=_link(directory / "root"),
            mounts=frozenset(line for line in mount_table(pid) if line.split()[4] in WATCHED_MOUNT_POINTS),
            nice=min(int(words[16]) for words in threads),
            policies=frozenset(int(words[38]) for words in threads) - _ORDINARY_POLICIES,
            processors=frozenset(
                frozenset(os.sched_getaffinity(int(path.name))) for path in (directory / "task").iterdir()
            ),
            cgroups=_read(directory / "cgroup"),
            terminals=_terminal_count(directory / "fd"),
            oom_score=int(_read(directory / "oom_score_adj")),
        )
        return None if int(_stat(directory)[6]) & _PF_EXITING else process
    except (OSError, IndexError, ValueError):
        return None


def _stat(directory):
    """Return the fields of /proc/PID/stat that follow the name, starting with the state."""
    return _read(directory / "stat").rpartition(") ")[2].split()


def _read(path):
    """Read a small file of /proc with one `read` call, which is three times as fast as a text stream."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 65536).decode(errors="replace")
    finally:
        os.close(fd)


def _link(path):
    return str(path.readlink())


def _terminal_count(directory):
    """Count the descriptors that refer to terminals.

    `pathlib.Path` would be too slow, because a process may have a hundred thousand descriptors.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return sum(_is_terminal(name, fd) for name in os.listdir(fd))  # noqa: PTH208
    finally:
        os.close(fd)


def _is_terminal(name, directory_fd):
    try:
        return os.readlink(name, dir_fd=directory_fd).startswith(("/dev/pts/", "/dev/ptmx", "/dev/tty"))
    except OSError:
        return False


def mount_table(pid):
    """Return the lines of a process's mount table; empty if the process has ended."""
    try:
        return Path("/proc", str(pid), "mountinfo").read_text().splitlines()
    except OSError:
        return []


def mount_namespaces():
    """Return `{namespace: pid of a process in it}` for all namespaces of the machine."""
    namespaces = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                namespaces.setdefault(_link(directory / "ns/mnt"), int(directory.name))
            except OSError:
                continue
    return namespaces


def read_etc(root):
    """Return the security-relevant files in /etc, keyed by name."""
    return {name: (root / "etc" / name).read_bytes() for name in WATCHED_ETC_FILES if (root / "etc" / name).exists()}


def list_watched_directories(root):
    """Return the paths in the directories where an attack would create files."""
    found = set()
    for directory in WATCHED_DIRECTORIES:
        try:
            with os.scandir(root / directory) as entries:
                found.update(f"/{directory}/{entry.name}" for entry in entries)
        except OSError:
            continue
    return found


def read_settings():
    """Return the host's kernel settings, keyed by path."""
    return {path: Path(path).read_text() for path in KERNEL_SETTING_FILES if os.access(path, os.R_OK)}


def socket_buffer_bytes():
    """Return the memory used by the buffers of all TCP and UDP sockets, in all network namespaces of the machine."""
    pages = re.findall(r"(?m)^(?:TCP|UDP):.* mem (\d+)", _read(Path("/proc/net/sockstat")))
    return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE")


def bpf_filter_bytes():
    """Return the memory used by compiled BPF filters and programs; 0 if the kernel does not report it."""
    try:
        lines = Path("/proc/vmallocinfo").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if "bpf" in line)


def semaphore_count(pid):
    """Return the number of System V semaphores in the IPC namespace of a process; 0 if the process has ended."""
    lines = []

    def read():  # /proc/sysvipc shows the namespace of the thread that opens the file
        with contextlib.suppress(OSError), open(f"/proc/{pid}/ns/ipc", "rb") as namespace:  # noqa: PTH123
            if _libc.setns(namespace.fileno(), _CLONE_NEWIPC) == 0:
                lines.extend(Path("/proc/sysvipc/sem").read_text().splitlines()[1:])

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    return sum(int(line.split()[3]) for line in lines)


def aio_events():
    """Return the number of AIO events in use on the whole machine."""
    return int(Path("/proc/sys/fs/aio-nr").read_text())


def calls_in_progress(pid, functions):
    """Return (thread id, function) for each thread of a process that is executing one of these kernel functions."""
    found = set()
    with contextlib.suppress(OSError):
        for thread in Path("/proc", str(pid), "task").iterdir():
            with contextlib.suppress(OSError):
                stack = _read(thread / "stack")
                found.update((int(thread.name), function) for function in functions if f" {function}+" in stack)
    return found


def key_count(uid):
    """Return the number of kernel keys of a user."""
    found = re.search(rf"(?m)^\s*{uid}:\s+\d+ (\d+)/", Path("/proc/key-users").read_text())
    return int(found[1]) if found else 0


def key_names():
    """Return the keys visible to root on the host, as described by the kernel."""
    return Path("/proc/keys").read_text().splitlines()


def control_groups():
    """Return the paths of all control groups."""
    return [path for path, _, _ in os.walk("/sys/fs/cgroup")]
