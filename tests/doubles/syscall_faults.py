"""Uses strace(1) to make system calls of real processes fail, and mounts file systems small enough to fill."""

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
"""System calls that modify or sync files."""


@dataclass(frozen=True)
class Fault:
    """A fault that makes the n-th of these calls fail in each thread and process.

    is_persistent: whether all later calls fail too. paths: the files whose calls fail; all files if empty.
    """

    error: str
    nth: int
    calls: str = WRITE_LIKE
    paths: tuple[str, ...] = ()
    is_persistent: bool = False

    def arguments(self):
        when = f"{self.nth}+" if self.is_persistent else str(self.nth)
        path_options = [word for path in self.paths for word in ("-P", path)]
        return ["-e", f"trace={self.calls}", "-e", f"inject={self.calls}:error={self.error}:when={when}", *path_options]


class Injection:
    """An active fault. hits: the calls that failed."""

    def __init__(self, log):
        self._log = log

    @property
    def hits(self):
        return [line for line in self._log.read_text(errors="replace").splitlines() if "(INJECTED)" in line]


@contextlib.contextmanager
def injected_fault(pid, fault, log):
    """Inject the fault into a server and the process that forks runners, including threads and new child processes."""
    log.unlink(missing_ok=True)
    pids = [pid, *_runner_fork_servers(pid)]
    process_options = [word for each in pids for word in ("-p", str(each))]
    command = ["strace", "-f", "-qq", "-y", "-o", str(log), *fault.arguments(), *process_options]
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 20
        while not all(_is_traced(each, tracer.pid) for each in pids):
            assert tracer.poll() is None, tracer.stderr.read()
            assert time.monotonic() < deadline, "strace did not attach"
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


def _runner_fork_servers(server_pid):
    """Return the pids of the processes from which the server forks runners. After the first launch, there is one."""
    children = Path(f"/proc/{server_pid}/task").glob("*/children")
    pids = [pid for path in children for pid in path.read_text().split()]
    return [pid for pid in pids if b"sandbox.bootstrap.runner_fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _is_traced(pid, tracer):
    """Return whether every thread of the process is traced."""
    tracer_line = f"TracerPid:\t{tracer}\n"
    return all(tracer_line in (thread / "status").read_text() for thread in Path(f"/proc/{pid}/task").iterdir())


@contextlib.contextmanager
def small_file_system(directory, size_bytes):
    """Mount a new ext4 without reserved blocks at `directory`."""
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


def fill_file_system(directory, *, free_bytes=0):
    """Fill a file system up to the last `free_bytes`; return the file that uses the space."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        for piece_bytes in (1 << 20, 1 << 16, 4096):
            while _free_bytes(directory) - free_bytes >= piece_bytes:
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, piece_bytes)
                except OSError:
                    break
    return filler


def _free_bytes(directory):
    stats = os.statvfs(directory)
    return stats.f_bavail * stats.f_frsize


def _run(*command):
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, f"{command}: {result.stderr}"


def failed_calls(hits):
    """Return the failed calls with their first arguments."""
    return sorted({re.sub(r"^\d+ +(\w+)\((.*?)[,)].*", r"\1 \2", line) for line in hits})
