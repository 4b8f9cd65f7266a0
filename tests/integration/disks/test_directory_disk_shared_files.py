"""Open files on a directory disk are inspected once, even if many processes share one file table."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandbox.disks import directory_disk

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
def hold_open(path: Path, flags: int) -> Iterator[None]:
    """Run a process and children that have the same unlinked file open many times."""
    path.write_bytes(b"x" * 8192)
    command = [sys.executable, "-c", _HOLDER, str(path), str(_FILES), str(_CHILDREN), str(flags)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield
        holder.communicate()


def count_inspected_files() -> int:
    """Return the number of open files that are inspected in this process's descendants."""
    return sum(1 for _ in directory_disk._open_files())


@pytest.mark.skipif(os.getuid() != 0, reason="an ordinary user cannot compare the files of every process")
def test_shared_file_table_is_inspected_once(tmp_path: Path):
    before = count_inspected_files()
    with hold_open(tmp_path / "file", _CLONE_FILES):
        assert count_inspected_files() - before < 2 * _FILES
        deleted = directory_disk.measure_deleted_files(tmp_path.stat().st_dev)
    assert deleted.file_count >= 1
    assert deleted.size_bytes >= 8192


def test_separate_file_tables_are_all_inspected(tmp_path: Path):
    before = count_inspected_files()
    with hold_open(tmp_path / "file", 0):
        assert count_inspected_files() - before >= _FILES * (1 + _CHILDREN)
