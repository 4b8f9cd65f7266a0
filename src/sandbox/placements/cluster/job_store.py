"""Stores the jobs of a server in files, so they survive the server."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.resources import Resources
from sandbox.primitives.durable_files import fsync_path, write_durably


class StoredJob(msgspec.Struct, frozen=True, rename={"is_abandoned": "is_given_up", "was_end_confirmed": "has_ended"}):
    """What the server stores about a job.

    lease_seconds: how long the worker may communicate after an answer. The server's setting may change later.
    attempt_id: names the job. attempt_ids: the attempts of the task that this worker runs or ran, in order.
    token_hashes: SHA-256 of each submission's join token. After a crash, there may be several.
    nonce_hash: SHA-256 of the random number of the worker that has claimed the job; None before the claim.
    host, boot_id, runtime: sent by the worker that has claimed the job.
    is_fenced: the worker sent an invalid message. It gets no more answers, so its lease ends.
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
