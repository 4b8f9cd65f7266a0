"""Tasks wait for what the machine really has, say so, and go on by themselves."""

import asyncio

import pytest

from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from doubles.server_components import GIB, TO_END, TO_RUNNING, Rooms
from sandbox.interfaces.store import TaskQuery
from sandbox.interfaces.tasks import Retention, UnavailableError
from sandbox.journal.writer import FileJournalWriter
from sandbox.model.disk_space import DiskSpace
from sandbox.model.events import AttemptStarted, Idempotency, TaskFinished
from sandbox.model.task_state import TaskState
from sandbox.server.scheduler import Resources, Scheduler
from sandbox.server.tracked_task import TrackedTask

MIB = 1024**2


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.server.task_service.MEMORY_CHECK_SECONDS", 0.05)
    made = Rooms(tmp_path, MemoryStore())
    yield made
    for task_id in list(made.runners.recorders):
        made.runners.die(task_id)


async def message(service, task_id):
    return (await service.status(task_id)).state_message


def test_a_task_waits_until_the_machine_has_memory_again(world):
    world.memory_available_bytes = 300 * MIB

    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            assert await message(service, "task-1") == (
                "Waiting for 0.5 GiB of memory that nobody uses (the machine has 0.293 GiB)"
            )
            assert world.runners.orders == []
            listed = (await service.query(TaskQuery(frozenset({TaskState.PENDING})))).tasks
            assert [task.state_message for task in listed] == [await message(service, "task-1")]
            world.memory_available_bytes = GIB
            await world.launched("task-1")
            listed = (await service.query(TaskQuery())).tasks
            assert [task.state_message for task in listed if "memory" in task.state_message] == []

    asyncio.run(play())


def test_tasks_that_are_just_starting_are_counted_and_those_that_run_are_not(world):
    world.memory_available_bytes = GIB + 1

    async def play():
        async with world.server() as service:
            for number in range(4):
                await service.submit(manifest(f"task-{number}"))
            await world.launched("task-1")
            assert "memory that nobody uses" in await message(service, "task-2")
            world.runners.play("task-0", *TO_RUNNING)
            await world.launched("task-2")
            assert "memory that nobody uses" in await message(service, "task-3")

    asyncio.run(play())


def test_who_is_let_in_no_longer_says_that_it_waits_for_room(world):
    world.capacity = Resources(4, 100 * GIB, 100 * GIB)
    launch, go_on = world.runners.launch, asyncio.Event()

    async def slow(order, lock_fd):
        if order.task_id == "second":
            await go_on.wait()
        await launch(order, lock_fd)

    world.runners.launch = slow

    async def play():
        async with world.server() as service:
            await service.submit(manifest("first"))
            await service.submit(manifest("second"))
            assert "CPUs" in await message(service, "second")
            await world.launched("first")
            world.runners.play("first", *TO_RUNNING, *TO_END)
            async with asyncio.timeout(10):
                while "CPUs" in await message(service, "second"):
                    await asyncio.sleep(0.005)
            assert len(world.runners.orders) == 1
            go_on.set()
            await world.launched("second")

    asyncio.run(play())


def test_a_task_that_no_longer_fits_after_a_restart_keeps_nobody_waiting_and_can_be_cancelled(world):
    world.capacity = Resources(8, 100 * GIB, 100 * GIB)

    async def before():
        async with world.server() as service:
            await service.submit(manifest("running"))
            await service.submit(manifest("huge", vm={"cpus": 8}))

    async def after():
        async with world.server() as service:
            await service.submit(manifest("small", vm={"cpus": 4}))
            assert "larger machine: asks for 8 CPUs (4 in all)" in await message(service, "huge")
            world.runners.play("running", *TO_RUNNING, *TO_END)
            await world.launched("small")
            await service.cancel("huge", reason="", force=False)
            return (await service.wait("huge", 10)).state

    asyncio.run(before())
    world.capacity = Resources(4, 100 * GIB, 100 * GIB)
    assert asyncio.run(after()) is TaskState.CANCELLED


def test_a_task_waits_while_the_disk_is_nearly_full_and_begins_when_there_is_room(world):
    async def play():
        async with world.server() as service:
            world.space = DiskSpace(GIB, 1000 * GIB)
            await service.submit(manifest("task-1"))
            status = await service.status("task-1")
            assert status.state is TaskState.PENDING
            assert "is nearly full" in status.state_message
            assert not (await service.health()).is_ready
            world.space = DiskSpace(100 * GIB, 1000 * GIB)
            await world.launched("task-1")
            assert (await service.health()).is_ready

    asyncio.run(play())


def test_a_task_begins_although_what_lets_tasks_in_broke_once(world, monkeypatch):
    admit, breaks = Scheduler.admit_next, [OSError(5, "Input/output error")]

    def admit_later(room, available_bytes):
        if breaks:
            raise breaks.pop()
        return admit(room, available_bytes)

    monkeypatch.setattr(Scheduler, "admit_next", admit_later)

    async def play():
        async with world.server() as service:
            with pytest.raises(OSError, match="Input/output"):
                await service.submit(manifest("task-1"))
            await world.launched("task-1")

    asyncio.run(play())


def test_a_drained_server_begins_and_takes_nothing_and_lets_what_runs_end(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest("task-1"), Idempotency("key", "sha"))
            await world.launched("task-1")
            world.space = DiskSpace(GIB, 1000 * GIB)
            await service.submit(manifest("task-2"))
            assert await service.drain() == await service.drain()
            world.space = DiskSpace(100 * GIB, 1000 * GIB)
            with pytest.raises(UnavailableError, match="being drained"):
                await service.submit(manifest("task-3"))
            assert (await service.submit(manifest("task-1"), Idempotency("key", "sha"))).is_replayed
            assert "being drained" in (await service.status("task-2")).state_message
            draining = await service.drain_status()
            assert (draining.running, draining.waiting) == (1, 1)
            world.runners.play("task-1", *TO_RUNNING, *TO_END)
            await world.until(service, "task-1", TaskState.COMPLETED)
            assert (await service.drain_status()).running == 0
        async with world.server() as service:  # a restart changes nothing
            assert (await service.status("task-2")).state is TaskState.PENDING
            assert (await service.drain_status()).since == draining.since
            await service.undo_drain()
            await world.launched("task-2")

    asyncio.run(play())


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_task_that_was_let_in_and_held_up_before_the_drain_does_not_begin_after_it(world, monkeypatch, is_cancelled):
    monkeypatch.setattr("sandbox.server.task_service.RETRY_SECONDS", 0.05)
    world.capacity = Resources(4, 100 * GIB, 100 * GIB)
    trouble = [OSError(5, "Input/output error")]

    def find_image(_):
        if trouble:
            raise trouble[0]

    monkeypatch.setattr(world, "find_image", find_image)

    async def until_told(service, task_id, words):
        async with asyncio.timeout(10):
            while words not in await message(service, task_id):
                await asyncio.sleep(0.005)

    async def play():
        async with world.server() as service:
            for task_id in ("task-1", "task-2"):
                await service.submit(manifest(task_id, vm={"cpus": 4}))
            await until_told(service, "task-1", "Input/output error")
            await service.drain()
            trouble.clear()
            await until_told(service, "task-1", "being drained")
            await asyncio.sleep(0.2)
            draining = await service.drain_status()
            assert (draining.running, draining.waiting, world.runners.orders) == (0, 2, [])
            if is_cancelled:
                await service.cancel("task-1", reason="", force=False)
                assert (await service.wait("task-1", 10)).state is TaskState.CANCELLED
                return
            await service.undo_drain()
            await world.launched("task-1")
            assert await message(service, "task-2") == "Waiting for 4 CPUs (0 free)"

    asyncio.run(play())


def test_a_held_up_task_whose_wish_is_written_ends_though_the_server_is_drained(world, monkeypatch):
    """It begins nothing: there is only its end to be written."""
    monkeypatch.setattr("sandbox.server.task_service.RETRY_SECONDS", 0.05)
    append, is_full = FileJournalWriter.append, [True]

    def refuse_the_end(writer, event, transition=None, **when):
        if is_full and isinstance(event, TaskFinished | AttemptStarted):
            raise OSError(28, "No space left on device")
        return append(writer, event, transition, **when)

    monkeypatch.setattr(FileJournalWriter, "append", refuse_the_end)

    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            async with asyncio.timeout(10):
                while "No space left" not in await message(service, "task-1"):
                    await asyncio.sleep(0.005)
            with pytest.raises(UnavailableError):
                await service.cancel("task-1", reason="", force=False)
            await service.drain()
            is_full.clear()
            assert (await service.wait("task-1", 10)).state is TaskState.CANCELLED

    asyncio.run(play())


@pytest.fixture
def may_look_up(monkeypatch):
    """Who follows a task that was cancelled rests behind its end until the test lets it look up."""
    rest, let = TrackedTask.wait_for_wake, asyncio.Event()

    async def rest_until_let(feed, seconds):
        await (let.wait() if feed.task.state is TaskState.CANCELLED else rest(feed, seconds))

    monkeypatch.setattr(TrackedTask, "wait_for_wake", rest_until_let)
    return let


async def prune_one_that_waits(world, service, task_id):
    """Behind the task `before`; gives the work of who still follows the task that is gone."""
    await service.submit(manifest("before"))
    await world.launched("before")
    await service.submit(manifest(task_id))
    following = service.dependencies.journal_tailer._asyncio_tasks[task_id]
    await service.cancel(task_id, reason="", force=False)
    await service.wait(task_id, 10)
    assert [task.id for task in await service.prune(Retention(older_than_seconds=0), dry_run=False)] == [task_id]
    assert not following.done()
    return following


def test_a_task_that_takes_the_id_of_a_pruned_one_keeps_its_place_in_the_line(world, may_look_up):
    world.capacity = Resources(4, 100 * GIB, 100 * GIB)

    async def play():
        async with world.server() as service:
            following = await prune_one_that_waits(world, service, "again")
            await service.submit(manifest("again"))
            may_look_up.set()
            await asyncio.wait_for(following, 10)
            assert "Waiting for" in await message(service, "again")
            world.runners.play("before", *TO_RUNNING, *TO_END)
            await world.launched("again")
            world.runners.play("again", *TO_RUNNING, *TO_END)
            return (await service.wait("again", 10)).state

    assert asyncio.run(play()) is TaskState.COMPLETED


def test_a_task_that_takes_the_id_of_a_pruned_one_keeps_its_room(world, may_look_up):
    world.capacity = Resources(4, 100 * GIB, 100 * GIB)

    async def play():
        async with world.server() as service:
            following = await prune_one_that_waits(world, service, "again")
            world.runners.play("before", *TO_RUNNING, *TO_END)
            await service.wait("before", 10)
            await service.submit(manifest("again"))
            await world.launched("again")
            may_look_up.set()
            await asyncio.wait_for(following, 10)
            await service.submit(manifest("after"))
            assert "Waiting for 4 CPUs (0 free)" in await message(service, "after")
            world.runners.play("again", *TO_RUNNING, *TO_END)
            await service.wait("again", 10)
            await world.launched("after")

    asyncio.run(play())
