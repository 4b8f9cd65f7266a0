"""Properties of the host that only the server needs: capacity, name, run directory."""

import hashlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from sandbox.bootstrap.private_directory import make_private_directory
from sandbox.bootstrap.settings.schema import CapacitySection
from sandbox.server.scheduler import Resources

_USER_RUNTIME_ROOT = Path("/run/user")
"""Parent of the runtime directories of logged-in users (pam_systemd(8))."""


def measure_capacity(data_dir: Path, factors: CapacitySection) -> Resources:
    """Return the capacity for tasks: CPUs of this process, memory and the data directory's disk, each overcommitted."""
    disk = os.statvfs(data_dir)
    return Resources(
        cpus=int(len(os.sched_getaffinity(0)) * factors.cpus),
        memory_bytes=int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * factors.memory),
        disk_bytes=int(disk.f_blocks * disk.f_frsize * factors.disk),
    )


def read_memory_available_bytes() -> int | None:
    """Return the memory available without swapping (proc(5), meminfo, MemAvailable); None if it is unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def host_name() -> str:
    """Return the host name."""
    return socket.gethostname()


def choose_run_dir(data_dir: Path) -> Path:
    """Return a short, private directory for sockets, one per data directory.

    A Unix socket's path has at most 107 bytes. The name is derived from the data directory's inode, not from its path:
    another path to the same directory must lead to the same sockets of live runners.
    """
    status = data_dir.stat()
    name = hashlib.sha256(f"{status.st_dev}:{status.st_ino}".encode()).hexdigest()[:12]
    candidates = _run_dir_candidates()
    # XDG_RUNTIME_DIR differs between login sessions; the runners of an earlier server keep their directory.
    parent = next((candidate for candidate in candidates if (candidate / name).is_dir()), candidates[0])
    make_private_directory(parent)
    return make_private_directory(parent / name)


def _run_dir_candidates() -> Sequence[Path]:
    """Return the candidates, best first. A directory that any user could create is made private or rejected."""
    user = os.geteuid()
    if user == 0:
        return (Path("/run/sandbox"),)
    runtime_dir, usual = os.environ.get("XDG_RUNTIME_DIR"), _USER_RUNTIME_ROOT / str(user)
    return (*((Path(runtime_dir) / "sandbox",) if runtime_dir else ()), Path(f"/tmp/sandbox-{user}"), usual / "sandbox")  # noqa: S108
