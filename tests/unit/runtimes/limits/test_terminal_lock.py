"""Time for which a sandbox holds the lock for opening terminals."""

import threading
import time
from pathlib import Path

import pytest

from sandbox.model.fixed_limits import TERMINAL_LOCK_SECONDS_MAX
from sandbox.runtimes.limits.kernel_watch import KernelUsage
from sandbox.runtimes.limits.terminal_lock import TerminalLockMeter, TerminalLockProbe

_OPENS = "[<0>] ptmx_open+0x45/0x1b0\n[<0>] do_dentry_open+0x2b1/0x470\n"
_WAITS = "[<0>] __mutex_lock.constprop.0+0x392/0xa70\n" + _OPENS


class TerminalLockHarness:
    """A probe that waits for the lock, a clock, and the threads of a sandbox."""

    def __init__(self, proc: Path) -> None:
        self.waited_seconds, self.now = 10.0, 100.0
        self._proc = proc
        self._meter = TerminalLockMeter(lambda: self.waited_seconds, lambda: self.now, proc)

    def add_thread(self, number: int, state: str, stack: str) -> None:
        directory = self._proc / str(number)
        directory.mkdir()
        (directory / "stat").write_text(f"{number} (a) b) {state} 1 1 1")
        (directory / "stack").write_text(stack)

    def measure(self, seconds: int) -> float:
        """Measure once per second for this many seconds. Return the last measured time."""
        measured = 0.0
        for _ in range(seconds):
            self.now += 1
            measured = self._meter.measure(lambda: [7, 8, 9])
        return measured


@pytest.fixture
def lock(tmp_path: Path) -> TerminalLockHarness:
    return TerminalLockHarness(tmp_path)


@pytest.mark.parametrize(
    ("state", "stack", "seconds"),
    [
        ("R", _OPENS, 3.0),
        ("R", _WAITS, 3.0),
        ("D", "[<0>] balance_dirty_pages+0x1/0x2\n" + _OPENS, 3.0),
        ("R", "[<0>] tty_release+0x1/0x2\n", 3.0),
        ("D", _WAITS, 0.0),
        ("R", "[<0>] do_sys_openat2+0x1/0x2\n", 0.0),
    ],
    ids=["holds", "was given the lock", "holds and waits for something else", "closes", "waits", "opens a file"],
)
def test_time_counts_while_a_thread_may_hold_the_lock(
    lock: TerminalLockHarness, state: str, stack: str, seconds: float
):
    lock.add_thread(8, state, stack)
    assert lock.measure(3) == seconds


def test_time_does_not_count_while_the_lock_is_free(lock: TerminalLockHarness):
    lock.add_thread(8, "R", _OPENS)
    lock.waited_seconds = 0.9
    assert lock.measure(3) == 0.0


def test_time_decreases_slowly_while_the_lock_is_free(lock: TerminalLockHarness):
    lock.add_thread(8, "R", _OPENS)
    assert lock.measure(3) == 3.0
    lock.waited_seconds = 0.0
    assert lock.measure(4) == 2.0
    assert lock.measure(9) == 0.0


def test_time_above_the_limit_is_a_violation():
    assert not KernelUsage(terminal_lock_seconds=TERMINAL_LOCK_SECONDS_MAX).find_exceeded_limit()
    assert "terminals" in KernelUsage(terminal_lock_seconds=TERMINAL_LOCK_SECONDS_MAX + 0.1).find_exceeded_limit()


def test_probe_reports_how_long_it_has_waited():
    is_free = threading.Event()
    probe = TerminalLockProbe(is_free.wait)
    assert probe.waited_seconds() == 0.0
    time.sleep(0.05)
    assert 0.05 <= probe.waited_seconds() < 10
    is_free.set()
    deadline = time.monotonic() + 10
    while probe.waited_seconds() > 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert probe.waited_seconds() < 0.05


def test_probe_takes_the_lock_of_this_machine():
    probe = TerminalLockProbe()
    probe.waited_seconds()
    time.sleep(0.5)
    assert probe.waited_seconds() == 0.0
