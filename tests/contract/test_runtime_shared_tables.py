"""No sandbox can exhaust a kernel table that all sandboxes share with the host."""

import asyncio
from pathlib import Path

import pytest

from doubles.sandbox_lifecycle import TIMEOUT_SECONDS, has_own_kernel, read_until, ready_sandbox, run_python
from sandbox.interfaces.runtime import Command, Runtime, TerminalSize
from sandbox.runtimes.programs.launcher import PTYS_MAX
from sandbox.runtimes.programs.process_limits import OPEN_FILES_MAX, OPEN_FILES_SOFT_MAX

_FILES = f"""
import os, resource
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
held = [os.open("/dev/null", os.O_RDONLY) for _ in range(4000)]
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
try:
    while len(held) < {OPEN_FILES_MAX} + 10: held.append(os.open("/dev/null", os.O_RDONLY))
except OSError as error:
    print(error.strerror)
try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard + 1))
except (OSError, ValueError) as error:
    print("hard limit")
"""


def test_open_files_per_process_are_limited(runtime: Runtime, disk: Path):
    result = run_python(runtime, disk, _FILES)
    expected = f"{OPEN_FILES_SOFT_MAX} {OPEN_FILES_MAX}\nToo many open files\nhard limit\n"
    assert (result.output, result.errors) == (expected, "")


async def test_open_files_on_a_terminal_are_limited(runtime: Runtime, disk: Path):
    async def scenario() -> str:
        async with ready_sandbox(runtime, disk) as sandbox:
            output, _ = await sandbox.start(Command(["/bin/sh", "-c", "echo up; sleep 300"], {}, "/workspace"))
            await read_until(output, b"up")
            command = Command(["/bin/bash", "-c", "ulimit -Sn; ulimit -Hn"], {}, "/workspace")
            terminal = await sandbox.open_terminal(command, TerminalSize(24, 80))
            async with asyncio.timeout(TIMEOUT_SECONDS):
                return (await terminal.output.read()).decode()

    assert (await scenario()).split() == [str(OPEN_FILES_SOFT_MAX), str(OPEN_FILES_MAX)]


_TERMINALS = f"""
import os, pty
held = [pty.openpty()]
os.write(held[0][0], b"typed\\n")
print(os.read(held[0][1], 100), os.ttyname(held[0][1]))
try:
    while len(held) < {PTYS_MAX} + 10: held.append(pty.openpty())
except OSError as error:
    print(error)
print(len(held), flush=True)
os.close(held[-1][0]), os.close(held[-1][1])
print("open" if pty.openpty() else "", flush=True)
"""


def test_number_of_terminals_is_limited(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("terminals belong to the sandbox's kernel")
    result = run_python(runtime, disk, _TERMINALS)
    echo, *_, count, reopened = result.output.splitlines()
    assert echo == "b'typed\\n' /dev/pts/0"
    assert (int(count), reopened) == (PTYS_MAX, "open"), result


_AIO = """
import ctypes, errno, os
libc, context = ctypes.CDLL(None, use_errno=True), ctypes.c_ulong(0)
number = {"x86_64": 206, "aarch64": 0}[os.uname().machine]
made = libc.syscall(number, 1, ctypes.byref(context))
print("made" if made == 0 else errno.errorcode[ctypes.get_errno()])
with open("file", "w+b") as file:
    os.pwritev(file.fileno(), [b"one"], 0)
    print(os.preadv(file.fileno(), [bytearray(3)], 0))
"""


def test_file_io_works_without_aio_contexts(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("contexts belong to the sandbox's kernel")
    result = run_python(runtime, disk, _AIO)
    assert result.output.split() == ["ENOSYS", "3"], result
