"""Deleting one finished task removes it completely and nothing else, even across a crash."""

import asyncio
import errno
from collections import Counter

import pytest

from doubles.server_components import ServerComponents
from doubles.stored_tasks import StoredTasks
from sandbox.interfaces.server_services import TaskNotEndedError, TaskNotFoundError, UnavailableError
from sandbox.interfaces.store import TaskQuery
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.model.failure import Failure, FailureCode
from sandbox.server import pruning
from sandbox.store.sqlite import SqliteStore

FAILED = Failure(FailureCode.AGENT_FAILED, "It failed.")
IDS = ["task-1", "task-2", "task-3"]


@pytest.fixture
def stored(tmp_path):
    return StoredTasks.with_three_tasks(tmp_path)


@pytest.fixture
def components(stored):
    instance = ServerComponents(stored.data_dir, SqliteStore(stored.data_dir / "index.sqlite"))
    yield instance
    instance.store.close()


@pytest.fixture
def no_wait(monkeypatch):
    """Deletion does not wait for a task that is in use."""
    monkeypatch.setattr(pruning, "DELETION_TIMEOUT_SECONDS", 0.0)


def reopen(components):
    components.store.close()
    components.store = SqliteStore(components.data_dir / "index.sqlite")


async def remaining_ids(components):
    async with components.server() as service:
        return [task.id for task in (await service.query(TaskQuery(order="asc"))).tasks]


def directories(stored):
    return sorted(path.name for path in (stored.data_dir / "tasks").iterdir())


async def test_deleted_task_is_gone_and_others_remain(stored, components):
    async with components.server() as service:
        assert await service.delete("task-2") == "Task task-2 was deleted."
        for call in (service.status, service.artifacts, service.delete):
            with pytest.raises(TaskNotFoundError):
                await call("task-2")
        assert len(await service.artifacts("task-1")) == 1
    assert directories(stored) == ["task-1", "task-3"]
    assert list((stored.data_dir / "pruned").iterdir()) == []
    reopen(components)
    assert await remaining_ids(components) == ["task-1", "task-3"]


async def test_only_one_of_several_concurrent_deletions_succeeds(components):
    async with components.server() as service:
        results = await asyncio.gather(*(service.delete("task-2") for _ in range(5)), return_exceptions=True)
    assert Counter(map(type, results)) == {str: 1, TaskNotFoundError: 4}


async def test_task_that_has_not_ended_is_kept(components, stored):
    recorder = stored.add_running_task("working")
    stored.index("working")
    async with components.server() as service:
        with pytest.raises(TaskNotEndedError, match="cancel it, then delete it"):
            await service.delete("working")
        assert (await service.status("working")).state == "running"
    recorder.writer.close()


async def test_deletion_waits_for_a_process_that_uses_the_task(stored, components, monkeypatch):
    refusals, detach = [], pruning.Pruner._detach

    def count_refusals(*arguments):
        is_detached = detach(*arguments)
        refusals.extend([] if is_detached else [arguments])
        return is_detached

    monkeypatch.setattr(pruning.Pruner, "_detach", count_refusals)
    async with components.server() as service:
        with stored.journals.try_lock("task-1"):
            deletion = asyncio.create_task(service.delete("task-1"))
            async with asyncio.timeout(10):
                while len(refusals) < 3:
                    await asyncio.sleep(0.01)
            assert (await service.status("task-1")).id == "task-1"
            assert not deletion.done()
        assert await deletion == "Task task-1 was deleted."


@pytest.mark.usefixtures("no_wait")
async def test_task_that_stays_in_use_is_kept(stored, components):
    async with components.server() as service:
        with stored.journals.try_lock("task-1"), pytest.raises(UnavailableError, match="is still in use"):
            await service.delete("task-1")
        assert await service.delete("task-1") == "Task task-1 was deleted."


@pytest.mark.usefixtures("no_wait")
async def test_task_is_kept_until_its_sandbox_is_removed(stored, components):
    handle = TaskLayout(stored.data_dir, "task-1").attempt("a" * 12).handle
    handle.parent.mkdir(parents=True, exist_ok=True)
    handle.write_text("{}")
    async with components.server() as service:
        with pytest.raises(UnavailableError, match="parts of its sandbox remain"):
            await service.delete("task-1")
        handle.unlink()
        assert await service.delete("task-1") == "Task task-1 was deleted."


async def test_preserved_sandbox_of_a_deleted_task_is_deleted(stored, components):
    stored.add_failed_task("kept", FAILED, attempt_id="b" * 12, lifecycle={"failure_action": "preserve"})
    workspace = TaskLayout(stored.data_dir, "kept").attempt("b" * 12).workspace
    workspace.mkdir(parents=True)
    (workspace / "file").write_text("x")
    stored.index("kept")
    async with components.server() as service:
        assert await service.has_preserved_sandbox(await service.status("kept"))
        assert await service.delete("kept") == "Task kept was deleted."
    assert directories(stored) == IDS


@pytest.mark.parametrize("step", ["before the rename", "after the rename"])
async def test_crash_leaves_a_task_complete_or_deleted(stored, components, monkeypatch, step):
    move_aside = pruning.Pruner._move_aside

    def crash(*arguments):
        if step == "after the rename":
            move_aside(*arguments)
        raise SystemError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(pruning.Pruner, "_move_aside", crash)
        async with components.server() as service:
            with pytest.raises(SystemError):
                await service.delete("task-1")
    reopen(components)
    assert await remaining_ids(components) == (IDS if step == "before the rename" else IDS[1:])
    reopen(components)
    async with components.server() as service:
        if step == "before the rename":
            await service.delete("task-1")
        else:
            await service.delete("task-2")
    assert directories(stored) == (IDS[1:] if step == "before the rename" else IDS[2:])
    assert list((stored.data_dir / "pruned").iterdir()) == []


async def test_files_that_cannot_be_removed_yet_are_reported(stored, components):
    async def fail(paths):
        raise OSError(errno.EPERM, "Operation not permitted")

    components.remove, remove = fail, components.remove
    async with components.server() as service:
        message = await service.delete("task-1")
        assert message.startswith("Task task-1 was deleted. Some files still use disk space: ")
        assert "Operation not permitted; the server tries every five minutes" in message
        with pytest.raises(TaskNotFoundError):
            await service.status("task-1")
        components.remove = remove
        await service.delete("task-2")
    assert list((stored.data_dir / "pruned").iterdir()) == []


@pytest.mark.usefixtures("no_wait")
async def test_task_that_cannot_be_moved_is_kept(stored, components, monkeypatch):
    def refuse(*_):
        raise OSError("Read-only file system")

    async with components.server() as service:
        with monkeypatch.context() as patch:
            patch.setattr(pruning.Pruner, "_move_aside", refuse)
            with pytest.raises(UnavailableError):
                await service.delete("task-1")
        assert (await service.status("task-1")).id == "task-1"
        assert len(await service.artifacts("task-1")) == 1
