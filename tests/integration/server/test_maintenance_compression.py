"""Journals of ended tasks are compressed after a delay and can be read from any position as before."""

import asyncio
import os
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from doubles.server_components import ServerComponents
from doubles.stored_tasks import StoredTasks
from doubles.unreachable_journals import UnreachableJournals
from sandbox.interfaces.store import TaskQuery
from sandbox.model.fixed_limits import JOURNAL_COMPRESSION_DELAY_SECONDS
from sandbox.server.maintenance import JournalCompressor
from sandbox.store.sqlite import SqliteStore


@pytest.fixture
def stored(tmp_path):
    """Two tasks that ended long ago, one that has just ended, and a running one."""
    instance = StoredTasks(tmp_path)
    instance.add_completed_task("old-1", lines=2000)
    instance.add_completed_task("old-2")
    instance.current_time = datetime.now(UTC) - timedelta(seconds=JOURNAL_COMPRESSION_DELAY_SECONDS / 2)
    instance.add_completed_task("young")
    instance.add_running_task("running").writer.close()
    instance.index()
    return instance


@pytest.fixture
def components(stored):
    instance = ServerComponents(stored.data_dir, SqliteStore(stored.data_dir / "index.sqlite"))
    yield instance
    instance.store.close()


def compressed_task_ids(stored):
    return sorted(path.parents[1].name for path in (stored.data_dir / "tasks").glob("*/journal/records.gz"))


async def events_of(service, task_id, after=0):
    events = [event async for event in service.follow(task_id, after=after)]
    assert [event async for event in service.recorded_events(task_id, after=after)] == events
    return events


async def test_old_journals_are_compressed_and_read_as_before(stored, components):
    async def scenario():
        async with components.server() as service:
            before = {task_id: await events_of(service, task_id) for task_id in ("old-1", "old-2", "young")}
            compressor = JournalCompressor(components.journals, components.store, components.clock)
            reading = service.recorded_events("old-1")
            first = await anext(reading)
            await compressor.sweep()
            assert compressed_task_ids(stored) == ["old-1", "old-2"]
            # A reader that started before the sweep can still read the rest.
            assert [first, *[event async for event in reading]] == before["old-1"]
            for task_id, events in before.items():
                assert await events_of(service, task_id) == events
                for after in (1, 5, len(events) // 2, events[-2]["seq"], events[-1]["seq"]):
                    expected = [event for event in events if event["seq"] > after]
                    assert await events_of(service, task_id, after) == (expected or events[-1:])
            await compressor.sweep()

    await scenario()
    assert not (stored.data_dir / "tasks" / "old-1" / "journal" / "records").exists()


def test_journal_whose_writer_may_be_alive_is_compressed_later(stored, components):
    journals = UnreachableJournals(stored.data_dir)
    compressor = JournalCompressor(journals, components.store, components.clock)
    asyncio.run(compressor.sweep())
    assert compressed_task_ids(stored) == []
    journals.is_unknown = False
    asyncio.run(compressor.sweep())
    assert compressed_task_ids(stored) == ["old-1", "old-2"]


def test_damaged_journal_is_not_compressed_and_does_not_block_others(stored, components, caplog):
    data = bytearray(stored.records("old-1").read_bytes())
    data[1000] ^= 1
    stored.records("old-1").write_bytes(data)
    compressor = JournalCompressor(components.journals, components.store, components.clock)
    for _ in range(2):
        asyncio.run(compressor.sweep())
    assert compressed_task_ids(stored) == ["old-2"]
    assert stored.records("old-1").read_bytes() == data
    assert caplog.text.count("The journal of task old-1 is left uncompressed") == 1


async def test_restored_older_journal_is_not_compressed(stored, components, caplog):
    data = b"".join(stored.records("old-1").read_bytes().splitlines(keepends=True)[:-1])
    stored.records("old-1").write_bytes(data)
    await JournalCompressor(components.journals, components.store, components.clock).sweep()
    assert compressed_task_ids(stored) == ["old-2"]
    assert stored.records("old-1").read_bytes() == data
    assert "old-1" in caplog.text


def test_compression_continues_after_a_full_disk(stored, components, monkeypatch):
    compressor = JournalCompressor(components.journals, components.store, components.clock)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            asyncio.run(compressor.sweep())
    assert compressed_task_ids(stored) == []
    # The partially written file was removed, so it uses no space on the full disk.
    assert list((stored.data_dir / "tasks").glob("*/journal/*.new")) == []
    asyncio.run(compressor.sweep())
    assert compressed_task_ids(stored) == ["old-1", "old-2"]


def test_locked_journal_is_compressed_in_a_later_sweep(stored, components, monkeypatch):
    least_recently_changed_first = TaskQuery.least_recently_changed_first
    monkeypatch.setattr(
        TaskQuery, "least_recently_changed_first", lambda *query: replace(least_recently_changed_first(*query), limit=1)
    )
    compressor = JournalCompressor(components.journals, components.store, components.clock)
    with stored.journals.try_lock("old-1"):
        asyncio.run(compressor.sweep())
    assert compressed_task_ids(stored) == ["old-2"]
    asyncio.run(compressor.sweep())
    assert compressed_task_ids(stored) == ["old-1", "old-2"]


async def test_shutdown_does_not_wait_for_a_compression(components, monkeypatch):
    """The next server can use the data directory immediately, and restarts the interrupted compression."""
    started, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def compress(_):
        started.set()
        may_end.wait(60)
        ended.set()

    monkeypatch.setattr(components.journals, "compress", compress)

    async def scenario():
        sweeping = asyncio.create_task(
            JournalCompressor(components.journals, components.store, components.clock).sweep()
        )
        async with asyncio.timeout(10):
            while not started.is_set():
                await asyncio.sleep(0.005)
        sweeping.cancel()

    await scenario()
    assert not ended.is_set()
    may_end.set()
    assert ended.wait(10)


async def test_unreadable_journal_does_not_block_others(stored, components, monkeypatch):
    original_compress = stored.journals.compress

    def compress(task_id):
        if task_id == "old-1":
            raise OSError(5, "Input/output error")
        original_compress(task_id)

    monkeypatch.setattr(components.journals, "compress", compress)
    with pytest.raises(OSError, match=r"old-1.*Input/output error"):
        await JournalCompressor(components.journals, components.store, components.clock).sweep()
    assert compressed_task_ids(stored) == ["old-2"]
