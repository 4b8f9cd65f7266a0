"""Launches runners for tasks."""

import asyncio
import base64
import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import msgspec

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.images import Image, ImageUnusableError
from sandbox.interfaces.journal import JournalBusyError, Journals, Recorder
from sandbox.interfaces.placement import Placement
from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.interfaces.tasks import UnavailableError
from sandbox.model.disk_space import transient_disk_error
from sandbox.model.events import (
    AgentExited,
    AttemptFailed,
    AttemptStarted,
    CancelRequested,
    ErrorReported,
    FollowUpSkipped,
    TaskFinished,
)
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.limits import FINISHERS_MAX
from sandbox.model.manifest.schema import Secret
from sandbox.model.retry import backoff_seconds, next_follow_up
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.server.journal_replay import JournalReplayer, ReplaySlot
from sandbox.server.runtime_prober import RuntimeProber
from sandbox.server.tracked_task import TrackedTask

_log = logging.getLogger(__name__)

FindImage = Callable[[str], Image | None]
"""Finds the current image of a profile, None for the host's own /usr. Raises ImageUnusableError."""


LookUpSecrets = Callable[[Sequence[Secret]], Awaitable[Mapping[str, str]]]
"""Resolves secrets to values by name. Raises SecretUnavailableError."""

_TRANSIENT_ERRNOS = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EPIPE, errno.ETIMEDOUT})
"""Temporary errors that are not the task's fault.

The host has no process, memory or descriptor to spare, or the runner's pipe broke: the runner was killed before it got
its order, or the host was too busy.
"""

_RUNNER_LOST = Failure(FailureCode.RUNNER_LOST, "The task's runner died, and its sandbox could not be removed.")
_COLLECT_FAILED = Failure(
    FailureCode.COLLECT_FAILED,
    "The agent had ended, but the task's runner died, and not all results could be stored; submit the task again.",
)
_CLEANUP_FAILED_MESSAGE = (
    "The sandbox may not have been removed completely: the task's runner died, and the cleanup failed."
)


class Host(NamedTuple):
    """The host that runners are started on, and its current boot id."""

    name: str
    boot_id: str


class RunnerLauncher:
    """Records an attempt, starts its runner and releases the journal, whose lock the runner inherits."""

    def __init__(
        self,
        journals: Journals,
        placement: Placement,
        clock: Clock,
        look_up_secrets: LookUpSecrets,
        find_image: FindImage,
        *,
        prober: RuntimeProber,
        host: Host,
    ) -> None:
        self._journal_replayer = JournalReplayer(journals)
        self._cancellation_replayer = JournalReplayer(journals)
        self._placement = placement
        self._clock = clock
        self._look_up_secrets = look_up_secrets
        self._find_image = find_image
        self._prober = prober
        self._host = host
        self._resolving: set[asyncio.Task[object]] = set()

    async def launch(self, tracked: TrackedTask) -> None:
        """Start the first attempt of a pending task. Does nothing if the task was cancelled in the meantime.

        Raises OSError if nothing could be written; the task is still pending then.
        """
        # Resolve before taking the lock: a cancel request must not wait for an external Vault.
        resolved = await self._resolve_cancellably(tracked.task)
        async with tracked.write_lock:
            recorder = tracked.recorder
            if recorder is None:
                return
            try:
                await self._start_pending(recorder, resolved)
            finally:
                # Close the journal even if the end could not be written, because a finisher waits for the lock.
                if recorder.task.state is not TaskState.PENDING:
                    tracked.recorder = None
                    tracked.wake()
                    recorder.writer.close()

    async def acquire_journal(self, tracked: TrackedTask) -> bool:
        """Acquire the journal of a pending task for its launch. Return whether it was free and the task still waits.

        Raises OSError, JournalDamagedError.
        """
        async with self._journal_replayer.slot() as slot, tracked.write_lock:
            try:
                writer = await self._journal_replayer.open(tracked.task.id, slot)
            except JournalBusyError:
                return False
            try:
                task = (await self._journal_replayer.read_from(tracked.task.id, tracked.replay_state, slot)).task
                if task is not None and task.is_waiting_to_start:
                    tracked.recorder = Recorder(writer, task, self._clock.now)
            finally:
                if tracked.recorder is None:
                    writer.close()
            return tracked.recorder is not None

    def cancel_secret_lookups(self) -> None:
        """Cancel launches that wait for secrets. They have recorded nothing yet, and the next server repeats them."""
        for launch in self._resolving:
            launch.cancel()

    async def _resolve_cancellably(self, task: Task) -> Mapping[str, str] | Failure:
        launch = asyncio.current_task()
        assert launch is not None
        self._resolving.add(launch)
        try:
            return await self._resolve_secrets(task)
        finally:
            self._resolving.discard(launch)

    async def _resolve_secrets(self, task: Task) -> Mapping[str, str] | Failure:
        """Return the values by name. They are sent to the runner and nowhere else."""
        try:
            return await resolve_task_secrets(self._look_up_secrets, task.manifest.secrets)
        except SecretUnavailableError as error:
            _log.warning("Secrets of task %s cannot be resolved: %s", task.id, error.detail, extra={"task_id": task.id})
            detail = error.detail if error.detail != error.message else ""
            return Failure(FailureCode.SECRET_UNAVAILABLE, error.message, detail=detail)

    async def _start_pending(self, recorder: Recorder, resolved: Mapping[str, str] | Failure) -> None:
        if recorder.task.state is not TaskState.PENDING:
            return
        if recorder.task.cancel is not None or recorder.task.failure is not None:
            await asyncio.to_thread(recorder.record, TaskFinished())
            return
        if isinstance(resolved, Failure):
            await asyncio.to_thread(finalize, recorder, resolved)
            return
        await self._start_attempt(recorder, resolved)

    async def _start_attempt(self, recorder: Recorder, secrets: Mapping[str, str]) -> None:
        is_first = recorder.task.attempt is None
        try:
            image = await asyncio.to_thread(self._find_image, recorder.task.manifest.vm.profile)
        except ImageUnusableError as error:
            await asyncio.to_thread(
                _fail_start, recorder, Failure(FailureCode.PROVISION_FAILED, error.message), is_first
            )
            return
        started = self._next_attempt(recorder.task)
        await asyncio.to_thread(recorder.record, started)
        try:
            await self._launch_runner(recorder, started.attempt_id, secrets=dict(secrets), image=image)
        except OSError as error:
            if transient_disk_error(error) is not None or error.errno in _TRANSIENT_ERRNOS:
                # The lock is free now. As soon as a finisher can be started, it ends this attempt; another attempt may
                # follow.
                _log.warning("The runner of task %s could not be started: %s", recorder.task.id, error)
                return
            failure = Failure(FailureCode.INTERNAL, f"The runner could not be started: {error}.")
            await asyncio.to_thread(_fail_start, recorder, failure, is_first)

    def _next_attempt(self, task: Task) -> AttemptStarted:
        previous = task.attempt
        resumes = (
            previous is not None and previous.follow_up is not None and previous.transfers_disk(previous.follow_up)
        )
        return AttemptStarted(
            new_attempt_id(),
            self._prober.result.order_template.runtime,
            self._host.name,
            self._host.boot_id,
            number=task.attempt_count + 1,
            resumes=resumes,
        )

    async def recover(self, tracked: TrackedTask) -> None:
        """Recover a task that no process runs: launch a finisher for a dead runner, or start the next attempt.

        A finisher that dies is followed by another one, after an increasing pause. After the last one the server
        finalizes the task itself, as it does for a task that ends before its first attempt. Raises OSError,
        JournalDamagedError.
        """
        if not tracked.has_been_idle(backoff_seconds(tracked.task), self._clock.monotonic()):
            return
        if _can_continue(tracked.task) and (reason := self._prober.blocked_reason) is not None:
            tracked.status_message = f"Waiting: {reason}"
            return
        if (
            not _can_continue(tracked.task)
            and not _is_force_cancelled(tracked.task)
            and not tracked.is_finisher_backoff_over(self._clock.monotonic())
        ):
            tracked.status_message = "The cleanup after the task failed too; it is retried after a pause."
            return
        # As in `launch`: resolve before taking a slot or lock.
        resolved = await self._resolve_secrets(tracked.task)
        # Take the slot first: a cancel request must not wait on the lock while this waits for other tasks' journals.
        async with (
            self._journal_replayer.slot() as slot,
            tracked.write_lock,
            self._locked_recorder(tracked, self._journal_replayer, slot) as recorder,
        ):
            if recorder is not None and not recorder.task.state.is_final:
                await self._recover(recorder, tracked, resolved)

    @asynccontextmanager
    async def acquire_cancellation_slot(self, within_seconds: float) -> AsyncIterator[ReplaySlot]:
        """Wait for a replay slot for a cancel request; these slots are separate from those of launches.

        Raises UnavailableError if no slot becomes free within this time.
        """
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(within_seconds):
                    slot = await stack.enter_async_context(self._cancellation_replayer.slot())
            except TimeoutError as error:
                raise UnavailableError(
                    "The server is still cancelling other tasks whose runners died; try again."
                ) from error
            yield slot

    async def record_cancel(
        self, tracked: TrackedTask, cancel_requested: CancelRequested, slot: ReplaySlot
    ) -> Task | None:
        """Record a cancel request if no runner responds. Return the updated task, or None if that is impossible now.

        The caller holds `tracked.write_lock`; the tailer handles the rest. Raises OSError, JournalDamagedError.
        """
        async with self._locked_recorder(tracked, self._cancellation_replayer, slot) as recorder:
            if recorder is None or recorder.task.state.is_final:
                return None
            await asyncio.to_thread(recorder.record, cancel_requested)
        tracked.wake()
        return recorder.task

    @asynccontextmanager
    async def _locked_recorder(
        self, tracked: TrackedTask, replayer: JournalReplayer, slot: ReplaySlot
    ) -> AsyncIterator[Recorder | None]:
        """Hold a free journal for the duration of the block; yields None if another process holds it."""
        try:
            writer = await replayer.open(tracked.task.id, slot)
        except JournalBusyError:
            yield None
            return
        try:
            replay_state = await replayer.read_from(tracked.task.id, tracked.replay_state, slot)
            yield Recorder(writer, replay_state.task, self._clock.now)
        finally:
            writer.close()

    async def _recover(self, recorder: Recorder, tracked: TrackedTask, resolved: Mapping[str, str] | Failure) -> None:
        attempt = recorder.task.attempt
        if attempt is None:
            await self._start_pending(recorder, resolved)
            return
        if _can_continue(recorder.task):
            await self._start_follow_up(recorder, resolved)
            tracked.finishers_launched = 0
            return
        if tracked.finishers_launched >= FINISHERS_MAX:
            if recorder.task.needs_only_teardown and not tracked.has_reported_leftovers:
                await asyncio.to_thread(recorder.record, ErrorReported("teardown_failed", _CLEANUP_FAILED_MESSAGE))
                tracked.has_reported_leftovers = True
            await asyncio.to_thread(
                finalize, recorder, _COLLECT_FAILED if recorder.task.agent_has_exited else _RUNNER_LOST
            )
            return
        secrets = {} if isinstance(resolved, Failure) else dict(resolved)
        await self._launch_runner(recorder, attempt.id, secrets=secrets, finish=True)
        tracked.record_finisher_launch(self._clock.monotonic())

    async def _start_follow_up(self, recorder: Recorder, resolved: Mapping[str, str] | Failure) -> None:
        """Start the next attempt; if that fails, a finisher finalizes the task."""
        if isinstance(resolved, Failure):
            await asyncio.to_thread(recorder.record, AttemptFailed(resolved))
        else:
            await self._start_attempt(recorder, resolved)

    async def _launch_runner(
        self,
        recorder: Recorder,
        attempt_id: str,
        *,
        secrets: dict[str, str],
        image: Image | None = None,
        finish: bool = False,
    ) -> None:
        """Start a runner. A finisher gets no model access, and the secrets only to redact the collected files."""
        attempt = recorder.task.attempt
        template = self._prober.result.order_template
        order = msgspec.structs.replace(
            template,
            task_id=recorder.task.id,
            attempt_id=attempt_id,
            resumes=attempt is not None and attempt.resumes,
            upstream=None if finish else template.upstream,
            secrets=secrets,
            image=image,
            finish=finish,
        )
        await self._placement.launch(order, recorder.writer.lock_fd)


def new_attempt_id() -> str:
    """Return a random attempt id: twelve base32 characters (60 bits)."""
    return base64.b32encode(os.urandom(8)).decode().lower()[:12]


def _can_continue(task: Task) -> bool:
    return task.is_between_attempts and task.cancel is None and task.failure is None


def _is_force_cancelled(task: Task) -> bool:
    return task.cancel is not None and task.cancel.force


def _fail_start(recorder: Recorder, failure: Failure, is_first: bool) -> None:
    """Record that an attempt could not be started.

    If it is the first one, nothing is left over and the task ends. Else a finisher removes the leftovers of earlier
    attempts and finalizes the task.
    """
    if is_first:
        finalize(recorder, failure)
    else:
        recorder.record(AttemptFailed(failure))


def cancel_pending(recorder: Recorder, cancel_requested: CancelRequested) -> None:
    """End a task that has not started, and release its journal."""
    recorder.record(cancel_requested)
    recorder.record(TaskFinished())
    recorder.writer.close()


def finalize(recorder: Recorder, failure: Failure) -> None:
    """End the task without another attempt, because parts of the last one may still be running.

    An outcome that is complete and collected stays; otherwise the task fails.
    """
    if not recorder.task.needs_only_teardown:
        _record_failure(recorder, failure)
    recorder.record(TaskFinished())


def _record_failure(recorder: Recorder, failure: Failure) -> None:
    if recorder.task.attempt_state is TaskState.RUNNING:
        recorder.record(AgentExited(None, None, failure))
    else:
        recorder.record(AttemptFailed(failure))
    while (follow_up := next_follow_up(recorder.task)) is not None:
        recorder.record(FollowUpSkipped(follow_up, failure.message))


async def resolve_task_secrets(look_up: LookUpSecrets, secrets: Sequence[Secret]) -> dict[str, str]:
    """Return the values by name. Raises only SecretUnavailableError, which hides the texts of other errors."""
    try:
        return dict(await look_up(secrets))
    except SecretUnavailableError:
        raise
    except Exception as error:
        # Only the type, and no exception chaining: the text may contain a value.
        problem = f"The secrets could not be resolved ({type(error).__name__}); check their source."
    raise SecretUnavailableError(problem)
