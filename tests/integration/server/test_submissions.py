"""A client that lost the response submits again with the same idempotency key and gets the same task."""

import asyncio
from datetime import timedelta

import pytest

from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from doubles.server_components import TO_RUNNING, ServerComponents
from sandbox.interfaces.server_services import IdempotencyKeyReusedError, InsufficientResourcesError, UnavailableError
from sandbox.interfaces.store import DuplicateTaskError, StoreError
from sandbox.model.events import Idempotency
from sandbox.model.resources import Resources
from sandbox.model.task_state import TaskState
from sandbox.runner.attempt_context import read_records
from sandbox.store.sqlite import SqliteStore

KEY = Idempotency("key-1", "aa" * 32)
KEY_WITH_OTHER_BODY = Idempotency("key-1", "bb" * 32)


@pytest.fixture(params=["memory", "sqlite"])
def components(request, tmp_path):
    store = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "index.sqlite")
    instance = ServerComponents(tmp_path, store)
    yield instance
    for task_id in list(instance.placement.recorders):
        instance.placement.kill(task_id)


async def test_repeated_submission_returns_the_original_task(components):
    async def scenario():
        async with components.server() as service:
            first = await service.submit(manifest(""), KEY)
            assert (first.is_replayed, first.task.state) == (False, TaskState.PENDING)
            early_replay = await service.submit(manifest(""), KEY)
            await components.wait_for_launch(first.task.id)
            components.placement.record(first.task.id, *TO_RUNNING, *TO_COMPLETED)
            await service.wait(first.task.id, 10)
            late_replay = await service.submit(manifest(""), KEY)
            assert (early_replay.is_replayed, late_replay.is_replayed) == (True, True)
            assert first.task == early_replay.task == late_replay.task
            return first.task.id

    task_id = await scenario()
    assert list(components.journals.task_ids()) == [task_id]
    assert next(iter(read_records(components.journals, task_id))).event.idempotency == KEY


async def test_key_that_is_reused_with_another_body_is_rejected(components):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest(), KEY)
            with pytest.raises(IdempotencyKeyReusedError):
                await service.submit(manifest("task-2"), KEY_WITH_OTHER_BODY)
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING, *TO_COMPLETED)
            await service.wait("task-1", 10)
            with pytest.raises(IdempotencyKeyReusedError):
                await service.submit(manifest("task-2"), KEY_WITH_OTHER_BODY)

    await scenario()
    assert list(components.journals.task_ids()) == ["task-1"]


async def test_key_is_checked_before_the_id(components):
    async with components.server() as service:
        await service.submit(manifest(), KEY)
        assert (await service.submit(manifest(), KEY)).is_replayed
        with pytest.raises(DuplicateTaskError):
            await service.submit(manifest(), Idempotency("key-2", "aa" * 32))
        with pytest.raises(DuplicateTaskError):
            await service.submit(manifest())


async def test_concurrent_submissions_with_one_key_create_one_task(components):
    async def scenario():
        async with components.server() as service:
            return await asyncio.gather(*(service.submit(manifest(""), KEY) for _ in range(30)))

    submissions = await scenario()
    assert len({submission.task.id for submission in submissions}) == 1
    assert sorted(submission.is_replayed for submission in submissions) == [False] + [True] * 29
    assert len(components.journals.task_ids()) == 1


async def test_different_keys_create_different_tasks(components):
    async def scenario():
        async with components.server() as service:
            keys = [Idempotency(f"key-{number}", "aa" * 32) for number in range(3)]
            return [(await service.submit(manifest(""), key)).task.id for key in keys]

    assert len(set(await scenario())) == 3


async def test_rejected_submission_does_not_consume_its_key(components):
    components.capacity = Resources(4, 10**12, 10**12)

    async def scenario():
        async with components.server() as service:
            with pytest.raises(InsufficientResourcesError):
                await service.submit(manifest(vm={"cpus": 5}), KEY)
            return await service.submit(manifest(), KEY_WITH_OTHER_BODY)

    assert not (await scenario()).is_replayed


async def test_key_expires_after_a_day(components):
    async def scenario():
        async with components.server() as service:
            components.clock.set_back_by = timedelta(hours=24, seconds=5)
            first = await service.submit(manifest(""), KEY)
            components.clock.set_back_by = timedelta(seconds=30)
            replayed = await service.submit(manifest(""), KEY)
            components.clock.set_back_by = timedelta()
            second = await service.submit(manifest(""), KEY_WITH_OTHER_BODY)
            return first, replayed, second

    first, replayed, second = await scenario()
    assert replayed.is_replayed
    assert not second.is_replayed
    assert first.task.id == replayed.task.id != second.task.id


def test_key_survives_a_lost_index(tmp_path):
    components = ServerComponents(tmp_path, MemoryStore())

    async def scenario():
        async with components.server() as service:
            return await service.submit(manifest(""), KEY)

    first = asyncio.run(scenario())
    components.store, components.capacity = MemoryStore(), Resources(1, 1, 1)
    repeated = asyncio.run(scenario())
    assert (repeated.task, repeated.is_replayed) == (first.task, True)


async def test_active_task_is_found_by_key_without_an_index_row(tmp_path):
    class UnwritableStore(MemoryStore):
        def save_all(self, indexed):
            if indexed:
                raise StoreError("full")

    components = ServerComponents(tmp_path, UnwritableStore(), capacity=Resources(4, 10**12, 10**12))

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest("first"))
            await service.submit(manifest("second"), KEY)
            return await service.submit(manifest("third"), KEY)

    assert (await scenario()).task.id == "second"
    for task_id in list(components.placement.recorders):
        components.placement.kill(task_id)


async def test_submission_with_a_key_is_rejected_if_the_index_fails(tmp_path):
    class UnreadableStore(MemoryStore):
        def find_by_idempotency_key(self, key, since):
            raise StoreError("locked")

    components = ServerComponents(tmp_path, UnreadableStore())

    async def scenario():
        async with components.server() as service:
            with pytest.raises(UnavailableError, match="locked"):
                await service.submit(manifest(), KEY)

    await scenario()
    assert not components.journals.task_ids()


async def test_journal_of_a_rerun_contains_the_id_of_the_original_task(components):
    async with components.server() as service:
        await service.submit(manifest("task-1"))
        await service.submit(manifest("task-2"), rerun_of="task-1")
    assert [components.journals.replay(task_id).task.rerun_of for task_id in ("task-1", "task-2")] == [None, "task-1"]
