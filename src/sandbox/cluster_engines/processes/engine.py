"""Runs workers as processes on this machine, for tests and for trying out a cluster setup without a batch system.

The directory of one job, from which its supervisor is started and its status is read:

NAME/environment    the worker's environment, with its join token; removed when the worker is started
NAME/request.json   the rest of the request, and the position in the queue; written before anything is started
NAME/lock           the supervisor and the worker hold this lock
NAME/started.json   the supervisor's process id, start time and boot id; written before the worker is started
NAME/withdrawn      the job was cancelled
NAME/ended.json     the exit code of the worker, negative after a signal
NAME/supervisor.log the errors of the supervisor

Each job has a directory. The files survive the server, and so does a supervisor. The next lookup by any server starts
the waiting jobs that fit, in order of submission. Jobs have no memory or CPU limits: only the sum of their requests is
bounded.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from sandbox.cluster_engines import check_job_name, is_job_name
from sandbox.cluster_engines.processes.supervisor import read_boot_id, read_start_time
from sandbox.interfaces.cluster_engine import (
    EngineHost,
    EngineRejectedError,
    EngineUnavailableError,
    JobPhase,
    JobRequest,
    JobStatus,
)
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.resources import Resources
from sandbox.primitives.files import create_private_file, fsync_path, replace_durably, write_durably

_Record = TypeVar("_Record")
_log = logging.getLogger(__name__)
_START_SECONDS = 20.0
_SUPERVISOR = (sys.executable, "-I", "-m", "sandbox.cluster_engines.processes.supervisor")
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}


class StoredRequest(msgspec.Struct, frozen=True):
    """The file `request.json`."""

    position: int
    request: JobRequest


class _StartedSupervisor(msgspec.Struct, frozen=True):
    """The file `started.json`."""

    pid: int
    start_time: int
    boot_id: str


class JobDirectory:
    """The files of one job. Raises ValueError for an invalid job name."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = check_job_name(name)
        self._path = root / name
        self._environment = self._path / "environment"

    def create(self, stored: StoredRequest) -> None:
        """Store the request. A directory without a complete request does not count as a job."""
        self._path.mkdir(mode=0o700, exist_ok=True)
        fsync_path(self._path.parent)
        part = self._environment.with_suffix(".part")
        with create_private_file(part) as file:
            file.write(msgspec.json.encode(stored.request.environment))
        replace_durably(part, self._environment)
        request = msgspec.structs.replace(stored.request, environment={})
        write_durably(
            self._path / "request.json", msgspec.json.encode(msgspec.structs.replace(stored, request=request))
        )

    def read_request(self) -> StoredRequest | None:
        """Return the stored request; None if there is no job."""
        return _decode(self._path / "request.json", StoredRequest)

    def start(self) -> None:
        """Start the supervisor, which detaches itself. After a failure, the job waits for the next lookup."""
        log = self._path / "supervisor.log"
        with log.open("ab") as errors:
            try:
                completed = subprocess.run(
                    [*_SUPERVISOR, str(self._path)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env=_ENVIRONMENT,
                    cwd="/",
                    timeout=_START_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                _log.warning("the job %s was not started within %g s", self.name, _START_SECONDS)
                return
        if completed.returncode != 0:
            _log.warning("the job %s was not started; see %s", self.name, log)

    def cancel(self) -> None:
        """Prevent the start of the supervisor or, if it is running, end it."""
        write_durably(self._path / "withdrawn", b"")
        self._environment.unlink(missing_ok=True)
        started = _decode(self._path / "started.json", _StartedSupervisor)
        if started is None or started.boot_id != read_boot_id():
            return
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(started.pid)
            try:
                # The open pidfd rules out a later process with the same id.
                if read_start_time(started.pid) == started.start_time:
                    for number in (signal.SIGTERM, signal.SIGCONT):
                        signal.pidfd_send_signal(pidfd, number)
            finally:
                os.close(pidfd)

    def phase(self) -> JobPhase:
        """Return the phase of the job."""
        if self.read_request() is None:
            return JobPhase.UNKNOWN
        if (self._path / "ended.json").exists():
            return JobPhase.ENDED
        if self._is_locked():
            return JobPhase.RUNNING
        was_started_or_cancelled = (self._path / "started.json").exists() or (self._path / "withdrawn").exists()
        return JobPhase.ENDED if was_started_or_cancelled else JobPhase.WAITING

    def status(self, host: str) -> JobStatus:
        """Return the status of the job."""
        phase = self.phase()
        started = _decode(self._path / "started.json", _StartedSupervisor)
        if phase is JobPhase.UNKNOWN:
            return JobStatus(phase, reason="There is no job with this name.")
        return JobStatus(
            phase,
            host=host if started is not None else "",
            reason=self._describe(phase, was_started=started is not None),
            job_id=str(started.pid) if started is not None else "",
        )

    def _describe(self, phase: JobPhase, *, was_started: bool) -> str:
        if phase is JobPhase.RUNNING:
            return ""
        if phase is JobPhase.WAITING:
            return "The job is waiting until the machine has enough free CPUs, memory and disk."
        if not was_started:
            return "The job was cancelled before it was started."
        try:
            exit_code = int(json.loads((self._path / "ended.json").read_bytes())["exit_code"])
        except (OSError, ValueError, KeyError, TypeError):
            return "The worker was killed together with its supervisor, or the machine was restarted."
        how = f"was ended by signal {-exit_code}" if exit_code < 0 else f"exited with {exit_code}"
        return f"The worker {how}."

    def remove(self) -> None:
        """Remove the files, beginning with the request, because there is no job without a request."""
        (self._path / "request.json").unlink(missing_ok=True)
        shutil.rmtree(self._path)

    def _is_locked(self) -> bool:
        """Return whether the supervisor or the worker is alive. The kernel releases the lock when both have ended."""
        try:
            lock_fd = os.open(self._path / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            return not try_lock(lock_fd)
        finally:
            os.close(lock_fd)


def try_lock(lock_fd: int) -> bool:
    """Acquire the lock on an open file without waiting. Returns whether this succeeded."""
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _decode(path: Path, record: type[_Record]) -> _Record | None:
    """Return the record in a file; None if there is no complete one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=record)
    except (FileNotFoundError, *DECODE_ERRORS):
        return None


ENDED_JOBS_MAX = 200
"""Number of ended jobs whose status is kept. Older ones become `UNKNOWN`."""

_LOCK_SECONDS = 20.0
_LOCK_POLL_SECONDS = 0.02


class ProcessEngine:
    """Implements `interfaces.cluster_engine.Engine` for this machine.

    Several servers can use a directory, one after the other.

    directory: the directory of the jobs, on a local file system. host: the name of this machine in the status.
    capacity: the resources that all running jobs may request in total.
    """

    def __init__(self, directory: Path, host: str, capacity: Resources) -> None:
        self._directory = directory
        self._host = host
        self._capacity = capacity

    async def submit(self, request: JobRequest) -> None:
        """Store the request, and start the worker if it fits. Implements `Engine.submit`."""
        self._job_directory(request.name)
        if self._host in request.excluded_hosts:
            raise EngineRejectedError(f"No host is left for the job: the only host, {self._host}, is excluded.")
        if not request.resources.fits_in(self._capacity):
            shortfall = ", ".join(request.resources.describe_shortfall(self._capacity, "in total"))
            raise EngineRejectedError(f"This machine is too small for the job: {shortfall}. Lower the request.")
        await asyncio.to_thread(self._submit, request)

    async def cancel(self, name: str) -> None:
        """Mark the job as cancelled, then send SIGTERM to its supervisor. Implements `Engine.cancel`."""
        self._job_directory(name)
        await asyncio.to_thread(self._cancel, name)

    async def reconcile_jobs(self, names: Collection[str]) -> Mapping[str, JobStatus]:
        """Start the waiting jobs that fit, then read the files. Implements `Engine.reconcile_jobs`."""
        for name in names:
            self._job_directory(name)
        return await asyncio.to_thread(self._reconcile_jobs, frozenset(names))

    async def maximal_host_sizes(self) -> Sequence[Resources]:
        """Return the capacity of this machine. Implements `Engine.maximal_host_sizes`."""
        return (self._capacity,)

    async def hosts(self) -> Sequence[EngineHost]:
        """Return this machine. Implements `Engine.hosts`."""
        return (EngineHost(self._host, self._capacity),)

    def _job_directory(self, name: str) -> "JobDirectory":
        return JobDirectory(self._directory, name)

    def _submit(self, request: JobRequest) -> None:
        with self._locked():
            jobs = self._jobs()
            if any(job.files.name == request.name for job in jobs):
                return
            self._job_directory(request.name).create(
                StoredRequest(1 + max((job.position for job in jobs), default=0), request)
            )
            self._start_waiting(self._jobs())

    def _cancel(self, name: str) -> None:
        with self._locked():
            job = self._job_directory(name)
            if job.read_request() is not None:
                job.cancel()

    def _reconcile_jobs(self, names: Collection[str]) -> Mapping[str, JobStatus]:
        with self._locked():
            jobs = self._jobs()
            self._start_waiting(jobs)
            ended = [job for job in jobs if job.phase is JobPhase.ENDED]
            for job in ended[: max(0, len(ended) - ENDED_JOBS_MAX)]:
                job.files.remove()
            return {name: self._job_directory(name).status(self._host) for name in names}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the directory's lock, so that no other server or thread starts jobs. Raises EngineUnavailableError."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock_fd = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                deadline = time.monotonic() + _LOCK_SECONDS
                while not try_lock(lock_fd):
                    if time.monotonic() > deadline:
                        raise EngineUnavailableError(f"{self._directory} is busy; stop other servers that use it.")
                    time.sleep(_LOCK_POLL_SECONDS)
                yield
            finally:
                os.close(lock_fd)
        except OSError as error:
            raise EngineUnavailableError(f"The jobs in {self._directory} cannot be managed: {error}.") from error

    def _jobs(self) -> "list[_Job]":
        """Return all jobs, in order of submission."""
        jobs = []
        for path in self._directory.iterdir():
            if is_job_name(path.name) and path.is_dir():
                files = JobDirectory(self._directory, path.name)
                if (stored := files.read_request()) is not None:
                    jobs.append(_Job(stored.position, files, stored.request.resources, files.phase()))
        return sorted(jobs, key=lambda job: job.position)

    def _start_waiting(self, jobs: "list[_Job]") -> None:
        """Start the oldest waiting jobs, up to the first job that does not fit."""
        free = self._capacity
        for job in jobs:
            if job.phase is JobPhase.RUNNING:
                free = _subtract(free, job.resources)
        for job in jobs:
            if job.phase is not JobPhase.WAITING:
                continue
            if not job.resources.fits_in(free):
                return
            job.files.start()
            free = _subtract(free, job.resources)


class _Job(NamedTuple):
    """A job, and its phase when its files were read."""

    position: int
    files: "JobDirectory"
    resources: Resources
    phase: JobPhase


def _subtract(total: Resources, used: Resources) -> Resources:
    return Resources(total.cpus - used.cpus, total.memory_bytes - used.memory_bytes, total.disk_bytes - used.disk_bytes)
