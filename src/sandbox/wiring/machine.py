"""What this machine is: its size, its name, its places."""

import contextlib
import hashlib
import os
import socket
import stat
from pathlib import Path

from sandbox.control.admission import Capacity
from sandbox.wiring.private_directory import make_private
from sandbox.wiring.settings import CapacitySection


def measure_capacity(data_dir: Path, factors: CapacitySection) -> Capacity:
    """What may be promised: CPUs of this process, all memory, the data directory's disk, each overcommitted."""
    disk = os.statvfs(data_dir)
    return Capacity(
        cpus=int(len(os.sched_getaffinity(0)) * factors.cpus),
        memory_bytes=int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * factors.memory),
        disk_bytes=int(disk.f_blocks * disk.f_frsize * factors.disk),
    )


def read_memory_available_bytes() -> int | None:
    """What new processes could use without swapping (proc(5), meminfo, MemAvailable); None where it is not told."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def name_host() -> str:
    """The machine's host name."""
    return socket.gethostname()


def choose_run_dir(data_dir: Path) -> Path:
    """A short, private place for sockets (a Unix socket's path has 107 bytes), one a data directory.

    By the directory itself and not by its path: another path to it must lead to the sockets of runners that live.
    """
    found = data_dir.stat()
    name = hashlib.sha256(f"{found.st_dev}:{found.st_ino}".encode()).hexdigest()[:12]
    if os.geteuid() == 0:
        return _make(Path("/run/sandbox"), name)
    # What a login session offers differs from one to the next; the runners of an earlier server stay where they are.
    kept = data_dir / "run"
    if (before := _owned(kept)) is not None and before.name == name:
        return make_private(before)
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    parent = Path(runtime_dir) / "sandbox" if runtime_dir else Path(f"/tmp/sandbox-{os.geteuid()}")  # noqa: S108  (is made private)
    chosen = _make(parent, name)
    _replace_link(kept, chosen)
    return chosen


def _make(parent: Path, name: str) -> Path:
    make_private(parent)
    return make_private(parent / name)


def _owned(link: Path) -> Path | None:
    """The directory of this user's that a link leads to."""
    with contextlib.suppress(OSError):
        target = link.readlink()
        found = target.lstat()
        return target if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() else None
    return None


def _replace_link(link: Path, target: Path) -> None:
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)
