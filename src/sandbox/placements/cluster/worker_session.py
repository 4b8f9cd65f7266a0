"""The connection of a worker that has claimed a job: requests to the worker, and the state of its host.

Sessions run on one event loop, which runs in a thread (`LoopThread`), except as noted. `WorkerClient` sends requests
from any other thread. Messages from workers are untrusted.
"""

import asyncio
import contextlib
import errno
import itertools
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from hmac import compare_digest
from typing import Any, TypeVar

import msgspec

from sandbox.interfaces.images import ImageUnusableError
from sandbox.interfaces.journal import JournalBusyError, LockState
from sandbox.interfaces.placement import AttemptLocation, HostUnreachableError
from sandbox.interfaces.runner import RunnerNotStartedError
from sandbox.interfaces.worker_messages import (
    HEARTBEAT_SECONDS_MAX,
    CallResult,
    FindImage,
    Heartbeat,
    JoinStream,
    Launch,
    OpenStream,
    PrepareImage,
    ReadEndOffset,
    ReceiveRecords,
    Request,
    ServerCall,
    ServerMessage,
    StartDebugSession,
    StreamRefused,
    TaskEnded,
)
from sandbox.model.errors import DECODE_ERRORS, SandboxError
from sandbox.model.fixed_limits import CONTROL_REQUEST_TIMEOUT_SECONDS
from sandbox.placements.cluster.file_transfers import ImageOffer
from sandbox.placements.cluster.jobs import Jobs
from sandbox.primitives.message_stream import StreamPair, encode_message

_SILENCE_SECONDS = 3 * HEARTBEAT_SECONDS_MAX
_JOURNAL_ERRORS = (JournalBusyError, RunnerNotStartedError)
_ERRORS: dict[type[Request], tuple[type[SandboxError | OSError], ...]] = {
    PrepareImage: (ImageUnusableError,),
    FindImage: (ImageUnusableError,),
    ReadEndOffset: _JOURNAL_ERRORS,
    ReceiveRecords: _JOURNAL_ERRORS,
    Launch: _JOURNAL_ERRORS,
    StartDebugSession: (RunnerNotStartedError,),
}
"""The errors of each request, apart from OSError. A compromised worker could name any error."""


class WorkerSession:
    """The connection of the worker that has claimed a job.

    copied_end_offset: the offset after the last record of the server's copy of the journal.
    key: authenticates further connections of the session.
    image_offer: the image that the worker may fetch.
    """

    def __init__(self, writer: asyncio.StreamWriter, host: str, copied_end_offset: int) -> None:
        self._writer = writer
        self._host = host
        self.key = os.urandom(32)
        self._numbers = itertools.count(1)
        self._results: dict[int, asyncio.Future[CallResult]] = {}
        self._streams: dict[int, asyncio.Future[StreamPair]] = {}
        self._heartbeat: Heartbeat | None = None
        self._heartbeat_at = time.monotonic()
        self._is_launching = False
        self._launches = 0
        self.image_offer = ImageOffer()
        self.copied_end_offset = copied_end_offset
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def lock_state(self) -> LockState:
        """Whether a runner holds the journal's lock. Thread-safe.

        UNKNOWN if no recent heartbeat covers the last launch, or if no runner holds the lock but the server's copy of
        the journal lacks records.
        """
        heartbeat = self._heartbeat
        if heartbeat is None or self._is_launching or heartbeat.is_launching or heartbeat.launches < self._launches:
            return LockState.UNKNOWN
        if time.monotonic() - self._heartbeat_at >= _SILENCE_SECONDS:
            return LockState.UNKNOWN
        if heartbeat.lock_state == "held":
            return LockState.HELD
        return LockState.FREE if self.copied_end_offset >= heartbeat.end_offset else LockState.UNKNOWN

    def has_key(self, key: bytes) -> bool:
        """Return whether this is the session's key."""
        return compare_digest(key, self.key)

    def send(self, message: ServerMessage) -> None:
        """Send a message. A worker that does not read is disconnected by the kernel or by the end of its lease."""
        if not self._writer.is_closing():
            self._writer.write(encode_message(message))

    def notify_task_ended(self) -> None:
        """Notify the worker that the task has ended."""
        self.send(TaskEnded())

    def close(self) -> None:
        """Close the connection, cancel its tasks, and raise an error in every caller that waits for the worker."""
        if not self._writer.is_closing():
            self._writer.close()
        for task in self._tasks:
            task.cancel()
        waiters: list[asyncio.Future[Any]] = [*self._results.values(), *self._streams.values()]
        for waiting in waiters:
            if not waiting.done():
                waiting.set_exception(HostUnreachableError(self._host))
                waiting.exception()  # otherwise, asyncio logs the error if nothing is waiting

    def receive(self, message: Heartbeat | CallResult | StreamRefused) -> None:
        """Store the state of the worker's host, or pass a result to its caller if the caller is still waiting."""
        match message:
            case Heartbeat():
                self._heartbeat, self._heartbeat_at = message, time.monotonic()
            case CallResult():
                result = self._results.get(message.call_id)
                if result is not None and not result.done():
                    result.set_result(message)
            case StreamRefused():
                stream = self._streams.get(message.stream_id)
                if stream is not None and not stream.done():
                    stream.set_exception(ConnectionRefusedError(errno.ECONNREFUSED, "No runner listens"))

    def record_copied(self, end_offset: int) -> None:
        """Set the size of the server's copy of the journal."""
        self.copied_end_offset = end_offset

    @contextlib.contextmanager
    def cancelling_on_close(self) -> Iterator[None]:
        """Cancel the current task if the session ends within the context. Raises HostUnreachableError."""
        self._check_open()
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    def receive_stream(self, message: JoinStream, streams: StreamPair) -> bool:
        """Pass a connection to the caller that is waiting for it. Return False if nobody is waiting."""
        future = self._streams.get(message.stream_id)
        if future is None or future.done():
            return False
        future.set_result(streams)
        return True

    async def call(
        self, request: Request, result_type: Any, timeout_seconds: float = CONTROL_REQUEST_TIMEOUT_SECONDS
    ) -> Any:
        """Send a request and return its result, converted to `result_type`.

        Raises HostUnreachableError, or the error of the worker.
        """
        call_id = next(self._numbers)
        future = self._results[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._check_open()
            self.send(ServerCall(call_id, request))
            async with asyncio.timeout(timeout_seconds):
                answer = await future
        except TimeoutError as error:
            raise HostUnreachableError(self._host) from error
        finally:
            del self._results[call_id]
        if answer.error:
            raise _convert_error(request, answer)
        try:
            return msgspec.json.decode(answer.value, type=result_type)
        except DECODE_ERRORS as error:
            raise HostUnreachableError(self._host) from error

    def post(self, request: Request) -> None:
        """Send a request whose result nobody needs."""
        self.send(ServerCall(next(self._numbers), request))

    def begin_launch(self) -> None:
        """Make the lock state UNKNOWN until `end_launch`. Thread-safe.

        Raises JournalBusyError during another launch.
        """
        if self._is_launching:
            raise JournalBusyError(f"Another runner is being started on {self._host}.")
        self._is_launching = True

    def end_launch(self) -> None:
        """End the launch that `begin_launch` began."""
        self._is_launching = False

    async def launch(self, request: Request, timeout_seconds: float) -> None:
        """Send a launch request. Heartbeats from before the launch no longer count.

        Returns normally if the worker does not respond: the runner may have been started.
        """
        try:
            self._launches = await self.call(request, int, timeout_seconds)
        except HostUnreachableError:
            pass
        finally:
            self._heartbeat = None

    async def open_stream(self, attempt_id: str) -> StreamPair:
        """Open a stream to the control socket of an attempt. Raises OSError."""
        stream_id = next(self._numbers)
        future: asyncio.Future[StreamPair] = asyncio.get_running_loop().create_future()
        self._streams[stream_id] = future
        try:
            self._check_open()
            self.send(OpenStream(stream_id, attempt_id))
            async with asyncio.timeout(CONTROL_REQUEST_TIMEOUT_SECONDS):
                return await future
        except TimeoutError as error:
            raise HostUnreachableError(self._host) from error
        finally:
            del self._streams[stream_id]

    def _check_open(self) -> None:
        if self._writer.is_closing():
            raise HostUnreachableError(self._host)


def _convert_error(request: Request, answer: CallResult) -> Exception:
    """Return the worker's error, or an OSError if requests of this type cannot fail with that error."""
    expected = {error.__name__: error for error in _ERRORS.get(type(request), ())}
    return expected.get(answer.error, OSError)(answer.message)


T = TypeVar("T")

_CLOSING_STEPS = 5
"""Number of event loop iterations within which an aborted connection is closed."""


class LoopThread:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._is_closing = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="cluster", daemon=True)
        self._thread.start()

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop's thread, and wait for its result. Raises OSError after `close`."""
        self._check_open(coroutine)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def run_blocking(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop's thread, and block until it returns.

        The coroutine must have a time limit. Raises OSError after `close`.
        """
        self._check_open(coroutine)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def post(self, function: Callable[[], None]) -> None:
        """Call a function in the event loop's thread, and do not wait for it. Does nothing after `close`."""
        if not self._is_closing:
            self._loop.call_soon_threadsafe(function)

    def _check_open(self, coroutine: Coroutine[Any, Any, T]) -> None:
        if self._is_closing:
            coroutine.close()
            raise HostUnreachableError("of the cluster", "cannot be reached, because the server is stopping")

    def close(self) -> None:
        """Cancel all tasks of the event loop, and end its thread. Idempotent."""
        self._is_closing = True
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for _ in range(_CLOSING_STEPS):
        await asyncio.sleep(0)


WORKER_LAUNCH_TIMEOUT_SECONDS = 40.0
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
        return self.thread.run_blocking(self._request(location, request, result_type, CONTROL_REQUEST_TIMEOUT_SECONDS))

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

    def may_have_files(self, location: AttemptLocation) -> bool:
        """Return whether the attempt's host may have files, which is the case while the attempt's worker exists.

        The worker removes the files before the server deletes the job.
        """
        job = self.jobs.of_attempt(location.attempt_id)
        return job is not None and job.is_claimed and not job.stored.is_abandoned
