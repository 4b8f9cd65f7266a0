"""Runs workers as processes on this machine, for tests and for trying out a cluster setup without a batch system.

Each job has a directory. The files survive the server, and so does a supervisor. The next look-up by any server starts
the waiting jobs that fit, in order of submission. Jobs have no memory or CPU limits: only the sum of their requests is
bounded.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sandbox.cluster_engines import is_job_name
from sandbox.cluster_engines.processes.job_directory import JobDirectory, StoredRequest, try_lock
from sandbox.interfaces.cluster_engine import (
    EngineHost,
    EngineRejectedError,
    EngineUnavailableError,
    JobPhase,
    JobRequest,
    JobStatus,
)
from sandbox.model.resources import Resources

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
