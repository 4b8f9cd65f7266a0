"""The state of one job: what is stored in a file, what the engine reports, and whether its worker is connected.

The stored part survives the server. A `Job` is used on one event loop only.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from sandbox.interfaces.cluster_engine import JobPhase, JobStatus, job_name
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.placement import HostIdentity
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.resources import Resources
from sandbox.placements.cluster.claim_and_takeover_rules import Observation
from sandbox.primitives.files import fsync_path, write_durably


class StoredJob(msgspec.Struct, frozen=True, rename={"is_abandoned": "is_given_up", "was_end_confirmed": "has_ended"}):
    """What the server stores about a job.

    lease_seconds: how long the worker may communicate after an answer. The server's setting may change later.
    attempt_id: names the job. attempt_ids: the attempts of the task that this worker runs or ran, in order.
    token_hashes: SHA-256 of each submission's join token. After a crash, there may be several.
    nonce_hash: SHA-256 of the nonce of the worker that has claimed the job; None before the claim.
    host, boot_id, runtime: sent by the worker that has claimed the job.
    is_fenced: the worker sent an invalid message. It gets no further responses, so its lease ends.
    is_abandoned: the worker can no longer communicate, and the journal may be continued elsewhere.
    was_end_confirmed: the engine confirmed the end of the abandoned worker.
    loss_reason: what the engine reported about the abandoned worker; empty if it reported no problem.
    excluded_hosts: the hosts that were drained when the job was submitted, sorted.
    """

    task_id: str
    attempt_id: str
    resources: Resources
    lease_seconds: float
    attempt_ids: tuple[str, ...] = ()
    token_hashes: tuple[bytes, ...] = ()
    nonce_hash: bytes | None = None
    host: str = ""
    boot_id: str = ""
    runtime: str = ""
    is_fenced: bool = False
    is_abandoned: bool = False
    was_end_confirmed: bool = False
    excluded_hosts: tuple[str, ...] = ()
    loss_reason: str = ""


class JobStore:
    """Stores each job in a file under the data directory. No other process reads the files at the same time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fsync_path(directory.parent)

    def load_all(self) -> Iterator[StoredJob]:
        """Yield all jobs. Raises OSError if a file cannot be decoded, because its job would otherwise be lost."""
        for path in sorted(self._directory.glob("*.json")):
            try:
                yield msgspec.json.decode(path.read_bytes(), type=StoredJob)
            except DECODE_ERRORS as error:
                raise OSError(f"{path} is damaged: {error}; restore it from a backup.") from error

    def save(self, job: StoredJob) -> None:
        """Store a job; it is on disk on return. Raises OSError."""
        write_durably(self._path(job), msgspec.json.encode(job))

    def remove(self, job: StoredJob) -> None:
        """Remove a job. Idempotent. Raises OSError."""
        self._path(job).unlink(missing_ok=True)

    def _path(self, job: StoredJob) -> Path:
        return self._directory / f"{job.attempt_id}.json"


class JobSession(Protocol):
    """The connection of the worker that has claimed a job; implemented by `WorkerSession`."""

    @property
    def lock_state(self) -> LockState:
        """Whether a runner holds the journal's lock. Thread-safe."""
        ...

    def notify_task_ended(self) -> None:
        """Notify the worker that the task has ended."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class Job:
    """A job with its state in memory."""

    def __init__(self, stored: StoredJob, now: float) -> None:
        self.stored = stored
        self.session: JobSession | None = None
        self._answered_at = now
        """When the server last answered the worker; an earlier server may have answered until this one started."""
        self.status: JobStatus | None = None
        """The status last reported by the engine, with the job's id and host; None if the engine is not responding."""
        self.phase: JobPhase | None = None
        """The phase in the status, insofar as it applies to the worker that has claimed the job."""
        self.phase_since = now
        self.reason = "The job is being submitted."
        self._not_before = now
        self.claimed_at = now
        self.has_task_ended = False
        self._changed = asyncio.Event()

    @property
    def is_claimed(self) -> bool:
        """Whether a worker has claimed the job."""
        return self.stored.nonce_hash is not None

    @property
    def name(self) -> str:
        """The name of the job."""
        return job_name(self.stored.attempt_id)

    @property
    def identity(self) -> HostIdentity:
        """The host of the worker."""
        return HostIdentity(f"cluster:{self.stored.host}", self.stored.boot_id)

    @property
    def may_answer_worker(self) -> bool:
        """Whether the server may answer the worker. An answer extends the worker's lease."""
        return not (self.stored.is_abandoned or self.stored.is_fenced)

    @property
    def is_postponed(self) -> bool:
        """Whether the job must not be submitted now, because of a recent submission or the loss of a worker."""
        return time.monotonic() < self._not_before

    async def wait_for_change(self, timeout_seconds: float) -> None:
        """Wait for the end of the connection, another lock state or another confirmed host, or for the timeout."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._changed.wait()

    def wake_waiters(self) -> None:
        """Wake everything that waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    def connect(self, session: JobSession) -> None:
        """Set the connection of the worker, and close an earlier one."""
        if self.session is not None:
            self.session.close()
        self.session = session
        self.record_answer()

    def disconnect(self, session: JobSession) -> None:
        """Remove the connection, unless the worker has another one already."""
        if self.session is session:
            self.session = None
            self.wake_waiters()

    def record_answer(self) -> None:
        """Record that the server is answering the worker now, which extends the worker's lease."""
        self._answered_at = time.monotonic()

    def set_stored(self, stored: StoredJob) -> None:
        """Set what was stored."""
        if stored.nonce_hash != self.stored.nonce_hash:
            self.claimed_at = time.monotonic()
        self.stored = stored

    def postpone(self, seconds: float, reason: str) -> None:
        """Delay the submission of the job by at least this time."""
        self._not_before, self.reason = time.monotonic() + seconds, reason

    def mark_task_ended(self) -> None:
        """Record that the task has ended, and notify the worker."""
        self.has_task_ended = True
        if self.session is not None:
            self.session.notify_task_ended()

    def set_status(self, status: JobStatus | None, now: float) -> None:
        """Set the engine's report, or None if the engine is not responding."""
        phase = None if status is None else self._phase_of_worker(status)
        if phase is not self.phase:
            self.phase, self.phase_since = phase, now
        before, self.status = confirmed_host(self), status
        if confirmed_host(self) != before:
            self.wake_waiters()
        if status is not None and not (phase is JobPhase.UNKNOWN and self.is_postponed):
            self.reason = status.reason or self._describe(status)

    def _describe(self, status: JobStatus) -> str:
        if status.phase is JobPhase.RUNNING and not self.is_claimed:
            return f"The worker is starting on {status.host}."
        return f"The job is {status.phase}."

    def _phase_of_worker(self, status: JobStatus) -> JobPhase:
        """Return the phase of the job on the worker's host.

        The end of the job on another host proves nothing: an engine may also start the job, or a copy of it, there.
        """
        if status.phase is JobPhase.ENDED and self.is_claimed and status.host != self.stored.host:
            return JobPhase.UNREACHABLE
        return status.phase

    def observe(self, now: float) -> Observation:
        """Return the server's observations about the worker."""
        return Observation(
            self.is_claimed, self.session is not None, now - self._answered_at, self.phase, now - self.phase_since
        )


def confirmed_host(job: Job) -> str:
    """Return the job's host, according to the engine; empty if the engine does not run the job, or is ending it."""
    status = job.status
    return status.host if status is not None and status.phase is JobPhase.RUNNING and not status.is_ending else ""
