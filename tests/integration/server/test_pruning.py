"""Pruning removes finished tasks completely and nothing else, even across a crash."""

import asyncio
import contextlib
import errno
import os
import sqlite3
import threading
from pathlib import Path

import pytest

from doubles.manifests import encode_json
from doubles.server_components import ServerComponents
from doubles.stored_tasks import StoredTasks
from doubles.unreachable_journals import UnreachableJournals
from sandbox.bootstrap.data_dir_maintenance import prune_data_dir
from sandbox.disks.commands import remove_trees
from sandbox.interfaces.server_services import Retention, TaskNotFoundError, UnavailableError
from sandbox.interfaces.store import TaskQuery
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.model.failure import Failure, FailureCode
from sandbox.server import pruning
from sandbox.store.sqlite import SqliteStore

FAILED = Failure(FailureCode.AGENT_FAILED, "It failed.")
NO_RETENTION = Retention(older_than_seconds=0)


@pytest.fixture
def stored(tmp_path):
    instance = StoredTasks(tmp_path)
    for number in range(1, 6):
        instance.add_completed_task(f"task-{number}", labels={"number": str(number)})
    instance.index()
    return instance


@pytest.fixture
def components(stored, tmp_path):
    instance = ServerComponents(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    yield instance
    instance.store.close()


def prune(components, retention, **options):
    async def scenario():
        async with components.server() as service:
            pruned = await service.prune(retention, **{"dry_run": False, **options})
            page = await service.query(TaskQuery(order="asc"))
            return [task.id for task in pruned.tasks], [task.id for task in page.tasks]

    components.store.close()
    components.store = SqliteStore(components.data_dir / "index.sqlite")
    return asyncio.run(scenario())


def dry_run(components, retention):
    """Return the complete result of a dry run."""

    async def scenario():
        async with components.server() as service:
            return await service.prune(retention, dry_run=True)

    components.store.close()
    components.store = SqliteStore(components.data_dir / "index.sqlite")
    return asyncio.run(scenario())


def directories(stored):
    return sorted(path.name for path in (stored.data_dir / "tasks").iterdir())


def test_oldest_tasks_are_pruned_completely(stored, components):
    assert prune(components, Retention(keep=3), dry_run=True) == (
        ["task-1", "task-2"],
        [f"task-{n}" for n in range(1, 6)],
    )
    assert len(directories(stored)) == 5
    assert prune(components, Retention(keep=3)) == (["task-1", "task-2"], ["task-3", "task-4", "task-5"])
    assert directories(stored) == ["task-3", "task-4", "task-5"]
    assert list((stored.data_dir / "pruned").iterdir()) == []
    assert prune(components, Retention(keep=3)) == ([], ["task-3", "task-4", "task-5"])


def test_task_whose_writer_may_be_alive_is_kept(stored, components):
    components.journals = UnreachableJournals(stored.data_dir)
    names = [f"task-{number}" for number in range(1, 6)]
    assert prune(components, NO_RETENTION) == ([], names)
    components.journals.is_unknown = False
    assert prune(components, NO_RETENTION) == (names, [])


def test_size_limit_counts_bytes_on_disk(stored, components):
    sparse = stored.data_dir / "tasks" / "task-2" / "artifacts" / "big"
    sparse.write_bytes(os.urandom(400_000))
    pruned, remaining = prune(components, Retention(max_bytes=300_000))
    assert (pruned, remaining) == (["task-1", "task-2"], ["task-3", "task-4", "task-5"])


def test_file_that_vanishes_during_the_scan_does_not_hide_the_others(tmp_path, monkeypatch):
    for number in range(5):
        (tmp_path / f"{number}").write_bytes(bytes(4096))
    before = pruning.disk_usage_bytes(tmp_path)
    scan = os.scandir

    def scan_and_remove(path):
        entries = list(scan(path))
        Path(entries[0]).unlink()
        return contextlib.nullcontext(entries)

    monkeypatch.setattr(os, "scandir", scan_and_remove)
    assert pruning.disk_usage_bytes(tmp_path) == before * 4 // 5 > 0


async def test_pruned_task_is_not_found_and_its_id_is_reusable(stored, components):
    async def scenario():
        async with components.server() as service:
            await service.prune(NO_RETENTION, dry_run=False)
            for call in (service.status, service.artifacts):
                with pytest.raises(TaskNotFoundError):
                    await call("task-1")
            with pytest.raises(TaskNotFoundError):
                await anext(service.recorded_events("task-1"))
            second = await service.submit(make_manifest())
            await components.wait_for_launch("task-1")
            components.placement.kill("task-1")
            return second.task.last_seq, (await service.query(TaskQuery(labels={"number": "1"}))).total_count

    assert (await scenario()) == (1, 0)


async def test_replay_ends_with_an_error_if_the_task_is_pruned(stored, components):
    stored.add_completed_task("long", lines=20_000)
    stored.index("long")

    async def scenario():
        async with components.server() as service:
            stream = service.recorded_events("long")
            await anext(stream)
            await service.prune(NO_RETENTION, dry_run=False)
            *_, error_event, end_event = [event async for event in stream]
            return error_event, end_event

    error_event, end_event = await scenario()
    assert (error_event["type"], error_event["error"], end_event["type"]) == ("error", "task_not_found", "end")
    assert "was removed" in error_event["message"]


def make_manifest():
    from doubles.manifests import manifest

    return manifest("task-1")


def test_unfinished_tasks_and_preserved_sandboxes_are_kept(stored, components):
    running = stored.add_running_task("running")
    stored.add_failed_task("preserved", FAILED, attempt_id="b" * 12, lifecycle={"failure_action": "preserve"})
    stored.add_failed_task("released", FAILED, attempt_id="c" * 12, lifecycle={"failure_action": "preserve"})
    handle = TaskLayout(stored.data_dir, "preserved").attempt("b" * 12).handle
    handle.parent.mkdir(parents=True)
    handle.write_text("{}")
    stored.index("running", "preserved", "released")

    pruned, remaining = prune(components, NO_RETENTION)
    assert pruned == [*(f"task-{number}" for number in range(1, 6)), "released"]
    assert remaining == ["running", "preserved"]
    assert handle.exists()
    running.writer.close()


def test_task_with_a_locked_journal_is_kept(stored, components):
    with stored.journals.try_lock("task-1"):
        assert prune(components, NO_RETENTION)[1] == ["task-1"]
    assert prune(components, NO_RETENTION)[0] == ["task-1"]


def test_task_without_files_is_pruned(stored, components):
    import shutil

    shutil.rmtree(stored.data_dir / "tasks" / "task-1")
    assert prune(components, Retention(keep=4)) == (["task-1"], ["task-2", "task-3", "task-4", "task-5"])


@pytest.mark.parametrize("step", ["before the rename", "after the rename"])
def test_crash_leaves_a_task_complete_or_pruned(stored, components, monkeypatch, step):
    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        target = "pathlib.Path.rename" if step == "before the rename" else "sandbox.server.pruning.Pruner._move_aside"
        move_aside = __import__("sandbox.server.pruning", fromlist=["Pruner"]).Pruner._move_aside
        patch.setattr(target, crash if step == "before the rename" else lambda *a: (move_aside(*a), crash()))
        with pytest.raises(KeyboardInterrupt):
            prune(components, Retention(keep=4))

    components.store.close()
    components.store = SqliteStore(components.data_dir / "index.sqlite")

    async def list_tasks():
        async with components.server() as service:
            task_ids = [task.id for task in (await service.query(TaskQuery(order="asc"))).tasks]
            for task_id in task_ids:
                assert [event async for event in service.recorded_events(task_id)][-1]["type"] == "end"
                assert len(await service.artifacts(task_id)) == 1
            return task_ids

    all_ids = [f"task-{number}" for number in range(1, 6)]
    assert asyncio.run(list_tasks()) == (all_ids if step == "before the rename" else all_ids[1:])
    prune(components, Retention(keep=4))
    assert directories(stored) == all_ids[1:]
    assert list((stored.data_dir / "pruned").iterdir()) == []


def test_task_that_cannot_be_moved_is_kept(stored, components):
    (stored.data_dir / "pruned").write_text("no directory")
    with pytest.raises(UnavailableError):
        prune(components, Retention(keep=4))
    (stored.data_dir / "pruned").unlink()
    assert prune(components, Retention(keep=5)) == ([], [f"task-{number}" for number in range(1, 6)])


async def test_directory_for_pruned_tasks_is_created_before_it_is_needed(stored, components):
    """If the directory were created only when it is needed, a full file system could prevent its creation."""
    async with components.server() as service:
        service.pruner.prepare()
        service.pruner.prepare()
        assert list((stored.data_dir / "pruned").iterdir()) == []
        (stored.data_dir / "pruned").rmdir()
        (stored.data_dir / "pruned").write_text("no directory")
        service.pruner.prepare()


def test_task_that_cannot_be_moved_is_indexed_again(stored, components, monkeypatch, caplog):
    def raise_error(*_):
        raise OSError("Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("sandbox.server.pruning.Pruner._move_aside", raise_error)
        assert prune(components, Retention(keep=4)) == ([], [f"task-{number}" for number in range(1, 6)])
    assert "is kept: Read-only" in caplog.text
    assert prune(components, Retention(keep=4))[0] == ["task-1"]


def test_task_counts_as_pruned_even_if_its_rename_cannot_be_flushed(stored, components, monkeypatch):
    move_aside = __import__("sandbox.server.pruning", fromlist=["Pruner"]).Pruner._move_aside

    def move_then_raise(*arguments):
        move_aside(*arguments)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("sandbox.server.pruning.Pruner._move_aside", move_then_raise)
        assert prune(components, Retention(keep=4)) == (["task-1"], [f"task-{number}" for number in range(2, 6)])


PRUNED_BUT_NOT_REMOVED = r"^Finished tasks removed: 1\..*pruned: Operation not permitted"


def test_failing_removal_does_not_block_other_tasks_and_limits(stored, components):
    async def raise_error(_):
        raise OSError("Operation not permitted")

    components.remove = raise_error
    with pytest.raises(UnavailableError, match=PRUNED_BUT_NOT_REMOVED):
        prune(components, Retention(keep=4))
    assert directories(stored) == [f"task-{number}" for number in range(2, 6)]
    (stored.data_dir / "tasks" / "task-2" / "artifacts" / "big").write_bytes(os.urandom(400_000))
    with pytest.raises(UnavailableError, match=PRUNED_BUT_NOT_REMOVED):
        prune(components, Retention(keep=4, max_bytes=300_000))
    assert directories(stored) == ["task-3", "task-4", "task-5"]
    components.remove = remove_trees
    assert prune(components, Retention(keep=4)) == ([], ["task-3", "task-4", "task-5"])
    assert list((stored.data_dir / "pruned").iterdir()) == []


REBUILD_MESSAGE = r"its entry in the index is damaged .*{}.*\)\); stop the server and run: .*rebuild\.$"


def block_lock(stored):
    lock = stored.data_dir / "tasks" / "task-1" / "journal" / "lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()
    return r"Is a directory.*\); check the disk\.$"


def damage_artifacts(stored):
    stored.damage_row("task-1", "artifacts")
    return REBUILD_MESSAGE.format("")


def damage_task(stored):
    stored.damage_row("task-1", "task")
    return REBUILD_MESSAGE.format("")


def damage_task_into_another(stored):
    with contextlib.closing(stored.open_store()) as store:
        other = store.load("task-2").task
    stored.damage_row("task-1", "task", encode_json(other))
    return REBUILD_MESSAGE.format("contains task task-2")


def damage_time_of_change(stored):
    """Set the row's time of the last state change to 0, so that it differs from the time in the task."""
    stored.damage_row("task-1", "state_changed_at", 0)
    return REBUILD_MESSAGE.format("but the column state_changed_at contains 0")


PRUNE_ALL = [{"older_than_seconds": 0}, {"keep": 0}, {"max_bytes": 0}]


@pytest.mark.parametrize(
    "damage", [block_lock, damage_artifacts, damage_task, damage_task_into_another, damage_time_of_change]
)
@pytest.mark.parametrize("retention_limits", PRUNE_ALL)
async def test_damaged_task_is_kept_and_does_not_block_others(stored, components, damage, retention_limits):
    async def scenario():
        async with components.server() as service:
            reason = damage(stored)
            with pytest.raises(UnavailableError, match=rf"Finished tasks removed: 4\. .*task-1: .*{reason}"):
                await service.prune(Retention(**retention_limits), dry_run=False)

    await scenario()
    assert directories(stored) == ["task-1"]


async def test_damaged_search_index_does_not_block_other_tasks(stored, components):
    """SQLite refuses to remove terms that were never added."""
    async with components.server() as service:
        with contextlib.closing(sqlite3.connect(stored.data_dir / "index.sqlite")) as connection, connection:
            connection.execute("UPDATE searchable SET state = '-1' WHERE id = 'task-1'")
        reason = rf"task-\d: {REBUILD_MESSAGE.format('malformed')}"
        with pytest.raises(UnavailableError, match=rf"Finished tasks removed: 4\. .*{reason}"):
            await service.prune(Retention(older_than_seconds=0), dry_run=False)
    assert len(directories(stored)) == 1


@pytest.mark.parametrize("retention_limits", PRUNE_ALL)
def test_unreadable_preserved_sandbox_is_kept_and_does_not_block_others(
    stored, components, monkeypatch, retention_limits
):
    preserve(stored, "preserved", "b" * 12, 1)

    def raise_error(_, task):
        if task.id == "preserved":
            raise OSError(errno.EIO, "Input/output error")
        return False

    monkeypatch.setattr("sandbox.server.preserved_sandboxes.PreservedSandboxes.is_preserved", raise_error)
    result = dry_run(components, Retention(**retention_limits))
    assert [task.id for task in result.tasks] == [f"task-{number}" for number in range(1, 6)]
    assert result.unexamined == {"preserved": "[Errno 5] Input/output error; check the disk"}
    with pytest.raises(UnavailableError, match=r"Finished tasks removed: 5\. .*preserved: .*Input/output error"):
        prune(components, Retention(**retention_limits))
    assert directories(stored) == ["preserved"]


@pytest.mark.parametrize("retention_limits", PRUNE_ALL)
def test_task_of_an_unreachable_host_is_kept_and_does_not_block_others(stored, components, retention_limits):
    """An unreachable host may still have part of the task's sandbox."""
    stored.add_completed_task("elsewhere", attempt_id="c" * 12, host="gone:far")
    stored.index("elsewhere")
    reason = "the host far cannot be reached with this server's settings"
    with pytest.raises(UnavailableError, match=rf"removed: 5\. .*elsewhere: {reason}\); check cluster.engine\.$"):
        prune(components, Retention(**retention_limits))
    assert directories(stored) == ["elsewhere"]
    with pytest.raises(UnavailableError, match="elsewhere: the host far can be reached only by a server"):
        prune_data_dir(stored.data_dir, Retention(**retention_limits), dry_run=False)
    assert directories(stored) == ["elsewhere"]
    components.placement_names = ["gone", ""]
    prune(components, Retention(**retention_limits))
    assert directories(stored) == []


def test_removal_stops_after_the_first_timeout(stored, components, monkeypatch):
    batch_sizes = []

    async def time_out(paths):
        batch_sizes.append(len(paths))
        raise TimeoutError

    monkeypatch.setattr("sandbox.server.pruning._REMOVE_BATCH_SIZE", 1)
    components.remove = time_out
    with pytest.raises(UnavailableError, match="the operation timed out; fix the cause"):
        prune(components, Retention(keep=2))
    assert directories(stored) == ["task-4", "task-5"]
    assert batch_sizes == [1]


def test_task_is_kept_until_its_sandbox_is_removed(stored, components):
    handle = TaskLayout(stored.data_dir, "task-1").attempt("a" * 12).handle
    handle.parent.mkdir(parents=True, exist_ok=True)
    handle.write_text("{}")
    assert prune(components, NO_RETENTION)[1] == ["task-1"]
    handle.unlink()
    assert prune(components, NO_RETENTION)[0] == ["task-1"]


def preserve(stored, task_id, attempt_id, size_bytes):
    """Add a task with a preserved sandbox of the given size."""
    stored.add_failed_task(task_id, FAILED, attempt_id=attempt_id, lifecycle={"failure_action": "preserve"})
    workspace = TaskLayout(stored.data_dir, task_id).attempt(attempt_id).workspace
    workspace.mkdir(parents=True)
    (workspace / "big").write_bytes(os.urandom(size_bytes))
    stored.index(task_id)


def test_unprunable_data_does_not_count_against_limits(stored, components):
    preserve(stored, "preserved", "b" * 12, 3_000_000)
    unknown = stored.data_dir / "tasks" / "unknown"
    unknown.mkdir()
    (unknown / "big").write_bytes(os.urandom(3_000_000))
    assert prune(components, Retention(max_bytes=1_000_000))[0] == []
    assert prune(components, Retention(keep=5))[0] == []
    assert prune(components, Retention(keep=4))[0] == ["task-1"]


def test_combined_limits_prune_no_more_tasks_than_the_strictest_limit(stored, components):
    for number in range(1, 6):
        (stored.data_dir / "tasks" / f"task-{number}" / "artifacts" / "big").write_bytes(os.urandom(400_000))
    combined = Retention(keep=4, max_bytes=1_500_000)
    assert prune(components, combined, dry_run=True)[0] == ["task-1", "task-2"]
    assert prune(components, combined) == (["task-1", "task-2"], ["task-3", "task-4", "task-5"])


@pytest.fixture
def slow_disk(components, monkeypatch):
    """Block the measurement of task-2 until the test resumes it.

    Yield a list with one entry for each started measurement, and the event that resumes the measurement.
    """
    started, may_finish = [], threading.Event()
    disk_usage_bytes = pruning.disk_usage_bytes

    def measure(directory):
        if directory.name == "task-2":
            started.append(directory.name)
            may_finish.wait(60)
        return disk_usage_bytes(directory)

    monkeypatch.setattr(pruning, "disk_usage_bytes", measure)
    yield started, may_finish
    may_finish.set()


async def test_slow_measurement_is_shared_by_later_sweeps(stored, components, slow_disk):
    started, may_finish = slow_disk
    (stored.data_dir / "tasks" / "task-2" / "artifacts" / "big").write_bytes(os.urandom(400_000))
    size_limit = Retention(max_bytes=300_000)

    async def scenario():
        async with components.server() as service:
            for _ in range(40):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await service.prune(size_limit, dry_run=False)
            # Threads stay available for other work.
            async with asyncio.timeout(10):
                await asyncio.to_thread(lambda: None)
                before = len(started)
                may_finish.set()
                pruned = await service.prune(size_limit, dry_run=False)
            return before, [task.id for task in pruned.tasks]

    assert (await scenario()) == (1, ["task-1", "task-2"])


async def test_measurement_ignores_tasks_that_are_removed_in_the_meantime(stored, components, slow_disk):
    started, may_finish = slow_disk
    for number in range(1, 6):
        (stored.data_dir / "tasks" / f"task-{number}" / "artifacts" / "big").write_bytes(os.urandom(400_000))

    async def scenario():
        async with components.server() as service:
            size_prune = asyncio.create_task(service.prune(Retention(max_bytes=1_500_000), dry_run=False))
            async with asyncio.timeout(10):
                while not started:
                    await asyncio.sleep(0.005)
            components.store.delete("task-1")
            may_finish.set()
            return [task.id for task in (await size_prune).tasks]

    assert (await scenario()) == ["task-2"]


async def test_shutdown_does_not_wait_for_a_measurement(components, slow_disk):
    started, may_finish = slow_disk

    async def scenario():
        async with components.server() as service:
            size_prune = asyncio.create_task(service.prune(Retention(max_bytes=1), dry_run=False))
            async with asyncio.timeout(10):
                while not started:
                    await asyncio.sleep(0.005)
            size_prune.cancel()

    await scenario()
    assert not may_finish.is_set()


async def test_deletion_does_not_wait_for_a_dry_run(components, slow_disk):
    started, may_finish = slow_disk
    async with components.server() as service:
        dry_run = asyncio.create_task(service.prune(NO_RETENTION, dry_run=True))
        async with asyncio.timeout(10):
            while not started:
                await asyncio.sleep(0.005)
            assert await service.delete("task-5") == "Task task-5 was deleted."
        may_finish.set()
        # The dry run lists the task or not, depending on when the deletion happens. It is never an error.
        assert {"task-1", "task-2", "task-3", "task-4"} <= {task.id for task in (await dry_run).tasks}


async def test_age_and_count_limits_do_not_wait_for_a_measurement(stored, components, slow_disk):
    started, _ = slow_disk
    async with components.server() as service:
        size_prune = asyncio.create_task(service.prune(Retention(max_bytes=10**9), dry_run=False))
        async with asyncio.timeout(10):
            while not started:
                await asyncio.sleep(0.005)
            pruned = asyncio.create_task(service.prune(Retention(keep=4), dry_run=False))
            while components.store.load("task-1") is not None:
                await asyncio.sleep(0.005)
        for pending in (size_prune, pruned):
            pending.cancel()
