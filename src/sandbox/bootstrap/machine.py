"""Since when the machine is up. A module of its own, because runners load nothing that only the server needs."""

import hashlib
import os
import socket
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from sandbox.bootstrap.private_directory import make_private_directory
from sandbox.bootstrap.settings.schema import CapacitySection
from sandbox.server.scheduler import Resources


def read_boot_id() -> str:
    """Changes at every boot (proc(5), random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class SystemClock:
    """Implements `contracts.clock.Clock`."""

    def now(self) -> datetime:
        """UTC wall clock."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds that only go forward."""
        return time.monotonic()


_USER_RUNTIME_ROOT = Path("/run/user")
"""Where a machine with logins has a directory for each user who is there (pam_systemd(8))."""


def measure_capacity(data_dir: Path, factors: CapacitySection) -> Resources:
    """What may be promised: CPUs of this process, all memory, the data directory's disk, each overcommitted."""
    disk = os.statvfs(data_dir)
    return Resources(
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


def host_name() -> str:
    """The machine's host name."""
    return socket.gethostname()


def choose_run_dir(data_dir: Path) -> Path:
    """A short, private place for sockets (a Unix socket's path has 107 bytes), one a data directory.

    By the directory itself and not by its path: another path to it must lead to the sockets of runners that live.
    """
    status = data_dir.stat()
    name = hashlib.sha256(f"{status.st_dev}:{status.st_ino}".encode()).hexdigest()[:12]
    candidates = _run_dir_candidates()
    # What a login session tells differs from one to the next; the runners of an earlier server stay where they are.
    parent = next((place for place in candidates if (place / name).is_dir()), candidates[0])
    make_private_directory(parent)
    return make_private_directory(parent / name)


def _run_dir_candidates() -> Sequence[Path]:
    """Where it may be, the best first. Those that anybody could make are made private or refused."""
    user = os.geteuid()
    if user == 0:
        return (Path("/run/sandbox"),)
    runtime_dir, usual = os.environ.get("XDG_RUNTIME_DIR"), _USER_RUNTIME_ROOT / str(user)
    return (*((Path(runtime_dir) / "sandbox",) if runtime_dir else ()), Path(f"/tmp/sandbox-{user}"), usual / "sandbox")  # noqa: S108
