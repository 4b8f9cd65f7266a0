"""A simulated day of tasks: the server keeps only the ended tasks within its retention limits."""

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING, ServerComponents
from sandbox.interfaces.server_services import Retention
from sandbox.model.resources import Resources
from sandbox.model.task_state import TaskState
from sandbox.server import dispatcher
from sandbox.server.maintenance import JournalCompressor
from sandbox.server.scheduler import Scheduler
from sandbox.store.sqlite import SqliteStore

INTERVAL, RETENTION_HOURS = timedelta(minutes=15), 6
TASKS_PER_DAY = int(timedelta(hours=24) / INTERVAL)
RETAINED = int(timedelta(hours=RETENTION_HOURS) / INTERVAL)
UNCOMPRESSED = int(timedelta(hours=1) / INTERVAL)


@pytest.fixture
def components(tmp_path):
    instance = ServerComponents(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    yield instance
    instance.store.close()


def count_journal_files(components, name):
    return len(list(components.data_dir.glob(f"tasks/*/journal/{name}")))


async def open_resources(service):
    """Wait until no journal is tailed, then return the numbers of open descriptors and asyncio tasks."""
    async with asyncio.timeout(10):
        while service.tracked_tasks:
            await asyncio.sleep(0.005)
    return len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())


async def test_only_retained_tasks_remain_after_a_day_of_tasks(components):
    async def run_task(service, compressor, number):
        task_id = f"task-{number}"
        await service.submit(manifest(task_id))
        await components.wait_for_launch(task_id)
        components.placement.record(task_id, *TO_RUNNING, *TO_COMPLETED)
        await components.wait_for_state(service, task_id, TaskState.COMPLETED)
        components.placement.orders.clear()
        components.clock.set_back_by -= INTERVAL
        await compressor.sweep()
        await service.prune(Retention(older_than_seconds=RETENTION_HOURS * 3600), dry_run=False)

    async def scenario():
        async with components.server() as service:
            compressor = JournalCompressor(components.journals, components.store, components.clock)
            for number in range(RETAINED + 1):
                await run_task(service, compressor, number)
            baseline = await open_resources(service)
            for number in range(RETAINED + 1, TASKS_PER_DAY):
                await run_task(service, compressor, number)
            assert await open_resources(service) <= baseline
            return len(components.store.task_ids())

    stored_count = await scenario()
    assert RETAINED - 1 <= stored_count <= RETAINED + 1
    assert len(list((components.data_dir / "tasks").iterdir())) == stored_count
    assert count_journal_files(components, "records") <= UNCOMPRESSED + 1


async def test_tasks_that_wait_behind_many_others_are_not_examined_for_each_submission(components, monkeypatch):
    """Otherwise the time of a submission would grow with the number of waiting tasks."""
    monkeypatch.setattr(dispatcher, "_PAUSE_FACTOR", 1e6)
    monkeypatch.setattr(dispatcher, "_FEW_WAITING_TASKS", 5)
    monkeypatch.setattr(dispatcher, "MEMORY_CHECK_INTERVAL_SECONDS", 60.0)
    components.capacity = Resources(4, 8 << 30, 1 << 40)
    examined, waiting_messages = [], Scheduler.waiting_messages

    def count(scheduler, *arguments):
        examined.append(scheduler.waiting_count)
        return waiting_messages(scheduler, *arguments)

    monkeypatch.setattr(Scheduler, "waiting_messages", count)
    async with components.server() as service:
        for number in range(20):
            await service.submit(manifest(f"task-{number}"))
        assert max(examined) < 10
        assert (await service.status("task-1")).state_message.startswith("Waiting")


async def test_slow_examination_of_waiting_tasks_does_not_delay_starts_for_long(components, monkeypatch):
    """For example, measuring the free disk space may take seconds."""
    monkeypatch.setattr(dispatcher, "_PAUSE_FACTOR", 1e6)
    monkeypatch.setattr(dispatcher, "_FEW_WAITING_TASKS", 1)
    monkeypatch.setattr(dispatcher, "MEMORY_CHECK_INTERVAL_SECONDS", 0.2)
    components.capacity = Resources(4, 8 << 30, 1 << 40)
    async with components.server() as service:
        for number in range(5):
            await service.submit(manifest(f"task-{number}"))
        await components.wait_for_launch("task-0")
        components.placement.record("task-0", *TO_RUNNING, *TO_COMPLETED)
        async with asyncio.timeout(5):
            await components.wait_for_launch("task-1")
