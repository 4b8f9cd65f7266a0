"""What a server hands to runners and finishers, and what it tells those who come back to a story."""

import asyncio
import itertools
import os
import threading
import time
from pathlib import Path

import pytest

from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from doubles.server_components import TO_END, TO_RUNNING, Rooms
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.journal import read_records
from sandbox.interfaces.store import IndexedTask
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import (
    AgentExited,
    Artifact,
    ArtifactCollected,
    AttemptEnded,
    AttemptFailed,
    CancelRequested,
    ErrorReported,
    Output,
    TaskFinished,
)
from sandbox.model.limits import FINISHERS_MAX
from sandbox.model.task_state import TaskState

LOST = AttemptFailed(Failure(FailureCode.RUNNER_LOST, "gone"))
UPSTREAM = ModelUpstream("https://model.example", api_key="sk-secret")


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.LOSS_CHECK_SECONDS", 0.1)
    made = Rooms(tmp_path, MemoryStore(), upstream=UPSTREAM)
    yield made
    for task_id in list(made.runners.recorders):
        made.runners.die(task_id)


async def collect(frames):
    return [frame async for frame in frames]


def test_a_finisher_is_not_given_the_models_key(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING)
            world.runners.die("task-1")
            await world.launched("task-1", 2)

    asyncio.run(play())
    assert [(order.finish, order.upstream) for order in world.runners.orders] == [(False, UPSTREAM), (True, None)]


def test_a_task_whose_runner_never_came_to_life_is_started_by_the_next_server(world):
    """The server dies between the intent and the runner's first breath: nothing was made, so nothing is lost."""

    async def before():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")

    async def after():
        async with world.server() as service:
            await world.launched("task-1", 2)
            world.runners.play("task-1", LOST, AttemptEnded())
            world.runners.die("task-1")
            await world.launched("task-1", 3)
            world.runners.play("task-1", *TO_RUNNING, *TO_END)
            return await service.wait("task-1", 10)

    asyncio.run(before())
    world.runners.die("task-1")
    task = asyncio.run(after())
    assert (task.state, task.attempts) == (TaskState.COMPLETED, 2)
    first, finisher, second = world.runners.orders
    assert [order.finish for order in (first, finisher, second)] == [False, True, False]
    assert finisher.attempt_id == first.attempt_id
    assert task.attempt.id == second.attempt_id != first.attempt_id
    assert second.upstream == UPSTREAM


def test_a_task_whose_runners_all_die_at_once_fails_after_a_few(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            for count in range(1, 2 + FINISHERS_MAX):
                await world.launched("task-1", count)
                if world.runners.orders[-1].finish:
                    world.runners.play("task-1", LOST, AttemptEnded())
                world.runners.die("task-1")
            await world.launched("task-1", 6)
            world.runners.play("task-1", LOST, TaskFinished())
            return await service.wait("task-1", 10)

    task = asyncio.run(play())
    assert (task.state, task.attempts) == (TaskState.FAILED, 3)
    assert [order.finish for order in world.runners.orders] == [False, True] * 3


@pytest.mark.parametrize(("trouble", "code"), [("image", "provision_failed"), ("launch", "internal_error")])
def test_a_task_that_cannot_be_attempted_again_is_ended_by_who_removes_what_is_left(world, trouble, code):
    """The twin is the first attempt, of which nothing can be left: the server ends it itself."""

    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", LOST, AttemptEnded())
            if trouble == "image":
                world.image_trouble = "The image is gone."
            else:
                world.runners.refuses = True
            world.runners.die("task-1")
            async with asyncio.timeout(10):
                while trouble == "launch" and not world.runners.refusals:
                    await asyncio.sleep(0.01)
            world.runners.refuses = False
            await world.launched("task-1", 2)
            world.runners.play("task-1", TaskFinished())
            return await service.wait("task-1", 10)

    task = asyncio.run(play())
    assert (task.state, task.failure.code) == (TaskState.FAILED, code)
    assert [order.finish for order in world.runners.orders] == [False, True]
    assert world.runners.orders[1].attempt_id == task.attempt.id


def test_a_task_that_was_cancelled_before_its_runner_died_is_not_attempted_again(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", CancelRequested("enough"))
            world.runners.die("task-1")
            await world.launched("task-1", 2)

    asyncio.run(play())
    assert [order.finish for order in world.runners.orders] == [False, True]


def test_a_wish_that_a_dead_runner_cannot_take_is_written_before_a_finisher_begins(world, monkeypatch):
    # Its death is found by the wish and not before.
    monkeypatch.setattr("sandbox.server.journal_tailer.LOSS_CHECK_SECONDS", 60.0)
    launch, wishes = world.runners.launch, []

    async def watched(order, lock_fd):
        await launch(order, lock_fd)
        wishes.append(world.runners.recorders["task-1"].task.cancel)

    monkeypatch.setattr(world.runners, "launch", watched)

    async def play():
        async with world.server() as service:
            await world.running(service)
            world.runners.die("task-1")
            await service.cancel("task-1", reason="enough", force=False)
            monkeypatch.setattr("sandbox.server.journal_tailer.LOSS_CHECK_SECONDS", 0.05)
            await world.launched("task-1", 2)

    asyncio.run(play())
    assert wishes == [None, CancelRequested("enough")]


def test_after_a_finisher_that_died_the_next_one_waits_longer_each_time(world, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.4)
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_FACTOR", 3)
    launched_at = []

    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING)
            for count in range(1, 2 + FINISHERS_MAX):
                await world.launched("task-1", count)
                launched_at.append(time.monotonic())
                world.runners.die("task-1")
                while count == 3 and "tried after a pause" not in (await service.status("task-1")).state_message:
                    await asyncio.sleep(0.01)
            await service.wait("task-1", 20)
            launched_at.append(time.monotonic())

    asyncio.run(play())
    _, *pauses, end = (later - earlier for earlier, later in itertools.pairwise(launched_at))
    assert [pause > least for pause, least in zip(pauses, (0.4, 1.2, 3.6), strict=True)] == [True] * 3
    assert end < 3.6


def test_a_task_that_is_to_stop_at_once_waits_for_no_pause(world, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 300.0)

    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING)
            await world.lose("task-1", 2)
            await service.cancel("task-1", reason="", force=True)
            await world.launched("task-1", 3)

    asyncio.run(play())
    assert [order.finish for order in world.runners.orders] == [False, True, True]


def test_a_working_agents_task_ends_though_every_finisher_dies(world, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)

    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING)
            await world.lose("task-1", 1 + FINISHERS_MAX)
            return await service.wait("task-1", 20)

    task = asyncio.run(play())
    assert (task.state, task.failure.code) == (TaskState.FAILED, "runner_lost")
    kinds = [type(record.event) for record in read_records(world.journals, "task-1")]
    assert kinds[-2:] == [AgentExited, TaskFinished]


async def when_nobody_can_clean_up(world, *events):
    """How a task ends whose runner died after these events, and all of its finishers too."""
    async with world.server() as service:
        await service.submit(manifest())
        await world.launched("task-1")
        world.runners.play("task-1", *TO_RUNNING, *events)
        await world.lose("task-1", 1 + FINISHERS_MAX)
        return await service.wait("task-1", 20)


def test_a_success_that_was_kept_stays_one_though_nobody_can_clean_up(world, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)
    metadata = Artifact("metadata.json", ".sandbox/metadata.json", 2, "application/json", "sha256:0")

    task = asyncio.run(when_nobody_can_clean_up(world, TO_END[0], ArtifactCollected(metadata)))
    assert (task.state, task.failure) == (TaskState.COMPLETED, None)
    *_, trouble, finished = [record.event for record in read_records(world.journals, "task-1")]
    assert isinstance(trouble, ErrorReported)
    assert (trouble.error, finished) == ("teardown_failed", TaskFinished())


def test_a_success_of_which_not_everything_was_kept_says_what_is_missing(world, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)
    patch = Artifact("task-1.patch", ".sandbox/task-1.patch", 2, "text/x-diff", "sha256:0")

    task = asyncio.run(when_nobody_can_clean_up(world, TO_END[0], ArtifactCollected(patch)))
    assert (task.state, task.failure.code) == (TaskState.FAILED, "collect_failed")
    assert "The agent had ended" in task.failure.message


def test_an_agents_own_failure_stays_the_tasks_though_nobody_can_clean_up(world, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)

    failed = AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "It gave up."))
    assert asyncio.run(when_nobody_can_clean_up(world, failed)).failure == failed.failure


def test_who_comes_back_is_told_what_it_has_not_seen_and_nothing_twice(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            lines = [Output.from_bytes("stdout", b"%d\n" % number) for number in range(5)]
            world.runners.play("task-1", *TO_RUNNING, *lines, *TO_END)
            await service.wait("task-1", 10)
            whole = await collect(service.replay("task-1"))
            for known in (0, 1, 6, 8, whole[-2]["seq"]):
                rest = [frame for frame in whole if frame["seq"] > known]
                assert await collect(service.replay("task-1", after=known)) == rest
                assert await collect(service.follow("task-1", after=known)) == rest
            return whole

    assert [frame["seq"] for frame in asyncio.run(play())] == list(range(1, 14))


def test_who_follows_all_tasks_hears_of_a_new_one_from_its_first_record(world):
    async def play():
        async with world.server() as service:
            frames = service.follow_all()
            first = asyncio.ensure_future(anext(frames))
            await asyncio.sleep(0)
            await service.submit(manifest())
            told = await asyncio.wait_for(first, 10)
            await frames.aclose()
            return told

    told = asyncio.run(play())
    assert (told["task_id"], told["seq"], told["new_state"]) == ("task-1", 1, "pending")


def test_a_record_that_its_runner_takes_back_and_writes_again_is_told_once(world, monkeypatch):
    """Its flush fails when it was read and told already."""
    fdatasync, heard, refused = os.fdatasync, threading.Event(), []

    def fail_once_it_is_told(descriptor):
        if not refused and b"agent_started" in Path(f"/proc/self/fd/{descriptor}").read_bytes():
            refused.append(heard.wait(10))
            raise OSError(5, "Input/output error")
        fdatasync(descriptor)

    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            one, every = [], []

            async def hear(frames, told):
                async for frame in frames:
                    told.append((frame["seq"], frame["type"]))
                    if all(told and told[-1][0] == 5 for told in (one, every)):
                        heard.set()
                    if frame["type"] == "end":
                        return

            hearing = [
                asyncio.create_task(hear(service.follow("task-1", after=0), one)),
                asyncio.create_task(hear(service.follow_all(), every)),
            ]
            await asyncio.sleep(0)
            world.runners.play("task-1", *TO_RUNNING[:2])
            monkeypatch.setattr("sandbox.journal.writer.os.fdatasync", fail_once_it_is_told)
            with pytest.raises(OSError, match="Input/output"):
                await asyncio.to_thread(world.runners.play, "task-1", TO_RUNNING[2])
            await world.until(service, "task-1", TaskState.READY)
            world.runners.play("task-1", TO_RUNNING[2], *TO_END)
            await asyncio.wait_for(asyncio.gather(*hearing), 10)
            return one, every

    for told in asyncio.run(play()):
        seqs = [seq for seq, _ in told]
        assert seqs == sorted(set(seqs))
    assert refused == [True]


def test_an_index_whose_task_and_place_disagree_is_read_anew(world):
    """As after a power loss: the place fits a record of the journal that is, the task a journal that was."""

    async def before():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING[:2])
            await world.until(service, "task-1", TaskState.READY)

    async def after():
        async with world.server() as service:
            world.runners.play("task-1", TO_RUNNING[2])
            await world.until(service, "task-1", TaskState.RUNNING)
            return [frame["seq"] for frame in await collect(service.replay("task-1"))]

    asyncio.run(before())
    first_two = b"".join((world.data_dir / "tasks/task-1/journal/records").read_bytes().splitlines(keepends=True)[:2])
    world.store.save(IndexedTask(world.store.load("task-1").task, len(first_two)))
    assert asyncio.run(after()) == [1, 2, 3, 4, 5]
