"""System calls made to fail in real processes by strace(1), and file systems small enough to fill."""

import contextlib
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

WRITE_LIKE = (
    "write,writev,pwrite64,pwritev,fsync,fdatasync,sync_file_range,ftruncate,truncate,fallocate,"
    "rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,link,linkat,symlink,symlinkat"
)
"""What changes a disk, or waits for one."""


@dataclass(frozen=True)
class Fault:
    """The n-th of these calls fails in each thread and process; with `is_persistent` all later ones too.

    paths: only calls on these files, all where there are none.
    """

    error: str
    nth: int
    calls: str = WRITE_LIKE
    paths: tuple[str, ...] = ()
    is_persistent: bool = False

    def arguments(self):
        when = f"{self.nth}+" if self.is_persistent else str(self.nth)
        chosen = [word for path in self.paths for word in ("-P", path)]
        return ["-e", f"trace={self.calls}", "-e", f"inject={self.calls}:error={self.error}:when={when}", *chosen]


class Injection:
    """One under way. hits: the calls that were made to fail."""

    def __init__(self, log):
        self._log = log

    @property
    def hits(self):
        return [line for line in self._log.read_text(errors="replace").splitlines() if "(INJECTED)" in line]


@contextlib.contextmanager
def injected_fault(pid, fault, log):
    """Within, the fault happens to a process, its threads and whatever they start."""
    log.unlink(missing_ok=True)
    command = ["strace", "-f", "-qq", "-y", "-o", str(log), *fault.arguments(), "-p", str(pid)]
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 20
        while not _is_traced(pid, tracer.pid):
            assert tracer.poll() is None, tracer.stderr.read()
            assert time.monotonic() < deadline, "strace does not attach"
            time.sleep(0.01)
        yield Injection(log)
    finally:
        tracer.send_signal(signal.SIGTERM)
        try:
            tracer.wait(20)
        except subprocess.TimeoutExpired:
            tracer.kill()
            tracer.wait()
        tracer.stderr.close()


def _is_traced(pid, tracer):
    """Every thread of the process is."""
    mark = f"TracerPid:\t{tracer}\n"
    return all(mark in (thread / "status").read_text() for thread in Path(f"/proc/{pid}/task").iterdir())


@contextlib.contextmanager
def small_file_system(directory, size_bytes):
    """An ext4 of its own at `directory`, with no room kept for root."""
    image = directory.with_suffix(".img")
    with image.open("xb") as file:
        file.truncate(size_bytes)
    _run("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
    directory.mkdir()
    _run("mount", "-o", "loop", str(image), str(directory))
    try:
        yield directory
    finally:
        _run("umount", str(directory))
        image.unlink()


def fill(directory, *, but_bytes=0):
    """Take all room of a file system but so much; gives the file that has it."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for piece_bytes in (1 << 20, 1 << 16, 4096):
            while _free_bytes(directory) - but_bytes >= piece_bytes:
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, piece_bytes)
                except OSError:
                    break
    return ballast


def _free_bytes(directory):
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def _run(*command):
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, f"{command}: {ran.stderr}"


def failed_calls(hits):
    """Which calls they were, and on what."""
    return sorted({re.sub(r"^\d+ +(\w+)\((.*?)[,)].*", r"\1 \2", line) for line in hits})
