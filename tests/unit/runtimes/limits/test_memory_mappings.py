"""The mappings of a sandbox's processes are counted in /proc; hidden mappings are attributed to the sandbox."""

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sandbox.model.fixed_limits import VMA_BYTES_MAX
from sandbox.runtimes.limits import memory_mappings
from sandbox.runtimes.limits.kernel_memory import VMA_BYTES, SlabUsage
from sandbox.runtimes.limits.memory_mappings import (
    MappingMeter,
    SandboxProcesses,
    are_mappings_hidden,
    count_mappings,
)

MAPPINGS_MAX = VMA_BYTES_MAX // VMA_BYTES
OWN_PID = os.getpid()


@pytest.fixture
def more_mappings() -> Iterator[Callable[[int], None]]:
    """Return a function that adds mappings to this process."""
    with ExitStack() as held:

        def add(count: int) -> None:
            for number in range(count):
                # The kernel merges adjacent mappings with the same protection.
                protection = mmap.PROT_READ | (mmap.PROT_WRITE if number % 2 else 0)
                held.enter_context(mmap.mmap(-1, mmap.PAGESIZE, prot=protection))

        yield add


def count_own() -> int:
    count = count_mappings([OWN_PID], 1 << 30)
    assert count is not None
    return count


def test_mappings_of_processes_are_summed(more_mappings: Callable[[int], None]):
    before = count_own()
    more_mappings(300)
    assert before + 290 < count_own() < before + 400
    assert count_mappings([OWN_PID, OWN_PID], 1 << 30) == 2 * count_own()
    assert count_mappings([1 << 22], 10) == 0


def test_count_stops_above_the_maximum():
    count = count_mappings(iter([OWN_PID, OWN_PID, 0, 0]), 10)
    assert count is not None
    assert 10 < count <= count_own()


def test_mappings_of_a_process_without_its_first_thread_are_counted():
    source = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=[600]).start()
print("held", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while "Z" not in Path(f"/proc/{process.pid}/status").read_text().split("State:")[1][:5]:
            time.sleep(0.01)
        count = count_mappings([process.pid], 1 << 30)
        process.kill()
    assert count is not None
    assert count > 10


def test_count_that_takes_too_long_has_no_result(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory_mappings, "_COUNT_SECONDS", -1.0)
    assert count_mappings([OWN_PID], 1 << 30) is None


@pytest.mark.parametrize(
    ("hidden", "kernel_bytes", "is_hidden"),
    [
        (150, 1 << 30, True),
        (50, 1 << 30, False),
        (50, 0, True),  # the sandbox lists mappings that its kernel memory cannot contain
    ],
)
def test_mappings_that_no_process_lists_are_hidden(tmp_path: Path, hidden: int, kernel_bytes: int, is_hidden: bool):
    slabs, own = tmp_path / "slabinfo", count_own()
    (tmp_path / "proc").mkdir()
    slabs.write_text(f"vm_area_struct  {own + hidden}   {own + 900}    192   21    1 : tunables\n")
    sandboxes = [SandboxProcesses([OWN_PID], kernel_bytes)]
    assert are_mappings_hidden(sandboxes, 100, slabs, str(tmp_path / "proc")) == is_hidden


def test_mappings_of_processes_outside_of_sandboxes_are_not_hidden(tmp_path: Path):
    slabs, own = tmp_path / "slabinfo", count_own()
    (tmp_path / "proc" / str(OWN_PID)).mkdir(parents=True)
    slabs.write_text(f"vm_area_struct  {own + 50}   {own + 900}    192   21    1 : tunables\n")
    assert not are_mappings_hidden([], 100, slabs, str(tmp_path / "proc"))
    assert not are_mappings_hidden([], 100, tmp_path / "absent")


@pytest.mark.parametrize(
    ("kernel_bytes", "is_hidden"),
    [
        (900_000 * VMA_BYTES, True),
        (1 << 30, False),  # all of the machine's mappings may be the sandbox's
    ],
)
def test_mappings_that_take_too_long_to_count_are_estimated_from_kernel_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_bytes: int, is_hidden: bool
):
    monkeypatch.setattr(memory_mappings, "count_mappings", lambda ids, _: None if OWN_PID in ids else 0)
    (tmp_path / "slabinfo").write_text("vm_area_struct  1000000   1000000    192   21    1 : tunables\n")
    sandboxes = [SandboxProcesses([OWN_PID], kernel_bytes)]
    assert are_mappings_hidden(sandboxes, 100, tmp_path / "slabinfo", str(tmp_path / "absent")) == is_hidden


def test_mappings_of_a_large_host_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory_mappings, "_COUNT_SECONDS", -1.0)
    (tmp_path / "slabinfo").write_text("vm_area_struct  1000000   1000000    192   21    1 : tunables\n")
    assert not are_mappings_hidden([], 100, tmp_path / "slabinfo")


@pytest.mark.parametrize(("left", "is_hidden"), [(150, True), (50, False)])
def test_mappings_of_programs_that_end_during_the_count_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, is_hidden: bool
):
    slabs = tmp_path / "slabinfo"
    slabs.write_text("vm_area_struct  1000000   1000000    192   21    1 : tunables\n")

    def count(process_ids: Iterable[int], mappings_max: int) -> int:
        slabs.write_text(f"vm_area_struct  {left}   1000000    192   21    1 : tunables\n")
        return 0

    monkeypatch.setattr(memory_mappings, "count_mappings", count)
    assert are_mappings_hidden([], 100, slabs, str(tmp_path / "absent")) == is_hidden


class CountedSandbox:
    """A sandbox on a machine whose mappings have grown."""

    def __init__(self, own: int | None, *, are_hidden: bool = False) -> None:
        self.own, self.are_hidden, self.now, self.counts, self.checks = own, are_hidden, 100.0, 0, 0
        self._counter = MappingMeter(self._count, self._check, lambda: self.now)

    def _count(self, process_ids: Iterable[int], mappings_max: int) -> int | None:
        assert list(process_ids) == [7]
        assert mappings_max == MAPPINGS_MAX
        self.counts += 1
        return self.own

    def _check(self, sandboxes: Iterable[SandboxProcesses], mappings_max: int) -> bool:
        assert mappings_max == MAPPINGS_MAX
        assert list(sandboxes) == [SandboxProcesses([7], 1)]
        self.checks += 1
        return self.are_hidden

    def measure(self, growth_bytes: int, share_bytes: int = 0) -> int:
        """Return the size that is known once the counting thread has ended."""
        slabs = SlabUsage(0, 0, vma_bytes=share_bytes, vma_bytes_upper_bound=growth_bytes)
        self._counter.measure(slabs, lambda: [7], lambda: [SandboxProcesses([7], 1)])
        thread = self._counter._thread
        if thread is not None:
            thread.join(10)
        return self._counter.measure(slabs, lambda: [7], lambda: [SandboxProcesses([7], 1)])


def test_mappings_are_not_counted_while_their_growth_is_within_the_limit():
    sandbox = CountedSandbox(None)
    assert sandbox.measure(VMA_BYTES_MAX, VMA_BYTES_MAX) == VMA_BYTES_MAX
    assert sandbox.counts == 0


@pytest.mark.parametrize("own", [MAPPINGS_MAX + 1, None])
def test_sandbox_with_too_many_mappings_exceeds_the_limit(own: int | None):
    assert CountedSandbox(own).measure(VMA_BYTES_MAX + 1) == VMA_BYTES_MAX + 1


def test_growth_caused_by_another_sandbox_does_not_end_the_sandbox():
    sandbox = CountedSandbox(1000)
    assert sandbox.measure(1 << 40, VMA_BYTES_MAX + 1) == 1000 * VMA_BYTES
    assert sandbox.checks == 1


def test_hidden_mappings_are_attributed_by_share():
    sandbox = CountedSandbox(1000, are_hidden=True)
    assert sandbox.measure(1 << 40, VMA_BYTES_MAX) == 1000 * VMA_BYTES
    assert sandbox.checks == 0
    sandbox.now += 1
    assert sandbox.measure(1 << 40, VMA_BYTES_MAX + 1) == 1000 * VMA_BYTES
    sandbox.now += 1
    assert sandbox.measure(1 << 40, VMA_BYTES_MAX + 1) == VMA_BYTES_MAX + 1


def test_hidden_mappings_are_attributed_only_after_two_consecutive_checks():
    sandbox = CountedSandbox(1000)
    for sandbox.are_hidden in (True, False, True, False):
        assert sandbox.measure(1 << 40, VMA_BYTES_MAX + 1) == 1000 * VMA_BYTES
        sandbox.now += 1
    assert sandbox.checks == 4


def test_mappings_are_attributed_by_share_while_a_program_blocks_the_count():
    is_blocked, now = threading.Event(), [100.0]
    counter = MappingMeter(lambda *_: 1000 if is_blocked.wait(30) else None, lambda *_: False, lambda: now[0])
    slabs = SlabUsage(0, 0, vma_bytes=VMA_BYTES_MAX + 1, vma_bytes_upper_bound=1 << 40)
    measured = []
    for now[0] in (100.0, 129.0, 131.0):
        measured.append(counter.measure(slabs, list, list))
    is_blocked.set()
    assert counter._thread is not None
    counter._thread.join(10)
    measured.append(counter.measure(slabs, list, list))
    assert measured == [0, 0, VMA_BYTES_MAX + 1, 1000 * VMA_BYTES]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_failed_count_is_repeated_after_a_pause():
    counts, now = [], [100.0]

    def count(*_: object) -> int:
        counts.append(now[0])
        raise OSError

    counter = MappingMeter(count, lambda *_: False, lambda: now[0])
    for now[0] in (100.0, 100.2, 100.6):
        counter.measure(SlabUsage(0, 0, vma_bytes_upper_bound=1 << 40), list, list)
        assert counter._thread is not None
        counter._thread.join(10)
    assert counts == [100.0, 100.6]


def test_count_is_repeated_if_its_thread_cannot_start(monkeypatch: pytest.MonkeyPatch):
    def raise_error(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    sandbox = CountedSandbox(1000)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", raise_error)
        assert sandbox.measure(1 << 40) == 0
    assert sandbox.measure(1 << 40) == 1000 * VMA_BYTES


def test_counts_are_half_a_second_apart():
    sandbox = CountedSandbox(1000)
    for _ in range(3):
        sandbox.measure(1 << 40)
        sandbox.now += 0.2
    assert sandbox.counts == 1
    sandbox.measure(1 << 40)
    assert sandbox.counts == 2
