"""Accepts the connections of workers: claims, heartbeats, records, artifacts and streams.

Everything here runs on one event loop. Messages from workers are untrusted.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from sandbox.interfaces.images import ImageSource
from sandbox.interfaces.journal import JournalBusyError, JournalDamagedError, TaskReplicas
from sandbox.interfaces.placement import HostUnreachableError
from sandbox.interfaces.worker_messages import (
    FIRST_MESSAGE_BYTES_MAX,
    WORKER_MESSAGE_BYTES_MAX,
    CallResult,
    Claim,
    Claimed,
    EndedTasks,
    FetchImage,
    FindEndedTasks,
    FirstMessage,
    Heartbeat,
    HeartbeatAnswer,
    JoinStream,
    Records,
    RecordsReceived,
    RunnerLog,
    StreamRefused,
    Upload,
    UploadReceived,
    WorkDone,
    WorkerDismissed,
    WorkerMessage,
)
from sandbox.interfaces.workspace import CredentialAnswer, CredentialRequest, NoCredentialsError
from sandbox.model.errors import SandboxError, error_reason
from sandbox.placements.cluster.file_transfers import ArtifactsTooLargeError, ArtifactUploads, ImageTransfers
from sandbox.placements.cluster.hosts import SeenHosts
from sandbox.placements.cluster.job_state import Job
from sandbox.placements.cluster.worker_authorization import (
    ClaimChecker,
    ClaimRejectedError,
    FindCloneCredentials,
    WorkerCredentialRequests,
)
from sandbox.placements.cluster.worker_session import WorkerSession
from sandbox.primitives.concurrency import accept_connection
from sandbox.primitives.message_stream import InvalidMessageError, encode_message, read_message

SaveRunnerLog = Callable[[str, str, bytes], None]
"""Stores the log of a runner, given the ids of the task and of the attempt. Blocks; raises OSError."""
_log = logging.getLogger(__name__)

UNAUTHENTICATED_CONNECTIONS_MAX = 128
"""Maximum number of unauthenticated connections. If there are more, the oldest is closed."""

JOURNAL_BYTES_MAX = 4 * 1024**3
"""Maximum size of a journal that a worker may write. A correct worker writes less, because it enforces lower limits."""

_FIRST_MESSAGE_SECONDS = 10.0
"""Time limit for the TLS handshake, and again for the first message after it."""

_CLOSE_SECONDS = 2.0
_ACCEPT_PAUSE_SECONDS = 0.1
_BACKLOG = 512
_READ_AHEAD_BYTES = 2**17
_TLS_BUFFER_BYTES = 2**14
"""Size of the buffer that asyncio keeps for each TLS connection. A TLS record contains at most this much data."""

_first_decoder: "msgspec.msgpack.Decoder[FirstMessage]" = msgspec.msgpack.Decoder(FirstMessage)
_decoder: "msgspec.msgpack.Decoder[WorkerMessage]" = msgspec.msgpack.Decoder(WorkerMessage)


class WorkerRequestSources(NamedTuple):
    """The providers of the data that hosts request from the server. find_credentials: see `FindCloneCredentials`."""

    find_credentials: FindCloneCredentials
    images: ImageSource


class WorkerServer:
    """Listens for workers.

    replicas: the copies of journals and artifacts.
    has_task_ended: returns whether a task has ended or is gone. Blocks.
    tls: the server's certificate.
    """

    def __init__(
        self,
        claims: ClaimChecker,
        hosts: SeenHosts,
        replicas: TaskReplicas,
        save_runner_log: SaveRunnerLog,
        has_task_ended: Callable[[str], bool],
        providers: WorkerRequestSources,
        tls: ssl.SSLContext,
    ) -> None:
        self._credential_requests = WorkerCredentialRequests(replicas, providers.find_credentials)
        self._claims = claims
        self._jobs = claims.jobs
        self._hosts = hosts
        self._has_task_ended = has_task_ended
        self._save_runner_log = save_runner_log
        self._replicas = replicas
        self._tls = tls
        self._unauthenticated: dict[asyncio.Task[None], None] = {}
        """The tasks that serve unauthenticated connections, oldest first."""
        self._sessions: dict[WorkerSession, Job] = {}
        self._uploads = ArtifactUploads(replicas)
        self._images = ImageTransfers(providers.images)
        self._serving: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None

    async def listen(self, host: str, port: int) -> None:
        """Listen until the tasks of the event loop are cancelled. Raises OSError."""
        # By default, each connection would keep 256 KiB. asyncio has this setting only for the whole process.
        SSLProtocol.max_size = min(SSLProtocol.max_size, _TLS_BUFFER_BYTES)
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        with contextlib.ExitStack() as listening:
            listeners = [
                listening.enter_context(socket.create_server(address, family=family, backlog=_BACKLOG))
                for family, _, _, _, address in infos
            ]
            for listener in listeners:
                listener.setblocking(False)
            listening.pop_all()
        self._closing = asyncio.create_task(self._accept_until_cancelled(listeners))

    async def _accept_until_cancelled(self, listeners: Sequence[socket.socket]) -> None:
        try:
            await asyncio.gather(*map(self._accept, listeners))
        finally:
            for listener in listeners:
                listener.close()
            for serving in self._serving:
                serving.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        """Accept connections. An asyncio server would not count connections during the TLS handshake."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection = await accept_connection(listener)
            except OSError as error:
                _log.warning("A connection of a worker was not accepted: %s", error_reason(error))
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            serving = loop.create_task(self._serve_socket(connection))
            self._serving.add(serving)
            self._unauthenticated[serving] = None
            serving.add_done_callback(self._serving_ended)
            if len(self._unauthenticated) > UNAUTHENTICATED_CONNECTIONS_MAX:
                oldest = next(iter(self._unauthenticated))
                del self._unauthenticated[oldest]
                oldest.cancel()

    def _serving_ended(self, serving: "asyncio.Task[None]") -> None:
        self._serving.discard(serving)
        self._unauthenticated.pop(serving, None)
        if not serving.cancelled() and (error := serving.exception()) is not None:
            _log.error("A connection of a worker was not served", exc_info=error)

    def _mark_authenticated(self) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        self._unauthenticated.pop(serving, None)

    async def _serve_socket(self, connection: socket.socket) -> None:
        """Serve a connection if its first message arrives soon enough after the TLS handshake."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(_READ_AHEAD_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=_FIRST_MESSAGE_SECONDS,
                ssl_shutdown_timeout=_CLOSE_SECONDS,
            )
        except BaseException as error:
            connection.close()
            if not isinstance(error, OSError):
                raise
            return
        first_message: FirstMessage | None = None
        try:
            async with asyncio.timeout(_FIRST_MESSAGE_SECONDS):
                first_message = await read_message(reader, _first_decoder, FIRST_MESSAGE_BYTES_MAX)
        except (OSError, InvalidMessageError) as error:
            _log.debug("A connection to the port for workers was closed: %s", error_reason(error))
        finally:
            if first_message is None:
                transport.abort()
        if first_message is not None:
            await self._serve(first_message, reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    async def _serve(
        self, first_message: FirstMessage, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            match first_message:
                case Claim():
                    await self._serve_claim(first_message, reader, writer)
                case JoinStream():
                    session = self._find_session(first_message.session_key)
                    if session is not None and session.receive_stream(first_message, (reader, writer)):
                        await writer.wait_closed()  # the receiver closes the connection
                case Upload():
                    await self._serve_upload(first_message, reader, writer)
                case FetchImage():
                    await self._serve_image(first_message, reader, writer)
        except (OSError, InvalidMessageError, SandboxError) as error:
            _log.debug("A connection of a worker was closed: %s", error_reason(error))
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        finally:
            await _close(writer)

    def _find_session(self, key: bytes) -> WorkerSession | None:
        """Return the session with this key. If it exists, the current connection becomes authenticated."""
        session = next((session for session in self._sessions if session.has_key(key)), None)
        if session is not None:
            self._mark_authenticated()
        return session

    async def _serve_claim(self, claim: Claim, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if (job := await self._claims.accept(claim, (reader, writer))) is None:
                return  # the worker tries again
            self._mark_authenticated()
            copied_end_offset = await asyncio.to_thread(self._replicas.end_offset, job.stored.task_id)
            # A worker that was abandoned in the meantime must not get an answer, which would extend its lease.
            if not job.may_answer_worker:
                raise ClaimRejectedError("The attempt has ended.")
        except ClaimRejectedError as error:
            writer.write(encode_message(WorkerDismissed(str(error))))
            await writer.drain()
            return
        task_id = job.stored.task_id
        session = WorkerSession(writer, job.identity.name, copied_end_offset)
        job.connect(session)
        self._sessions[session] = job
        self._hosts.record_claim(claim)
        session.send(Claimed(session.key, task_id, job.stored.lease_seconds, copied_end_offset))
        if job.has_task_ended:
            session.notify_task_ended()
        try:
            while job.session is session and await self._serve_message(job, session, reader):
                with contextlib.suppress(ConnectionError):  # messages that have already arrived are still read
                    await writer.drain()
                await asyncio.sleep(0)  # a worker that has sent thousands of messages must not delay the others
        except (InvalidMessageError, JournalDamagedError) as error:
            session.send(WorkerDismissed(error_reason(error)))
            self._jobs.fence(job, error_reason(error))
        finally:
            job.disconnect(session)
            del self._sessions[session]
            session.close()

    async def _serve_message(self, job: Job, session: WorkerSession, reader: asyncio.StreamReader) -> bool:
        """Serve the next message. Returns False at the end of the session.

        Raises OSError, InvalidMessageError, JournalDamagedError.
        """
        message = await read_message(reader, _decoder, WORKER_MESSAGE_BYTES_MAX)
        if not job.may_answer_worker:
            session.send(WorkerDismissed("The attempt was abandoned."))
            return False
        match message:
            case Heartbeat():
                before = session.lock_state
                session.receive(message)
                self._hosts.record_contact(job.stored.host)
                job.record_answer()
                session.send(HeartbeatAnswer(message.number))
                if session.lock_state is not before:
                    job.wake_waiters()
            case Records() | FindEndedTasks() | CredentialRequest():
                await self._answer(job, session, message)
            case CallResult() | StreamRefused():
                session.receive(message)
            case RunnerLog():
                await self._receive_log(job, message)
            case WorkDone():
                if not job.has_task_ended and not await asyncio.to_thread(self._has_task_ended, job.stored.task_id):
                    raise InvalidMessageError("the task has not ended")
                self._jobs.remove(job)
                return False
            case None:
                return False
        return True

    async def _answer(
        self, job: Job, session: WorkerSession, message: Records | FindEndedTasks | CredentialRequest
    ) -> None:
        match message:
            case Records():
                session.send(await self._receive_records(job, session, message))
            case FindEndedTasks():
                session.send(EndedTasks(await asyncio.to_thread(self._filter_ended, message.task_ids)))
            case CredentialRequest():
                await self._answer_credential_request(job, session, message)

    def _filter_ended(self, task_ids: Sequence[str]) -> tuple[str, ...]:
        return tuple(task_id for task_id in dict.fromkeys(task_ids) if self._has_task_ended(task_id))

    async def _answer_credential_request(self, job: Job, session: WorkerSession, request: CredentialRequest) -> None:
        """Check a request, and look the credentials up in the background, because heartbeats must not wait."""
        try:
            url = await self._credential_requests.find_url(job, request)
        except NoCredentialsError as error:
            session.send(CredentialAnswer(request.number, reason=str(error)))
            return

        sending = asyncio.create_task(self._send_credentials(job, session, request, url))
        self._serving.add(sending)
        sending.add_done_callback(self._serving_ended)

    async def _send_credentials(self, job: Job, session: WorkerSession, request: CredentialRequest, url: str) -> None:
        with contextlib.suppress(HostUnreachableError), session.cancelling_on_close():
            session.send(await self._credential_requests.find(job, request, url))

    async def _receive_log(self, job: Job, message: RunnerLog) -> None:
        """Store the log of an attempt of this worker. An error is only logged. Raises InvalidMessageError."""
        if message.attempt_id not in job.stored.attempt_ids:
            raise InvalidMessageError(f"attempt {message.attempt_id} does not belong to this worker")
        try:
            await asyncio.to_thread(self._save_runner_log, job.stored.task_id, message.attempt_id, message.data)
        except OSError as error:
            _log.warning("The log of attempt %s was not stored: %s", message.attempt_id, error_reason(error))

    async def _receive_records(self, job: Job, session: WorkerSession, message: Records) -> RecordsReceived:
        """Append records to the server's copy of the journal. Raises JournalDamagedError if they must not be in it."""
        task_id = job.stored.task_id
        if message.offset > session.copied_end_offset:
            return RecordsReceived(session.copied_end_offset, is_accepted=False)
        if message.offset + len(message.data) > JOURNAL_BYTES_MAX:
            raise JournalDamagedError("The journal is too large.")
        try:
            end = await asyncio.to_thread(self._replicas.receive_untrusted, task_id, message.offset, message.data)
        except JournalDamagedError:
            raise
        except (JournalBusyError, OSError) as error:
            _log.debug("Records of task %s are not stored yet: %s", task_id, error_reason(error))
            session.record_copied(await asyncio.to_thread(self._replicas.end_offset, task_id))
            return RecordsReceived(session.copied_end_offset, is_accepted=False)
        session.record_copied(end)
        return RecordsReceived(end)

    async def _serve_upload(self, upload: Upload, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Store an artifact, unless the session ends first. Raises OSError, InvalidMessageError."""
        session = self._find_session(upload.session_key)
        if session is None:
            return
        job = self._sessions[session]

        def is_current() -> bool:
            return job.session is session and job.may_answer_worker

        try:
            with session.cancelling_on_close():
                is_accepted = await self._uploads.receive(job, upload.artifact, reader, is_current)
        except ArtifactsTooLargeError as error:
            self._jobs.fence(job, error_reason(error))
            session.close()
            return
        writer.write(encode_message(UploadReceived(is_accepted)))
        await writer.drain()

    async def _serve_image(self, fetch: FetchImage, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send an image that the server has named to this worker. Raises OSError."""
        session = self._find_session(fetch.session_key)
        if session is None:
            return
        with session.cancelling_on_close(), session.image_offer.taking(fetch.digest) as image:
            if image is not None:
                await self._images.send(image, reader, writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    """Close a connection; abort it if the worker does not confirm the end in time, or if the caller is cancelled."""
    if not writer.is_closing():  # a second `close` of a TLS connection makes `abort` ineffective
        writer.close()
    try:
        async with asyncio.timeout(_CLOSE_SECONDS):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        pass
    finally:
        writer.transport.abort()
