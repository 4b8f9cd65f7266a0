"""Files that ending processes have not closed count once the kernel's memory has grown."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from sandbox.model.fixed_limits import CLOSING_FILES_BYTES_MAX
from sandbox.runtimes.limits import files_without_descriptors
from sandbox.runtimes.limits.files_without_descriptors import (
    ClosingFilesMeter,
    ClosingThread,
    SyscallBufferMeter,
    find_closing_thread,
    may_any_measurement_differ,
)
from sandbox.runtimes.limits.usage_limits import KernelUsage

MEBIBYTE = 1 << 20


@pytest.mark.parametrize(("mebibytes", "may_differ"), [(756, False), (757, True)])
def test_all_meters_use_the_same_measurement_of_machine_memory(
    monkeypatch: pytest.MonkeyPatch, mebibytes: int, may_differ: bool
):
    buffer_meter, current = SyscallBufferMeter(lambda: 500 * MEBIBYTE), mebibytes * MEBIBYTE
    closing_files_meter = ClosingFilesMeter(lambda: 2000 * MEBIBYTE)
    monkeypatch.setattr(files_without_descriptors, "count_machine_unreclaimable_bytes", lambda: current)
    assert may_any_measurement_differ(buffer_meter, None, closing_files_meter) is may_differ
    assert closing_files_meter.may_measurement_differ(current + CLOSING_FILES_BYTES_MAX + 1)
    assert not may_any_measurement_differ(None, None)


THREAD = 1 << 23
"""The id of no real thread: larger than the kernel's maximum."""


def add_thread(proc: Path, thread: int, name: bytes, flags: int, process: int = 7) -> None:
    """Create the files of a thread without a descriptor table in a fake /proc."""
    directory = proc / str(thread)
    directory.mkdir()
    stat = b"%d (%b) R 1 7 7 0 -1 %d %b 500 0" % (thread, name, flags, b" ".join([b"0"] * 12))
    (directory / "stat").write_bytes(stat)
    (directory / "status").write_bytes(b"Name:\t%b\nTgid:\t%d\n" % (name, process))
    (directory / "schedstat").write_text("100 200 10\n")


@pytest.mark.parametrize("name", [b"program", b"\xff\xfe", b") R 1"])
def test_closing_thread_is_found_regardless_of_its_name(tmp_path: Path, name: bytes):
    add_thread(tmp_path, THREAD, name, flags=0x4)
    assert find_closing_thread(THREAD, tmp_path) == ClosingThread("R", "500", 10, "7")


def test_thread_that_is_not_ending_is_not_closing_files(tmp_path: Path):
    add_thread(tmp_path, THREAD, b"\xff\xfe", flags=0x40)
    assert find_closing_thread(THREAD, tmp_path) is None


class EndingProcesses:
    """Processes that are closing their files, on a machine whose kernel memory has grown."""

    def __init__(self, count: int, state: str = "R") -> None:
        self.threads = {thread: ClosingThread(state, "500", 10, str(thread)) for thread in range(count)}
        self.bytes, self.now = 1 << 30, 100.0
        self._meter = ClosingFilesMeter(lambda: self.bytes, self._find, lambda: self.now)
        self.bytes += CLOSING_FILES_BYTES_MAX + 100 * MEBIBYTE

    def _find(self, thread: int) -> ClosingThread | None:
        return self.threads.get(thread)

    def may_measurement_differ(self) -> bool:
        """Return whether the next measurement may differ although no program of the sandbox has run."""
        return self._meter.may_measurement_differ(self.bytes)

    def measure(self, *, seconds: float = 0.0, time_slices: int = 0) -> int:
        """Advance the clock and the time slices of each process. Return the measured MiB."""
        self.now += seconds
        for thread, closing in self.threads.items():
            slices = closing.time_slices + time_slices
            self.threads[thread] = replace(closing, time_slices=slices)
        return (self._meter.measure(lambda: [*self.threads, 9999]) or 0) // MEBIBYTE


@pytest.mark.parametrize(
    ("count", "state", "time_slices", "mebibytes"),
    [
        (4, "R", 2, 1124),  # the whole growth
        (2, "R", 2, 640),
        (4, "D", 0, 0),  # waits for a slow disk
        (4, "R", 1, 0),  # starved, but with few files
    ],
)
def test_files_of_processes_that_take_a_long_time_to_end_are_counted(
    count: int, state: str, time_slices: int, mebibytes: int
):
    processes = EndingProcesses(count, state)
    assert processes.measure() == 0
    assert processes.measure(seconds=0.9, time_slices=time_slices) == 0
    assert processes.measure(seconds=0.1) == mebibytes


def test_files_of_processes_that_wait_for_five_seconds_are_counted():
    processes = EndingProcesses(4, "D")
    assert processes.measure() == processes.measure(seconds=4.9) == 0
    assert processes.measure(seconds=0.1) == 1124


def test_count_may_differ_while_processes_are_closing_files():
    """A process that gets no processor does not run, but the time that it needs counts."""
    processes = EndingProcesses(4)
    assert processes.may_measurement_differ()
    processes.measure()
    assert processes.may_measurement_differ()
    processes.threads = {}
    processes.measure()
    assert not processes.may_measurement_differ()


def test_threads_of_one_process_are_counted_once():
    processes = EndingProcesses(4)
    processes.threads = {thread: replace(closing, process_id="7") for thread, closing in processes.threads.items()}
    assert processes.measure() == 0
    assert processes.measure(seconds=1, time_slices=2) == 320


def test_files_of_ending_processes_are_not_counted_without_growth_of_kernel_memory():
    processes = EndingProcesses(4)
    processes.bytes = (1 << 30) + CLOSING_FILES_BYTES_MAX
    assert processes.measure() == processes.measure(seconds=2, time_slices=9) == 0


def test_later_process_with_the_same_id_does_not_count_as_slow():
    processes = EndingProcesses(4)
    processes.measure()
    processes.threads = {thread: ClosingThread("R", "600", 90, str(thread)) for thread in processes.threads}
    assert processes.measure(seconds=2) == 0


def test_files_of_ending_processes_above_the_limit_are_a_violation():
    assert not KernelUsage(closing_files_bytes=CLOSING_FILES_BYTES_MAX).find_exceeded_limit()
    assert (
        "ending processes" in KernelUsage(closing_files_bytes=CLOSING_FILES_BYTES_MAX + MEBIBYTE).find_exceeded_limit()
    )


def test_living_and_ended_processes_are_not_closing_files():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert find_closing_thread(ended.pid) is None
    ended.wait()
    assert find_closing_thread(ended.pid) is None
    assert find_closing_thread(os.getpid()) is None


# Terminals
