"""Directories that the kernel of a sandbox's own has open are counted, in the one table that its processes share."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox.interfaces.runtime import FileUsage
from sandbox.runtimes.limits import kernel_usage

_OPENED = 30
_HOLDER = """
import os, sys
held = [os.open(sys.argv[1], os.O_RDONLY | int(flags)) for flags in sys.argv[3:] for _ in range(int(sys.argv[2]))]
print("held", flush=True); sys.stdin.read()
"""
Holder = Callable[..., int]


@pytest.fixture
def holding(tmp_path: Path) -> Iterator[Holder]:
    """Starts a process that opens a file or directory so often with each of the flags, and gives its id."""
    started: list[subprocess.Popen[str]] = []

    def start(*flags: int, path: Path = tmp_path) -> int:
        words = [sys.executable, "-c", _HOLDER, str(path), str(_OPENED), *map(str, flags)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process.pid

    yield start
    for process in started:
        process.communicate("")


@pytest.fixture(autouse=True)
def low_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_usage, "OPEN_DIRECTORIES_MAX", 20)


def test_directories_count_and_paths_and_files_do_not(holding: Holder, tmp_path: Path):
    (tmp_path / "file").touch()
    assert kernel_usage.count_directories([holding(0)], descriptors_each=1).directories == _OPENED
    assert kernel_usage.count_directories([holding(os.O_PATH)], descriptors_each=1).directories == 0
    assert kernel_usage.count_directories([holding(0, path=tmp_path / "file")], descriptors_each=1).directories == 0
    both = kernel_usage.count_directories([holding(0, os.O_PATH)], descriptors_each=1)
    assert (both.directories, both.open_files) == (_OPENED, None)


def test_a_directory_that_takes_two_descriptors_counts_once(holding: Holder):
    assert kernel_usage.count_directories([holding(0, 0)], descriptors_each=2).directories == _OPENED


def test_processes_that_share_their_files_count_once(holding: Holder):
    assert kernel_usage.count_directories([holding(0), holding(0)], descriptors_each=1).directories == _OPENED


def test_few_files_and_no_process_are_no_use(holding: Holder, monkeypatch: pytest.MonkeyPatch):
    assert kernel_usage.count_directories([], descriptors_each=1) == FileUsage()
    monkeypatch.setattr(kernel_usage, "OPEN_DIRECTORIES_MAX", 1000)
    assert kernel_usage.count_directories([holding(0)], descriptors_each=1) == FileUsage()
