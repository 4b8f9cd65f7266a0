"""Sends requests to the workers of attempts from any thread."""

import contextlib
from functools import partial
from typing import Any

from sandbox.interfaces.placement import AttemptLocation, HostUnreachableError
from sandbox.interfaces.worker_messages import Request
from sandbox.model.fixed_limits import CONTROL_REQUEST_TIMEOUT_SECONDS
from sandbox.placements.cluster.event_loop_thread import LoopThread
from sandbox.placements.cluster.jobs import Jobs
from sandbox.placements.cluster.worker_session import WorkerSession
from sandbox.primitives.message_stream import StreamPair

LAUNCH_SECONDS = 40.0
"""How long a worker may take to start a runner."""


class WorkerClient:
    """Sends requests to the workers of attempts, from any thread."""

    def __init__(self, jobs: Jobs, thread: LoopThread) -> None:
        self.jobs = jobs
        self.thread = thread

    def request_blocking(self, location: AttemptLocation, request: Request, result_type: Any) -> Any:
        """Send a request to an attempt's worker, and block until the result arrives.

        Raises OSError, HostUnreachableError.
        """
        self.session_of(location)
        return self.thread.wait_for(self._request(location, request, result_type, CONTROL_REQUEST_TIMEOUT_SECONDS))

    async def request(
        self,
        location: AttemptLocation,
        request: Request,
        result_type: Any,
        timeout_seconds: float = CONTROL_REQUEST_TIMEOUT_SECONDS,
    ) -> Any:
        """Send a request to the worker of an attempt. Raises OSError, HostUnreachableError."""
        return await self.thread.run(self._request(location, request, result_type, timeout_seconds))

    async def _request(
        self, location: AttemptLocation, request: Request, result_type: Any, timeout_seconds: float
    ) -> Any:
        return await self.session_of(location).call(request, result_type, timeout_seconds)

    def post(self, location: AttemptLocation, request: Request) -> None:
        """Send a request, if the worker is connected, and do not wait for the result."""
        with contextlib.suppress(HostUnreachableError):
            self.thread.post(partial(self.session_of(location).post, request))

    async def open_stream(self, location: AttemptLocation) -> StreamPair:
        """Open a stream to the control socket of an attempt. Call this in the event loop's thread. Raises OSError."""
        return await self.session_of(location).open_stream(location.attempt_id)

    def session_of(self, location: AttemptLocation) -> WorkerSession:
        """Return the session of an attempt's worker, or of the task's current worker. Raises HostUnreachableError."""
        job = self.jobs.of_attempt(location.attempt_id) or self.jobs.of_task(location.task_id)
        session = None if job is None or job.stored.is_abandoned else job.session
        if not isinstance(session, WorkerSession):
            raise HostUnreachableError(location.host)
        return session

    def has_files(self, location: AttemptLocation) -> bool:
        """Return whether the attempt's host may have files, which is the case while the attempt's worker exists.

        The worker removes the files before the server deletes the job.
        """
        job = self.jobs.of_attempt(location.attempt_id)
        return job is not None and job.is_claimed and not job.stored.is_abandoned
