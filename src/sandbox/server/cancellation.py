"""Delivers a cancel request to the holder of the task's journal: the server or a runner, if there is one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import JournalDamagedError, Journals, Liveness
from sandbox.interfaces.placement import CANCEL_TOO_LATE, CancelOrder, RunnerClient, RunnerUnreachableError
from sandbox.interfaces.tasks import TaskFinishedError, UnavailableError
from sandbox.model.events import CancelRequested
from sandbox.model.limits import CANCEL_SECONDS, CANCEL_SECONDS_MIN
from sandbox.model.state_machine import IllegalEventError
from sandbox.model.task import Task
from sandbox.server.runner_launcher import RunnerLauncher, cancel_pending
from sandbox.server.tracked_task import TrackedTask

_NOT_STARTED_MESSAGE = "The task had not started and is cancelled."
_STOPPING_MESSAGE = "The task is being stopped; its results so far are stored."


class Canceller:
    """Tries until the request is on disk or CANCEL_SECONDS have passed; the last try may take longer."""

    def __init__(
        self, journals: Journals, runners: RunnerClient, runner_launcher: RunnerLauncher, clock: Clock
    ) -> None:
        self._journals = journals
        self._runners = runners
        self._runner_launcher = runner_launcher
        self._clock = clock

    async def cancel(self, tracked: TrackedTask, order: CancelOrder) -> str:
        """Return a message for the caller once the request is durable. Raises TaskFinishedError, UnavailableError."""
        deadline = self._clock.monotonic() + CANCEL_SECONDS
        async with self._write_lock(tracked, deadline):
            pass
        # However long the lock took, leave time to reach a runner that has just started.
        deadline = max(deadline, self._clock.monotonic() + CANCEL_SECONDS_MIN)
        while True:
            try:
                message = await self._try_cancel(tracked, order, deadline)
            except (JournalDamagedError, IllegalEventError) as error:
                raise UnavailableError(f"The task is blocked and cannot be cancelled: {error.message}") from error
            except OSError as error:
                raise UnavailableError(f"The task could not be cancelled: {error}; try again.") from error
            if message is not None:
                return message
            if self._clock.monotonic() >= deadline:
                raise UnavailableError(f"The runner of task {tracked.task.id} does not respond; try again.")
            await tracked.wait_for_change(0.05)

    async def _try_cancel(self, tracked: TrackedTask, order: CancelOrder, deadline: float) -> str | None:
        """Return a message, or None to try again."""
        cancel_requested = CancelRequested(order.reason, order.force)
        async with self._write_lock(tracked, deadline):
            if tracked.recorder is not None:
                await asyncio.to_thread(cancel_pending, tracked.recorder, cancel_requested)
                tracked.recorder = None
                tracked.wake()
                return _NOT_STARTED_MESSAGE
        if tracked.task.state.is_final:
            raise TaskFinishedError(tracked.task)
        if tracked.task.attempt is None:
            return await self._record_cancel(tracked, cancel_requested, deadline)
        try:
            reply = await self._runners.cancel(tracked.task.attempt.id, order)
        except RunnerUnreachableError:
            return await self._record_cancel(tracked, cancel_requested, deadline)
        if reply.was_disk_write_rejected:
            raise OSError(reply.message)
        if not reply.done:
            return None
        return reply.message or _STOPPING_MESSAGE

    async def _record_cancel(
        self, tracked: TrackedTask, cancel_requested: CancelRequested, deadline: float
    ) -> str | None:
        if self._journals.liveness(tracked.task.id) is not Liveness.FREE:
            return None
        async with (
            self._runner_launcher.acquire_cancellation_slot(self._remaining_seconds(deadline)) as slot,
            self._write_lock(tracked, deadline),
        ):
            task = await self._runner_launcher.record_cancel(tracked, cancel_requested, slot)
        return None if task is None else _describe_outcome(task)

    @asynccontextmanager
    async def _write_lock(self, tracked: TrackedTask, deadline: float) -> AsyncIterator[None]:
        """Hold `tracked.write_lock`. Raises UnavailableError if the deadline passes first."""
        try:
            async with asyncio.timeout(self._remaining_seconds(deadline)):
                await tracked.write_lock.acquire()
        except TimeoutError as error:
            message = f"Task {tracked.task.id} is being passed to a runner and cannot be cancelled at this moment"
            raise UnavailableError(f"{message}; try again.") from error
        try:
            yield
        finally:
            tracked.write_lock.release()

    def _remaining_seconds(self, deadline: float) -> float:
        return max(deadline - self._clock.monotonic(), CANCEL_SECONDS_MIN)


def _describe_outcome(task: Task) -> str:
    """Describe the effect of a cancel request that was just recorded."""
    if task.cancel is None:
        return CANCEL_TOO_LATE
    return _NOT_STARTED_MESSAGE if task.attempt is None else _STOPPING_MESSAGE
