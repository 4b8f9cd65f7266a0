"""What a program that has taken over gVisor's kernel can do on the host."""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from doubles.runtime_availability import require_runtime
from doubles.sandbox_lifecycle import MEBIBYTE, ready_sandbox
from sandbox.interfaces.runtime import Command, Sandbox
from sandbox.runtimes.gvisor import GvisorRuntime

_KERNEL_COMMAND = b"runsc-sandbox"
_FILES_COMMAND = b"runsc-gofer"
_WAIT_SECONDS = 20.0


@pytest.fixture
def runtime(tmp_path: Path) -> GvisorRuntime:
    """Skip the test if gVisor does not work."""
    require_runtime("gvisor", tmp_path / "probe")
    return GvisorRuntime(tmp_path / "run")


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _processes_of(sandbox: Sandbox) -> dict[int, bytes]:
    """Return the command lines of the sandbox's processes on the host, keyed by pid."""
    uid = int(sandbox.handle.details["kernel_uid"])
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if path.stat().st_uid == uid:
                found[int(path.name)] = _command_line(int(path.name))
    return found


def _find_process(sandbox: Sandbox, text: bytes) -> int | None:
    return next((pid for pid, line in _processes_of(sandbox).items() if text in line), None)


async def _start_sleep(sandbox: Sandbox) -> None:
    await sandbox.start(Command(["/usr/bin/sleep", "60"], {"PATH": "/usr/bin"}, "/workspace"))


_TRACE = """
import ctypes, errno, os, signal, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
kernel, *targets = map(int, sys.argv[1:])
fields = dict(line.split(":", 1) for line in open(f"/proc/{kernel}/status").read().splitlines())
capabilities = int(fields["CapPrm"], 16)
assert libc.setns(os.open(f"/proc/{kernel}/ns/user", os.O_RDONLY), 0) == 0
os.setresgid(0, 0, 0)
os.setresuid(0, 0, 0)
low, high = capabilities & 0xFFFFFFFF, capabilities >> 32
assert libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", low, low, 0, high, high, 0)) == 0
assert libc.prctl(4, 1, 0, 0, 0) == 0  # PR_SET_DUMPABLE, which the new uid has cleared
own = os.fork()
if own == 0:
    signal.alarm(60)
    signal.pause()
for pid in (own, *targets):
    ctypes.set_errno(0)
    libc.ptrace(16, pid, 0, 0)  # PTRACE_ATTACH
    print(errno.errorcode.get(ctypes.get_errno(), "works"))
os.kill(own, 9)
"""
"""Becomes a process with the rights of gVisor's kernel, and traces its own child and the processes in its arguments."""


async def test_kernel_can_trace_only_the_programs_inside(runtime: GvisorRuntime, tmp_path: Path):
    """runsc sees the files of the host and can make most system calls, so gVisor's kernel must not control it."""
    async with ready_sandbox(runtime, tmp_path / "disk") as sandbox:
        await _start_sleep(sandbox)
        kernel, files = _find_process(sandbox, _KERNEL_COMMAND), _find_process(sandbox, _FILES_COMMAND)
        runsc = _find_process(sandbox, f"sandbox:{sandbox.handle.attempt_id}".encode())
        argv = [sys.executable, "-c", _TRACE, *map(str, (kernel, runsc, files))]
        traced = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=30, check=True)
        assert traced.stdout.split() == ["works", "EPERM", "EPERM"]


_SENT_BYTES_MAX = 1024 * 1024 * 1024
_PIDFD_GETFD = 438


def _copy_listener(pid: int) -> socket.socket:
    """Copy the listening Unix socket of a process."""
    listening = {
        fields[6]
        for fields in map(str.split, Path(f"/proc/{pid}/net/unix").read_text().splitlines())
        if fields[3] == "00010000"
    }
    links = {path.name: path.readlink().name for path in Path(f"/proc/{pid}/fd").iterdir()}
    number = next(int(name) for name, target in links.items() if target[len("socket:[") : -1] in listening)
    pidfd = os.pidfd_open(pid)
    descriptor = ctypes.CDLL(None).syscall(_PIDFD_GETFD, pidfd, number, 0)
    os.close(pidfd)
    return socket.socket(fileno=descriptor)


def _respond_endlessly(listener: socket.socket) -> int:
    """Accept a connection and send a long string. Returns how many bytes were sent before the peer closed it."""
    listener.setblocking(True)
    listener.settimeout(_WAIT_SECONDS)
    connection, _ = listener.accept()
    sent, piece = 0, b"a" * (1024 * 1024)
    with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.settimeout(_WAIT_SECONDS)
        connection.recv(4096)
        connection.sendall(b'{"success":true,"err":"')
        while sent < _SENT_BYTES_MAX:
            connection.sendall(piece)
            sent += len(piece)
    return sent


async def test_runsc_that_reads_an_endless_response_ends(runtime: GvisorRuntime, tmp_path: Path):
    """runsc reads a response of any size from gVisor's kernel, and no control group limits its memory."""
    async with ready_sandbox(runtime, tmp_path / "disk") as sandbox:
        await _start_sleep(sandbox)
        kernel = _find_process(sandbox, _KERNEL_COMMAND)
        assert kernel is not None
        os.kill(kernel, signal.SIGSTOP)
        try:
            with _copy_listener(kernel) as listener:
                responding = asyncio.create_task(asyncio.to_thread(_respond_endlessly, listener))
                await sandbox.signal(signal.SIGTERM)
                assert await responding < 300 * MEBIBYTE
        finally:
            os.kill(kernel, signal.SIGCONT)
        await sandbox.signal(signal.SIGTERM)
        assert (await sandbox.wait()).code == 128 + signal.SIGTERM
