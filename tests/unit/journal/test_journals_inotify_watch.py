"""Writes to a journal are reported without polling, and a busy journal is not reported too often."""

import asyncio
import os
import threading
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox.journal import journals
from sandbox.journal.journals import FileJournals, FileJournalWatch
from sandbox.model.events import TaskFinished

TIMEOUT_SECONDS = 20


def inotify_descriptors():
    descriptors = Path("/proc/self/fd")
    return {name for name in descriptors.iterdir() if _link(name) == "anon_inode:inotify"}


def _link(path):
    try:
        return str(path.readlink())
    except FileNotFoundError:  # the descriptor of the list itself
        return ""


class WatchedJournals:
    """Two journals with their writers."""

    def __init__(self, data_dir):
        journals, self.watch = FileJournals(data_dir), FileJournalWatch(data_dir).watch
        self.writers = {task_id: journals.create(task_id) for task_id in ("task-1", "task-2")}

    def write(self, task_id):
        self.writers[task_id].append(TaskFinished(), at=datetime.now(UTC))


@pytest.fixture
def watched(tmp_path):
    watched = WatchedJournals(tmp_path)
    yield watched
    for writer in watched.writers.values():
        writer.close()


async def test_each_write_is_reported_to_the_watches_of_its_journal(watched):
    first, second, other = asyncio.Event(), asyncio.Event(), asyncio.Event()
    with ExitStack() as stack:
        for task_id, event in (("task-1", first), ("task-1", second), ("task-2", other)):
            assert stack.enter_context(watched.watch(task_id, event.set))
        for _ in range(3):
            watched.write("task-1")
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await first.wait()
                await second.wait()
            first.clear()
            second.clear()
        assert not other.is_set()
        watched.write("task-2")
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await other.wait()


async def test_slow_closing_of_the_inotify_instance_does_not_block_the_server(watched, monkeypatch):
    """Closing an instance can take seconds while a sandbox uses inotify."""
    before, may_close, close = inotify_descriptors(), threading.Event(), os.close

    def close_slowly(descriptor):
        assert may_close.wait(TIMEOUT_SECONDS)
        close(descriptor)

    with watched.watch("task-1", os.abort):
        assert len(inotify_descriptors() - before) == 1
        monkeypatch.setattr(journals.os, "close", close_slowly)
    reported = asyncio.Event()
    with watched.watch("task-1", reported.set):
        watched.write("task-1")
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await reported.wait()
    assert len(inotify_descriptors() - before) == 2
    may_close.set()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while inotify_descriptors() != before:
            await asyncio.sleep(0.01)


async def test_ended_watch_is_not_notified(watched):
    ended, current = asyncio.Event(), asyncio.Event()
    with watched.watch("task-1", current.set):
        with watched.watch("task-1", ended.set):
            watched.write("task-1")
        watched.write("task-1")
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await current.wait()
    assert not ended.is_set()


async def test_many_writes_are_reported_together(watched, monkeypatch):
    monkeypatch.setattr(journals, "_NOTIFY_INTERVAL_SECONDS", 0.2)
    reports = []
    with watched.watch("task-1", lambda: reports.append(1)):
        for _ in range(20):
            watched.write("task-1")
            await asyncio.sleep(0.002)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while len(reports) < 2:  # the first write, and the writes after it
                await asyncio.sleep(0.01)
    assert len(reports) < 10


async def test_lost_events_are_reported_to_all_watches(watched, monkeypatch):
    first, second = asyncio.Event(), asyncio.Event()
    overflow = journals._EVENT.pack(-1, journals._IN_Q_OVERFLOW, 0, 0)
    with watched.watch("task-1", first.set), watched.watch("task-2", second.set):
        monkeypatch.setattr(journals.os, "read", lambda *_: overflow)
        watched.write("task-1")
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await first.wait()
            await second.wait()
        monkeypatch.undo()


@pytest.mark.parametrize("function", ["inotify_init1", "inotify_add_watch"])
async def test_watch_without_inotify_is_refused(watched, monkeypatch, function):
    class Libc:
        inotify_init1 = journals._libc.inotify_init1
        inotify_add_watch = journals._libc.inotify_add_watch

    monkeypatch.setattr(Libc, function, staticmethod(lambda *_: -1))
    monkeypatch.setattr(journals, "_libc", Libc)
    with watched.watch("task-1", os.abort) as is_watched:
        assert not is_watched
        watched.write("task-1")
