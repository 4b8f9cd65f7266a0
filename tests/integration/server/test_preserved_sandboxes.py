"""What a failed task left for its user is there until it is released or its time is over."""

import asyncio
import errno
import traceback
from datetime import timedelta

import pytest

from doubles.manifests import manifest
from doubles.server_components import TO_END, TO_RUNNING, Rooms
from sandbox.disks.removal import remove_trees
from sandbox.interfaces.layout import TaskLayout
from sandbox.interfaces.placement import RunnerUnreachableError, TerminalOrder
from sandbox.interfaces.tasks import SandboxNotPreservedError, TaskNotFoundError, UnavailableError
from sandbox.interfaces.terminals import TerminalRefusedError
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import AgentExited, AttemptEnded, TaskFinished
from sandbox.model.task_state import TaskState
from sandbox.server.maintenance.garbage_collector import GarbageCollector
from sandbox.server.maintenance.garbage_collector import GarbageCollectorDependencies as ClearingRooms
from sandbox.server.maintenance.pruning import PreservationExpiry
from sandbox.store.sqlite import SqliteStore

FAILED = (AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "It failed.")), TaskFinished())
LOST = AgentExited(None, None, Failure(FailureCode.RUNNER_LOST, "gone"))
DAY = 24 * 3600


@pytest.fixture
def world(tmp_path):
    made = Rooms(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    yield made
    for task_id in list(made.runners.recorders):
        made.runners.die(task_id)


def files(world, order):
    return TaskLayout(world.data_dir, order.task_id).attempt(order.attempt_id)


async def fail(world, service, task_id, failure_action="preserve"):
    """As the runner does: the files of the sandbox stay."""
    await service.submit(manifest(task_id, lifecycle={"failure_action": failure_action}))
    await world.launched(task_id)
    world.runners.play(task_id, *TO_RUNNING, *FAILED)
    await service.wait(task_id, 10)
    kept = files(world, world.runners.orders[-1])
    deep = kept.workspace / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "file").write_text("x")
    (deep / "link").symlink_to("/etc")
    (deep / "closed").mkdir(mode=0o500)
    kept.repository.mkdir()
    kept.handle.write_text("{}")
    kept.runner_log.write_text("log")
    return kept


async def lose_before_the_disk_is_taken_over(world, service):
    """The first attempt hands its disk on; the second and all finishers die before they have it. Gives its files."""
    await service.submit(manifest(lifecycle={"failure_action": "preserve", "resume": True}))
    await world.launched("task-1")
    kept = files(world, world.runners.orders[0])
    kept.workspace.mkdir(parents=True)
    kept.runner_log.write_text("log")
    world.runners.play("task-1", *TO_RUNNING, LOST, AttemptEnded())
    async with asyncio.timeout(30):
        while not (await service.status("task-1")).state.is_terminal:
            if "task-1" in world.runners.recorders:
                world.runners.die("task-1")
            await asyncio.sleep(0.005)
    assert (await service.status("task-1")).attempts == 2
    return kept


def test_the_disk_that_nobody_came_to_take_over_is_kept_where_it_is(world, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.LOSS_CHECK_SECONDS", 0.05)
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)
    visits = []

    async def launch(order, _):
        visits.append((order.visit, order.attempt_id))

    async def open_terminal(attempt_id, _):
        if not visits:
            raise RunnerUnreachableError("not yet")
        return attempt_id

    async def play():
        async with world.server() as service:
            kept = await lose_before_the_disk_is_taken_over(world, service)
            task = await service.status("task-1")
            assert task.state is TaskState.FAILED_PRESERVED
            assert await service.has_preserved_sandbox(task)
            rooms = service.dependencies
            clearing_rooms = ClearingRooms(
                world.data_dir, rooms.journals, rooms.store, rooms.preserved_sandboxes, remove_trees
            )
            await GarbageCollector(clearing_rooms, ()).sweep()
            assert kept.workspace.exists()
            monkeypatch.setattr(world.runners, "launch", launch)
            monkeypatch.setattr(world.runners, "open_terminal", open_terminal)
            assert await service.open_terminal("task-1", TerminalOrder(24, 80)) == kept.root.name
            assert visits == [(True, kept.root.name)]
            await service.release("task-1")
            assert not await service.has_preserved_sandbox(task)
            return kept

    assert [file.name for file in asyncio.run(play()).root.iterdir()] == ["runner.log"]


def test_releasing_removes_everything_but_the_log_once(world):
    async def play():
        async with world.server() as service:
            kept = await fail(world, service, "task-1")
            await service.release("task-1")
            with pytest.raises(SandboxNotPreservedError):
                await service.release("task-1")
            return kept, await service.status("task-1")

    kept, task = asyncio.run(play())
    assert [file.name for file in kept.root.iterdir()] == [kept.runner_log.name]
    assert task.state is TaskState.FAILED_PRESERVED


def test_of_many_who_release_at_once_one_does(world):
    async def play():
        async with world.server() as service:
            await fail(world, service, "task-1")
            return await asyncio.gather(*(service.release("task-1") for _ in range(8)), return_exceptions=True)

    outcomes = asyncio.run(play())
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["NoneType"] + ["SandboxNotPreservedError"] * 7


def test_a_release_that_was_broken_off_can_be_ended(world):
    async def play():
        async with world.server() as service:
            kept = await fail(world, service, "task-1")
            await asyncio.to_thread((kept.workspace / "a" / "b" / "file").unlink)
            kept.disk.rename(kept.root / "half-removed")
            await service.release("task-1")
            return kept

    kept = asyncio.run(play())
    assert [file.name for file in kept.root.iterdir()] == [kept.runner_log.name]


def test_a_release_that_was_broken_off_before_the_image_of_the_disk_was_gone_can_be_ended(world):
    async def play():
        async with world.server() as service:
            kept = await fail(world, service, "task-1")
            kept.handle.unlink()
            kept.disk.rename(kept.disk_image)
            await service.release("task-1")
            return kept

    kept = asyncio.run(play())
    assert [file.name for file in kept.root.iterdir()] == [kept.runner_log.name]


def test_nobody_gets_at_what_is_being_released(world):
    """Else a sandbox would be made of half a disk, or of a new one that nobody would ever remove."""

    async def play():
        async with world.server() as service:
            kept = await fail(world, service, "task-1")
            task, remove, got = await service.status("task-1"), world.remove, []

            async def remove_while_somebody_comes(paths):
                await remove(paths)
                with service.dependencies.preserved_sandboxes.try_lock(task) as lock_fd:
                    got.append(lock_fd)

            world.remove = remove_while_somebody_comes
            await service.release("task-1")
            return got, [file.name for file in kept.root.iterdir()]

    assert asyncio.run(play()) == ([None], ["runner.log"])


def test_a_release_right_after_a_shell_waits_until_the_shell_is_gone(world):
    """The user has left; what the shell ran in takes a moment more to go."""

    async def play():
        async with world.server() as service:
            kept = await fail(world, service, "task-1")
            with service.dependencies.preserved_sandboxes.try_lock(await service.status("task-1")):
                release = asyncio.create_task(service.release("task-1"))
                done, _ = await asyncio.wait([release], timeout=0.5)
                assert not done
            await asyncio.wait_for(release, 30)
            return [file.name for file in kept.root.iterdir()]

    assert asyncio.run(play()) == ["runner.log"]


def test_a_release_while_somebody_stays_in_the_shell_is_refused_and_removes_nothing(world, monkeypatch):
    monkeypatch.setattr("sandbox.server.preserved_sandboxes.DEBUG_SESSION_END_SECONDS", 0.2)

    async def play():
        async with world.server() as service:
            kept = await fail(world, service, "task-1")
            held = service.dependencies.preserved_sandboxes.try_lock(await service.status("task-1"))
            with held, pytest.raises(UnavailableError, match="Somebody has a shell"):
                await service.release("task-1")
            return kept.handle.exists()

    assert asyncio.run(play())


def test_who_comes_too_late_for_a_release_leaves_nothing_behind(world, monkeypatch):
    async def play():
        async with world.server() as service:
            kept = await fail(world, service, "task-1")
            await service.release("task-1")
            answers = iter([True, False])  # it was there when it was looked at, and not when it was taken
            monkeypatch.setattr(service.dependencies.preserved_sandboxes, "is_preserved", lambda _: next(answers))
            task = await service.status("task-1")
            with pytest.raises(SandboxNotPreservedError), service.dependencies.preserved_sandboxes.try_lock(task):
                pass
            return [file.name for file in kept.root.iterdir()]

    assert asyncio.run(play()) == ["runner.log"]


def test_a_shell_in_what_was_released_is_refused_with_the_reason(world):
    async def play():
        async with world.server() as service:
            await fail(world, service, "task-1")
            await service.release("task-1")
            with pytest.raises(TerminalRefusedError, match="it was released, or its time is over"):
                await service.open_terminal("task-1", TerminalOrder(24, 80))

    asyncio.run(play())


def test_a_shell_in_what_is_released_while_it_is_opened_is_refused_with_the_reason(world, monkeypatch):
    async def play():
        async with world.server() as service:
            await fail(world, service, "task-1")

            async def release_first(*_):
                await service.release("task-1")
                raise RunnerUnreachableError("nobody is there yet")

            monkeypatch.setattr(world.runners, "open_terminal", release_first)
            with pytest.raises(TerminalRefusedError, match="it was released, or its time is over"):
                await service.open_terminal("task-1", TerminalOrder(24, 80))

    asyncio.run(play())


def no_shell(world, hinder, match):
    async def play():
        async with world.server() as service:
            hinder(service, await fail(world, service, "task-1"))
            with pytest.raises(UnavailableError, match=match):
                await service.open_terminal("task-1", TerminalOrder(24, 80))

    asyncio.run(play())


def test_a_shell_on_a_disk_that_refuses_is_told_so_and_may_be_opened_later(world):
    def hinder(_, kept):
        kept.debug_session_lock.symlink_to("/nowhere")

    no_shell(world, hinder, r"No shell of task task-1 can be opened: .*; try again\.")


def test_a_preserved_task_that_cannot_be_looked_at_refuses_a_shell_until_it_can(world, monkeypatch):
    def refuse(_):
        raise OSError(errno.EIO, "Input/output error")

    def hinder(service, _):
        monkeypatch.setattr(service.dependencies.preserved_sandboxes, "is_preserved", refuse)

    no_shell(world, hinder, "Input/output error; try again")


def test_the_agent_of_what_is_kept_has_ended(world):
    async def play():
        async with world.server() as service:
            await fail(world, service, "task-1")
            with pytest.raises(TerminalRefusedError, match="has ended; open a shell in what it left"):
                await service.open_terminal("task-1", TerminalOrder(24, 80, agent=True))

    asyncio.run(play())


def test_a_shell_for_which_there_is_no_image_any_more_is_refused_with_what_to_do(world):
    async def play():
        async with world.server() as service:
            await fail(world, service, "task-1")
            world.image_trouble = "The image of the profile tools is gone; build it again."
            with pytest.raises(TerminalRefusedError, match="can be opened: The image of the profile tools is gone"):
                await service.open_terminal("task-1", TerminalOrder(24, 80))

    asyncio.run(play())


def test_a_shell_whose_secrets_break_where_they_come_from_is_refused_and_tells_none_of_them(world, monkeypatch):
    async def break_(_):
        raise ValueError("s3cret-value")

    async def play():
        async with world.server() as service:
            await fail(world, service, "task-1")
            monkeypatch.setattr(service.dependencies.debug_sessions, "_secret_resolver", break_)
            with pytest.raises(UnavailableError, match=r"could not be resolved \(ValueError\)") as refused:
                await service.open_terminal("task-1", TerminalOrder(24, 80))
            return refused.value

    assert "s3cret-value" not in "".join(traceback.format_exception(asyncio.run(play())))


def test_only_what_is_preserved_can_be_released(world):
    async def play():
        async with world.server() as service:
            kept = await fail(world, service, "destroyed", failure_action="destroy")
            await service.submit(manifest("running", lifecycle={"failure_action": "preserve"}))
            await world.launched("running")
            world.runners.play("running", *TO_RUNNING)
            await world.until(service, "running", TaskState.RUNNING)
            for task_id in ("destroyed", "running"):
                with pytest.raises(SandboxNotPreservedError):
                    await service.release(task_id)
            with pytest.raises(TaskNotFoundError):
                await service.release("nobody")
            world.runners.play("running", *TO_END)
            return kept

    assert asyncio.run(play()).disk.exists()


def test_what_was_kept_for_its_time_goes_and_what_is_younger_stays(world):
    async def play():
        async with world.server() as service:
            rooms = service.dependencies
            expiry = PreservationExpiry(rooms.store, rooms.preserved_sandboxes, rooms.clock, DAY)
            world.clock.set_back = timedelta(hours=25)
            old = await fail(world, service, "old")
            world.clock.set_back = timedelta(hours=23)
            young = await fail(world, service, "young")
            world.clock.set_back = timedelta()
            await expiry.sweep()
            first = (old.disk.exists(), young.disk.exists())
            world.clock.set_back = -timedelta(hours=2)
            await expiry.sweep()
            return first, (old.disk.exists(), young.disk.exists())

    assert asyncio.run(play()) == ((False, True), (False, False))


def test_a_hundred_and_fifty_that_are_over_all_go(world, monkeypatch):
    async def play():
        async with world.server() as service:
            rooms = service.dependencies
            world.clock.set_back = timedelta(hours=25)
            kept = [await fail(world, service, f"task-{number}") for number in range(150)]
            world.clock.set_back = timedelta()
            expiry = PreservationExpiry(rooms.store, rooms.preserved_sandboxes, rooms.clock, DAY)
            await expiry.sweep()
            left = [each for each in kept if each.disk.exists()]
            queries = []
            query = rooms.store.query
            monkeypatch.setattr(rooms.store, "query", lambda asked: queries.append(asked) or query(asked))
            await expiry.sweep()
            return left, [asked.cursor is None for asked in queries]

    assert asyncio.run(play()) == ([], [False])


def test_one_that_cannot_be_looked_at_is_tried_again_and_keeps_no_other(world, monkeypatch):
    async def play():
        async with world.server() as service:
            rooms = service.dependencies
            world.clock.set_back = timedelta(hours=25)
            kept = [await fail(world, service, name) for name in ("a", "b")]
            world.clock.set_back = timedelta()
            expiry = PreservationExpiry(rooms.store, rooms.preserved_sandboxes, rooms.clock, DAY)
            is_kept = rooms.preserved_sandboxes.is_preserved

            def refuse(task):
                if task.id == "a":
                    raise OSError(errno.EIO, "Input/output error")
                return is_kept(task)

            with monkeypatch.context() as patched:
                patched.setattr(rooms.preserved_sandboxes, "is_preserved", refuse)
                assert await service.has_preserved_sandbox(await service.status("a"))
                with pytest.raises(UnavailableError, match="release it again"):
                    await service.release("a")
                await expiry.sweep()
                first = [each.disk.exists() for each in kept]
            await expiry.sweep()
            return first, [each.disk.exists() for each in kept]

    assert asyncio.run(play()) == ([True, False], [False, False])


def test_one_that_cannot_be_removed_is_tried_again_and_keeps_no_other(world):
    async def play():
        async with world.server() as service:
            rooms = service.dependencies
            world.clock.set_back = timedelta(hours=25)
            kept = [await fail(world, service, name) for name in ("a", "b")]
            world.clock.set_back = timedelta()
            expiry = PreservationExpiry(rooms.store, rooms.preserved_sandboxes, rooms.clock, DAY)
            remove = world.remove

            async def refuse(paths):
                if kept[0].disk in paths:
                    raise OSError("busy")
                await remove(paths)

            world.remove = refuse
            await expiry.sweep()
            first = [each.disk.exists() for each in kept]
            world.remove = remove
            await expiry.sweep()
            return first, [each.disk.exists() for each in kept]

    assert asyncio.run(play()) == ([True, False], [False, False])
