"""A wish to cancel is answered in time and with the truth, whoever holds the task at that moment."""

import asyncio
import time

import pytest

from doubles.manifests import manifest
from doubles.server_components import TO_END
from sandbox.interfaces.journal import Recorder
from sandbox.interfaces.tasks import UnavailableError
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import AgentExited, TaskFinished, TaskSubmitted
from sandbox.model.task_state import TaskState

LOST = (AgentExited(None, None, Failure(FailureCode.RUNNER_LOST, "lost")), TaskFinished())


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
    monkeypatch.setattr("sandbox.server.journal_tailer.LOSS_CHECK_SECONDS", 60.0)

    async def play():
        async with world.server() as service:
            await world.running(service)
            world.runners.play("task-1", *events)
            world.runners.die("task-1")
            cancelled = await service.cancel("task-1", reason="", force=False)
            monkeypatch.setattr("sandbox.server.journal_tailer.LOSS_CHECK_SECONDS", 0.05)
            await world.launched("task-1", 2)
            world.runners.play("task-1", *rest)
            return cancelled.message, (await service.wait("task-1", 10)).state

    assert asyncio.run(play()) == (message, state)


def test_a_wish_for_a_task_whose_journal_was_busy_at_the_start_says_that_it_had_not_begun(world, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.LOSS_CHECK_SECONDS", 60.0)

    busy = Recorder(world.journals.create("task-1"), None, world.clock.now)
    busy.record(TaskSubmitted("task-1", manifest()))

    async def play():
        async with world.server() as service:
            busy.writer.close()
            cancelled = await service.cancel("task-1", reason="", force=False)
            monkeypatch.setattr("sandbox.server.journal_tailer.LOSS_CHECK_SECONDS", 0.05)
            return cancelled.message, (await service.wait("task-1", 10)).state

    assert asyncio.run(play()) == ("The task had not begun and is cancelled.", TaskState.CANCELLED)


class SlowStart:
    """Starting a runner takes until `may_end` is set."""

    def __init__(self, runners, monkeypatch):
        self.has_begun, self.may_end = asyncio.Event(), asyncio.Event()
        launch = runners.launch

        async def launch_slowly(order, lock_fd):
            self.has_begun.set()
            await self.may_end.wait()
            await launch(order, lock_fd)

        monkeypatch.setattr(runners, "launch", launch_slowly)


def test_a_wish_while_the_runner_is_being_started_is_answered_in_time_and_blames_no_runner(world, monkeypatch):
    monkeypatch.setattr("sandbox.server.cancellation.CANCEL_SECONDS", 0.3)

    async def play():
        start = SlowStart(world.runners, monkeypatch)
        async with world.server() as service:
            await service.submit(manifest())
            await start.has_begun.wait()
            try:
                with pytest.raises(UnavailableError) as caught:
                    await asyncio.wait_for(service.cancel("task-1", reason="", force=False), 5)
            finally:
                start.may_end.set()
            await world.launched("task-1")
            cancelled = await service.cancel("task-1", reason="", force=False)
            return caught.value.message, cancelled.message

    refused, cancelled = asyncio.run(play())
    assert refused == "Task task-1 is just being handed over to a runner and cannot be cancelled meanwhile; try again."
    assert cancelled == "The task is being stopped; what it made until now is kept."


def test_a_wish_is_tried_once_more_when_the_start_ends_at_the_last_moment(world, monkeypatch):
    """The time is over when the lock comes free."""
    monkeypatch.setattr("sandbox.server.cancellation.CANCEL_SECONDS", 30)

    async def play():
        start = SlowStart(world.runners, monkeypatch)
        async with world.server() as service:
            await service.submit(manifest())
            await start.has_begun.wait()
            cancelling = asyncio.create_task(service.cancel("task-1", reason="", force=False))
            await asyncio.sleep(0.05)
            began = world.clock.monotonic()
            monkeypatch.setattr(world.clock, "monotonic", lambda: time.monotonic() + 31)
            assert world.clock.monotonic() - began > 30
            start.may_end.set()
            return (await asyncio.wait_for(cancelling, 10)).message

    assert asyncio.run(play()) == "The task is being stopped; what it made until now is kept."
