"""A day passes in seconds: what a server has of tasks that are over is what it was told to keep, and no more."""

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from doubles.manifests import manifest
from doubles.server_components import TO_END, TO_RUNNING, Rooms
from sandbox.interfaces.tasks import Retention
from sandbox.model.task_state import TaskState
from sandbox.server.maintenance.compaction import JournalCompactor
from sandbox.store.sqlite import SqliteStore

PACE, HOURS_KEPT = timedelta(minutes=15), 6
A_DAY = int(timedelta(hours=24) / PACE)
KEPT = int(timedelta(hours=HOURS_KEPT) / PACE)
PLAIN = int(timedelta(hours=1) / PACE)


@pytest.fixture
def world(tmp_path):
    made = Rooms(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    yield made
    made.store.close()


def files_of(world, name):
    return len(list(world.data_dir.glob(f"tasks/*/journal/{name}")))


async def held(service):
    """Descriptors and tasks of the event loop, once nobody is followed any more."""
    async with asyncio.timeout(10):
        while service.dependencies.journal_tailer.tracked_tasks:
            await asyncio.sleep(0.005)
    return len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())


def test_a_day_of_tasks_leaves_what_is_kept_and_nothing_else(world):
    async def live(service, packing, number):
        task_id = f"task-{number}"
        await service.submit(manifest(task_id))
        await world.launched(task_id)
        world.runners.play(task_id, *TO_RUNNING, *TO_END)
        await world.until(service, task_id, TaskState.COMPLETED)
        world.runners.orders.clear()
        world.clock.set_back -= PACE
        await packing.sweep()
        await service.prune(Retention(older_than_seconds=HOURS_KEPT * 3600), dry_run=False)

    async def play():
        async with world.server() as service:
            packing = JournalCompactor(world.journals, world.store, world.clock)
            for number in range(KEPT + 1):
                await live(service, packing, number)
            early = await held(service)
            for number in range(KEPT + 1, A_DAY):
                await live(service, packing, number)
            assert await held(service) <= early
            return len(world.store.task_ids())

    kept = asyncio.run(play())
    assert KEPT - 1 <= kept <= KEPT + 1
    assert len(list((world.data_dir / "tasks").iterdir())) == kept
    assert files_of(world, "records") <= PLAIN + 1
