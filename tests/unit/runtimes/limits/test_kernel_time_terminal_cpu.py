"""The CPU time of kernel threads counts for the sandboxes that write to terminals."""

import itertools
import os
import threading
import time
from collections.abc import Collection
from pathlib import Path

import pytest

from sandbox.model.fixed_limits import TERMINAL_CPU_SECONDS_MAX
from sandbox.runtimes.limits.kernel_time import TerminalMeter, TerminalThreads, count_terminals_if_written
from sandbox.runtimes.limits.usage_limits import KernelUsage


def add_kernel_thread(proc: Path, thread: int, name: str, ticks: int, function: str) -> None:
    """Write the /proc files of a kernel thread that has used `ticks` of CPU time and is executing `function`."""
    directory = proc / str(thread)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "stat").write_text(f"{thread} ({name}) R 2 {'0 ' * 9}{ticks - 1} 1 0 0 20 0")
    (directory / "stack").write_text(f"[<0>] {function}+0x16d/0x1a0\n[<0>] process_one_work+0x18c/0x350\n")


def test_threads_that_process_the_input_of_terminals_are_measured(tmp_path: Path):
    hertz = os.sysconf("SC_CLK_TCK")
    threads = {
        11: ("kworker/u8:1+events_unbound", "flush_to_ldisc"),
        12: ("kworker/u8:2-loop0", "loop_process_work"),
        13: ("kworker/1:0-events", "flush_to_ldisc"),
    }
    (tmp_path / "children").write_text("11 12 13 99 ")
    measured = TerminalThreads(tmp_path, tmp_path / "children")
    for ticks, growth in ((hertz, 0.0), (3 * hertz, 2.0), (3 * hertz, 0.0)):
        for thread, (name, function) in threads.items():
            add_kernel_thread(tmp_path, thread, name, ticks, function)
        assert measured.read_new_cpu_seconds() == growth


def test_threads_of_the_kernel_are_unknown_in_a_separate_pid_namespace(tmp_path: Path):
    assert TerminalThreads(tmp_path, tmp_path / "absent").read_new_cpu_seconds() == 0


def add_terminals(proc: Path, names: Collection[str], written_at: float, function: str = "do_sys_poll") -> None:
    """Write the /proc files of a process with these terminals. One of its threads is executing `function`."""
    terminals = proc / "7/root/dev/pts"
    terminals.mkdir(parents=True)
    for name in (*names, "ptmx"):
        (terminals / name).touch()
    os.utime(terminals / "ptmx", (written_at, written_at))
    thread = proc / "7/task/8"
    thread.mkdir(parents=True)
    (thread / "stack").write_text(f"[<0>] {function}+0x1/0x2\n")


@pytest.mark.parametrize(
    ("names", "seconds_ago", "function", "count"),
    [
        (["0", "5"], 10, "do_sys_poll", 2),
        (["0", "5"], 30, "do_sys_poll", 0),
        (["0", "5"], 30, "file_tty_write.isra.0", 2),  # a long write: the kernel stores the time when it ends
        ([], 10, "file_tty_write.isra.0", 0),
    ],
)
def test_terminals_are_counted_if_a_program_writes_to_them(
    tmp_path: Path, names: list[str], seconds_ago: int, function: str, count: int
):
    add_terminals(tmp_path, names, time.time() - seconds_ago, function)
    assert count_terminals_if_written([6, 7], tmp_path) == count


def test_terminal_count_of_a_process_without_terminals_is_zero(tmp_path: Path):
    assert count_terminals_if_written([7], tmp_path) == 0


class WrittenTerminals:
    """Sandboxes that write to terminals, and the number of processors that kernel threads use for the terminals."""

    def __init__(self, processors: float, terminals: int, others: int = 0) -> None:
        self.processors, self.now = processors, 100.0
        self.terminals = {1: terminals, 2: others}
        self._meter = TerminalMeter(
            lambda: self.processors, lambda process_ids: self.terminals[min(process_ids)], lambda: self.now
        )

    def measure(self, seconds: int) -> float:
        """Measure once per second for this many seconds. Return the last measured time."""
        measured = 0.0
        for _ in range(seconds):
            self.now += 1
            measured = self._meter.measure(lambda: [1], lambda: [[2]])
        return measured


@pytest.mark.parametrize(
    ("processors", "terminals", "others", "seconds"),
    [(1.5, 4, 0, 3.0), (0.5, 4, 0, 0.0), (1.5, 4, 12, 0.75), (1.5, 0, 4, 0.0)],
)
def test_time_for_terminals_beyond_half_a_processor_is_divided_by_the_number_of_terminals(
    processors: float, terminals: int, others: int, seconds: float
):
    assert WrittenTerminals(processors, terminals, others).measure(4) == seconds


def test_sandbox_that_delays_its_count_is_charged_and_does_not_delay_other_sandboxes():
    """A program can list its terminals so slowly that nobody else can list them."""
    ended = threading.Event()

    def count(process_ids: Collection[int]) -> int:
        return 10 if 1 in process_ids else 40 * ended.wait(20)

    now = itertools.count(100.0)
    meter = TerminalMeter(lambda: 1.5, count, lambda: next(now))
    started_at = time.monotonic()
    try:
        measured = [meter.measure(lambda: [1], lambda: [[2]]) for _ in range(6)]
    finally:
        ended.set()
    assert measured == [0.0, 0.2, 0.4, pytest.approx(0.6), 0.8, 1.0]
    assert time.monotonic() - started_at < 10


def test_time_for_terminals_decreases_when_the_threads_have_little_to_do():
    written = WrittenTerminals(1.5, 4)
    assert written.measure(3) == 2.0
    written.processors = 0.0
    assert written.measure(2) == 1.0
    assert written.measure(3) == 0.0


def test_time_for_terminals_is_reset_when_the_sandbox_stops_writing():
    written = WrittenTerminals(1.5, 4)
    assert written.measure(3) == 2.0
    written.terminals[1] = 0
    assert written.measure(1) == 0.0


def test_time_for_terminals_above_the_limit_is_a_violation():
    assert not KernelUsage(terminal_cpu_seconds=TERMINAL_CPU_SECONDS_MAX).find_exceeded_limit()
    assert "terminals" in KernelUsage(terminal_cpu_seconds=TERMINAL_CPU_SECONDS_MAX + 0.1).find_exceeded_limit()
