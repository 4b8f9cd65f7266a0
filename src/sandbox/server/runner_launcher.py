"""Starts the runners of attempts, and resolves the secrets that are sent only to them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.images import ImageUnusableError
from sandbox.interfaces.journal import Recorder
from sandbox.interfaces.placement import ReservedHost
from sandbox.interfaces.runner import FinishAttempt, RunAttempt, RunnerNotStartedError
from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.model.events import AttemptFailed, AttemptStarted, TaskFinished
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import Secret
from sandbox.model.task import Attempt, Task
from sandbox.model.task_state import TaskState
from sandbox.primitives.concurrency import run_in_daemon_thread
from sandbox.server.ending_without_runner import end_without_follow_up
from sandbox.server.placements import Placements, takes_over_disk
from sandbox.server.tracked_task import JournalOwner, NoKnownOwner, RunnerOwned, ServerOwned, TrackedTask

_log = logging.getLogger(__name__)

LookUpSecrets = Callable[[Sequence[Secret]], Awaitable[Mapping[str, str]]]
"""Looks up secrets; returns values by name. Raises SecretUnavailableError."""


class TaskSecrets:
    """Resolves secrets from their sources, which may be external and slow."""

    def __init__(self, look_up: LookUpSecrets) -> None:
        self._look_up = look_up
        self._launches: set[asyncio.Task[object]] = set()

    async def resolve(self, task: Task) -> dict[str, str]:
        """Return the values, keyed by name. Raises only SecretUnavailableError, which hides other errors' texts."""
        try:
            return dict(await self._look_up(task.manifest.secrets))
        except SecretUnavailableError:
            raise
        except Exception as error:
            # Report only the error's type, and do not chain the error: its text may contain a value.
            problem = f"The secrets could not be resolved ({type(error).__name__}); check their source."
        raise SecretUnavailableError(problem)

    async def resolve_for_attempt(self, task: Task) -> Mapping[str, str] | Failure:
        """Return the values, keyed by name. If a value is missing, return the failure that ends the attempt."""
        try:
            return await self.resolve(task)
        except SecretUnavailableError as error:
            _log.warning("Secrets of task %s cannot be resolved: %s", task.id, error.detail, extra={"task_id": task.id})
            detail = error.detail if error.detail != error.message else ""
            return Failure(FailureCode.SECRET_UNAVAILABLE, error.message, detail=detail)

    async def resolve_cancellably(self, task: Task) -> Mapping[str, str] | Failure:
        """Call `resolve_for_attempt`, and let `cancel_lookups` cancel the caller while it is waiting here."""
        launch = asyncio.current_task()
        assert launch is not None
        self._launches.add(launch)
        try:
            return await self.resolve_for_attempt(task)
        finally:
            self._launches.discard(launch)

    def cancel_lookups(self) -> None:
        """Cancel the callers that are waiting in `resolve_cancellably`."""
        for launch in self._launches:
            launch.cancel()


class RunnerLauncher:
    """Records an attempt and starts its runner, which takes over the journal.

    upstreams: the model API of each kind of agent that the server offers; None if there is no key for that API.
    may_follow_redirects: returns whether git may follow redirects to other hosts; called for each launch.
    """

    def __init__(
        self,
        placements: Placements,
        secrets: TaskSecrets,
        upstreams: Mapping[str, ModelUpstream | None],
        may_follow_redirects: Callable[[], bool],
    ) -> None:
        self._placements = placements
        self._secrets = secrets
        self._upstreams = upstreams
        self._may_follow_redirects = may_follow_redirects

    async def launch(self, tracked: TrackedTask) -> None:
        """Start the first attempt of a pending task. Does nothing if the task was cancelled in the meantime.

        Raises OSError if nothing could be written; the task is still pending then. Raises HostPendingError if no host
        is available yet.
        """
        owner = tracked.owner
        if not isinstance(owner, ServerOwned):
            return
        reserved = await self._placements.reserve_host(tracked.task)
        # Resolve the secrets before taking the lock: a cancel request must not wait for an external Vault.
        secrets_or_failure = await self._secrets.resolve_cancellably(tracked.task)
        async with tracked.write_lock:
            if not isinstance(tracked.owner, ServerOwned):
                return
            recorder = tracked.owner.recorder
            next_owner: JournalOwner = NoKnownOwner()
            try:
                next_owner = await self.start_pending(recorder, secrets_or_failure, reserved)
            finally:
                # Close the journal even if the end could not be written, because a finisher waits for the lock.
                if recorder.task.state is not TaskState.PENDING:
                    tracked.transfer(next_owner)
                    recorder.writer.close()

    def cancel_secret_lookups(self) -> None:
        """Cancel launches that are waiting for secrets and have recorded nothing; a restarted server repeats them."""
        self._secrets.cancel_lookups()

    async def start_pending(
        self, recorder: Recorder, secrets_or_failure: Mapping[str, str] | Failure, reserved: ReservedHost | None
    ) -> JournalOwner:
        """Start the first attempt of a pending task, or end the task if it cannot start. Return the next owner.

        reserved: the host of the attempt; None if the task is expected to end. Raises OSError.
        """
        if recorder.task.state is not TaskState.PENDING:
            return NoKnownOwner()
        if recorder.task.cancel is not None or recorder.task.failure is not None:
            await asyncio.to_thread(recorder.record, TaskFinished())
            return NoKnownOwner()
        if isinstance(secrets_or_failure, Failure):
            return await _fail_start(recorder, secrets_or_failure, is_first=True)
        return NoKnownOwner() if reserved is None else await self._start_attempt(recorder, secrets_or_failure, reserved)

    async def start_follow_up(
        self, recorder: Recorder, secrets_or_failure: Mapping[str, str] | Failure, reserved: ReservedHost
    ) -> JournalOwner:
        """Start the next attempt; if that fails, a finisher finalizes the task. Return the next owner.

        Raises OSError.
        """
        if isinstance(secrets_or_failure, Failure):
            return await _fail_start(recorder, secrets_or_failure, is_first=False)
        return await self._start_attempt(recorder, secrets_or_failure, reserved)

    async def start_finisher(
        self, recorder: Recorder, attempt: Attempt, secrets_or_failure: Mapping[str, str] | Failure
    ) -> JournalOwner:
        """Start a finisher for an attempt whose runner died. Return the next owner. Raises OSError.

        A finisher gets no model access. It gets the secrets only to redact the collected files. It does not need the
        task's agent.
        """
        secrets = {} if isinstance(secrets_or_failure, Failure) else dict(secrets_or_failure)
        order = FinishAttempt(recorder.task.id, attempt.id, secrets, keeps_session=True)
        return RunnerOwned(await self._placements.launch(order, attempt.host, recorder.writer))

    async def _start_attempt(
        self, recorder: Recorder, secrets: Mapping[str, str], reserved: ReservedHost
    ) -> JournalOwner:
        is_first = recorder.task.attempt is None
        if (missing := self._missing_agent(recorder.task)) is not None:
            return await _fail_start(recorder, missing, is_first=is_first)
        try:
            # A slow host must not keep a shared thread busy.
            image = await run_in_daemon_thread(partial(reserved.find_image, recorder.task.manifest.vm.profile))
        except ImageUnusableError as error:
            failure = Failure(FailureCode.PROVISION_FAILED, error.message)
            return await _fail_start(recorder, failure, is_first=is_first)
        started = _next_attempt(recorder.task, reserved)
        await asyncio.to_thread(recorder.record, started)
        order = RunAttempt(
            recorder.task.id,
            started.attempt_id,
            self._upstreams.get(recorder.task.manifest.agent.kind),
            image,
            dict(secrets),
            resumes=started.resumes,
            clone_follows_redirects=self._may_follow_redirects(),
            keeps_session=True,
        )
        try:
            return RunnerOwned(await self._placements.launch(order, started.host, recorder.writer))
        except RunnerNotStartedError as error:
            # The lock is free now. As soon as a finisher can be started, the finisher ends this attempt; another
            # attempt may follow.
            _log.warning("The runner of task %s could not be started: %s", recorder.task.id, error)
            return NoKnownOwner()
        except OSError as error:
            failure = Failure(FailureCode.INTERNAL, f"The runner could not be started: {error}.")
            return await _fail_start(recorder, failure, is_first=is_first)

    def _missing_agent(self, task: Task) -> Failure | None:
        """Return the failure of a task whose agent the server does not offer; an earlier server accepted the task."""
        kind = task.manifest.agent.kind
        if kind in self._upstreams:
            return None
        offered = " and ".join(self._upstreams)
        message = (
            f"This server does not have the agent {kind}, only {offered}; submit the task to a server that has "
            f"{kind}, or choose another agent."
        )
        return Failure(FailureCode.AGENT_NOT_OFFERED, message)


def _next_attempt(task: Task, reserved: ReservedHost) -> AttemptStarted:
    number, resumes = task.attempt_count + 1, takes_over_disk(task)
    return reserved.identity.attempt_started_event(
        reserved.attempt_id, reserved.runtime, number=number, resumes=resumes
    )


async def _fail_start(recorder: Recorder, failure: Failure, *, is_first: bool) -> NoKnownOwner:
    """Record that an attempt could not be started; return the next owner. Raises OSError.

    If it was the first attempt, nothing is left over, so the task ends. Otherwise a finisher removes the leftovers of
    earlier attempts and finalizes the task.
    """
    if is_first:
        await asyncio.to_thread(end_without_follow_up, recorder, failure)
    else:
        await asyncio.to_thread(recorder.record, AttemptFailed(failure))
    return NoKnownOwner()
