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
from sandbox.runtimes.limits.open_files import (
    FileLockMeter,
    LocksByOwner,
    count_directories,
    count_locks_by_owner,
    has_many_locks,
    list_directory,
)
from sandbox.runtimes.limits.usage_limits import FileUsage

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
5: FLOCK  ADVISORY  READ 30 00:01:1002 0 EOF
6: OFDLCK ADVISORY  WRITE -1 fe:00:8 0 EOF
7: POSIX  ADVISORY  WRITE 0 fe:00:8 0 EOF
"""


def test_locks_are_counted_by_process_or_file_system(tmp_path: Path):
    """Process 30 has ended, but other processes still have its files. Only the sandbox has mounted device 0:44."""
    (locks := tmp_path / "locks").write_text(LOCKS)
    for pid, devices in ((1, ["254:0"]), (10, ["254:0", "0:44"]), (11, []), (20, ["254:0"]), (40, ["254:0"])):
        (tmp_path / str(pid)).mkdir()
        mounts = [f"30 20 {device} / /somewhere rw - ext4 /dev/vda rw\n" for device in devices]
        (tmp_path / str(pid) / "mountinfo").write_text("".join(mounts))
    assert count_locks_by_owner([11, 10], locks, tmp_path) == (4, 1)
    assert count_locks_by_owner([11], locks, tmp_path) == (1, 2)
    assert count_locks_by_owner([40], locks, tmp_path) == (0, 2)
    assert count_locks_by_owner([], locks, tmp_path) == (0, 2)
    (tmp_path / "1" / "mountinfo").unlink()
    assert count_locks_by_owner([11, 10], locks, tmp_path) == (3, 2), "the host's file systems are unknown"
    assert count_locks_by_owner([10], tmp_path / "absent", tmp_path) == (0, 0)


def test_number_of_inspected_locks_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (locks := tmp_path / "locks").write_text(LOCKS)
    monkeypatch.setattr(open_files, "_LISTED_LOCKS_MAX", 2)
    assert count_locks_by_owner([10, 11], locks, tmp_path) == (2, 0)


class FakeMachine:
    """A machine with one sandbox. changes: see `FileLockMeter`."""

    def __init__(self, directory: Path) -> None:
        self._slabinfo = directory / "slabinfo"
        self.changes: int | None = 0
        self.counts = 0
        self.now = 0.0
        self.set_locks()

    def set_locks(self, own: int = 0, orphans: int = 0, others: int = 0) -> None:
        self._locks = LocksByOwner(own, orphans)
        used = own + orphans + others
        self._slabinfo.write_text(f"slabinfo\n# name\nfile_lock_cache {used} 99999 192 21 1 : x\n")

    def count_locks(self) -> LocksByOwner:
        self.counts += 1
        return self._locks

    def start_sandbox(self) -> Callable[[], int | None]:
        """Return a function that measures the sandbox's locks at its next interval."""
        slabs = SlabStatistics(self._slabinfo, lambda: self.now)
        meter = FileLockMeter(slabs, self.count_locks, lambda: self.changes, lambda: self.now)

        def measure() -> int | None:
            self.now += 100
            return meter.count()

        return measure


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_locks_are_counted_only_while_the_machine_has_many(machine: FakeMachine):
    measure = machine.start_sandbox()
    machine.set_locks(own=2, others=FILE_LOCKS_MAX - 2)
    assert (measure(), machine.counts) == (0, 0)
    machine.set_locks(own=2, others=FILE_LOCKS_MAX - 1)
    assert (measure(), machine.counts) == (2, 1)


def test_orphans_of_earlier_sandboxes_are_not_charged(machine: FakeMachine):
    """They may remain until the host restarts."""
    machine.set_locks(orphans=30_000)
    measure = machine.start_sandbox()
    assert (measure(), machine.counts) == (0, 1), "the orphans alone are no reason to count again"
    machine.set_locks(own=9000, orphans=30_000)
    assert measure() == 9000


def test_orphans_of_earlier_sandboxes_below_the_limit_are_not_charged(machine: FakeMachine):
    """Otherwise, a few locks of the next sandbox would exceed the limit together with them."""
    machine.set_locks(orphans=FILE_LOCKS_MAX - 100)
    measure = machine.start_sandbox()
    machine.set_locks(own=300, orphans=FILE_LOCKS_MAX - 100)
    assert (measure(), machine.counts) == (0, 1)
    machine.set_locks(own=9000, orphans=FILE_LOCKS_MAX - 100)
    assert measure() == 9000


def test_orphans_that_appear_while_no_other_sandbox_exists_are_charged(machine: FakeMachine):
    machine.set_locks(orphans=9000)
    measure = machine.start_sandbox()
    machine.set_locks(own=10, orphans=18_000)
    assert measure() == 9010
    machine.set_locks(own=10, orphans=27_000)
    assert measure() == 18_010
    machine.set_locks(own=9000, orphans=12_000)
    assert measure() == 12_000, "locks that were released are no longer charged"


def test_orphans_are_not_charged_while_another_sandbox_exists(machine: FakeMachine):
    measure = machine.start_sandbox()
    machine.changes = None
    machine.set_locks(own=10, orphans=9000)
    assert measure() == 10
    machine.changes = 1
    assert measure() == 0
    machine.set_locks(own=10, orphans=18_000)
    assert measure() == 10, "the other sandbox may have left them when it ended"
    machine.set_locks(own=10, orphans=27_000)
    assert measure() == 9010


def test_orphans_of_a_sandbox_that_started_and_ended_between_two_counts_are_not_charged(machine: FakeMachine):
    measure = machine.start_sandbox()
    machine.changes = 1
    machine.set_locks(own=10, orphans=9000)
    assert measure() == 10
    machine.set_locks(own=10, orphans=18_000)
    assert measure() == 9010


def test_orphans_of_a_sandbox_that_starts_and_ends_during_a_count_are_not_charged(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
):
    count = machine.count_locks

    def count_while_another_sandbox_ends() -> LocksByOwner:
        machine.changes = 1
        return count()

    monkeypatch.setattr(machine, "count_locks", count_while_another_sandbox_ends)
    measure = machine.start_sandbox()
    machine.set_locks(own=10, orphans=9000)
    assert measure() == 10


def test_locks_are_not_counted_if_the_kernel_does_not_show_their_number(tmp_path: Path):
    def count(slabinfo: Path) -> int | None:
        return FileLockMeter(SlabStatistics(slabinfo), lambda: LocksByOwner(1, 1), lambda: 0).count()

    assert count(tmp_path / "absent") is None
    (tmp_path / "slabinfo").write_text("slabinfo\n# name\ndentry 9 9 192 21 1 : x\n")
    assert count(tmp_path / "slabinfo") is None


@pytest.mark.parametrize(("count_seconds", "pause_seconds"), [(0.0, 1.0), (0.3, 3.0)])
def test_locks_are_counted_again_after_a_pause(tmp_path: Path, count_seconds: float, pause_seconds: float):
    machine, now, counts = FakeMachine(tmp_path), 100.0, 0

    def count_locks() -> LocksByOwner:
        nonlocal now, counts
        now, counts = now + count_seconds, counts + 1
        return LocksByOwner(counts, 0)

    slabs = SlabStatistics(tmp_path / "slabinfo", lambda: now)
    meter = FileLockMeter(slabs, count_locks, lambda: 0, lambda: now)
    now += 1
    machine.set_locks(others=FILE_LOCKS_MAX + 1)
    assert meter.count() == 1
    now = 101.0 + pause_seconds - 0.01
    assert meter.count() == 1
    now = 101.0 + pause_seconds + 0.01
    assert meter.count() == 2


@pytest.mark.parametrize(("capacity", "are_many"), [("1023 N0=1023\n", False), ("1024 N0=900 N1=124\n", True)])
def test_list_of_locks_is_not_read_if_the_kernel_shows_their_number(tmp_path: Path, capacity: str, are_many: bool):
    """Reading the list stops all file locking on the machine."""
    (tmp_path / "total_objects").write_text(capacity)
    os.mkfifo(tmp_path / "locks")  # opening it would wait forever
    assert has_many_locks(tmp_path / "total_objects", tmp_path / "locks") is are_many


@pytest.mark.parametrize(("count", "are_many"), [(1023, False), (1024, True), (None, False)])
def test_listed_locks_are_counted_if_the_kernel_does_not_show_their_number(
    tmp_path: Path, count: int | None, are_many: bool
):
    if count is not None:
        (tmp_path / "locks").write_text("1: POSIX  ADVISORY  WRITE 7 fd:00:1 0 EOF\n" * count)
    assert has_many_locks(tmp_path / "missing", tmp_path / "locks") is are_many
