"""The open directories of a guest kernel are counted in the descriptor table that the kernel's processes share."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox.model.fixed_limits import FILE_LOCKS_MAX
from sandbox.runtimes.limits import open_files
from sandbox.runtimes.limits.kernel_memory import SlabStatistics
from sandbox.runtimes.limits.kernel_usage import FileUsage
from sandbox.runtimes.limits.open_files import FileLockMeter, count_directories, count_locks_by_owner, list_directory

_OPEN_COUNT = 30
_HOLDER = """
import os, sys
held = [os.open(sys.argv[1], os.O_RDONLY | int(flags)) for flags in sys.argv[3:] for _ in range(int(sys.argv[2]))]
print("held", flush=True); sys.stdin.read()
"""
StartHolder = Callable[..., int]


@pytest.fixture
def start_holder(tmp_path: Path) -> Iterator[StartHolder]:
    """Return a function that starts a process that opens the path repeatedly with each of the flags."""
    started: list[subprocess.Popen[str]] = []

    def start(*flags: int, path: Path = tmp_path) -> int:
        command = [sys.executable, "-c", _HOLDER, str(path), str(_OPEN_COUNT), *map(str, flags)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process.pid

    yield start
    for process in started:
        process.communicate("")


@pytest.fixture(autouse=True)
def low_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "OPEN_DIRECTORIES_MAX", 20)


def test_directories_are_counted_but_files_and_o_path_descriptors_are_not(start_holder: StartHolder, tmp_path: Path):
    (tmp_path / "file").touch()
    assert count_directories([start_holder(0)], descriptors_per_directory=1).directories == _OPEN_COUNT
    assert count_directories([start_holder(os.O_PATH)], descriptors_per_directory=1).directories == 0
    assert count_directories([start_holder(0, path=tmp_path / "file")], descriptors_per_directory=1).directories == 0
    usage = count_directories([start_holder(0, os.O_PATH)], descriptors_per_directory=1)
    assert (usage.directories, usage.open_files) == (_OPEN_COUNT, None)


def test_directory_with_two_descriptors_is_counted_once(start_holder: StartHolder):
    assert count_directories([start_holder(0, 0)], descriptors_per_directory=2).directories == _OPEN_COUNT


def test_files_shared_by_processes_are_counted_once(start_holder: StartHolder):
    assert count_directories([start_holder(0), start_holder(0)], descriptors_per_directory=1).directories == _OPEN_COUNT


def test_usage_is_empty_if_there_are_few_files_or_no_processes(
    start_holder: StartHolder, monkeypatch: pytest.MonkeyPatch
):
    assert count_directories([], descriptors_per_directory=1) == FileUsage()
    monkeypatch.setattr(open_files, "OPEN_DIRECTORIES_MAX", 1000)
    assert count_directories([start_holder(0)], descriptors_per_directory=1) == FileUsage()


def test_large_table_is_not_listed(start_holder: StartHolder, monkeypatch: pytest.MonkeyPatch):
    """Listing a large table takes seconds."""
    listed: list[str] = []
    monkeypatch.setattr(open_files, "list_directory", lambda one: listed.append(one) or list_directory(one))
    monkeypatch.setattr(open_files, "_LISTED_FILES_MAX", 3 * _OPEN_COUNT)
    large = start_holder(0, os.O_PATH, os.O_PATH, os.O_PATH)
    usage = count_directories([large], descriptors_per_directory=1)
    assert (usage.directories, listed) == (_OPEN_COUNT, [])
    count_directories([start_holder(0, os.O_PATH)], descriptors_per_directory=1)
    assert len(listed) == 1


def test_directories_in_a_large_table_are_estimated(start_holder: StartHolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(open_files, "_LISTED_FILES_MAX", 20)
    monkeypatch.setattr(open_files, "_TRIED_DESCRIPTORS_MAX", 64)
    pid = start_holder(0, 0, 0, 0, os.O_PATH, os.O_PATH)
    estimates = [count_directories([pid], descriptors_per_directory=2).directories for _ in range(20)]
    assert 0.7 * 2 * _OPEN_COUNT < sum(estimates) / len(estimates) < 1.3 * 2 * _OPEN_COUNT


LOCKS = """\
1: FLOCK  ADVISORY  READ 10 00:2c:1001 0 EOF
2: FLOCK  ADVISORY  READ 10 00:2c:1001 0 EOF
2: -> FLOCK  ADVISORY  WRITE 11 00:2c:1001 0 EOF
3: POSIX  ADVISORY  WRITE 20 fe:00:7 0 EOF
4: FLOCK  ADVISORY  READ 30 00:2c:1001 0 EOF
"""


def test_locks_are_counted_by_process_or_file_system(tmp_path: Path):
    """Process 30 has ended, but another process still has its file. Only the sandbox has mounted device 0:44."""
    (locks := tmp_path / "locks").write_text(LOCKS)
    for pid, devices in ((1, ["254:0"]), (10, ["254:0", "0:44"]), (11, []), (20, ["254:0"]), (40, ["254:0"])):
        (tmp_path / str(pid)).mkdir()
        mounts = [f"30 20 {device} / /somewhere rw - ext4 /dev/vda rw\n" for device in devices]
        (tmp_path / str(pid) / "mountinfo").write_text("".join(mounts))
    assert count_locks_by_owner([11, 10], locks, tmp_path) == (4, 1)
    assert count_locks_by_owner([11], locks, tmp_path) == (1, 3)
    assert count_locks_by_owner([40], locks, tmp_path) == (0, 4)
    assert count_locks_by_owner([], locks, tmp_path) == (0, 4)
    (tmp_path / "1" / "mountinfo").unlink()
    assert count_locks_by_owner([11, 10], locks, tmp_path) == (3, 1), "the host's file systems are unknown"
    assert count_locks_by_owner([10], tmp_path / "absent", tmp_path) == (0, 0)


def test_number_of_inspected_locks_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (locks := tmp_path / "locks").write_text(LOCKS)
    monkeypatch.setattr(open_files, "_LISTED_LOCKS_MAX", 2)
    assert count_locks_by_owner([10, 11], locks, tmp_path) == (2, 0)


@pytest.fixture
def slabinfo(tmp_path: Path) -> Callable[[int], Path]:
    def write(locks: int) -> Path:
        (path := tmp_path / "slabinfo").write_text(f"slabinfo\n# name\nfile_lock_cache {locks} 99999 192 21 1 : x\n")
        return path

    return write


def test_locks_are_counted_only_while_the_machine_has_many(slabinfo: Callable[[int], Path]):
    for locks, expected in ((FILE_LOCKS_MAX, 0), (FILE_LOCKS_MAX + 1, FILE_LOCKS_MAX - 1)):
        meter = FileLockMeter(SlabStatistics(slabinfo(locks)))
        assert meter.count(lambda machine_locks: machine_locks - 2) == expected


def test_locks_are_not_counted_if_the_kernel_does_not_show_their_number(tmp_path: Path):
    assert FileLockMeter(SlabStatistics(tmp_path / "absent")).count(lambda _: 1) is None
    (tmp_path / "slabinfo").write_text("slabinfo\n# name\ndentry 9 9 192 21 1 : x\n")
    assert FileLockMeter(SlabStatistics(tmp_path / "slabinfo")).count(lambda _: 1) is None


@pytest.mark.parametrize(("count_seconds", "pause_seconds"), [(0.0, 1.0), (0.3, 3.0)])
def test_locks_are_counted_again_after_a_pause(
    slabinfo: Callable[[int], Path], count_seconds: float, pause_seconds: float
):
    now, counts = 100.0, 0
    meter = FileLockMeter(SlabStatistics(slabinfo(FILE_LOCKS_MAX + 1)), lambda: now)

    def count_own(machine_locks: int) -> int:
        nonlocal now, counts
        now, counts = now + count_seconds, counts + 1
        return counts

    assert meter.count(count_own) == 1
    now = 100.0 + pause_seconds - 0.01
    assert meter.count(count_own) == 1
    now = 100.0 + pause_seconds + 0.01
    assert meter.count(count_own) == 2
