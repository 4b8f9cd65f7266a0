"""Reports writes to journals, with inotify(7)."""

import asyncio
import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.interfaces.file_layout import TaskLayout

_IN_MODIFY, _IN_Q_OVERFLOW = 0x2, 0x4000
_EVENT = struct.Struct("iIII")
_EVENTS_BYTES = 64 * 1024
_NOTIFY_INTERVAL_SECONDS = 0.005
_libc = ctypes.CDLL(None, use_errno=True)


class FileJournalWatch:
    """Reports writes to journals with inotify(7). Its methods are called in the event loop.

    A journal that is written all the time is reported at most once per _NOTIFY_INTERVAL_SECONDS. While no journal is
    watched, no inotify instance is open.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._inotify_fd = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._callbacks: dict[int, list[Callable[[], None]]] = {}
        """The callbacks of each watch, keyed by the kernel's number of the watch, which is never reused."""

    @contextmanager
    def watch(self, task_id: str, notify: Callable[[], None]) -> Iterator[bool]:
        """Call `notify` after each write to the journal; see `WatchJournal`."""
        number = self._add(TaskLayout(self._data_dir, task_id).root / "journal" / "records")
        if number < 0:
            yield False
            return
        self._callbacks.setdefault(number, []).append(notify)
        try:
            yield True
        finally:
            self._callbacks[number].remove(notify)
            if not self._callbacks[number]:
                del self._callbacks[number]
                _libc.inotify_rm_watch(self._inotify_fd, number)
            if not self._callbacks:
                self._close()

    def _add(self, path: Path) -> int:
        """Return the number of the watch; -1 if the kernel rejects it."""
        if self._inotify_fd < 0:
            self._inotify_fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if self._inotify_fd < 0:
                return -1
            self._loop = asyncio.get_running_loop()
            self._resume()
        number: int = _libc.inotify_add_watch(self._inotify_fd, os.fsencode(path), _IN_MODIFY)
        if number < 0 and not self._callbacks:
            self._close()
        return number

    def _close(self) -> None:
        assert self._loop is not None
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._inotify_fd)
        closed_fd, self._inotify_fd, self._loop, self._timer = self._inotify_fd, -1, None, None
        # The kernel waits until all readers of a machine-wide lock have left it: for seconds if a sandbox keeps many of
        # them without CPU time.
        threading.Thread(target=os.close, args=(closed_fd,), daemon=True).start()

    def _resume(self) -> None:
        assert self._loop is not None
        self._timer = None
        self._loop.add_reader(self._inotify_fd, self._read_events)

    def _read_events(self) -> None:
        assert self._loop is not None
        self._loop.remove_reader(self._inotify_fd)
        self._timer = self._loop.call_later(_NOTIFY_INTERVAL_SECONDS, self._resume)
        changed: set[int] = set()
        data = os.read(self._inotify_fd, _EVENTS_BYTES)
        while data:
            number, mask, _, name_bytes = _EVENT.unpack_from(data)
            changed |= set(self._callbacks) if mask & _IN_Q_OVERFLOW else {number}
            data = data[_EVENT.size + name_bytes :]
        for number in changed:
            for notify in self._callbacks.get(number, ()):
                notify()
