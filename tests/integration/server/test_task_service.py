"""The server's view of tasks: taken, let in, handed to runners, followed, cancelled, found again after a restart."""

import asyncio
import contextlib
import threading

import pytest

from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from doubles.server_components import GIB, TO_END, TO_RUNNING
from sandbox.interfaces.journal import replay_task
from sandbox.interfaces.store import DuplicateTaskError, TaskQuery
from sandbox.interfaces.tasks import InsufficientResourcesError, TaskNotFoundError, TaskTerminalError, UnavailableError
from sandbox.journal.journals import FileJournals
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import AgentExited, AttemptFailed, Output, TaskFinished
from sandbox.model.limits import FINISHERS_MAX
from sandbox.model.task_state import TaskState
from sandbox.server.scheduler import Resources


async def collect(frames):
    return [frame async for frame in frames]


async def until_the_end(frames):
    """What is heard of all tasks until one has ended."""
    heard = []
    async with contextlib.aclosing(frames):
        while not heard or heard[-1]["type"] != "end":
            heard.append(await anext(frames))
    return heard


def test_a_check_tells_what_a_submission_would_and_leaves_nothing(world):
    world.capacity = Resources(8, 16 * GIB, 100 * GIB)

    async def play():
        async with world.server() as service:
            await service.check_admission(manifest())
            with pytest.raises(InsufficientResourcesError):
                await service.check_admission(manifest(vm={"cpus": 9}))
            assert (await service.query(TaskQuery())).total_count == 0
            assert not world.runners.orders
            await service.submit(manifest())
            with pytest.raises(DuplicateTaskError):
                await service.check_admission(manifest())
            await service.check_admission(manifest("task-2"))
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING, *TO_END)
            await service.wait("task-1", 10)

    asyncio.run(play())


def test_a_task_is_taken_launched_followed_and_finished(world):
    async def play():
        async with world.server() as service:
            submitted = await service.submit(manifest())
            assert not submitted.is_replayed
            assert submitted.task.state is TaskState.PENDING
            await world.launched("task-1")
            story = asyncio.create_task(collect(service.follow("task-1", after=0)))
            world.runners.play("task-1", *TO_RUNNING, Output.from_bytes("stdout", b"hello\n"), *TO_END)
            done = await service.wait("task-1", 10)
            assert done.state is TaskState.COMPLETED
            return await story

    frames = asyncio.run(play())
    states = [frame["new_state"] for frame in frames if frame["type"] == "state_change"]
    assert states == ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
    assert frames[-1]["type"] == "end"
    assert frames[-1]["state"] == "completed"
    assert [frame["seq"] for frame in frames] == sorted({frame["seq"] for frame in frames})
    assert [frame["data"] for frame in frames if frame["type"] == "output"] == ["hello\n"]


def test_the_task_is_on_disk_before_the_answer(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            return FileJournals(world.data_dir).task_ids(), world.store.load("task-1")

    ids, indexed = asyncio.run(play())
    assert list(ids) == ["task-1"]
    assert indexed.task.id == "task-1"


def test_a_task_without_an_id_gets_one(world):
    async def play():
        async with world.server() as service:
            return [(await service.submit(manifest(""))).task.id for _ in range(2)]

    first, second = asyncio.run(play())
    assert first != second
    assert len(first) == 36


def test_an_id_is_taken_once(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            with pytest.raises(DuplicateTaskError) as caught:
                await service.submit(manifest())
            together = await asyncio.gather(
                *(service.submit(manifest("task-2")) for _ in range(8)), return_exceptions=True
            )
            return caught.value.existing.id, [type(each).__name__ for each in together]

    existing, kinds = asyncio.run(play())
    assert existing == "task-1"
    assert kinds.count("Submission") == 1


def test_what_never_fits_is_refused_and_what_does_not_fit_now_waits(world):
    world.capacity = Resources(8, 100 * GIB, 100 * GIB)

    async def play():
        async with world.server() as service:
            with pytest.raises(InsufficientResourcesError, match=r"asks for 9 CPUs \(8 in all\): more than"):
                await service.submit(manifest("huge", vm={"cpus": 9}))
            await service.submit(manifest("first", vm={"cpus": 8}))
            await service.submit(manifest("second", vm={"cpus": 1}))
            await world.launched("first")
            waiting = await service.status("second")
            assert (waiting.state, waiting.state_message) == (TaskState.PENDING, "Waiting for 1 CPUs (0 free)")
            world.runners.play("first", *TO_RUNNING, *TO_END)
            await world.launched("second")

    asyncio.run(play())


def test_a_waiting_task_is_cancelled_without_a_runner(world):
    world.capacity = Resources(4, 100 * GIB, 100 * GIB)

    async def play():
        async with world.server() as service:
            await service.submit(manifest("first"))
            await service.submit(manifest("second"))
            cancelled = await service.cancel("second", reason="not needed", force=False)
            assert cancelled.task.state is TaskState.PENDING
            assert (await service.wait("second", 10)).state is TaskState.CANCELLED
            with pytest.raises(TaskTerminalError):
                await service.cancel("second", reason="", force=False)
            world.runners.play("first", *TO_RUNNING, *TO_END)
            await service.wait("first", 10)
        return [order.task_id for order in world.runners.orders]

    assert asyncio.run(play()) == ["first"]


def test_cancel_reaches_the_runner_and_is_durable_before_the_answer(world):
    async def play():
        async with world.server() as service:
            await world.running(service)
            await service.cancel("task-1", reason="why not", force=False)
            assert replay_task(world.journals, "task-1").task.cancel.reason == "why not"
            world.runners.play("task-1", AgentExited(143, None, Failure(FailureCode.AGENT_FAILED, "x")), TaskFinished())
            return (await service.wait("task-1", 10)).state

    assert asyncio.run(play()) is TaskState.CANCELLED


def test_a_server_that_comes_back_goes_on_with_everything(world):
    world.capacity = Resources(8, 100 * GIB, 100 * GIB)

    async def before():
        async with world.server() as service:
            for name in ("running", "cancelled-late", "waiting"):
                await service.submit(manifest(name, vm={"cpus": 4}))
            await world.launched("running")
            world.runners.play("running", *TO_RUNNING, Output.from_bytes("stdout", b"1\n"))
            await world.until(service, "running", TaskState.RUNNING)

    async def after():
        async with world.server() as service:
            world.runners.play("running", Output.from_bytes("stdout", b"2\n"), *TO_END)
            await service.wait("running", 10)
            await world.launched("waiting")
            return await collect(service.follow("running", after=0))

    asyncio.run(before())
    world.runners.play("cancelled-late", AttemptFailed(Failure(FailureCode.CLONE_FAILED, "no")), TaskFinished())
    frames = asyncio.run(after())
    assert [frame["data"] for frame in frames if frame["type"] == "output"] == ["1\n", "2\n"]
    *together, last = [order.task_id for order in world.runners.orders]
    assert (sorted(together), last) == (["cancelled-late", "running"], "waiting")
    assert world.store.load("cancelled-late").task.state is TaskState.FAILED


def test_a_lost_index_is_made_again_from_the_journals(world):
    async def before():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING, *TO_END)
            await service.wait("task-1", 10)

    async def after():
        async with world.server() as service:
            return (await service.status("task-1")).state, (await service.query(TaskQuery())).total_count

    asyncio.run(before())
    world.store = MemoryStore()
    assert asyncio.run(after()) == (TaskState.COMPLETED, 1)


def test_the_death_of_a_runner_is_found_and_a_finisher_started(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING)
            world.runners.die("task-1")
            await world.launched("task-1", 2)
            assert [order.finish for order in world.runners.orders] == [False, True]
            assert len({order.attempt_id for order in world.runners.orders}) == 1
            lost = Failure(FailureCode.RUNNER_LOST, "lost")
            world.runners.play("task-1", AgentExited(None, None, lost), TaskFinished())
            return await service.wait("task-1", 10)

    assert asyncio.run(play()).failure.code == "runner_lost"


def test_when_finishers_die_too_the_task_still_ends(world, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)

    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING[:1])
            await world.lose("task-1", 1 + FINISHERS_MAX)
            return await service.wait("task-1", 20)

    assert asyncio.run(play()).failure.code == "runner_lost"


def test_cancel_of_a_task_whose_runner_is_dead_is_kept(world):
    async def play():
        async with world.server() as service:
            await world.running(service)
            world.runners.die("task-1")
            await service.cancel("task-1", reason="", force=False)
            await world.launched("task-1", 2)
            lost = Failure(FailureCode.RUNNER_LOST, "lost")
            world.runners.play("task-1", AgentExited(None, None, lost), TaskFinished())
            return (await service.wait("task-1", 10)).state

    assert asyncio.run(play()) is TaskState.CANCELLED


def test_a_runner_that_cannot_be_started_fails_the_task(world):
    world.runners.refuses = True

    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            return await service.wait("task-1", 10)

    failed = asyncio.run(play())
    assert failed.failure.code == "internal_error"
    assert "no more processes" in failed.failure.message


def test_nothing_is_taken_while_nothing_could_run(world):
    world.blockers = ("There is no key for the model.",)

    async def play():
        async with world.server() as service:
            health = await service.health()
            assert not health.is_ready
            with pytest.raises(UnavailableError, match="no key"):
                await service.submit(manifest())

    asyncio.run(play())
    assert not world.journals.task_ids()


def test_an_unknown_task_is_not_found_anywhere(world):
    async def play():
        async with world.server() as service:
            for call in (
                service.status("nope"),
                service.cancel("nope", reason="", force=False),
                service.wait("nope", 1),
                service.artifacts("nope"),
                collect(service.follow("nope")),
                collect(service.replay("nope")),
            ):
                with pytest.raises(TaskNotFoundError):
                    await call

    asyncio.run(play())


def test_who_follows_in_the_instant_of_acceptance_hears_all_of_it(world):
    """Between its place in the index and its follower a task is for a moment known, and followed by nobody."""

    async def play():
        async with world.server() as service:
            register, is_indexed, may_go_on = service.dependencies.submissions, threading.Event(), threading.Event()
            add = register.add

            def add_slowly(*args):
                added = add(*args)
                is_indexed.set()
                assert may_go_on.wait(10)
                return added

            register.add = add_slowly
            submitting = asyncio.create_task(service.submit(manifest()))
            await asyncio.to_thread(is_indexed.wait, 10)
            told = asyncio.create_task(collect(service.follow("task-1", after=0)))
            await asyncio.sleep(0.1)
            may_go_on.set()
            await submitting
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING, *TO_END)
            return await asyncio.wait_for(told, 10)

    told = asyncio.run(play())
    assert told[-1]["type"] == "end"
    assert [one["seq"] for one in told] == sorted({one["seq"] for one in told})


def test_drains_and_their_undoing_may_come_at_once(world):
    async def play():
        async with world.server() as service:
            await asyncio.gather(*(service.drain() for _ in range(50)), *(service.undo_drain() for _ in range(50)))
            assert (await service.undo_drain()).since is None
            assert (await service.drain()).since is not None

    asyncio.run(play())


def test_who_follows_from_now_gets_the_present_state_first(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING, Output.from_bytes("stdout", b"old\n"))
            async with asyncio.timeout(10):
                while (await service.status("task-1")).last_seq < 6:
                    await asyncio.sleep(0.005)
            follower = service.follow("task-1")
            first = await anext(follower)
            world.runners.play("task-1", Output.from_bytes("stdout", b"new\n"), *TO_END)
            return first, await collect(follower)

    first, rest = asyncio.run(play())
    assert (first["previous_state"], first["new_state"]) == (None, "running")
    assert [frame["data"] for frame in rest if frame["type"] == "output"] == ["new\n"]
    assert rest[-1]["type"] == "end"


def test_who_follows_all_tasks_hears_of_each(world):
    async def play():
        async with world.server() as service:
            heard = []
            frames = service.follow_all()
            listening = asyncio.create_task(anext(frames))
            await asyncio.sleep(0)
            for name in ("a", "b"):
                await service.submit(manifest(name))
            heard.append(await listening)
            for name in ("a", "b"):
                await world.launched(name)
                world.runners.play(name, *TO_RUNNING, *TO_END)
            async with asyncio.timeout(10):
                while sum(frame["type"] == "end" for frame in heard) < 2:
                    heard.append(await anext(frames))
            await frames.aclose()
            return heard

    heard = asyncio.run(play())
    assert {frame["task_id"] for frame in heard} == {"a", "b"}


def test_an_index_that_is_ahead_of_its_journal_is_read_anew(world):
    """As after a power loss: the journal lost its last records, the index did not."""

    async def before():
        async with world.server() as service:
            await world.running(service)

    async def after():
        async with world.server() as service:
            await world.launched("task-1", 2)
            return (await service.status("task-1")).state

    asyncio.run(before())
    world.runners.die("task-1")
    records = world.data_dir / "tasks/task-1/journal/records"
    records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:3]))
    assert asyncio.run(after()) is TaskState.PROVISIONING


def test_who_follows_all_tasks_hears_the_end_of_one_whose_journal_lost_its_last_records(world, caplog):
    """What the finisher writes has numbers that the index knew of records that are gone."""
    caplog.set_level("INFO", "sandbox.server.journal_tailer")

    async def before():
        async with world.server() as service:
            await world.running(service)

    async def after():
        async with world.server() as service:
            heard = asyncio.create_task(until_the_end(service.follow_all()))
            await world.launched("task-1", 2)
            caplog.clear()
            world.runners.play("task-1", AttemptFailed(Failure(FailureCode.HOST_LOST, "lost")), TaskFinished())
            return await asyncio.wait_for(heard, 10)

    asyncio.run(before())
    world.runners.die("task-1")
    records = world.data_dir / "tasks/task-1/journal/records"
    records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:3]))
    heard = asyncio.run(after())
    assert [frame["new_state"] for frame in heard if frame["type"] == "state_change"] == ["failed"]
    assert [frame["seq"] for frame in heard] == sorted({frame["seq"] for frame in heard})
    assert "Task task-1 is failed" in caplog.messages


def test_one_damaged_journal_does_not_keep_the_server_from_starting(world):
    world.capacity = Resources(4, 100 * GIB, 100 * GIB)

    async def before():
        async with world.server() as service:
            for name in ("first", "damaged", "last"):
                await service.submit(manifest(name))

    async def after():
        async with world.server() as service:
            return (await service.status("damaged")).state, (await service.query(TaskQuery())).total_count

    asyncio.run(before())
    (world.data_dir / "tasks/damaged/journal/records").write_bytes(b"00000000 {}\n00000000 {}\n")
    assert asyncio.run(after()) == (TaskState.PENDING, 3)
