"""What is open on a plain disk is looked at once, however many processes share one table of open files."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandbox.disks import directory

_FILES, _CHILDREN = 200, 20
_HOLDER = """
import ctypes, os, signal, sys
fork = 56 if os.uname().machine == "x86_64" else 220
held = [os.open(sys.argv[1], os.O_RDONLY) for _ in range(int(sys.argv[2]))]
os.unlink(sys.argv[1])
libc, children = ctypes.CDLL(None), []
for _ in range(int(sys.argv[3])):
    child = libc.syscall(fork, int(sys.argv[4]) | signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        while True: libc.pause()
    children.append(child)
print("held", flush=True); sys.stdin.read()
for child in children: os.kill(child, signal.SIGKILL)
"""
_CLONE_FILES = 0x400


@contextmanager
def holding(path: Path, flags: int) -> Iterator[None]:
    """A process that has an unlinked file open many times, and its children."""
    path.write_bytes(b"x" * 8192)
    words = [sys.executable, "-c", _HOLDER, str(path), str(_FILES), str(_CHILDREN), str(flags)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield
        holder.communicate()


def looked_at() -> int:
    """How many open files of descendants are looked at."""
    return sum(1 for _ in directory._open_files())


@pytest.mark.skipif(os.getuid() != 0, reason="an ordinary user may not compare the files of every process")
def test_processes_that_share_their_open_files_are_looked_at_once(tmp_path: Path):
    before = looked_at()
    with holding(tmp_path / "file", _CLONE_FILES):
        assert looked_at() - before < 2 * _FILES
        found = directory.measure_deleted_files(tmp_path.stat().st_dev)
    assert found.file_count >= 1
    assert found.size_bytes >= 8192


def test_processes_with_open_files_of_their_own_are_all_looked_at(tmp_path: Path):
    before = looked_at()
    with holding(tmp_path / "file", 0):
        assert looked_at() - before >= _FILES * (1 + _CHILDREN)
