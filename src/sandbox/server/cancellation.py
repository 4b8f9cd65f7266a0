"""Delivers a cancel request to the holder of the task's journal: the server or a runner, if there is one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import JournalBusyError, JournalDamagedError, Journals, LockState, Recorder
from sandbox.interfaces.placement import CANCEL_TOO_LATE
from sandbox.interfaces.runner import CancelAttempt, RunnerUnreachableError
from sandbox.interfaces.server_services import TaskEndedError, UnavailableError
from sandbox.model.events import CancelRequested, TaskFinished
from sandbox.model.fixed_limits import CANCEL_TIMEOUT_SECONDS, CANCEL_TIMEOUT_SECONDS_MIN
from sandbox.model.state_machine import IllegalEventError
from sandbox.model.task import Task
from sandbox.server.recovery.journal_replay_threads import JournalReplayer, ReplaySlot
from sandbox.server.tracked_task import NoKnownOwner, ServerOwned, TrackedTask

_NOT_STARTED_MESSAGE = "The task was cancelled before it started."
STOPPING_MESSAGE = "The task is being stopped; its results so far are stored."


class Canceller:
    """Tries to deliver a cancel request until it is on disk or CANCEL_TIMEOUT_SECONDS have passed.

    The last attempt may take longer.
    """

    def __init__(self, journals: Journals, clock: Clock) -> None:
        self._journals = journals
        self._replayer = JournalReplayer(journals)
        """These slots are not shared with launches, so a cancel request never waits for the replays of launches."""
        self._clock = clock

    async def cancel(self, tracked: TrackedTask, request: CancelAttempt) -> str:
        """Return a message for the caller once the request is durable. Raises TaskEndedError, UnavailableError."""
        deadline = self._clock.monotonic() + CANCEL_TIMEOUT_SECONDS
        async with self._write_lock(tracked, deadline):
            pass
        # Leave time to reach a runner that has just started, even if the wait for the lock was long.
        deadline = max(deadline, self._clock.monotonic() + CANCEL_TIMEOUT_SECONDS_MIN)
        while True:
            try:
                message = await self._try_cancel(tracked, request, deadline)
            except (JournalDamagedError, IllegalEventError) as error:
                raise UnavailableError(f"The task is blocked and cannot be cancelled: {error.message}") from error
            except OSError as error:
                raise UnavailableError(f"The task could not be cancelled: {error}; try again.") from error
            if message is not None:
                return message
            if self._clock.monotonic() >= deadline:
                raise UnavailableError(f"The runner of task {tracked.task.id} is not responding; try again.")
            await tracked.wait_for_change(0.05)

    async def _try_cancel(self, tracked: TrackedTask, request: CancelAttempt, deadline: float) -> str | None:
        """Return a message, or None to try again."""
        cancel_requested = CancelRequested(request.reason, request.force)
        async with self._write_lock(tracked, deadline):
            owner = tracked.owner
            if isinstance(owner, ServerOwned):
                await asyncio.to_thread(_cancel_pending, owner.recorder, cancel_requested)
                tracked.transfer(NoKnownOwner())
                return _NOT_STARTED_MESSAGE
        if tracked.task.state.is_final:
            raise TaskEndedError(tracked.task)
        if isinstance(owner, NoKnownOwner):
            return await self._record_cancel(tracked, cancel_requested, deadline)
        try:
            reply = await owner.runner.cancel(request)
        except RunnerUnreachableError:
            return await self._record_cancel(tracked, cancel_requested, deadline)
        if reply.was_disk_write_rejected:
            raise OSError(reply.message)
        if not reply.done:
            return None
        return reply.message or STOPPING_MESSAGE

    async def _record_cancel(
        self, tracked: TrackedTask, cancel_requested: CancelRequested, deadline: float
    ) -> str | None:
        """Record the request if no runner holds the journal. Return a message, or None to try again."""
        if tracked.writer_lock_state(self._journals) is not LockState.FREE:
            return None
        try:
            async with (
                self._slot(self._remaining_seconds(deadline)) as slot,
                self._write_lock(tracked, deadline),
                self._replayer.recorder(tracked.task.id, tracked.replay_state, slot, self._clock.now) as recorder,
            ):
                if recorder.task.state.is_final:
                    return None
                await asyncio.to_thread(recorder.record, cancel_requested)
        except JournalBusyError:
            return None
        tracked.wake()  # the tailer reads the new record
        return _describe_outcome(recorder.task)

    @asynccontextmanager
    async def _slot(self, timeout_seconds: float) -> AsyncIterator[ReplaySlot]:
        """Wait for a replay slot. Raises UnavailableError if none becomes free within `timeout_seconds`."""
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(timeout_seconds):
                    slot = await stack.enter_async_context(self._replayer.slot())
            except TimeoutError as error:
                raise UnavailableError(
                    "The server is still cancelling other tasks whose runners died; try again."
                ) from error
            yield slot

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
        return max(deadline - self._clock.monotonic(), CANCEL_TIMEOUT_SECONDS_MIN)


def _cancel_pending(recorder: Recorder, cancel_requested: CancelRequested) -> None:
    """End a task that has not started, and release its journal."""
    recorder.record(cancel_requested)
    recorder.record(TaskFinished())
    recorder.writer.close()


def _describe_outcome(task: Task) -> str:
    """Describe the effect of a cancel request that was just recorded."""
    if task.cancel is None:
        return CANCEL_TOO_LATE
    return _NOT_STARTED_MESSAGE if task.attempt is None else STOPPING_MESSAGE
