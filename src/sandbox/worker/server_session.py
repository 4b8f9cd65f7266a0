"""One connection of a worker to its server, after the claim: heartbeats, the lease, replication and requests."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sandbox.interfaces.journal import JournalDamagedError, LockState, RecordBatch
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.interfaces.worker_messages import (
    ARTIFACT_PART_BYTES,
    HEARTBEAT_SECONDS_MAX,
    LEFTOVER_TASK_BATCH_MAX,
    RECORD_BATCH_BYTES,
    RUNNER_LOG_BYTES_MAX,
    SERVER_MESSAGE_BYTES_MAX,
    ArtifactPart,
    CallResult,
    Claimed,
    EndedTasks,
    FetchImage,
    FindEndedTasks,
    FirstMessage,
    Heartbeat,
    HeartbeatAnswer,
    JoinStream,
    OpenStream,
    PrepareImage,
    ReceiveRecords,
    Records,
    RecordsReceived,
    Request,
    RunnerLog,
    ServerCall,
    ServerMessage,
    StreamRefused,
    TaskEnded,
    Upload,
    UploadReceived,
    WorkDone,
    WorkerDismissed,
    WorkerMessage,
)
from sandbox.interfaces.workspace import CredentialAnswer, CredentialRequest
from sandbox.model.artifacts import Artifact
from sandbox.model.errors import SandboxError, error_reason
from sandbox.model.events import ArtifactCollected, TaskFinished
from sandbox.primitives.message_stream import StreamPair, encode_message, read_message
from sandbox.worker.task_requests import HostFilesError, OtherTaskLeftovers, WorkerTask

server_message_decoder: "msgspec.msgpack.Decoder[ServerMessage]" = msgspec.msgpack.Decoder(ServerMessage)
_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_ANSWER_SECONDS = 60.0
_CREDENTIAL_SECONDS = 60.0
_SILENCE_SECONDS = 15.0
_LAST_ANSWER_SECONDS = 10.0
_RETRY_SECONDS = 0.5
_DAMAGED_JOURNAL_TIMEOUT_SECONDS = 60.0
_RENEWAL_SECONDS_MAX = 5.0
_MESSAGE_CHARACTERS_MAX = 4096
_COPY_BYTES = 2**16


def seconds_since_boot() -> float:
    """Return the seconds since the host booted, including any time for which the host was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class DismissedError(Exception):
    """The server does not accept this worker, or it has abandoned the attempt."""


Dial = Callable[[FirstMessage], Awaitable[StreamPair]]
"""Opens a connection to the server, and sends the first message on it. Raises OSError."""


class Lease:
    """The time until which the runner may communicate, measured by `seconds_since_boot`."""

    def __init__(self) -> None:
        self.deadline = 0.0

    def extend(self, sent_at: float, seconds: float) -> None:
        """Extend the lease, because the server answered a message that was sent at this time."""
        self.deadline = max(self.deadline, sent_at + seconds)


class _RunnerState(NamedTuple):
    """What a heartbeat reports."""

    lock_state: LockState
    end_offset: int
    launches: int
    is_launching: bool


class ServerSession:
    """One connection to the server. `run` returns once the task has ended and no longer needs files on this host."""

    def __init__(
        self,
        task: WorkerTask,
        other_leftovers: OtherTaskLeftovers,
        lease: Lease,
        streams: StreamPair,
        claimed: Claimed,
        dial: Dial,
    ) -> None:
        self._worker_task = task
        self._other_leftovers = other_leftovers
        self._lease = lease
        self._reader, self._writer = streams
        self._claimed = claimed
        self._dial = dial
        self._copied_end_offset = claimed.end_offset
        self._sent_at: dict[int, float] = {}
        self._renewed_until = 0.0
        self._answered_at = time.monotonic()
        self._received: asyncio.Future[RecordsReceived] | None = None
        self._ended: asyncio.Future[EndedTasks] | None = None
        self._credentials: dict[int, asyncio.Future[CredentialAnswer]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_done = False
        self._unreadable_since: float | None = None

    @property
    def has_copied_all(self) -> bool:
        """Whether the server has every record of a journal that no runner writes."""
        return self._worker_task.lock_state() is LockState.FREE and self._end_offset() <= self._copied_end_offset

    async def run(self) -> None:
        """Serve the connection.

        Raises OSError if it breaks, InvalidMessageError, DismissedError; HostFilesError if this host's own files
        cannot be used.
        """
        loops = [asyncio.create_task(loop) for loop in (self._read(), self._send_heartbeats(), self._replicate())]
        ending = asyncio.create_task(self._wait_for_end())
        self._start(self._remove_leftovers())
        self._start(self._serve_credentials())
        try:
            await asyncio.wait({ending, *loops}, return_when=asyncio.FIRST_COMPLETED)
            for each in (ending, *loops):
                if each.done():
                    return each.result()
        finally:
            for each in (ending, *loops, *self._tasks):
                each.cancel()
            await asyncio.gather(ending, *loops, *self._tasks, return_exceptions=True)
            await self._worker_task.unlock_disks()

    async def _wait_for_end(self) -> None:
        """Wait until the task has ended and needs nothing on this host. Then remove its files and send `WorkDone`."""
        while True:
            with self._local_files():
                if self._worker_task.has_task_ended and self.has_copied_all and await self._worker_task.is_done():
                    break
            await asyncio.sleep(_POLL_SECONDS)
        for layout in self._worker_task.layout.attempts():
            if (data := await asyncio.to_thread(_read_log_tail, layout.runner_log)) is not None:
                await self._send(RunnerLog(layout.root.name, data))
        try:
            await self._worker_task.clean_up()
        except (OSError, SandboxError, TimeoutError) as error:
            _log.warning("Files are left for the next worker on this host to remove: %s", error_reason(error))
        self._is_done = True
        await self._send(WorkDone())
        await asyncio.sleep(_LAST_ANSWER_SECONDS)  # the server closes the connection before then

    async def _read(self) -> None:
        while True:
            message = await read_message(self._reader, server_message_decoder, SERVER_MESSAGE_BYTES_MAX)
            match message:
                case HeartbeatAnswer():
                    self._answered_at = time.monotonic()
                    self._lease.extend(self._sent_at.pop(message.number, 0.0), self._claimed.lease_seconds)
                    self._renew()
                case RecordsReceived() | EndedTasks() | CredentialAnswer():
                    self._pass_on(message)
                case ServerCall():
                    self._worker_task.check_image(message.request)
                    self._start(self._answer_call(message))
                case OpenStream():
                    self._start(self._serve_stream(message))
                case TaskEnded():
                    self._worker_task.mark_task_ended()
                case WorkerDismissed():
                    raise DismissedError(message.reason)
                case None if self._is_done:
                    return
                case None:
                    raise ConnectionError("the server closed the connection")

    def _pass_on(self, answer: RecordsReceived | EndedTasks | CredentialAnswer) -> None:
        """Pass an answer to the coroutine that is waiting for it, if any."""
        match answer:
            case RecordsReceived() if self._received is not None and not self._received.done():
                self._received.set_result(answer)
            case EndedTasks() if self._ended is not None and not self._ended.done():
                self._ended.set_result(answer)
            case CredentialAnswer() if answer.number in self._credentials:
                if not (found := self._credentials.pop(answer.number)).done():
                    found.set_result(answer)

    def _start(self, coroutine: "Awaitable[None]") -> None:
        task = asyncio.ensure_future(coroutine)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, message: WorkerMessage) -> None:
        self._writer.write(encode_message(message))
        async with asyncio.timeout(_ANSWER_SECONDS):
            await self._writer.drain()

    # Heartbeats and the lease.

    async def _send_heartbeats(self) -> None:
        """Send a heartbeat after each change and at least every two seconds.

        Raises TimeoutError if the server does not answer, HostFilesError.
        """
        number, reported, reported_at = 0, None, 0.0
        while True:
            if self._worker_task.failures.are_permanent:
                raise HostFilesError("launches of runners fail")
            with self._local_files():
                state, now = await asyncio.to_thread(self._state), time.monotonic()
            if state != reported or now - reported_at >= HEARTBEAT_SECONDS_MAX:
                number, reported, reported_at = number + 1, state, now
                self._sent_at[number] = seconds_since_boot()
                await self._send(
                    Heartbeat(
                        number,
                        "held" if state.lock_state is LockState.HELD else "free",
                        state.end_offset,
                        state.launches,
                        is_launching=state.is_launching,
                    )
                )
            if now - self._answered_at > _SILENCE_SECONDS:
                raise TimeoutError("the server does not answer")
            await asyncio.sleep(_POLL_SECONDS)

    def _state(self) -> _RunnerState:
        """Read the state of the runner. A launch that ends in the meantime counts as still running."""
        launches, is_launching = self._worker_task.launches, self._worker_task.is_launching
        lock_state, end = self._worker_task.lock_state(), max(self._end_offset(), self._copied_end_offset)
        is_launching = is_launching or self._worker_task.is_launching or self._worker_task.launches != launches
        return _RunnerState(lock_state, end, launches, is_launching)

    def _renew(self) -> None:
        """Pass the lease on to the runner if its agent may communicate, unless the runner got it a moment ago."""
        if not self._worker_task.may_communicate(self._copied_end_offset):
            self._renewed_until = 0.0
            return
        step = min(_RENEWAL_SECONDS_MAX, self._claimed.lease_seconds / 20)
        if self._lease.deadline - self._renewed_until >= step:
            self._renewed_until = self._lease.deadline
            self._start(self._renew_lease(self._lease.deadline))

    async def _renew_lease(self, deadline: float) -> None:
        try:
            await self._worker_task.renew_lease(deadline)
        except SandboxError:
            self._renewed_until = 0.0  # no runner is listening; the next answer repeats the renewal

    # Replication.

    def _journal_size(self) -> int:
        try:
            return self._worker_task.journals.size_bytes(self._worker_task.task_id)
        except FileNotFoundError:
            return 0

    def _end_offset(self) -> int:
        """Return the offset after the last record, or any smaller offset if the server has all records."""
        if self._journal_size() <= self._copied_end_offset:
            return 0
        return self._worker_task.replicas.end_offset(self._worker_task.task_id)

    @contextlib.contextmanager
    def _local_files(self) -> Iterator[None]:
        """Convert errors of this host's own files to HostFilesError, and record these errors."""
        try:
            yield
        except (OSError, JournalDamagedError) as error:
            self._worker_task.failures.record(error)
            raise HostFilesError(error_reason(error)) from error

    async def _replicate(self) -> None:
        """Send new records, each artifact before the record that names it. Raises OSError, HostFilesError."""
        while True:
            with self._local_files():
                has_records = self._journal_size() > self._copied_end_offset
            if not has_records or not await self._send_records():
                await asyncio.sleep(_POLL_SECONDS)

    async def _send_records(self) -> bool:
        """Send the next records. Returns whether the server has stored at least one of them."""
        task, task_id, offset = self._worker_task, self._worker_task.task_id, self._copied_end_offset
        with self._local_files():
            batch = await self._read_batch(offset)
            if batch is None or not batch.records:
                return False
            data = await asyncio.to_thread(task.replicas.read, task_id, offset, batch.next_offset - offset)
            await asyncio.to_thread(_flush, task.layout)
        task.note_agent_start(batch)
        for record in batch.records:
            if isinstance(record.event, ArtifactCollected) and not await self._upload(record.event.artifact):
                await asyncio.sleep(_RETRY_SECONDS)
                return False
        self._received = asyncio.get_running_loop().create_future()
        await self._send(Records(offset, data))
        async with asyncio.timeout(_ANSWER_SECONDS):
            received = await self._received
        self._copied_end_offset = received.end_offset
        self._renew()
        if not received.is_accepted:
            await asyncio.sleep(_RETRY_SECONDS)
            return False
        self._worker_task.failures.clear()
        if isinstance(batch.records[-1].event, TaskFinished):
            self._worker_task.mark_task_ended()
        return True

    async def _read_batch(self, offset: int) -> RecordBatch | None:
        """Return the next records; None while the journal lacks records that the server already has.

        The server sends its records before the next launch. Raises JournalDamagedError if this takes too long, OSError.
        """
        journals, task_id = self._worker_task.journals, self._worker_task.task_id
        try:
            batch = await asyncio.to_thread(journals.read, task_id, offset, bytes_max=RECORD_BATCH_BYTES)
        except FileNotFoundError:
            await asyncio.sleep(_RETRY_SECONDS)
            return None
        except JournalDamagedError:
            now = time.monotonic()
            self._unreadable_since = self._unreadable_since or now
            if now - self._unreadable_since > _DAMAGED_JOURNAL_TIMEOUT_SECONDS:
                raise
            await asyncio.sleep(_RETRY_SECONDS)
            return None
        self._unreadable_since = None
        return batch

    async def _upload(self, artifact: Artifact) -> bool:
        """Send an artifact. Returns whether the server has stored it. Raises OSError, HostFilesError."""
        with self._local_files():
            content = (self._worker_task.layout.artifacts / artifact.name).open("rb")
        with content:
            reader, writer = await self._dial(Upload(self._claimed.session_key, artifact))
            try:
                while True:
                    with self._local_files():
                        part = await asyncio.to_thread(content.read, ARTIFACT_PART_BYTES)
                    writer.write(encode_message(ArtifactPart(part)))
                    async with asyncio.timeout(_ANSWER_SECONDS):
                        await writer.drain()
                    if not part:
                        break
                async with asyncio.timeout(_ANSWER_SECONDS):
                    answer = await read_message(reader, server_message_decoder, SERVER_MESSAGE_BYTES_MAX)
            finally:
                writer.close()
        if answer is None:
            raise ConnectionError("the server closed the connection")
        return isinstance(answer, UploadReceived) and answer.is_accepted

    # Leftovers of other tasks.

    async def _remove_leftovers(self) -> None:
        """Remove the files left by killed workers if the server reports that the tasks of these workers have ended.

        Errors are only logged.
        """
        try:
            task_ids = await asyncio.to_thread(self._other_leftovers.find, self._worker_task.task_id)
            for start in range(0, len(task_ids), LEFTOVER_TASK_BATCH_MAX):
                asked = tuple(task_ids[start : start + LEFTOVER_TASK_BATCH_MAX])
                self._ended = asyncio.get_running_loop().create_future()
                await self._send(FindEndedTasks(asked))
                async with asyncio.timeout(_ANSWER_SECONDS):
                    ended = await self._ended
                await self._other_leftovers.remove(set(asked) & set(ended.task_ids))
        except (OSError, SandboxError, TimeoutError) as error:
            _log.warning("Files of other tasks are not removed yet: %s", error_reason(error))

    # Git credentials.

    async def _serve_credentials(self) -> None:
        """Pass the runner's requests to the server. If the connection breaks, the next session takes over."""
        with contextlib.suppress(ConnectionError):
            await self._worker_task.credential_requests.serve(self._ask_for_credentials)

    async def _ask_for_credentials(self, request: CredentialRequest) -> CredentialAnswer:
        """Return the server's answer. Raises ConnectionError."""
        future: asyncio.Future[CredentialAnswer] = asyncio.get_running_loop().create_future()
        self._credentials[request.number] = future
        try:
            await self._send(request)
            async with asyncio.timeout(_CREDENTIAL_SECONDS):
                return await future
        except TimeoutError:
            reason = "The server did not send the credentials in time."
            return CredentialAnswer(request.number, reason=reason, is_transient=True)
        finally:
            self._credentials.pop(request.number, None)

    # Requests.

    async def _answer_call(self, call: ServerCall) -> None:
        try:
            value = await self._carry_out(call.request)
            if isinstance(call.request, ReceiveRecords):
                self._copied_end_offset = max(self._copied_end_offset, value)
            result = CallResult(call.call_id, msgspec.json.encode(value))
        except (OSError, SandboxError) as error:
            message = error_reason(error)[:_MESSAGE_CHARACTERS_MAX]
            result = CallResult(call.call_id, error=type(error).__name__[:64], message=message)
        await self._send(result)

    async def _carry_out(self, request: Request) -> Any:
        if isinstance(request, PrepareImage):
            return await self._worker_task.prepare_image(request, self._open_image)
        return await self._worker_task.carry_out(request)

    async def _open_image(self, digest: str) -> StreamPair:
        return await self._dial(FetchImage(self._claimed.session_key, digest))

    async def _serve_stream(self, message: OpenStream) -> None:
        """Connect the server to the control socket of an attempt, until either side closes."""
        try:
            runner = await self._worker_task.connect(message.attempt_id)
        except OSError:
            await self._send(StreamRefused(message.stream_id))
            return
        with contextlib.suppress(OSError), contextlib.closing(runner[1]):
            server = await self._dial(JoinStream(self._claimed.session_key, message.stream_id))
            with contextlib.closing(server[1]):
                await _copy_both_ways(server, runner)


async def _copy_both_ways(first: StreamPair, second: StreamPair) -> None:
    """Copy data in both directions until one side has closed."""
    copies = [
        asyncio.create_task(_copy(first[0], second[1])),
        asyncio.create_task(_copy(second[0], first[1])),
    ]
    try:
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for copy in copies:
            copy.cancel()
        await asyncio.gather(*copies, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_COPY_BYTES):
            writer.write(data)
            await writer.drain()


def _read_log_tail(log: Path) -> bytes | None:
    """Return the end of a log; None if it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - RUNNER_LOG_BYTES_MAX))
            return file.read(RUNNER_LOG_BYTES_MAX)
    except OSError:
        return None


def _flush(layout: TaskLayout) -> None:
    """Flush the journal to disk, because the server must not get a record that this host may lose."""
    try:
        records_fd = os.open(layout.journal / "records", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fdatasync(records_fd)
    finally:
        os.close(records_fd)
