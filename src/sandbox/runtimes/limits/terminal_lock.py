"""Measures how long a sandbox holds the lock that the kernel needs to open any terminal of the machine (tty_mutex).

A program that opens or closes a pseudo-terminal can lose the processor while it holds this lock. It shares `vm.cpus`
with all other programs in its sandbox. If 430 of them are busy and 40 others open terminals, a program on the host
waits for more than a minute to open a terminal.
"""

import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

_DRIVERS = Path("/proc/tty/drivers")
"""The kernel holds the lock while it lists this file. A read takes some 20 µs."""

_PROC = Path("/proc")
_FUNCTIONS = ("ptmx_open", "tty_open", "tty_release", "release_tty")
"""Kernel functions that take the lock. They are in the stack of a thread that holds it, or waits for it."""

_WAIT_FUNCTION, _RUNNABLE = "mutex_lock", "R"
_WAITED_SECONDS_MIN = 1.0
"""Shorter waits do not count. Without programs that lose the processor, the lock is free within milliseconds."""

_RECOVERY_FACTOR = 0.25
"""While nobody waits for the lock, the measured time decreases by this multiple of the time that passes."""


class TerminalLockProbe:
    """Takes the lock repeatedly in its own thread, because a wait for the lock cannot be interrupted."""

    def __init__(self, take_lock: Callable[[], object] = _DRIVERS.read_bytes) -> None:
        self._take_lock = take_lock
        self._thread: threading.Thread | None = None
        self._started_at = 0.0

    def waited_seconds(self) -> float:
        """Return for how long the probe has waited for the lock; 0 if it has got the lock. Starts the next probe."""
        if self._thread is not None and self._thread.is_alive():
            return time.monotonic() - self._started_at
        self._started_at = time.monotonic()
        self._thread = threading.Thread(target=self._probe, name="terminal-lock", daemon=True)
        self._thread.start()
        return 0.0

    def _probe(self) -> None:
        with suppress(OSError):  # a kernel may be built without terminals
            self._take_lock()


class TerminalLockMeter:
    """Measures the time for which programs of one sandbox hold the lock while the machine waits for it."""

    def __init__(
        self,
        waited_seconds: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
        proc: Path = _PROC,
    ) -> None:
        self._waited_seconds = TerminalLockProbe().waited_seconds if waited_seconds is None else waited_seconds
        self._clock = clock
        self._proc = proc
        self._measured_at = clock()
        self._seconds = 0.0

    def measure(self, thread_ids: Callable[[], Collection[int]]) -> float:
        """Return the time in seconds. Reads files in /proc for each thread only while the probe waits."""
        now = self._clock()
        elapsed_seconds, self._measured_at = now - self._measured_at, now
        if self._waited_seconds() < _WAITED_SECONDS_MIN:
            self._seconds = max(0.0, self._seconds - _RECOVERY_FACTOR * elapsed_seconds)
        elif any(self._may_hold_lock(thread) for thread in thread_ids()):
            self._seconds += elapsed_seconds
        return self._seconds

    def _may_hold_lock(self, thread: int) -> bool:
        """Return whether the thread is in one of the functions and does not wait for a lock.

        A thread that was given the lock, and now waits for a processor, is runnable.
        """
        with suppress(OSError, IndexError):
            stack = (self._proc / str(thread) / "stack").read_text()
            if not any(name in stack for name in _FUNCTIONS):
                return False
            state = (self._proc / str(thread) / "stat").read_text().rpartition(")")[2].split()[0]
            return state == _RUNNABLE or _WAIT_FUNCTION not in stack
        return False
