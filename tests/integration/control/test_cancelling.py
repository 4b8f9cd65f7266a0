"""A wish to cancel is answered in time and with the truth, whoever holds the task at that moment."""

import asyncio

import pytest

from doubles.manifests import manifest
from doubles.server_rooms import TO_END, Rooms
from sandbox.contracts.recorder import Recorder
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.event import AgentExited, TaskFinished, TaskSubmitted
from sandbox.model.state import TaskState
from sandbox.stores.memory import MemoryStore

LOST = (AgentExited(None, None, Failure(FailureCode.RUNNER_LOST, "lost")), TaskFinished())


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.control.follower.LOSS_CHECK_SECONDS", 0.1)
    made = Rooms(tmp_path, MemoryStore())
    yield made
    for task_id in list(made.runners.recorders):
        made.runners.die(task_id)


@pytest.mark.parametrize(
    ("events", "rest", "message", "state"),
    [
        ((), LOST, "The task is being stopped; what it made until now is kept.", TaskState.CANCELLED),
        (
            TO_END[:1],
            TO_END[1:],
            "The agent had ended already; the task keeps its outcome.",
            TaskState.COMPLETED,
        ),
    ],
)
def test_a_wish_without_a_runner_is_answered_by_what_becomes_of_it(world, monkeypatch, events, rest, message, state):
    # The runner's death is found by the wish and not before.
    monkeypatch.setattr("sandbox.control.follower.LOSS_CHECK_SECONDS", 60.0)

    async def play():
        async with world.server() as service:
            await world.running(service)
            world.runners.play("task-1", *events)
            world.runners.die("task-1")
            cancelled = await service.cancel("task-1", reason="", force=False)
            monkeypatch.setattr("sandbox.control.follower.LOSS_CHECK_SECONDS", 0.05)
            await world.launched("task-1", 2)
            world.runners.play("task-1", *rest)
            return cancelled.message, (await service.wait("task-1", 10)).state

    assert asyncio.run(play()) == (message, state)


def test_a_wish_for_a_task_whose_journal_was_busy_at_the_start_says_that_it_had_not_begun(world, monkeypatch):
    monkeypatch.setattr("sandbox.control.follower.LOSS_CHECK_SECONDS", 60.0)

    busy = Recorder(world.journals.create("task-1"), None, world.clock.now)
    busy.record(TaskSubmitted("task-1", manifest()))

    async def play():
        async with world.server() as service:
            busy.writer.close()
            cancelled = await service.cancel("task-1", reason="", force=False)
            monkeypatch.setattr("sandbox.control.follower.LOSS_CHECK_SECONDS", 0.05)
            return cancelled.message, (await service.wait("task-1", 10)).state

    assert asyncio.run(play()) == ("The task had not begun and is cancelled.", TaskState.CANCELLED)
