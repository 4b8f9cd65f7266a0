"""Threads of a sandbox are interrupted when the number of open objects on the machine is far above its lowest count.

Buffers of blocked system calls are counted when the kernel's memory use has grown.
"""

import itertools
from collections.abc import Collection
from pathlib import Path

import pytest

from sandbox.model.fixed_limits import SYSCALL_BUFFER_BYTES_MAX
from sandbox.runtimes.limits.files_without_descriptors import (
    PendingSyscallInterrupter,
    SyscallBufferMeter,
    count_host_open_files,
    sum_syscall_buffer_bytes,
)
from sandbox.runtimes.limits.kernel_memory import count_machine_unreclaimable_bytes
from sandbox.runtimes.limits.usage_limits import KernelUsage

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
    assert count_machine_unreclaimable_bytes(tmp_path / "meminfo") == 120 << 10
    assert count_machine_unreclaimable_bytes(tmp_path / "absent") is None


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
        counts.append((meter.measure(lambda: [7]) or 0) // MEBIBYTE)
    assert counts == [0, 0, 257, 0, 257, 300]
    assert inspected == [[7]] * 3
    assert SyscallBufferMeter(lambda: None, sum_buffers).measure(lambda: [7]) is None


def test_count_of_buffers_may_differ_once_the_memory_has_grown():
    machine = {"bytes": 500 * MEBIBYTE}
    meter = SyscallBufferMeter(lambda: machine["bytes"], lambda _: 0)
    answers = []
    for mebibytes in (756, 400, 657):
        machine["bytes"] = mebibytes * MEBIBYTE
        answers.append(meter.may_measurement_differ(machine["bytes"]))
    assert answers == [False, False, True]
    assert meter.measure(lambda: [7]) == 0
    assert not meter.may_measurement_differ(machine["bytes"])
    machine["bytes"] = 500 * MEBIBYTE
    assert meter.measure(lambda: [7]) == 0
    assert meter.may_measurement_differ(657 * MEBIBYTE)
    assert not meter.may_measurement_differ(None)


def test_buffers_above_the_limit_are_a_violation():
    assert not KernelUsage(syscall_buffer_bytes=SYSCALL_BUFFER_BYTES_MAX).find_exceeded_limit()
    assert "257 MiB" in KernelUsage(syscall_buffer_bytes=SYSCALL_BUFFER_BYTES_MAX + MEBIBYTE).find_exceeded_limit()
