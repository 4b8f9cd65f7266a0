"""The jobs of a server, and the loop that submits, replaces and abandons them.

Everything here runs on one event loop. A new job is stored before it is submitted, and a claim before it is answered.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from typing import Any, NamedTuple

import msgspec

from sandbox.interfaces.cluster_engine import Engine, EngineRejectedError, JobPhase, JobRequest, JobStatus
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.task_file_layout import new_attempt_id
from sandbox.interfaces.worker_messages import NO_JOIN_TOKEN, Claim
from sandbox.model.errors import SandboxError, error_reason
from sandbox.model.resources import Resources
from sandbox.placements.cluster.claim_and_takeover_rules import (
    ClaimState,
    Decision,
    decide,
    may_claim,
    takeover_seconds,
)
from sandbox.placements.cluster.host_drains import HostDrains
from sandbox.placements.cluster.job_state import Job, JobStore, StoredJob, confirmed_host

POLL_SECONDS = 1.0
"""Interval at which the engine is queried for the phases of all jobs."""

_HOST_CONFIRMATION_TIMEOUT_SECONDS = 5.0
_ENGINE_SECONDS = 60.0
CONCURRENT_CANCELLATIONS_MAX = 2
"""Maximum number of concurrent cancellations. A submission may run at the same time.

An engine may run only a few commands at once, and a lookup of the jobs must not wait for many other commands.
"""

_TOKENS_MAX = 16
_DONE_TASKS_MAX = 10_000
_RESUBMIT_SECONDS = 5.0
_BACKOFF_EXPONENT_MAX = 10
_REPLACE_SECONDS_MAX = 60.0
_STABLE_SECONDS = 60.0
"""The loss of a worker that has kept its job for this long does not delay the next job."""

_log = logging.getLogger(__name__)


class JobSettings(NamedTuple):
    """Settings for the jobs of a server.

    lease_seconds: how long a worker may communicate after an answer.
    overhead_bytes: the memory that a job needs in addition to the task's memory.
    has_join_tokens: whether each worker gets a join token; otherwise, the engine gives it an identity token.
    create_job_request: returns the request for a job, given its name, an attempt id, a join token, and the job's
        resources.
    """

    lease_seconds: float
    overhead_bytes: int
    create_job_request: Callable[[str, str, bytes, Resources], JobRequest]
    has_join_tokens: bool = True


class Rejections:
    """Why the last worker of each task was rejected, until another worker claims the job. `reason` is thread-safe."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def reason(self, task_id: str) -> str:
        """Return why the task's last worker was rejected; empty if no rejection is recorded."""
        return self._reasons.get(task_id, "")

    def record(self, task_id: str, reason: str) -> None:
        """Record why a process was rejected. The job can still be claimed: that process might not be its worker."""
        if reason != self.reason(task_id):
            _log.error("A worker of task %s is rejected: %s", task_id, reason)
        self._reasons[task_id] = reason

    def remove(self, task_id: str) -> None:
        """Remove the reason, if there is one."""
        self._reasons.pop(task_id, None)


class Jobs:
    """All jobs of the server. Not thread-safe."""

    def __init__(self, store: JobStore, engine: Engine, settings: JobSettings, drains: HostDrains) -> None:
        self._store = store
        self._engine = engine
        self._settings = settings
        self._drains = drains
        self._started_at = time.monotonic()
        self._jobs: dict[str, Job] = {}
        """All jobs, keyed by the id of the attempt that names the job."""
        self._by_task: dict[str, Job] = {}
        """The current job of each task: the newest one that was not abandoned, otherwise any."""
        self._by_attempt: dict[str, Job] = {}
        for stored in store.load_all():
            self._add(Job(stored, self._started_at))
        self._losses: Counter[str] = Counter()
        """Number of consecutive workers of a task that did not start or were soon lost, keyed by task id."""
        self.rejections = Rejections()
        self._done: dict[str, None] = {}
        """The tasks whose jobs were removed most recently. None of their runners can communicate."""
        self._wake = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._to_submit: dict[str, Job] = {}
        """The jobs that are waiting to be submitted, keyed by the id of the attempt that names the job."""
        self._submitting: asyncio.Task[None] | None = None
        self._cancelling: set[asyncio.Task[None]] = set()
        self._cancellations = asyncio.Semaphore(CONCURRENT_CANCELLATIONS_MAX)

    @property
    def have_earlier_leases_ended(self) -> bool:
        """Whether every lease from an earlier server with the same setting has ended."""
        return time.monotonic() - self._started_at >= takeover_seconds(self._settings.lease_seconds)

    def of_task(self, task_id: str) -> Job | None:
        """Return the task's current job; if all of its jobs were abandoned, return any of them. Thread-safe."""
        return self._by_task.get(task_id)

    def of_attempt(self, attempt_id: str) -> Job | None:
        """Return the job of a reserved attempt, or None if the attempt was not reserved. Thread-safe."""
        return self._by_attempt.get(attempt_id)

    def lock_state(self, task_id: str) -> LockState:
        """Return whether a runner of the task may write. Thread-safe."""
        job = self.of_task(task_id)
        if job is None:
            return LockState.FREE if task_id in self._done or self.have_earlier_leases_ended else LockState.UNKNOWN
        if job.stored.is_abandoned or not job.is_claimed:
            return LockState.FREE
        session = job.session
        return LockState.UNKNOWN if session is None else session.lock_state

    def status(self, task_id: str) -> JobStatus | None:
        """Return the latest known status of the task's job, with the reason for it. Thread-safe.

        The reason includes why the last worker was rejected.
        """
        job = self.of_task(task_id)
        if job is None:
            return None
        status = job.status or JobStatus(JobPhase.UNKNOWN)
        reason = f"{job.reason} {self.rejections.reason(task_id)}".rstrip()
        return msgspec.structs.replace(status, host=job.stored.host or status.host, reason=reason)

    def reserve(self, task_id: str, last_attempt_id: str | None, resources: Resources) -> Job:
        """Return the task's current job, whose newest attempt id is unused. Creates the job if the task has none.

        last_attempt_id: the last attempt in the journal. Raises OSError.
        """
        job = self.of_task(task_id)
        if job is None or job.stored.is_abandoned:
            return self._create(task_id, resources, job)
        if last_attempt_id == job.stored.attempt_ids[-1]:
            attempt_id = new_attempt_id()
            self._save(job, attempt_ids=(*job.stored.attempt_ids, attempt_id))
            self._by_attempt[attempt_id] = job
        return job

    def find_claimable(self, claim: Claim) -> Job | None:
        """Return the job that a worker may claim or has already claimed, or None if there is no such job."""
        job = self._jobs.get(claim.attempt_id)
        if job is None or not may_claim(_claim_state(job.stored), _hash(claim.token), _hash(claim.nonce)):
            return None
        return job

    async def wait_for_host_confirmation(self, job: Job, host: str) -> bool:
        """Wait for the engine's answer; return whether the engine confirms that it runs the job on this host."""
        deadline = time.monotonic() + _HOST_CONFIRMATION_TIMEOUT_SECONDS
        while confirmed_host(job) != host:
            if (rest := deadline - time.monotonic()) <= 0:
                return False
            self._wake.set()
            await job.wait_for_change(min(POLL_SECONDS, rest))
        return True

    def claim(self, claim: Claim) -> Job | None:
        """Store a worker's claim, and return the claimed job; None if the claim is rejected. Raises OSError."""
        job, nonce_hash = self.find_claimable(claim), _hash(claim.nonce)
        if job is None:
            return None
        if job.is_claimed:
            return job if (job.stored.host, job.stored.boot_id) == (claim.host, claim.boot_id) else None
        fields = {"host": claim.host, "boot_id": claim.boot_id, "runtime": claim.runtime}
        job.record_answer()
        self._save(job, nonce_hash=nonce_hash, **fields)
        self.rejections.remove(job.stored.task_id)
        job_id = "" if job.status is None else job.status.job_id
        _log.info("The worker of task %s runs on %s, job %s", job.stored.task_id, claim.host, job_id or job.name)
        return job

    def fence(self, job: Job, reason: str) -> None:
        """Stop answering a worker that sent an invalid message. The journal is taken over after the lease ends.

        Raises OSError if this cannot be stored; in that case, the worker may connect again after a restart.
        """
        _log.error("The worker of task %s on %s is fenced: %s", job.stored.task_id, job.stored.host, reason)
        job.set_stored(msgspec.structs.replace(job.stored, is_fenced=True))  # takes effect even if `save` fails
        self._wake.set()
        self._cancel(job)
        self._store.save(job.stored)

    def notify_task_ended(self, task_id: str) -> None:
        """Allow the workers of a finished task to exit once nothing is preserved. Raises OSError.

        A worker that has not claimed its job gets no task, so its job is removed. The engine ends it later.
        """
        self._losses.pop(task_id, None)
        self.rejections.remove(task_id)
        for job in [each for each in self._jobs.values() if each.stored.task_id == task_id]:
            job.mark_task_ended()
            if job.is_claimed and not job.stored.is_abandoned:
                continue
            if not job.stored.is_abandoned:
                self._save(job, is_abandoned=True)
                self._cancel(job)
            self.remove(job)

    def remove(self, job: Job) -> None:
        """Remove a job whose worker has nothing left to do. Raises OSError."""
        self._store.remove(job.stored)
        if job.has_task_ended:
            self._losses.pop(job.stored.task_id, None)
            self.rejections.remove(job.stored.task_id)
        self._jobs.pop(job.stored.attempt_id, None)
        for attempt_id in job.stored.attempt_ids:
            self._by_attempt.pop(attempt_id, None)
        if self._by_task.get(job.stored.task_id) is job:
            del self._by_task[job.stored.task_id]
        self._done[job.stored.task_id] = None
        if len(self._done) > _DONE_TASKS_MAX:
            del self._done[next(iter(self._done))]

    def snapshot(self) -> Collection[Job]:
        """Return all jobs. Thread-safe."""
        return list(self._jobs.values())

    def task_ids(self) -> Collection[str]:
        """Return the tasks that have a job. Thread-safe."""
        return {job.stored.task_id for job in self.snapshot()}

    def start(self) -> None:
        """Start to look up the jobs, and continue until the tasks of the event loop are cancelled."""
        self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        """Look up the jobs and act on the results, until cancelled."""
        while True:
            await self._repeat_on_error(self._look_up())
            for job in list(self._jobs.values()):
                if not job.stored.is_abandoned:
                    await self._repeat_on_error(self._act(job))
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def _repeat_on_error(self, step: Coroutine[Any, Any, None]) -> None:
        """Log an error in the step, so the other jobs are not affected. The next iteration repeats the step."""
        try:
            await step
        except Exception as error:
            _log.error("A job could not be checked: %s", error_reason(error), exc_info=error)

    async def _look_up(self) -> None:
        jobs = [job for job in self._jobs.values() if not job.stored.is_abandoned]
        if not jobs:
            return
        try:
            async with asyncio.timeout(_ENGINE_SECONDS):
                found = await self._engine.reconcile_jobs([job.name for job in jobs])
        except (SandboxError, OSError, TimeoutError) as error:
            _log.warning("The engine is not responding: %s", error_reason(error))
            found = {}
        now = time.monotonic()
        for job in jobs:
            job.set_status(found.get(job.name), now)

    async def _act(self, job: Job) -> None:
        if self._has_outdated_exclusions(job):
            self._resubmit_under_new_name(job)
            return
        match decide(job.observe(time.monotonic()), job.stored.lease_seconds):
            case Decision.SUBMIT:
                self._submit_later(job)
            case Decision.REPLACE:
                self._abandon(job)
                self._create(job.stored.task_id, job.stored.resources, job)
                self.remove(job)
            case Decision.TAKE_OVER:
                self._abandon(job)

    def _has_outdated_exclusions(self, job: Job) -> bool:
        """Return whether a job without a worker may start on a drained host, or excludes a host that is not drained."""
        if job.is_claimed or job.stored.attempt_id in self._to_submit:
            return False
        if job.phase is JobPhase.RUNNING:
            return job.status is not None and self._drains.since(job.status.host) is not None
        was_submitted = bool(job.stored.token_hashes) and job.phase in {JobPhase.WAITING, JobPhase.UNKNOWN}
        return was_submitted and job.stored.excluded_hosts != self._drains.names

    def _resubmit_under_new_name(self, job: Job) -> None:
        """Replace a job with one that excludes the hosts that are drained now.

        The new job has a different name, because all submissions under one name must exclude the same hosts.
        """
        task_id = job.stored.task_id
        _log.info("The job of task %s is submitted again, because the drained hosts have changed", task_id)
        self._save(job, is_abandoned=True)
        self._cancel(job)
        self._create(task_id, job.stored.resources, None)
        self.remove(job)

    def _submit_later(self, job: Job) -> None:
        """Submit the job in the background, after the jobs that are already waiting, so no worker has to wait."""
        if job.is_postponed:
            return
        self._to_submit.setdefault(job.stored.attempt_id, job)
        if self._submitting is None:
            self._submitting = asyncio.create_task(self._submit_all())

    async def _submit_all(self) -> None:
        try:
            while self._to_submit:
                attempt_id, job = next(iter(self._to_submit.items()))
                if attempt_id in self._jobs and not job.stored.is_abandoned:
                    await self._repeat_on_error(self._submit(job))
                del self._to_submit[attempt_id]  # not earlier: the job must not be queued twice
        finally:
            self._submitting = None

    async def _submit(self, job: Job) -> None:
        """Submit the job. A crash may follow any step, so the hash of the token is stored first."""
        job.postpone(_RESUBMIT_SECONDS, "The job is being submitted.")
        token = os.urandom(32) if self._settings.has_join_tokens else NO_JOIN_TOKEN
        excluded = self._drains.names
        token_hashes = (*job.stored.token_hashes, _hash(token))[-_TOKENS_MAX:]
        self._save(job, token_hashes=token_hashes, excluded_hosts=excluded)
        task = job.stored.resources
        resources = Resources(task.cpus, task.memory_bytes + self._settings.overhead_bytes, task.disk_bytes)
        request = self._settings.create_job_request(job.name, job.stored.attempt_id, token, resources)
        request = msgspec.structs.replace(request, excluded_hosts=excluded)
        try:
            async with asyncio.timeout(_ENGINE_SECONDS):
                await self._engine.submit(request)
            # A lookup that began before the submission ended might not find the job.
            job.postpone(_RESUBMIT_SECONDS, "The job is being submitted.")
        except EngineRejectedError as error:
            job.postpone(_REPLACE_SECONDS_MAX, f"{error.message} {self._drains.describe()}".rstrip())
        except (SandboxError, OSError, TimeoutError) as error:
            job.postpone(_RESUBMIT_SECONDS, f"The job could not be submitted: {error_reason(error)}")

    def _abandon(self, job: Job) -> None:
        """Abandon a worker that can no longer communicate. Store this before another runner may write the journal."""
        task_id = job.stored.task_id
        _log.warning("The worker of task %s on %s is abandoned: %s", task_id, job.stored.host, job.reason)
        was_end_confirmed, loss_reason = job.phase is JobPhase.ENDED, _loss_reason(job)
        self._save(job, is_abandoned=True, was_end_confirmed=was_end_confirmed, loss_reason=loss_reason)
        was_stable = job.is_claimed and time.monotonic() - job.claimed_at >= _STABLE_SECONDS
        self._losses[task_id] = 0 if was_stable else self._losses[task_id] + 1
        if job.session is not None:
            job.session.close()
        self._cancel(job)
        if job.has_task_ended:
            self.remove(job)

    def _cancel(self, job: Job) -> None:
        """Cancel a job in the background: nothing depends on it, and the engine might not respond."""
        cancelling = asyncio.create_task(self._cancel_now(job.name))
        self._cancelling.add(cancelling)
        cancelling.add_done_callback(self._cancelling.discard)

    async def _cancel_now(self, name: str) -> None:
        try:
            async with self._cancellations, asyncio.timeout(_ENGINE_SECONDS):
                await self._engine.cancel(name)
        except (SandboxError, OSError, TimeoutError) as error:
            _log.warning("The job %s could not be cancelled: %s", name, error_reason(error))

    def _create(self, task_id: str, resources: Resources, lost: Job | None) -> Job:
        """Create a job; delay its submission if workers of the task were lost repeatedly."""
        attempt_id = new_attempt_id()
        stored = StoredJob(task_id, attempt_id, resources, self._settings.lease_seconds, (attempt_id,))
        self._store.save(stored)
        job = Job(stored, time.monotonic())
        if lost is not None and self._losses[task_id] > 0:
            pause = min(2.0 ** min(self._losses[task_id], _BACKOFF_EXPONENT_MAX), _REPLACE_SECONDS_MAX)
            is_rejected = bool(self.rejections.reason(task_id))
            event, cause = ("was rejected", "") if is_rejected else ("was lost", f" {lost.reason}")
            job.postpone(pause, f"The worker {event}; another one will be started after a pause.{cause}")
        self._add(job)
        self._done.pop(stored.task_id, None)
        self._wake.set()
        return job

    def _add(self, job: Job) -> None:
        stored = job.stored
        self._jobs[stored.attempt_id] = job
        self._by_attempt |= dict.fromkeys(stored.attempt_ids, job)
        if stored.task_id not in self._by_task or not stored.is_abandoned:
            self._by_task[stored.task_id] = job

    def _save(self, job: Job, **changes: object) -> None:
        """Store changes, then apply them."""
        stored = msgspec.structs.replace(job.stored, **changes)
        self._store.save(stored)
        job.set_stored(stored)


def _claim_state(stored: StoredJob) -> ClaimState:
    return ClaimState(stored.token_hashes, stored.nonce_hash, stored.is_fenced or stored.is_abandoned)


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _loss_reason(job: Job) -> str:
    """Return what the engine reports about a job that no longer runs; empty if unknown, or if it waits or runs."""
    if job.status is None or job.status.phase in {JobPhase.WAITING, JobPhase.RUNNING}:
        return ""
    return job.status.reason
