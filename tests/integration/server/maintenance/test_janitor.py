"""What the janitor clears away and what it never touches, with traces of attempts that the test plays itself."""

import asyncio
import errno
import logging
import os
import sqlite3
from contextlib import closing

import pytest

from doubles.manifests import manifest
from doubles.server_components import TO_END, TO_RUNNING, Rooms
from sandbox.disks.removal import remove_trees
from sandbox.interfaces.layout import AttemptLayout, TaskLayout, probe_directory
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import AgentExited, TaskFinished
from sandbox.model.task_state import TaskState
from sandbox.server.maintenance.garbage_collector import GarbageCollectionError, GarbageCollector
from sandbox.server.maintenance.garbage_collector import GarbageCollectorDependencies as ClearingRooms
from sandbox.server.maintenance.janitor import Janitor, PeriodicJob
from sandbox.server.maintenance.probe_cleanup import ProbeCleanup, probe_lock
from sandbox.store.sqlite import SqliteStore

FAILED = (AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "It failed.")), TaskFinished())


class PlayedLeftovers:
    """Sandboxes on a machine, by attempt id; those that are stuck do not end."""

    kind = "sandbox"

    def __init__(self, *, is_exclusive=False):
        self.is_exclusive = is_exclusive
        self.there, self.stuck = set(), set()

    def attempt_ids(self):
        return set(self.there)

    async def clean_up(self, attempt_id, files):
        if attempt_id in self.stuck:
            raise OSError("It does not end")
        self.there.discard(attempt_id)


@pytest.fixture
def world(tmp_path):
    made = Rooms(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    yield made
    for task_id in list(made.runners.recorders):
        made.runners.die(task_id)


def clearing(world, service, *kinds):
    rooms = service.dependencies
    return GarbageCollector(
        ClearingRooms(world.data_dir, rooms.journals, rooms.store, rooms.preserved_sandboxes, remove_trees), kinds
    )


async def begin(world, service, task_id, **parts):
    """A task that runs, with what a real attempt would have on disk."""
    await service.submit(manifest(task_id, **parts))
    await world.launched(task_id)
    files = TaskLayout(world.data_dir, task_id).attempt(world.runners.orders[-1].attempt_id)
    files.workspace.mkdir(parents=True)
    files.repository.mkdir()
    files.handle.write_text("{}")
    files.runner_log.write_text("log")
    world.runners.play(task_id, *TO_RUNNING)
    return files


def names(files):
    return sorted(path.name for path in files.root.iterdir())


async def end(world, service, task_id, *events):
    world.runners.play(task_id, *events)
    await world.until(service, task_id, (await service.wait(task_id, 10)).state)


def test_what_is_left_of_an_attempt_that_is_over_goes(world):
    async def play():
        async with world.server() as service:
            files, machine = await begin(world, service, "task-1"), PlayedLeftovers()
            machine.there.add(files.root.name)
            await end(world, service, "task-1", *TO_END)
            await clearing(world, service, machine).sweep()
            return names(files), machine.there

    assert asyncio.run(play()) == (["runner.log"], set())


def test_what_goes_on_is_let_alone_and_so_is_what_is_not_ours(world):
    async def play():
        async with world.server() as service:
            files, machine = await begin(world, service, "task-1"), PlayedLeftovers()
            machine.there |= {files.root.name, "of-another-server"}
            before = names(files)
            await clearing(world, service, machine).sweep()
            world.runners.play("task-1", *TO_END)
            return before == names(files), len(machine.there)

    assert asyncio.run(play()) == (True, 2)


def test_somebody_who_still_holds_the_journal_of_a_task_that_has_ended_is_not_disturbed(world):
    async def play():
        async with world.server() as service:
            files, machine = await begin(world, service, "task-1"), PlayedLeftovers()
            machine.there.add(files.root.name)
            recorder = world.runners.recorders["task-1"]
            for event in TO_END:
                recorder.record(event)
            await world.until(service, "task-1", TaskState.COMPLETED)
            before = names(files)
            await clearing(world, service, machine).sweep()
            held = (before == names(files), len(machine.there))
            world.runners.die("task-1")
            await clearing(world, service, machine).sweep()
            return held, names(files), machine.there

    assert asyncio.run(play()) == ((True, 1), ["runner.log"], set())


def test_what_ended_while_no_server_was_there_is_over_before_the_index_has_heard_of_it(world):
    async def play():
        async with world.server() as service:
            files, machine = await begin(world, service, "task-1"), PlayedLeftovers()
            machine.there.add(files.root.name)
        for event in TO_END:
            world.runners.recorders["task-1"].record(event)
        world.runners.die("task-1")
        rooms = service.dependencies
        with closing(SqliteStore(world.data_dir / "index.sqlite")) as store:
            assert not store.load("task-1").task.state.is_terminal
            here = ClearingRooms(world.data_dir, rooms.journals, store, rooms.preserved_sandboxes, remove_trees)
            await GarbageCollector(here, [machine]).sweep()
        return names(files), machine.there

    assert asyncio.run(play()) == (["runner.log"], set())


def test_a_directory_that_cannot_be_read_keeps_no_other_task_from_being_cleared_away(world, monkeypatch):
    listed = os.listdir

    def read(path):
        if str(path).endswith("task-1/attempts"):
            raise OSError(errno.EIO, "Input/output error")
        return listed(path)

    async def play():
        async with world.server() as service:
            await begin(world, service, "task-1")
            files, machine, sockets = await begin(world, service, "task-2"), PlayedLeftovers(), PlayedLeftovers()
            sockets.is_exclusive, sockets.there = True, {"of-task-1"}
            machine.there.add(files.root.name)
            for task_id in ("task-1", "task-2"):
                await end(world, service, task_id, *TO_END)
            monkeypatch.setattr("os.listdir", read)
            with pytest.raises(GarbageCollectionError, match="attempts of task task-1"):
                await clearing(world, service, machine, sockets).sweep()
            monkeypatch.undo()
            return names(files), machine.there, sockets.there

    assert asyncio.run(play()) == (["runner.log"], set(), {"of-task-1"})


def test_a_lock_that_cannot_be_opened_keeps_no_other_task_from_being_cleared_away(world):
    async def play():
        async with world.server() as service:
            broken, files = await begin(world, service, "task-1"), await begin(world, service, "task-2")
            machine = PlayedLeftovers()
            machine.there |= {broken.root.name, files.root.name}
            for task_id in ("task-1", "task-2"):
                await end(world, service, task_id, *TO_END)
            lock = TaskLayout(world.data_dir, "task-1").root / "journal" / "lock"
            lock.unlink()
            lock.mkdir()
            with pytest.raises(GarbageCollectionError, match="lock of task task-1"):
                await clearing(world, service, machine).sweep()
            return names(files), machine.there == {broken.root.name}

    assert asyncio.run(play()) == (["runner.log"], True)


def test_a_damaged_row_keeps_no_other_task_from_being_cleared_away(world):
    async def play():
        async with world.server() as service:
            damaged, files = await begin(world, service, "task-1"), await begin(world, service, "task-2")
            for task_id in ("task-1", "task-2"):
                await end(world, service, task_id, *TO_END)
            with closing(sqlite3.connect(world.data_dir / "index.sqlite")) as connection, connection:
                connection.execute("UPDATE tasks SET task = X'7B' WHERE id = 'task-1'")
            before = names(damaged)
            with pytest.raises(GarbageCollectionError, match="task task-1: The index of tasks is damaged"):
                await clearing(world, service, PlayedLeftovers()).sweep()
            return names(files), names(damaged) == before

    assert asyncio.run(play()) == (["runner.log"], True)


def test_a_task_that_waits_for_its_finisher_is_the_finishers(world):
    async def play():
        async with world.server() as service:
            files, machine = await begin(world, service, "task-1"), PlayedLeftovers()
            machine.there.add(files.root.name)
            world.runners.refuses = True
            world.runners.die("task-1")
            before = names(files)
            await clearing(world, service, machine).sweep()
            return before == names(files), len(machine.there)

    assert asyncio.run(play()) == (True, 1)


def test_of_a_preserved_sandbox_the_files_stay_and_a_dead_visit_goes(world):
    async def play():
        async with world.server() as service:
            files = await begin(world, service, "task-1", lifecycle={"failure_action": "preserve"})
            machine = PlayedLeftovers()
            await end(world, service, "task-1", *FAILED)
            machine.there.add(files.root.name)
            task = await service.status("task-1")
            with service.dependencies.preserved_sandboxes.try_lock(task):
                await clearing(world, service, machine).sweep()
                visited = len(machine.there)
            await clearing(world, service, machine).sweep()
            return visited, machine.there, files.workspace.is_dir(), files.handle.exists()

    assert asyncio.run(play()) == (1, set(), True, False)


def test_what_does_not_end_is_told_tried_again_and_keeps_nothing_else(world):
    async def play():
        async with world.server() as service:
            machine, kept = PlayedLeftovers(), []
            for task_id in ("a", "b"):
                files = await begin(world, service, task_id)
                machine.there.add(files.root.name)
                await end(world, service, task_id, *TO_END)
                kept.append(files)
            machine.stuck = {kept[0].root.name}
            with pytest.raises(GarbageCollectionError, match="task a: It does not end"):
                await clearing(world, service, machine).sweep()
            first = [path.handle.exists() for path in kept]
            machine.stuck = set()
            await clearing(world, service, machine).sweep()
            return first, [names(path) for path in kept]

    assert asyncio.run(play()) == ([True, False], [["runner.log"], ["runner.log"]])


def test_what_is_found_in_a_place_of_ones_own_goes_also_without_a_directory(world):
    async def play():
        async with world.server() as service:
            sockets, sandboxes = PlayedLeftovers(is_exclusive=True), PlayedLeftovers()
            sockets.there, sandboxes.there = {"aaaaaaaaaaaa"}, {"aaaaaaaaaaaa"}
            await clearing(world, service, sandboxes, sockets).sweep()
            return sockets.there, sandboxes.there

    assert asyncio.run(play()) == (set(), {"aaaaaaaaaaaa"})


def test_a_killed_probe_is_cleared_away_and_a_living_one_is_not(tmp_path):
    machine, place = PlayedLeftovers(), probe_directory(tmp_path, "aaaaaaaaaaaa")
    AttemptLayout(place).disk.mkdir(parents=True)
    machine.there = {"aaaaaaaaaaaa", "bbbbbbbbbbbb"}
    probes = ProbeCleanup(tmp_path, [machine], remove_trees)
    with probe_lock(tmp_path), probe_lock(tmp_path):
        asyncio.run(probes.sweep())
        assert place.exists()
    asyncio.run(probes.sweep())
    assert (place.exists(), machine.there) == (False, {"bbbbbbbbbbbb"})
    asyncio.run(ProbeCleanup(tmp_path / "none", [machine], remove_trees).sweep())


def test_a_killed_probe_that_does_not_go_keeps_no_other(tmp_path):
    machine, probe_ids = PlayedLeftovers(), [letter * 12 for letter in "abc"]
    for probe_id in probe_ids:
        AttemptLayout(probe_directory(tmp_path, probe_id)).disk.mkdir(parents=True)
    machine.there, machine.stuck = set(probe_ids), {probe_ids[0], probe_ids[1]}
    probes = ProbeCleanup(tmp_path, [machine], remove_trees)
    with pytest.raises(OSError, match=r"a{12}: It does not end") as caught:
        asyncio.run(probes.sweep())
    assert f"{probe_ids[1]}: It does not end" in str(caught.value)
    assert machine.there == machine.stuck
    assert [probe_directory(tmp_path, probe_id).exists() for probe_id in probe_ids] == [True, True, False]
    machine.stuck = set()
    asyncio.run(probes.sweep())
    assert machine.there == set()


def test_a_duty_that_fails_or_hangs_keeps_no_other_from_its_turn(monkeypatch, caplog):
    monkeypatch.setattr("sandbox.server.maintenance.janitor.PERIODIC_JOB_SECONDS", 0.05)
    done = []

    async def fails():
        raise OSError("no such luck")

    async def hangs():
        await asyncio.Event().wait()

    async def works():
        done.append("works")

    janitor = Janitor(
        [PeriodicJob("a", fails, "Mend a."), PeriodicJob("b", hangs, "Mend b."), PeriodicJob("c", works, "Mend c.")]
    )
    with caplog.at_level(logging.ERROR):
        asyncio.run(janitor.run_once())
    assert done == ["works"]
    assert [record.getMessage() for record in caplog.records] == [
        "The janitor could not look after a: no such luck; tried again in 5 minutes. Mend a.",
        "The janitor could not look after b: TimeoutError; tried again in 5 minutes. Mend b.",
    ]


def test_a_leftover_of_nobody_that_does_not_go_keeps_no_other(world):
    private = PlayedLeftovers(is_exclusive=True)
    private.there, private.stuck = {f"nobody{number}" for number in range(20)}, {"nobody7"}

    async def play():
        async with world.server() as service:
            with pytest.raises(GarbageCollectionError, match="nobody7: It does not end"):
                await clearing(world, service, private).sweep()

    asyncio.run(play())
    assert private.there == {"nobody7"}
