"""Pending tasks wait for available resources, report what they wait for, and start automatically."""

import asyncio

import pytest

from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from doubles.server_components import GIB, TO_RUNNING, ServerComponents
from sandbox.interfaces.server_services import Retention, UnavailableError
from sandbox.interfaces.store import TaskQuery
from sandbox.journal.writer import FileJournalWriter
from sandbox.model.events import AttemptStarted, Idempotency, TaskFinished
from sandbox.model.resources import DiskSpace, Resources
from sandbox.model.task_state import TaskState
from sandbox.server.recovery import RunnerRecovery
from sandbox.server.scheduler import Scheduler

MIB = 1024**2


@pytest.fixture
def components(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.server.dispatcher.MEMORY_CHECK_INTERVAL_SECONDS", 0.05)
    instance = ServerComponents(tmp_path, MemoryStore())
    yield instance
    for task_id in list(instance.placement.recorders):
        instance.placement.kill(task_id)


async def message(service, task_id):
    return (await service.status(task_id)).state_message


async def test_task_waits_for_available_memory(components):
    components.available_memory_bytes = 300 * MIB
    async with components.server() as service:
        await service.submit(manifest())
        assert await message(service, "task-1") == ("Waiting for 0.5 GiB of free memory (the machine has 0.293 GiB)")
        assert components.placement.orders == []
        tasks = (await service.query(TaskQuery(frozenset({TaskState.PENDING})))).tasks
        assert [task.state_message for task in tasks] == [await message(service, "task-1")]
        components.available_memory_bytes = GIB
        await components.wait_for_launch("task-1")
        tasks = (await service.query(TaskQuery())).tasks
        assert [task.state_message for task in tasks if "memory" in task.state_message] == []


async def test_starting_tasks_reserve_memory_and_running_tasks_do_not(components):
    components.available_memory_bytes = GIB + 1
    async with components.server() as service:
        for number in range(4):
            await service.submit(manifest(f"task-{number}"))
        await components.wait_for_launch("task-1")
        assert "free memory" in await message(service, "task-2")
        components.placement.record("task-0", *TO_RUNNING)
        await components.wait_for_launch("task-2")
        assert "free memory" in await message(service, "task-3")


async def test_admitted_task_clears_its_pending_reason(components):
    components.capacity = Resources(4, 100 * GIB, 100 * GIB)
    launch, may_continue = components.placement.launch, asyncio.Event()

    async def launch_slowly(order, writer):
        if order.task_id == "second":
            await may_continue.wait()
        return await launch(order, writer)

    components.placement.launch = launch_slowly
    async with components.server() as service:
        await service.submit(manifest("first"))
        await service.submit(manifest("second"))
        assert "CPUs" in await message(service, "second")
        await components.wait_for_launch("first")
        components.placement.record("first", *TO_RUNNING, *TO_COMPLETED)
        async with asyncio.timeout(10):
            while "CPUs" in await message(service, "second"):
                await asyncio.sleep(0.005)
        assert len(components.placement.orders) == 1
        may_continue.set()
        await components.wait_for_launch("second")


def test_oversized_task_after_a_restart_does_not_block_others(components):
    components.capacity = Resources(8, 100 * GIB, 100 * GIB)

    async def before():
        async with components.server() as service:
            await service.submit(manifest("running"))
            await service.submit(manifest("huge", vm={"cpus": 8}))

    async def after():
        async with components.server() as service:
            await service.submit(manifest("small", vm={"cpus": 4}))
            assert "larger machine: requests 8 CPUs (4 in all)" in await message(service, "huge")
            components.placement.record("running", *TO_RUNNING, *TO_COMPLETED)
            await components.wait_for_launch("small")
            await service.cancel("huge", reason="", force=False)
            return (await service.wait("huge", 10)).state

    asyncio.run(before())
    components.capacity = Resources(4, 100 * GIB, 100 * GIB)
    assert asyncio.run(after()) is TaskState.CANCELLED


async def test_task_waits_for_disk_space(components):
    async with components.server() as service:
        components.space = DiskSpace(GIB, 1000 * GIB)
        await service.submit(manifest("task-1"))
        status = await service.status("task-1")
        assert status.state is TaskState.PENDING
        assert "is nearly full" in status.state_message
        assert not (await service.health()).is_ready
        components.space = DiskSpace(100 * GIB, 1000 * GIB)
        await components.wait_for_launch("task-1")
        assert (await service.health()).is_ready


async def test_task_starts_after_a_scheduler_error(components, monkeypatch):
    admit, errors = Scheduler.admit_next, [OSError(5, "Input/output error")]

    def admit_later(scheduler, available_bytes):
        if errors:
            raise errors.pop()
        return admit(scheduler, available_bytes)

    monkeypatch.setattr(Scheduler, "admit_next", admit_later)
    async with components.server() as service:
        with pytest.raises(OSError, match="Input/output"):
            await service.submit(manifest("task-1"))
        await components.wait_for_launch("task-1")


async def test_draining_server_starts_no_tasks_and_finishes_running_tasks(components):
    async with components.server() as service:
        await service.submit(manifest("task-1"), Idempotency("key", "sha"))
        await components.wait_for_launch("task-1")
        components.space = DiskSpace(GIB, 1000 * GIB)
        await service.submit(manifest("task-2"))
        assert await service.drain() == await service.drain()
        components.space = DiskSpace(100 * GIB, 1000 * GIB)
        with pytest.raises(UnavailableError, match="being drained"):
            await service.submit(manifest("task-3"))
        assert (await service.submit(manifest("task-1"), Idempotency("key", "sha"))).is_replayed
        assert "being drained" in (await service.status("task-2")).state_message
        draining = await service.drain_status()
        assert (draining.running, draining.waiting) == (1, 1)
        components.placement.record("task-1", *TO_RUNNING, *TO_COMPLETED)
        await components.wait_for_state(service, "task-1", TaskState.COMPLETED)
        assert (await service.drain_status()).running == 0
    async with components.server() as service:  # the drain survives a restart
        assert (await service.status("task-2")).state is TaskState.PENDING
        assert (await service.drain_status()).since == draining.since
        await service.undo_drain()
        await components.wait_for_launch("task-2")


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_admitted_but_delayed_task_does_not_start_during_a_drain(components, monkeypatch, is_cancelled):
    monkeypatch.setattr("sandbox.server.dispatcher.HOST_ERROR_PAUSE_SECONDS", 0.05)
    components.capacity = Resources(4, 100 * GIB, 100 * GIB)
    errors = [OSError(5, "Input/output error")]

    def find_image(_, tier):
        if errors:
            raise errors[0]

    monkeypatch.setattr(components, "find_image", find_image)

    async def wait_for_message(service, task_id, text):
        async with asyncio.timeout(10):
            while text not in await message(service, task_id):
                await asyncio.sleep(0.005)

    async def scenario():
        async with components.server() as service:
            for task_id in ("task-1", "task-2"):
                await service.submit(manifest(task_id, vm={"cpus": 4}))
            await wait_for_message(service, "task-1", "Input/output error")
            await service.drain()
            errors.clear()
            await wait_for_message(service, "task-1", "being drained")
            await asyncio.sleep(0.2)
            draining = await service.drain_status()
            assert (draining.running, draining.waiting, components.placement.orders) == (0, 2, [])
            if is_cancelled:
                await service.cancel("task-1", reason="", force=False)
                assert (await service.wait("task-1", 10)).state is TaskState.CANCELLED
                return
            await service.undo_drain()
            await components.wait_for_launch("task-1")
            assert await message(service, "task-2") == "Waiting for 4 CPUs (0 free)"

    await scenario()


async def test_cancelled_delayed_task_ends_during_a_drain(components, monkeypatch):
    """A drain does not delay the end of a task, because no process has to be started to record the end."""
    monkeypatch.setattr("sandbox.server.dispatcher.HOST_ERROR_PAUSE_SECONDS", 0.05)
    append, is_full = FileJournalWriter.append, [True]

    def refuse_end(writer, event, transition=None, **when):
        if is_full and isinstance(event, TaskFinished | AttemptStarted):
            raise OSError(28, "No space left on device")
        return append(writer, event, transition, **when)

    monkeypatch.setattr(FileJournalWriter, "append", refuse_end)
    async with components.server() as service:
        await service.submit(manifest())
        async with asyncio.timeout(10):
            while "No space left" not in await message(service, "task-1"):
                await asyncio.sleep(0.005)
        with pytest.raises(UnavailableError):
            await service.cancel("task-1", reason="", force=False)
        await service.drain()
        is_full.clear()
        assert (await service.wait("task-1", 10)).state is TaskState.CANCELLED


@pytest.fixture
def tailer_resumption(monkeypatch):
    """Once a cancelled task has ended, pause its tailer until the test sets the returned event."""
    release_host, resumed = RunnerRecovery.release_host, asyncio.Event()

    async def release_when_resumed(recovery, tracked_task):
        if tracked_task.task.state is TaskState.CANCELLED:
            await resumed.wait()
        await release_host(recovery, tracked_task)

    monkeypatch.setattr(RunnerRecovery, "release_host", release_when_resumed)
    return resumed


async def prune_pending_task(components, service, task_id):
    """Prune a task that is queued after the task `before`; return the asyncio task that still tails its journal."""
    await service.submit(manifest("before"))
    await components.wait_for_launch("before")
    await service.submit(manifest(task_id))
    following = next(task for task in asyncio.all_tasks() if task.get_name() == f"follow {task_id}")
    await service.cancel(task_id, reason="", force=False)
    await service.wait(task_id, 10)
    assert [task.id for task in (await service.prune(Retention(older_than_seconds=0), dry_run=False)).tasks] == [
        task_id
    ]
    assert not following.done()
    return following


async def test_task_with_the_id_of_a_pruned_task_keeps_its_queue_position(components, tailer_resumption):
    components.capacity = Resources(4, 100 * GIB, 100 * GIB)

    async def scenario():
        async with components.server() as service:
            following = await prune_pending_task(components, service, "again")
            await service.submit(manifest("again"))
            tailer_resumption.set()
            await asyncio.wait_for(following, 10)
            assert "Waiting for" in await message(service, "again")
            components.placement.record("before", *TO_RUNNING, *TO_COMPLETED)
            await components.wait_for_launch("again")
            components.placement.record("again", *TO_RUNNING, *TO_COMPLETED)
            return (await service.wait("again", 10)).state

    assert (await scenario()) is TaskState.COMPLETED


async def test_task_with_the_id_of_a_pruned_task_keeps_its_resources(components, tailer_resumption):
    components.capacity = Resources(4, 100 * GIB, 100 * GIB)
    async with components.server() as service:
        following = await prune_pending_task(components, service, "again")
        components.placement.record("before", *TO_RUNNING, *TO_COMPLETED)
        await service.wait("before", 10)
        await service.submit(manifest("again"))
        await components.wait_for_launch("again")
        tailer_resumption.set()
        await asyncio.wait_for(following, 10)
        await service.submit(manifest("after"))
        assert "Waiting for 4 CPUs (0 free)" in await message(service, "after")
        components.placement.record("again", *TO_RUNNING, *TO_COMPLETED)
        await service.wait("again", 10)
        await components.wait_for_launch("after")
