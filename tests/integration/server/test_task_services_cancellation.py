"""A cancel request gets a timely and correct response in every phase of a task."""

import asyncio
import time

import pytest

from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from sandbox.interfaces.server_services import UnavailableError
from sandbox.journal.writer import JournalRecorder
from sandbox.model.events import AgentExited, TaskFinished, TaskSubmitted
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.task_state import TaskState

LOST = (AgentExited(None, None, Failure(FailureCode.RUNNER_LOST, "lost")), TaskFinished())


@pytest.mark.parametrize(
    ("events", "later_events", "message", "state"),
    [
        ((), LOST, "The task is being stopped; its results so far are stored.", TaskState.CANCELLED),
        (
            TO_COMPLETED[:1],
            TO_COMPLETED[1:],
            "The agent had already ended; the outcome is unchanged.",
            TaskState.COMPLETED,
        ),
    ],
)
async def test_cancel_without_a_runner_reports_the_outcome(
    components, monkeypatch, events, later_events, message, state
):
    # Disable the periodic check, so only the cancel request detects the lost runner.
    monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 60.0)

    async def scenario():
        async with components.server() as service:
            await components.start_running_task(service)
            components.placement.record("task-1", *events)
            components.placement.kill("task-1")
            cancelled = await service.cancel("task-1", reason="", force=False)
            monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 0.05)
            await components.wait_for_launch("task-1", 2)
            components.placement.record("task-1", *later_events)
            return cancelled.message, (await service.wait("task-1", 10)).state

    assert (await scenario()) == (message, state)


async def test_task_with_a_busy_journal_is_cancelled_before_it_starts(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 60.0)

    busy = JournalRecorder(components.journals.create("task-1"), None, components.clock.now)
    busy.record(TaskSubmitted("task-1", manifest()))

    async def scenario():
        async with components.server() as service:
            busy.writer.close()
            cancelled = await service.cancel("task-1", reason="", force=False)
            monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 0.05)
            return cancelled.message, (await service.wait("task-1", 10)).state

    assert (await scenario()) == ("The task was cancelled before it started.", TaskState.CANCELLED)


class SlowStart:
    """The launch of a runner blocks until `release_start` is set."""

    def __init__(self, placement, monkeypatch):
        self.has_started, self.release_start = asyncio.Event(), asyncio.Event()
        launch = placement.launch

        async def launch_slowly(order, writer):
            self.has_started.set()
            await self.release_start.wait()
            return await launch(order, writer)

        monkeypatch.setattr(placement, "launch", launch_slowly)


async def test_cancel_during_launch_times_out_with_a_reason(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.task_services.CANCEL_TIMEOUT_SECONDS", 0.3)

    async def scenario():
        slow_start = SlowStart(components.placement, monkeypatch)
        async with components.server() as service:
            await service.submit(manifest())
            await slow_start.has_started.wait()
            try:
                with pytest.raises(UnavailableError) as raised:
                    await asyncio.wait_for(service.cancel("task-1", reason="", force=False), 5)
            finally:
                slow_start.release_start.set()
            await components.wait_for_launch("task-1")
            cancelled = await service.cancel("task-1", reason="", force=False)
            return raised.value.message, cancelled.message

    error, cancelled = await scenario()
    assert error == "Task task-1 is being passed to a runner and cannot be cancelled at this moment; try again."
    assert cancelled == "The task is being stopped; its results so far are stored."


async def test_cancel_is_retried_when_the_launch_ends_at_the_timeout(components, monkeypatch):
    """The timeout expires at the moment the lock is released."""
    monkeypatch.setattr("sandbox.server.task_services.CANCEL_TIMEOUT_SECONDS", 30)

    async def scenario():
        slow_start = SlowStart(components.placement, monkeypatch)
        async with components.server() as service:
            await service.submit(manifest())
            await slow_start.has_started.wait()
            cancelling = asyncio.create_task(service.cancel("task-1", reason="", force=False))
            await asyncio.sleep(0.05)
            started = components.clock.monotonic()
            monkeypatch.setattr(components.clock, "monotonic", lambda: time.monotonic() + 31)
            assert components.clock.monotonic() - started > 30
            slow_start.release_start.set()
            return (await asyncio.wait_for(cancelling, 10)).message

    assert (await scenario()) == "The task is being stopped; its results so far are stored."
