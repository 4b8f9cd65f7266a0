"""A caller that heard no answer submits again with the same key, and still has one task."""

import asyncio
from datetime import timedelta

import pytest

from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from doubles.server_components import TO_END, TO_RUNNING, Rooms
from sandbox.interfaces.journal import read_records
from sandbox.interfaces.store import DuplicateTaskError, StoreError
from sandbox.interfaces.tasks import IdempotencyKeyReusedError, InsufficientResourcesError, UnavailableError
from sandbox.model.events import Idempotency
from sandbox.model.task_state import TaskState
from sandbox.server.scheduler import Resources
from sandbox.store.sqlite import SqliteStore

KEY = Idempotency("key-1", "aa" * 32)
OTHER_BODY = Idempotency("key-1", "bb" * 32)


@pytest.fixture(params=["memory", "sqlite"])
def world(request, tmp_path):
    store = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "index.sqlite")
    made = Rooms(tmp_path, store)
    yield made
    for task_id in list(made.runners.recorders):
        made.runners.die(task_id)


def test_the_same_submission_gives_the_same_task_as_it_was_then(world):
    async def play():
        async with world.server() as service:
            first = await service.submit(manifest(""), KEY)
            assert (first.is_replayed, first.task.state) == (False, TaskState.PENDING)
            early = await service.submit(manifest(""), KEY)
            await world.launched(first.task.id)
            world.runners.play(first.task.id, *TO_RUNNING, *TO_END)
            await service.wait(first.task.id, 10)
            late = await service.submit(manifest(""), KEY)
            assert (early.is_replayed, late.is_replayed) == (True, True)
            assert first.task == early.task == late.task
            return first.task.id

    task_id = asyncio.run(play())
    assert list(world.journals.task_ids()) == [task_id]
    assert next(iter(read_records(world.journals, task_id))).event.idempotency == KEY


def test_a_key_with_another_body_is_refused_also_after_the_end(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest(), KEY)
            with pytest.raises(IdempotencyKeyReusedError):
                await service.submit(manifest("task-2"), OTHER_BODY)
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING, *TO_END)
            await service.wait("task-1", 10)
            with pytest.raises(IdempotencyKeyReusedError):
                await service.submit(manifest("task-2"), OTHER_BODY)

    asyncio.run(play())
    assert list(world.journals.task_ids()) == ["task-1"]


def test_the_key_is_looked_at_before_the_id(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest(), KEY)
            assert (await service.submit(manifest(), KEY)).is_replayed
            with pytest.raises(DuplicateTaskError):
                await service.submit(manifest(), Idempotency("key-2", "aa" * 32))
            with pytest.raises(DuplicateTaskError):
                await service.submit(manifest())

    asyncio.run(play())


def test_of_many_at_once_one_makes_the_task_and_all_get_it(world):
    async def play():
        async with world.server() as service:
            return await asyncio.gather(*(service.submit(manifest(""), KEY) for _ in range(30)))

    submissions = asyncio.run(play())
    assert len({submission.task.id for submission in submissions}) == 1
    assert sorted(submission.is_replayed for submission in submissions) == [False] + [True] * 29
    assert len(world.journals.task_ids()) == 1


def test_other_keys_make_other_tasks(world):
    async def play():
        async with world.server() as service:
            keys = [Idempotency(f"key-{number}", "aa" * 32) for number in range(3)]
            return [(await service.submit(manifest(""), key)).task.id for key in keys]

    assert len(set(asyncio.run(play()))) == 3


def test_a_refused_submission_uses_up_no_key(world):
    world.capacity = Resources(4, 10**12, 10**12)

    async def play():
        async with world.server() as service:
            with pytest.raises(InsufficientResourcesError):
                await service.submit(manifest(vm={"cpus": 5}), KEY)
            return await service.submit(manifest(), OTHER_BODY)

    assert not asyncio.run(play()).is_replayed


def test_a_day_later_the_key_makes_a_new_task(world):
    async def play():
        async with world.server() as service:
            world.clock.set_back = timedelta(hours=24, seconds=5)
            first = await service.submit(manifest(""), KEY)
            world.clock.set_back = timedelta(seconds=30)
            replayed = await service.submit(manifest(""), KEY)
            world.clock.set_back = timedelta()
            second = await service.submit(manifest(""), OTHER_BODY)
            return first, replayed, second

    first, replayed, second = asyncio.run(play())
    assert replayed.is_replayed
    assert not second.is_replayed
    assert first.task.id == replayed.task.id != second.task.id


def test_another_server_on_the_same_data_knows_the_key(tmp_path):
    world = Rooms(tmp_path, MemoryStore())

    async def play():
        async with world.server() as service:
            return await service.submit(manifest(""), KEY)

    first = asyncio.run(play())
    world.store, world.capacity = MemoryStore(), Resources(1, 1, 1)
    again = asyncio.run(play())
    assert (again.task, again.is_replayed) == (first.task, True)


def test_a_living_task_is_found_though_the_index_did_not_take_it(tmp_path):
    class Forgetful(MemoryStore):
        def insert(self, indexed):
            raise StoreError("full")

    world = Rooms(tmp_path, Forgetful(), capacity=Resources(4, 10**12, 10**12))

    async def play():
        async with world.server() as service:
            await service.submit(manifest("first"))
            await service.submit(manifest("second"), KEY)
            return await service.submit(manifest("third"), KEY)

    assert asyncio.run(play()).task.id == "second"
    for task_id in list(world.runners.recorders):
        world.runners.die(task_id)


def test_while_the_index_cannot_be_asked_nothing_is_taken_with_a_key(tmp_path):
    class Silent(MemoryStore):
        def find_by_idempotency_key(self, key, since):
            raise StoreError("locked")

    world = Rooms(tmp_path, Silent())

    async def play():
        async with world.server() as service:
            with pytest.raises(UnavailableError, match="locked"):
                await service.submit(manifest(), KEY)

    asyncio.run(play())
    assert not world.journals.task_ids()
