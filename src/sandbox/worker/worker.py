"""A worker: claims an attempt of a task, keeps contact with the server, and exits when the task has ended."""

import asyncio
import contextlib
import hashlib
import logging
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable
from hmac import compare_digest
from typing import NamedTuple

from sandbox.interfaces.worker_messages import (
    FIRST_MESSAGE_BYTES_MAX,
    Claim,
    Claimed,
    FirstMessage,
    HostProof,
    ProveHost,
    ServerMessage,
    WorkerDismissed,
)
from sandbox.model.errors import SandboxError, error_reason
from sandbox.primitives.message_stream import InvalidMessageError, StreamPair, encode_message, read_message
from sandbox.primitives.secret_digests import compute_host_proof
from sandbox.worker.server_session import (
    DismissedError,
    Lease,
    ServerSession,
    seconds_since_boot,
    server_message_decoder,
)
from sandbox.worker.task_requests import HostFailures, HostFilesError, OtherTaskLeftovers, WorkerTask

_log = logging.getLogger(__name__)

EXIT_DONE, EXIT_DISMISSED, EXIT_NO_CONTACT, EXIT_HOST_FAILED, EXIT_TERMINATED = 0, 3, 4, 5, 143
"""Exit codes of a worker. A worker that ends because of SIGTERM must not exit with 0 (ADR 33)."""

RECONNECT_TIMEOUT_SECONDS = 24 * 3600.0
"""How long a worker tries to reach its server again. Its sandbox cannot communicate after the lease."""

FIRST_CONNECT_TIMEOUT_SECONDS = 300.0
"""How long a worker that has claimed nothing tries to reach its server."""

_CONNECT_SECONDS = 20.0
_RECONNECT_SECONDS_MAX = 2.0
_POLL_SECONDS = 0.1
_STOP_SECONDS = 10.0


class ServerAddress(NamedTuple):
    """The address for workers, and the SHA-256 (hex) of the certificate that the server must present."""

    host: str
    port: int
    certificate_fingerprint: str


class HostProofReaders(NamedTuple):
    """How a worker proves that it runs on its host.

    read_cluster_key: returns the key that proves the identity of this host; raises OSError, SandboxError.
    read_identity_token: returns the worker's identity token; raises OSError, SandboxError. None if the engine issues
        no such tokens.
    """

    read_cluster_key: Callable[[], bytes]
    read_identity_token: Callable[[], str] | None = None


class Worker:
    """Runs the attempts of one task. `run` returns the exit code."""

    def __init__(
        self,
        address: ServerAddress,
        claim: Claim,
        lease: Lease,
        create_worker_task: Callable[[str], WorkerTask],
        other_leftovers: OtherTaskLeftovers,
        lock_task: Callable[[str], contextlib.AbstractContextManager[None]],
        proofs: "HostProofReaders",
    ) -> None:
        """create_worker_task: returns a task on this host.

        lock_task: locks a task on this host; raises OSError if another worker holds the lock.
        """
        self._proofs = proofs
        self._address = address
        self._claim = claim
        self._create_worker_task = create_worker_task
        self._other_leftovers = other_leftovers
        self._lease = lease
        self._lock_task = lock_task
        self._worker_task: WorkerTask | None = None
        self._failures = HostFailures()
        self._locked_task_id: str | None = None
        self._session: ServerSession | None = None
        self._locks = contextlib.ExitStack()
        self._terminated = asyncio.Event()

    def terminate(self) -> None:
        """End the runner and the worker, because of SIGTERM."""
        self._terminated.set()

    async def run(self) -> int:
        """Work until the task has ended. No runner is left on return."""
        with self._locks:
            working = asyncio.create_task(self._work())
            terminated = asyncio.create_task(self._terminated.wait())
            await asyncio.wait({working, terminated}, return_when=asyncio.FIRST_COMPLETED)
            terminated.cancel()
            if not working.done():
                _log.warning("Terminated: the runner is killed")
                await self._kill()
                await self._send_last_records(working)
                return EXIT_TERMINATED
            if (code := working.result()) != EXIT_DONE:
                await self._kill()
                await self._clean_up()
            return code

    async def _work(self) -> int:
        """Connect to the server, and reconnect after errors, until the work ends; return the exit code."""
        contact_at, pause = time.monotonic(), 0.1
        while True:
            try:
                async with self._connected() as session:
                    self._session, pause = session, 0.1
                    try:
                        await session.run()
                    finally:
                        self._session, contact_at = None, time.monotonic()
                return EXIT_DONE
            except DismissedError as error:
                _log.error("The server does not accept this worker: %s", error)
                return EXIT_DISMISSED
            except HostFilesError as error:
                _log.error("The task cannot run on this host: %s", error)
                if self._failures.are_permanent:
                    return EXIT_HOST_FAILED
            except (OSError, InvalidMessageError) as error:
                _log.warning("No contact with the server: %s", error_reason(error))
            limit = FIRST_CONNECT_TIMEOUT_SECONDS if self._worker_task is None else RECONNECT_TIMEOUT_SECONDS
            if time.monotonic() - contact_at > limit:
                return EXIT_NO_CONTACT
            # The pause is random, because all workers lose contact with the server at the same time.
            await asyncio.sleep(pause * random.uniform(0.2, 1))  # noqa: S311
            pause = min(2 * pause, _RECONNECT_SECONDS_MAX)

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[ServerSession]:
        """Claim the attempt. Raises OSError, InvalidMessageError, DismissedError, HostFilesError."""
        sent_at = seconds_since_boot()
        reader, writer = await self._dial(self._claim)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                answer = await self._read_answer(reader, writer)
            match answer:
                case WorkerDismissed():
                    raise DismissedError(answer.reason)
                case Claimed():
                    self._lease.extend(sent_at, answer.lease_seconds)
                    task = await self._take_task(answer.task_id)
                    yield ServerSession(task, self._other_leftovers, self._lease, (reader, writer), answer, self._dial)
                case _:
                    raise ConnectionError("the server did not answer the claim")
        finally:
            writer.close()

    async def _read_answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> ServerMessage | None:
        """Return the answer to the claim. Prove the identity of this host first if the server requires it.

        Raises OSError, InvalidMessageError.
        """
        answer = await read_message(reader, server_message_decoder, FIRST_MESSAGE_BYTES_MAX)
        if isinstance(answer, ProveHost):
            writer.write(encode_message(self._prove_host(answer.challenge)))
            await writer.drain()
            answer = await read_message(reader, server_message_decoder, FIRST_MESSAGE_BYTES_MAX)
        return answer

    def _prove_host(self, challenge: bytes) -> HostProof:
        """Return the proof of this host's identity. It is valid only for the server whose certificate was checked."""
        claim = self._claim
        try:
            if self._proofs.read_identity_token is not None:
                return HostProof(None, self._proofs.read_identity_token())
            key = self._proofs.read_cluster_key()
        except (OSError, SandboxError) as error:
            _log.error("The server requires a proof of this host: %s", error_reason(error))
            return HostProof(None)
        proof = compute_host_proof(
            key, challenge, claim.attempt_id, claim.host, claim.nonce, self._address.certificate_fingerprint
        )
        return HostProof(proof)

    async def _take_task(self, task_id: str) -> WorkerTask:
        """Lock the task on this host, and remove the files that an earlier worker of the task left.

        Raises HostFilesError, DismissedError.
        """
        if self._locked_task_id not in {None, task_id}:
            raise DismissedError("The attempt belongs to another task.")
        if self._worker_task is None:
            try:
                self._worker_task = await self._prepare(task_id)
            except (OSError, SandboxError) as error:
                self._failures.record(error)
                raise HostFilesError(error_reason(error)) from error
            self._failures = self._worker_task.failures
        return self._worker_task

    async def _prepare(self, task_id: str) -> WorkerTask:
        """Lock and clean up the task; a repeated call keeps the lock. Raises OSError, SandboxError."""
        if self._locked_task_id is None:
            await asyncio.to_thread(self._locks.enter_context, self._lock_task(task_id))
            self._locked_task_id = task_id
        task = self._create_worker_task(task_id)
        async with asyncio.timeout(_STOP_SECONDS):
            await task.wait_until_no_runner()  # the kernel is killing the runner of the earlier worker
        await task.clean_up()
        return task

    async def _dial(self, first_message: FirstMessage) -> StreamPair:
        """Connect, check the server's certificate, and send the first message. Raises OSError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # the fingerprint is compared instead
        async with asyncio.timeout(_CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(self._address.host, self._address.port, ssl=context)
            try:
                certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
                if not compare_digest(hashlib.sha256(certificate).hexdigest(), self._address.certificate_fingerprint):
                    raise ConnectionError("another server answered: its certificate has a different fingerprint")
                writer.write(encode_message(first_message))
                await writer.drain()
            except BaseException:
                writer.transport.abort()
                raise
        return reader, writer

    async def _kill(self) -> None:
        if self._worker_task is not None:
            with contextlib.suppress(OSError):
                await self._worker_task.kill_runner()

    async def _send_last_records(self, working: "asyncio.Task[int]") -> None:
        """Send the last records of the killed runner, within the engine's grace period."""
        deadline = time.monotonic() + _STOP_SECONDS
        while not working.done() and time.monotonic() < deadline:
            if self._session is None or self._session.has_copied_all:
                break
            await asyncio.sleep(_POLL_SECONDS)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await self._clean_up()

    async def _clean_up(self) -> None:
        """Remove the task from this host. The next worker on this host removes what remains."""
        task = self._worker_task
        if task is None:
            return
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await task.wait_until_no_runner()
                await task.clean_up()
        except (OSError, SandboxError, TimeoutError) as error:
            _log.warning("The task's files are not removed yet: %s", error_reason(error))
