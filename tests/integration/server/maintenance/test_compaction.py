"""Journals of tasks that ended some time ago are packed, and their stories go on from any place as before."""

import asyncio
import os
import threading
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from doubles.server_components import Rooms
from doubles.stored_tasks import KeptTasks
from sandbox.interfaces.store import TaskQuery
from sandbox.model.limits import JOURNAL_COMPRESSION_DELAY_SECONDS
from sandbox.server.maintenance.compaction import JournalCompactor
from sandbox.store.sqlite import SqliteStore


@pytest.fixture
def kept(tmp_path):
    """Two tasks that ended long ago, one that has just ended, one that runs."""
    made = KeptTasks(tmp_path)
    made.finish("old-1", lines=2000)
    made.finish("old-2")
    made.at = datetime.now(UTC) - timedelta(seconds=JOURNAL_COMPRESSION_DELAY_SECONDS / 2)
    made.finish("young")
    made.run("running").writer.close()
    made.index()
    return made


@pytest.fixture
def world(kept):
    made = Rooms(kept.data_dir, SqliteStore(kept.data_dir / "index.sqlite"))
    yield made
    made.store.close()


def packed(kept):
    return sorted(path.parents[1].name for path in (kept.data_dir / "tasks").glob("*/journal/records.gz"))


async def story(service, task_id, after=0):
    followed = [frame async for frame in service.follow(task_id, after=after)]
    assert [frame async for frame in service.replay(task_id, after=after)] == followed
    return followed


def test_only_what_ended_long_ago_is_packed_and_told_as_before(kept, world):
    async def play():
        async with world.server() as service:
            before = {task_id: await story(service, task_id) for task_id in ("old-1", "old-2", "young")}
            packing = JournalCompactor(world.journals, world.store, world.clock)
            reading = service.replay("old-1")
            first = await anext(reading)
            await packing.sweep()
            assert packed(kept) == ["old-1", "old-2"]
            # Whoever was in the middle of it goes on.
            assert [first, *[frame async for frame in reading]] == before["old-1"]
            for task_id, told in before.items():
                assert await story(service, task_id) == told
                for after in (1, 5, len(told) // 2, told[-2]["seq"], told[-1]["seq"]):
                    expected = [frame for frame in told if frame["seq"] > after]
                    assert await story(service, task_id, after) == (expected or told[-1:])
            await packing.sweep()

    asyncio.run(play())
    assert not (kept.data_dir / "tasks" / "old-1" / "journal" / "records").exists()


def test_a_damaged_journal_stays_as_it_is_and_keeps_no_other_from_its_turn(kept, world, caplog):
    data = bytearray(kept.records("old-1").read_bytes())
    data[1000] ^= 1
    kept.records("old-1").write_bytes(data)
    packing = JournalCompactor(world.journals, world.store, world.clock)
    for _ in range(2):
        asyncio.run(packing.sweep())
    assert packed(kept) == ["old-2"]
    assert kept.records("old-1").read_bytes() == data
    assert caplog.text.count("old-1: its journal is kept as it is") == 1


def test_an_older_journal_that_somebody_put_back_stays_as_it_is(kept, world, caplog):
    data = b"".join(kept.records("old-1").read_bytes().splitlines(keepends=True)[:-1])
    kept.records("old-1").write_bytes(data)
    asyncio.run(JournalCompactor(world.journals, world.store, world.clock).sweep())
    assert packed(kept) == ["old-2"]
    assert kept.records("old-1").read_bytes() == data
    assert "old-1" in caplog.text


def test_what_a_full_disk_left_over_is_done_in_the_next_round(kept, world, monkeypatch):
    packing = JournalCompactor(world.journals, world.store, world.clock)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            asyncio.run(packing.sweep())
    assert packed(kept) == []
    # What was half written takes no room that the disk does not have.
    assert list((kept.data_dir / "tasks").glob("*/journal/*.new")) == []
    asyncio.run(packing.sweep())
    assert packed(kept) == ["old-1", "old-2"]


def test_a_journal_that_somebody_holds_is_packed_in_a_later_round(kept, world, monkeypatch):
    monkeypatch.setattr("sandbox.server.maintenance.compaction.TaskQuery", partial(TaskQuery, limit=1))
    packing = JournalCompactor(world.journals, world.store, world.clock)
    with kept.journals.try_lock("old-1"):
        asyncio.run(packing.sweep())
    assert packed(kept) == ["old-2"]
    asyncio.run(packing.sweep())
    assert packed(kept) == ["old-1", "old-2"]


def test_a_server_that_ends_does_not_wait_for_a_large_journal(world, monkeypatch):
    """Its data directory is the next one's at once; what was half packed is begun anew."""
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def pack(_):
        begun.set()
        may_end.wait(60)
        ended.set()

    monkeypatch.setattr(world.journals, "compress", pack)

    async def play():
        sweeping = asyncio.create_task(JournalCompactor(world.journals, world.store, world.clock).sweep())
        async with asyncio.timeout(10):
            while not begun.is_set():
                await asyncio.sleep(0.005)
        sweeping.cancel()

    asyncio.run(play())
    assert not ended.is_set()
    may_end.set()
    assert ended.wait(10)


def test_a_journal_that_its_disk_does_not_read_keeps_no_other_from_its_turn(kept, world, monkeypatch):
    real = kept.journals.compress

    def pack(task_id):
        if task_id == "old-1":
            raise OSError(5, "Input/output error")
        real(task_id)

    monkeypatch.setattr(world.journals, "compress", pack)
    with pytest.raises(OSError, match=r"old-1.*Input/output error"):
        asyncio.run(JournalCompactor(world.journals, world.store, world.clock).sweep())
    assert packed(kept) == ["old-2"]
