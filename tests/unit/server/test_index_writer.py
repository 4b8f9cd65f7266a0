"""Tasks that are written to the index at the same time share a transaction."""

import asyncio
import threading

import pytest

from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.store import IndexedTask, StoreError
from sandbox.model import events as e
from sandbox.model.state_machine import advance
from sandbox.server import index_writer
from sandbox.server.index_writer import IndexWriter


def indexed_task(name, offset=1):
    submitted = e.TaskSubmitted(name, manifest())
    return IndexedTask(advance(None, submitted, seq=1, at=SystemClock().now()).task, offset)


class BlockingStore(MemoryStore):
    """A store whose first transaction waits for `release`. Tasks in `broken` cannot be written."""

    def __init__(self):
        super().__init__()
        self.batches, self.broken, self.release = [], set(), threading.Event()

    def save_all(self, indexed):
        names = [each.task.id for each in indexed]
        self.batches.append(names)
        assert self.release.wait(20)
        if self.broken.intersection(names):
            raise StoreError("The index is unavailable.")
        super().save_all(indexed)


async def wait_until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def test_saves_during_a_transaction_share_the_next_one():
    store = BlockingStore()
    writer = IndexWriter(store)
    saves = [asyncio.create_task(writer.save(indexed_task("first")))]
    await wait_until(lambda: store.batches)
    saves += [asyncio.create_task(writer.save(indexed_task(f"task-{number}"))) for number in range(20)]
    await asyncio.sleep(0)
    store.release.set()
    await asyncio.gather(*saves)
    assert store.batches == [["first"], [f"task-{number}" for number in range(20)]]
    assert len(store.task_ids()) == 21


async def test_failure_affects_only_the_task_that_cannot_be_written():
    store = BlockingStore()
    store.broken.add("broken")
    store.release.set()
    writer = IndexWriter(store)
    results = await asyncio.gather(
        *(writer.save(indexed_task(name)) for name in ("one", "broken", "two")), return_exceptions=True
    )
    assert [type(result) for result in results] == [type(None), StoreError, type(None)]
    assert store.task_ids() == {"one", "two"}


async def test_deferred_saves_are_collected_and_the_newest_one_is_written(monkeypatch):
    monkeypatch.setattr(index_writer, "INDEX_INTERVAL_SECONDS", 0.05)
    store = BlockingStore()
    store.release.set()
    writer = IndexWriter(store)
    for offset in range(5):
        writer.save_later(indexed_task("busy", offset))
        writer.save_later(indexed_task("other", offset))
    assert store.batches == []
    await wait_until(lambda: store.batches)
    await wait_until(lambda: store.load("busy") is not None)
    assert sorted(store.batches[0]) == ["busy", "other"]
    assert store.load("busy").offset == 4
    await asyncio.sleep(0.1)
    assert len(store.batches) == 1


async def test_immediate_save_replaces_a_deferred_one(monkeypatch):
    monkeypatch.setattr(index_writer, "INDEX_INTERVAL_SECONDS", 0.05)
    store = BlockingStore()
    store.release.set()
    writer = IndexWriter(store)
    writer.save_later(indexed_task("task", 1))
    await writer.save(indexed_task("task", 2))
    await asyncio.sleep(0.2)
    assert store.batches == [["task"]]
    assert store.load("task").offset == 2


async def test_failed_deferred_save_is_retried(monkeypatch, caplog):
    monkeypatch.setattr(index_writer, "INDEX_INTERVAL_SECONDS", 0.02)
    store = BlockingStore()
    store.broken.add("task")
    store.release.set()
    writer = IndexWriter(store)
    writer.save_later(indexed_task("task"))
    await wait_until(lambda: len(store.batches) >= 2)
    store.broken.clear()
    await wait_until(lambda: store.load("task") is not None)
    assert "not up to date" in caplog.text
    await writer.close()


@pytest.mark.parametrize("is_newer_immediate", [True, False])
async def test_failed_deferred_save_does_not_replace_a_newer_one(monkeypatch, is_newer_immediate):
    monkeypatch.setattr(index_writer, "INDEX_INTERVAL_SECONDS", 0.02)
    store = BlockingStore()
    store.broken.add("task")
    writer = IndexWriter(store)
    writer.save_later(indexed_task("task", 1))
    await wait_until(lambda: store.batches)
    if is_newer_immediate:
        newer = asyncio.create_task(writer.save(indexed_task("task", 2)))
    else:
        writer.save_later(indexed_task("task", 2))
    await asyncio.sleep(0.05)
    save_all = store.save_all

    def repair_and_save(indexed):
        store.broken.clear()
        save_all(indexed)

    store.save_all = repair_and_save
    store.release.set()
    await wait_until(lambda: store.load("task") is not None)
    if is_newer_immediate:
        await newer
    await asyncio.sleep(0.1)
    assert store.load("task").offset == 2
    await writer.close()


async def test_close_stops_writing(monkeypatch):
    monkeypatch.setattr(index_writer, "INDEX_INTERVAL_SECONDS", 0.02)
    store = BlockingStore()
    writer = IndexWriter(store)
    waiting = asyncio.create_task(writer.save(indexed_task("task")))
    await wait_until(lambda: store.batches)
    writer.save_later(indexed_task("later"))
    waiting.cancel()
    await writer.close()
    store.release.set()
    await asyncio.sleep(0.1)
    assert store.batches == [["task"]]
    with pytest.raises(asyncio.CancelledError):
        await waiting
