"""The leftover remover removes leftovers of attempts and keeps everything else. The leftovers are simulated."""

import errno
import os
import sqlite3
from contextlib import closing

import pytest

from doubles.fake_leftovers import FakeLeftoverSource
from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING, ServerComponents
from doubles.unreachable_journals import UnreachableJournals
from sandbox.disks.commands import remove_trees
from sandbox.interfaces.placement import HostUnreachableError
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.model.events import AgentExited, TaskFinished
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.task_state import TaskState
from sandbox.placements.local.attempt_files import LocalAttemptFiles
from sandbox.server.maintenance import LeftoverRemovalError, LeftoverRemover
from sandbox.store.sqlite import SqliteStore

FAILED = (AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "It failed.")), TaskFinished())


@pytest.fixture
def components(tmp_path):
    instance = ServerComponents(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    yield instance
    for task_id in list(instance.placement.recorders):
        instance.placement.kill(task_id)


def leftover_remover(components, service, *leftover_sources):
    return remover_with(components, service, leftover_sources)


def remover_with(components, service, leftover_sources, **changes):
    found = LocalAttemptFiles(components.data_dir, leftover_sources, remove_trees)
    arguments = {"journals": components.journals, "store": components.store, **changes}
    return LeftoverRemover(**arguments, preserved_sandboxes=service.preserved_sandboxes, all_files=[found])


async def start(components, service, task_id, **sections):
    """Start a task with the files of a real attempt."""
    await service.submit(manifest(task_id, **sections))
    await components.wait_for_launch(task_id)
    layout = TaskLayout(components.data_dir, task_id).attempt(components.placement.orders[-1].attempt_id)
    layout.workspace.mkdir(parents=True)
    layout.host_git_directory.mkdir()
    layout.handle.write_text("{}")
    layout.runner_log.write_text("log")
    components.placement.record(task_id, *TO_RUNNING)
    return layout


def names(layout):
    return sorted(path.name for path in layout.root.iterdir())


async def end(components, service, task_id, *events):
    components.placement.record(task_id, *events)
    await components.wait_for_state(service, task_id, (await service.wait(task_id, 10)).state)


async def test_leftovers_of_an_ended_attempt_are_removed(components):
    async def scenario():
        async with components.server() as service:
            layout, leftovers = await start(components, service, "task-1"), FakeLeftoverSource()
            leftovers.attempts.add(layout.root.name)
            await end(components, service, "task-1", *TO_COMPLETED)
            await leftover_remover(components, service, leftovers).sweep()
            return names(layout), leftovers.attempts

    assert (await scenario()) == (["runner.log"], set())


async def test_running_sandboxes_and_sandboxes_of_other_servers_are_kept(components):
    async def scenario():
        async with components.server() as service:
            layout, leftovers = await start(components, service, "task-1"), FakeLeftoverSource()
            leftovers.attempts |= {layout.root.name, "of-another-server"}
            before = names(layout)
            await leftover_remover(components, service, leftovers).sweep()
            components.placement.record("task-1", *TO_COMPLETED)
            return before == names(layout), len(leftovers.attempts)

    assert (await scenario()) == (True, 2)


async def test_leftovers_of_a_locked_journal_are_kept(components):
    async def scenario():
        async with components.server() as service:
            layout, leftovers = await start(components, service, "task-1"), FakeLeftoverSource()
            leftovers.attempts.add(layout.root.name)
            recorder = components.placement.recorders["task-1"]
            for event in TO_COMPLETED:
                recorder.record(event)
            await components.wait_for_state(service, "task-1", TaskState.COMPLETED)
            before = names(layout)
            await leftover_remover(components, service, leftovers).sweep()
            while_locked = (before == names(layout), len(leftovers.attempts))
            components.placement.kill("task-1")
            await leftover_remover(components, service, leftovers).sweep()
            return while_locked, names(layout), leftovers.attempts

    assert (await scenario()) == ((True, 1), ["runner.log"], set())


@pytest.mark.parametrize("is_indexed", [True, False])
async def test_leftovers_of_an_attempt_that_may_be_alive_are_kept(components, is_indexed):
    """The end of the task is recorded in the index and the journal, or only in the journal."""
    async with components.server() as service:
        layout, leftovers = await start(components, service, "task-1"), FakeLeftoverSource()
        leftovers.attempts.add(layout.root.name)
        row = components.store.load("task-1")
        await end(components, service, "task-1", *TO_COMPLETED)
        if not is_indexed:
            components.store.save(row)
        before, journals = names(layout), UnreachableJournals(components.data_dir)
        remover = remover_with(components, service, [leftovers], journals=journals)
        await remover.sweep()
        assert (names(layout), len(leftovers.attempts)) == (before, 1)
        journals.is_unknown = False
        await remover.sweep()
        assert (names(layout), leftovers.attempts) == (["runner.log"], set())


async def test_leftovers_of_a_task_that_ended_while_no_server_ran_are_removed(components):
    async def scenario():
        async with components.server() as service:
            layout, leftovers = await start(components, service, "task-1"), FakeLeftoverSource()
            leftovers.attempts.add(layout.root.name)
        for event in TO_COMPLETED:
            components.placement.recorders["task-1"].record(event)
        components.placement.kill("task-1")
        with closing(SqliteStore(components.data_dir / "index.sqlite")) as store:
            assert not store.load("task-1").task.state.is_final
            await remover_with(components, service, [leftovers], store=store).sweep()
        return names(layout), leftovers.attempts

    assert (await scenario()) == (["runner.log"], set())


async def test_host_that_does_not_respond_does_not_block_other_hosts(components):
    class UnreachableFiles:
        async def scan(self):
            raise HostUnreachableError("far:one")

    async with components.server() as service:
        layout = await start(components, service, "task-1")
        await end(components, service, "task-1", *TO_COMPLETED)
        remover = LeftoverRemover(
            components.journals,
            components.store,
            service.preserved_sandboxes,
            [UnreachableFiles(), components.placement.files],
        )
        with pytest.raises(LeftoverRemovalError, match="the host one is not responding"):
            await remover.sweep()
        assert names(layout) == ["runner.log"]


async def test_unreadable_directory_does_not_block_other_tasks(components, monkeypatch):
    listdir = os.listdir

    def failing_listdir(path):
        if str(path).endswith("task-1/attempts"):
            raise OSError(errno.EIO, "Input/output error")
        return listdir(path)

    async def scenario():
        async with components.server() as service:
            await start(components, service, "task-1")
            layout, leftovers, sockets = (
                await start(components, service, "task-2"),
                FakeLeftoverSource(),
                FakeLeftoverSource(belongs_to_this_server=True),
            )
            sockets.attempts = {"of-task-1"}
            leftovers.attempts.add(layout.root.name)
            for task_id in ("task-1", "task-2"):
                await end(components, service, task_id, *TO_COMPLETED)
            monkeypatch.setattr("os.listdir", failing_listdir)
            with pytest.raises(LeftoverRemovalError, match="attempts of task task-1"):
                await leftover_remover(components, service, leftovers, sockets).sweep()
            monkeypatch.undo()
            return names(layout), leftovers.attempts, sockets.attempts

    assert (await scenario()) == (["runner.log"], set(), {"of-task-1"})


async def test_lock_that_cannot_be_opened_does_not_block_other_tasks(components):
    async def scenario():
        async with components.server() as service:
            broken, layout = await start(components, service, "task-1"), await start(components, service, "task-2")
            leftovers = FakeLeftoverSource()
            leftovers.attempts |= {broken.root.name, layout.root.name}
            for task_id in ("task-1", "task-2"):
                await end(components, service, task_id, *TO_COMPLETED)
            lock = TaskLayout(components.data_dir, "task-1").root / "journal" / "lock"
            lock.unlink()
            lock.mkdir()
            with pytest.raises(LeftoverRemovalError, match="lock of task task-1"):
                await leftover_remover(components, service, leftovers).sweep()
            return names(layout), leftovers.attempts == {broken.root.name}

    assert (await scenario()) == (["runner.log"], True)


async def test_damaged_index_row_does_not_block_other_tasks(components):
    async def scenario():
        async with components.server() as service:
            damaged, layout = await start(components, service, "task-1"), await start(components, service, "task-2")
            for task_id in ("task-1", "task-2"):
                await end(components, service, task_id, *TO_COMPLETED)
            with closing(sqlite3.connect(components.data_dir / "index.sqlite")) as connection, connection:
                connection.execute("UPDATE tasks SET task = X'7B' WHERE id = 'task-1'")
            before = names(damaged)
            with pytest.raises(LeftoverRemovalError, match="task task-1: The index of tasks is damaged"):
                await leftover_remover(components, service, FakeLeftoverSource()).sweep()
            return names(layout), names(damaged) == before

    assert (await scenario()) == (["runner.log"], True)


async def test_leftovers_of_a_task_that_waits_for_a_finisher_are_kept(components):
    async def scenario():
        async with components.server() as service:
            layout, leftovers = await start(components, service, "task-1"), FakeLeftoverSource()
            leftovers.attempts.add(layout.root.name)
            components.placement.launch_error = OSError("no more processes")
            components.placement.kill("task-1")
            before = names(layout)
            await leftover_remover(components, service, leftovers).sweep()
            return before == names(layout), len(leftovers.attempts)

    assert (await scenario()) == (True, 1)


async def test_preserved_files_are_kept_and_a_dead_session_is_removed(components):
    async def scenario():
        async with components.server() as service:
            layout = await start(components, service, "task-1", lifecycle={"failure_action": "preserve"})
            leftovers = FakeLeftoverSource()
            await end(components, service, "task-1", *FAILED)
            leftovers.attempts.add(layout.root.name)
            task = await service.status("task-1")
            async with service.preserved_sandboxes.try_lock(task):
                await leftover_remover(components, service, leftovers).sweep()
                during_session = len(leftovers.attempts)
            await leftover_remover(components, service, leftovers).sweep()
            return during_session, leftovers.attempts, layout.workspace.is_dir(), layout.handle.exists()

    assert (await scenario()) == (1, set(), True, False)


async def test_failing_removal_is_reported_and_retried(components):
    async def scenario():
        async with components.server() as service:
            leftovers, layouts = FakeLeftoverSource(), []
            for task_id in ("a", "b"):
                layout = await start(components, service, task_id)
                leftovers.attempts.add(layout.root.name)
                await end(components, service, task_id, *TO_COMPLETED)
                layouts.append(layout)
            leftovers.stuck = {layouts[0].root.name}
            with pytest.raises(LeftoverRemovalError, match="task a: It does not end"):
                await leftover_remover(components, service, leftovers).sweep()
            first = [layout.handle.exists() for layout in layouts]
            leftovers.stuck = set()
            await leftover_remover(components, service, leftovers).sweep()
            return first, [names(layout) for layout in layouts]

    assert (await scenario()) == ([True, False], [["runner.log"], ["runner.log"]])


async def test_unowned_leftovers_without_a_directory_are_removed(components):
    async def scenario():
        async with components.server() as service:
            sockets, sandboxes = FakeLeftoverSource(belongs_to_this_server=True), FakeLeftoverSource()
            sockets.attempts, sandboxes.attempts = {"aaaaaaaaaaaa"}, {"aaaaaaaaaaaa"}
            await leftover_remover(components, service, sandboxes, sockets).sweep()
            return sockets.attempts, sandboxes.attempts

    assert (await scenario()) == (set(), {"aaaaaaaaaaaa"})


async def test_failing_removal_of_unowned_leftovers_does_not_block_others(components):
    leftovers = FakeLeftoverSource(belongs_to_this_server=True)
    leftovers.attempts, leftovers.stuck = {f"nobody{number}" for number in range(20)}, {"nobody7"}

    async def scenario():
        async with components.server() as service:
            with pytest.raises(LeftoverRemovalError, match="nobody7: It does not end"):
                await leftover_remover(components, service, leftovers).sweep()

    await scenario()
    assert leftovers.attempts == {"nobody7"}
