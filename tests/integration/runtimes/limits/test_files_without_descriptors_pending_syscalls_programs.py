"""Interrupting a thread frees files that only its system call keeps open. The program continues."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandbox.runtimes.limits.files_without_descriptors import interrupt_threads

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can interrupt programs of other users")

_BLOCKED_THREAD_HOLDS_A_FILE = """
import os, select, threading
reader, writer = os.pipe()
poll = select.poll(); poll.register(reader, select.POLLIN)
def wait():
    try: poll.poll()
    except OSError: pass
threading.Thread(target=wait, daemon=True).start()
import time; time.sleep(0.3)
os.close(reader)
def write():
    try: os.write(writer, b"x"); print("written", flush=True)
    except BrokenPipeError: print("broken", flush=True)
write()
while input(): write()
"""


def test_file_held_only_by_a_blocked_thread_is_freed():
    with subprocess.Popen(
        [sys.executable, "-c", _BLOCKED_THREAD_HOLDS_A_FILE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        try:
            assert program.stdout.readline() == "written\n"
            output, deadline = "", time.monotonic() + 10
            while output != "broken\n" and time.monotonic() < deadline:
                interrupt_threads([program.pid])
                time.sleep(0.1)
                program.stdin.write("again\n")
                program.stdin.flush()
                output = program.stdout.readline()
            assert output == "broken\n"
        finally:
            program.kill()


_INTERRUPTED_PROGRAM = """
import asyncio, queue, signal, socket, subprocess, threading, time
left, right = socket.socketpair(); left.settimeout(20)
threading.Thread(target=lambda: (time.sleep(0.5), right.send(b"x"))).start()
assert left.recv(1) == b"x"
async def main():
    await asyncio.gather(*(asyncio.sleep(0.3) for _ in range(5)))
    child = await asyncio.create_subprocess_exec("sleep", "0.3")
    assert await child.wait() == 0
asyncio.run(main())
items = queue.Queue()
threading.Thread(target=lambda: (time.sleep(0.3), items.put(1))).start()
assert items.get(timeout=20) == 1
received = []
signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
for _ in range(20): signal.raise_signal(signal.SIGUSR1); time.sleep(0.01)
assert len(received) == 20
assert subprocess.run(["sh", "-c", "sleep 0.3 & wait; echo waited"], capture_output=True).stdout == b"waited\\n"
started = time.monotonic(); time.sleep(0.5); assert time.monotonic() - started >= 0.5
print("all")
"""


def test_programs_continue_after_their_calls_are_interrupted():
    with subprocess.Popen([sys.executable, "-c", _INTERRUPTED_PROGRAM], stdout=subprocess.PIPE, text=True) as program:
        try:
            count = 0
            while program.poll() is None:
                interrupt_threads([program.pid, *_children(program.pid)])
                count += 1
                time.sleep(0.02)
            assert program.stdout is not None
            assert program.stdout.read() == "all\n"
            assert (program.returncode, count > 10) == (0, True)
        finally:
            program.kill()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_processes_that_ended_or_cannot_be_traced_are_skipped():
    interrupt_threads([2**22 + 1, os.getpid()])
