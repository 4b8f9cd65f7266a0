"""Threads of a sandbox are interrupted when the number of open objects on the machine is far above its lowest count.

Buffers of blocked system calls are counted when the kernel's memory use has grown.
"""

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path

import pytest
from msgspec.structs import replace

from sandbox.model.fixed_limits import CLOSING_FILES_BYTES_MAX, SYSCALL_BUFFER_BYTES_MAX, TERMINAL_CPU_SECONDS_MAX
from sandbox.runtimes.limits import pending_syscalls
from sandbox.runtimes.limits.kernel_watch import KernelUsage
from sandbox.runtimes.limits.pending_syscalls import (
    ClosingFilesMeter,
    ClosingThread,
    PendingSyscallInterrupter,
    SyscallBufferMeter,
    TerminalMeter,
    TerminalThreads,
    count_host_open_files,
    count_machine_kernel_bytes,
    count_terminals_if_written,
    find_closing_thread,
    may_any_count_differ,
    sum_syscall_buffer_bytes,
)

MEBIBYTE = 1 << 20


@pytest.mark.parametrize(("text", "count"), [("1216\t0\t9223372036854775807\n", 1216), ("", None), ("x\n", None)])
def test_open_files_of_the_host_are_read_from_file_nr(tmp_path: Path, text: str, count: int | None):
    (tmp_path / "file-nr").write_text(text)
    assert count_host_open_files(tmp_path / "file-nr") == count


def test_open_files_of_the_host_are_unknown_without_the_file(tmp_path: Path):
    assert count_host_open_files(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("counts", "interruptions"),
    [
        ([50, 150], 0),
        ([50, 151], 1),
        ([150, 50, 150, 151], 1),  # growth is counted from the lowest count
        ([50, 151, 151, 251], 1),  # objects left after an interruption do not belong to the sandbox
        ([50, 151, 252], 2),
        ([None, 500, 600], 0),
        ([50, None, 151], 1),
    ],
)
def test_threads_are_interrupted_after_growth(counts: list[int | None], interruptions: int):
    machine, interrupted = {"objects": counts[0]}, list[Collection[int]]()
    interrupter = PendingSyscallInterrupter(
        lambda: machine["objects"], 100, interrupted.append, itertools.count().__next__
    )
    for machine["objects"] in counts[1:]:
        interrupter.interrupt_if_grown(lambda: [7])
    assert interrupted == [[7]] * interruptions


def test_growth_is_counted_from_the_objects_left_after_an_interruption():
    machine = {"objects": 0}
    interrupter = PendingSyscallInterrupter(
        lambda: machine["objects"], 100, lambda _: machine.update(objects=10), itertools.count().__next__
    )
    for objects in (101, 110, 111):
        machine["objects"] = objects
        interrupter.interrupt_if_grown(list)
        assert machine["objects"] == (110 if objects == 110 else 10)


def test_objects_are_counted_twice_a_second():
    times = [0.0]
    counts: list[float] = []
    interrupter = PendingSyscallInterrupter(
        lambda: counts.append(times[-1]) or 1, 100, lambda _: None, lambda: times[-1]
    )
    due = []
    for seconds in (0.1, 0.4, 0.5, 0.6, 1.1):
        times.append(seconds)
        if interrupter.is_due():
            due.append(seconds)
        interrupter.interrupt_if_grown(list)
    assert counts == [0.0, *due] == [0.0, 0.5, 1.1]


def test_processes_are_listed_only_if_they_are_interrupted():
    machine, listed = {"objects": 50}, []
    interrupter = PendingSyscallInterrupter(lambda: machine["objects"], 100, lambda _: None, itertools.count().__next__)
    for machine["objects"] in (150, 151):
        interrupter.interrupt_if_grown(lambda: listed.append(machine["objects"]) or [])
    assert listed == [151]


def test_kernel_bytes_are_read_from_meminfo(tmp_path: Path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nSUnreclaim:  100 kB\nVmallocUsed:  20 kB\nHugePages_Total: 0\n")
    assert count_machine_kernel_bytes(tmp_path / "meminfo") == 120 << 10
    assert count_machine_kernel_bytes(tmp_path / "absent") is None


def make_thread(proc: Path, thread: int, call: str, files: dict[int, str]) -> None:
    """Create the files of one of process 7's threads in a fake /proc."""
    directory = proc / "7/task" / str(thread)
    (directory / "fd").mkdir(parents=True)
    (directory / "net").mkdir()
    (directory / "net/netlink").write_text("sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode\n0 0 9 0 0 0 0 2 0 33\n")
    (directory / "syscall").write_text(call)
    for descriptor, target in files.items():
        (directory / "fd" / str(descriptor)).symlink_to(target)


SETTING, NETLINK = {3: "/proc/sys/kernel/pid_max"}, {4: "socket:[33]"}


@pytest.mark.parametrize(
    ("call", "files", "mebibytes"),
    [
        ("0 0x3 0x7f00 0x3ffff0 0x0 0x0 0x0 0x7ffe 0x7f", SETTING, 4),
        ("44 0x4 0x7f00 0x3ffff0 0x0 0x0 0x0 0x7ffe 0x7f", NETLINK, 6),
        ("0 0x3 0x7f00 0x3ffff0 0x0 0x0 0x0 0x7ffe 0x7f", {3: "/workspace/file", 4: "socket:[33]"}, 0),
        ("44 0x3 0x7f00 0x3ffff0 0x0 0x0 0x0 0x7ffe 0x7f", {3: "socket:[34]"}, 0),
        ("running\n", SETTING, 4),
        ("running\n", {**SETTING, **NETLINK}, 6),
        ("running\n", {3: "/workspace/file"}, 0),
        ("202 0x7f00 0x80 0x0 0x0 0x0 0x0 0x7ffe 0x7f", SETTING, 0),
        ("-1 0x7ffe 0x7f\n", SETTING, 0),
        ("", SETTING, 0),
    ],
)
def test_buffers_of_blocked_calls_are_counted_by_file(tmp_path: Path, call: str, files: dict[int, str], mebibytes: int):
    (tmp_path / "sys/net/core").mkdir(parents=True)
    (tmp_path / "sys/net/core/wmem_default").write_text(f"{6 * MEBIBYTE}\n")
    for thread in range(43):
        make_thread(tmp_path, thread, call, files)
    assert sum_syscall_buffer_bytes([7, 9], tmp_path) == 43 * mebibytes * MEBIBYTE


SYSCTL_STACK = "[<0>] _copy_to_iter+0x85/0x6b0\n[<0>] proc_sys_call_handler+0x1e3/0x290\n[<0>] vfs_read+0x2a2/0x360\n"
NETLINK_STACK = "[<0>] _copy_from_iter+0x99/0x690\n[<0>] netlink_sendmsg+0x1f0/0x470\n"
OTHER_STACK = "[<0>] anon_pipe_read+0x2b4/0x480\n[<0>] vfs_read+0x2a2/0x360\n"


@pytest.mark.parametrize(("stack", "mebibytes"), [(SYSCTL_STACK, 4), (NETLINK_STACK, 6), (OTHER_STACK, 0), ("", 0)])
@pytest.mark.parametrize("call", ["0 0x3 0x7f00 0x3ffff0 0x0 0x0 0x0 0x7ffe 0x7f", "running\n"])
def test_buffers_of_calls_are_counted_after_their_file_was_closed(
    tmp_path: Path, call: str, stack: str, mebibytes: int
):
    (tmp_path / "sys/net/core").mkdir(parents=True)
    (tmp_path / "sys/net/core/wmem_default").write_text(f"{6 * MEBIBYTE}\n")
    for thread in range(65):
        make_thread(tmp_path, thread, call, {3: "/dev/null"})
        (tmp_path / "7/task" / str(thread) / "stack").write_text(stack)
    assert sum_syscall_buffer_bytes([7], tmp_path) == 65 * mebibytes * MEBIBYTE


def test_calls_are_not_inspected_if_there_are_few_threads(tmp_path: Path):
    for thread in range(64):
        make_thread(tmp_path, thread, "0 0x3 0x7f00", SETTING)
    assert sum_syscall_buffer_bytes([7], tmp_path) == 0
    make_thread(tmp_path, 64, "0 0x3 0x7f00", SETTING)
    assert sum_syscall_buffer_bytes([7], tmp_path) == 65 * 4 * MEBIBYTE


def test_buffers_are_counted_only_after_growth_of_kernel_memory():
    machine, inspected = {"bytes": 500 * MEBIBYTE}, list[Collection[int]]()

    def sum_buffers(process_ids: Collection[int]) -> int:
        inspected.append(process_ids)
        return 300 * MEBIBYTE

    meter = SyscallBufferMeter(lambda: machine["bytes"], sum_buffers)
    counts = []
    for mebibytes in (500, 756, 757, 400, 657, 900):
        machine["bytes"] = mebibytes * MEBIBYTE
        counts.append((meter.count(lambda: [7]) or 0) // MEBIBYTE)
    assert counts == [0, 0, 257, 0, 257, 300]
    assert inspected == [[7]] * 3
    assert SyscallBufferMeter(lambda: None, sum_buffers).count(lambda: [7]) is None


def test_count_of_buffers_may_differ_once_the_memory_has_grown():
    machine = {"bytes": 500 * MEBIBYTE}
    meter = SyscallBufferMeter(lambda: machine["bytes"], lambda _: 0)
    answers = []
    for mebibytes in (756, 400, 657):
        machine["bytes"] = mebibytes * MEBIBYTE
        answers.append(meter.may_count_differ(machine["bytes"]))
    assert answers == [False, False, True]
    assert meter.count(lambda: [7]) == 0
    assert not meter.may_count_differ(machine["bytes"])
    machine["bytes"] = 500 * MEBIBYTE
    assert meter.count(lambda: [7]) == 0
    assert meter.may_count_differ(657 * MEBIBYTE)
    assert not meter.may_count_differ(None)


@pytest.mark.parametrize(("mebibytes", "may_differ"), [(756, False), (757, True)])
def test_all_meters_see_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch, mebibytes: int, may_differ: bool):
    buffer_meter, current = SyscallBufferMeter(lambda: 500 * MEBIBYTE), mebibytes * MEBIBYTE
    closing_files_meter = ClosingFilesMeter(lambda: 2000 * MEBIBYTE)
    monkeypatch.setattr(pending_syscalls, "count_machine_kernel_bytes", lambda: current)
    assert may_any_count_differ(buffer_meter, None, closing_files_meter) is may_differ
    assert closing_files_meter.may_count_differ(current + CLOSING_FILES_BYTES_MAX + 1)
    assert not may_any_count_differ(None, None)


def test_buffers_above_the_limit_are_a_violation():
    assert not KernelUsage(syscall_buffer_bytes=SYSCALL_BUFFER_BYTES_MAX).find_exceeded_limit()
    assert "257 MiB" in KernelUsage(syscall_buffer_bytes=SYSCALL_BUFFER_BYTES_MAX + MEBIBYTE).find_exceeded_limit()


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

    def may_count_differ(self) -> bool:
        """Return whether the next count may differ although no program of the sandbox has run."""
        return self._meter.may_count_differ(self.bytes)

    def measure(self, *, seconds: float = 0.0, time_slices: int = 0) -> int:
        """Advance the clock and the time slices of each process. Return the measured MiB."""
        self.now += seconds
        for thread, closing in self.threads.items():
            slices = closing.time_slices + time_slices
            self.threads[thread] = replace(closing, time_slices=slices)
        return (self._meter.count(lambda: [*self.threads, 9999]) or 0) // MEBIBYTE


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
    assert processes.may_count_differ()
    processes.measure()
    assert processes.may_count_differ()
    processes.threads = {}
    processes.measure()
    assert not processes.may_count_differ()


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
    assert not KernelUsage(closing_bytes=CLOSING_FILES_BYTES_MAX).find_exceeded_limit()
    assert "ending processes" in KernelUsage(closing_bytes=CLOSING_FILES_BYTES_MAX + MEBIBYTE).find_exceeded_limit()


def test_living_and_ended_processes_are_not_closing_files():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert find_closing_thread(ended.pid) is None
    ended.wait()
    assert find_closing_thread(ended.pid) is None
    assert find_closing_thread(os.getpid()) is None


# Terminals


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
        assert measured.read_growth() == growth


def test_threads_of_the_kernel_are_unknown_in_a_separate_pid_namespace(tmp_path: Path):
    assert TerminalThreads(tmp_path, tmp_path / "absent").read_growth() == 0


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


def test_sandbox_that_delays_its_count_counts_with_all_terminals_and_delays_no_other_sandbox():
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
