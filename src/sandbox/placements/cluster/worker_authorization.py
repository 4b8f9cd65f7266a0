"""Decides what a worker may have: an attempt that it claims, and git credentials for the attempt's task.

A claim is checked for the token, the version, the proof of the host, and the engine's confirmation. A host may be
compromised. It gets only the credentials of the repository that its task is about to clone.
"""

import asyncio
import contextlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import msgspec

from sandbox import __version__
from sandbox.interfaces.cluster_engine import EngineUnavailableError, WorkerRejectedError, WorkerVerifier
from sandbox.interfaces.journal import JournalDamagedError, TaskReplicas
from sandbox.interfaces.worker_messages import (
    FIRST_MESSAGE_BYTES_MAX,
    NO_JOIN_TOKEN,
    PROTOCOL_VERSION,
    Claim,
    HostProof,
    ProveHost,
)
from sandbox.interfaces.workspace import (
    CREDENTIAL_REQUESTS_MAX,
    CredentialAnswer,
    CredentialQuery,
    CredentialRequest,
    Credentials,
    NoCredentialsError,
)
from sandbox.model.errors import error_reason
from sandbox.placements.cluster.host_drains import HostDrains
from sandbox.placements.cluster.job_state import Job
from sandbox.placements.cluster.jobs import Jobs
from sandbox.primitives.message_stream import InvalidMessageError, StreamPair, encode_message, read_message
from sandbox.primitives.secret_digests import compute_host_proof, is_host_proof

_CHALLENGE_BYTES = 32
_PROOF_SECONDS = 10.0
_proof_decoder: "msgspec.msgpack.Decoder[HostProof]" = msgspec.msgpack.Decoder(HostProof)
_log = logging.getLogger(__name__)


class ClaimRejectedError(Exception):
    """The worker must not try again."""


class ClusterKey(NamedTuple):
    """The values against which the server checks the proof of a host.

    key: the secret that the server and the hosts share.
    certificate_fingerprint: SHA-256 (hex) of the server's certificate.
    """

    key: bytes
    certificate_fingerprint: str

    def __repr__(self) -> str:
        """Omit the key."""
        return f"ClusterKey({self.certificate_fingerprint!r})"


class ClaimChecker:
    """Checks claims.

    proof_method: the key with which workers prove their host, or the verifier of their identity tokens; None to accept
        any host that the engine confirms.
    """

    def __init__(self, jobs: Jobs, drains: HostDrains, proof_method: ClusterKey | WorkerVerifier | None) -> None:
        self.jobs = jobs
        self._drains = drains
        self._proof_method = proof_method

    async def accept(self, claim: Claim, streams: StreamPair) -> Job | None:
        """Store a claim, and return the claimed job.

        Returns None if the engine is not responding, or does not confirm the worker's host in time; the worker may try
        again. A worker that claimed its job earlier is identified by its nonce, so it does not prove its host again.
        Therefore, neither a lost answer nor a changed key ends a running task. Raises ClaimRejectedError,
        InvalidMessageError, OSError.
        """
        job = self.jobs.find_claimable(claim)
        if job is not None:
            try:
                if job.is_claimed:
                    _check_version(claim, is_reconnection=True)
                else:
                    await self._check_first_claim(job, claim, streams)
            except ClaimRejectedError as error:
                self._record_rejection(job, claim, str(error))
                raise
            except EngineUnavailableError as error:
                _log.warning("The worker of task %s was not checked: %s", job.stored.task_id, error.message)
                return None
            except TimeoutError:
                self._record_rejection(job, claim, f"The worker on {claim.host} did not authenticate its host in time.")
                raise
            except InvalidMessageError:
                self._record_rejection(job, claim, f"The worker on {claim.host} sent an invalid host proof.")
                raise
            if not job.is_claimed and not await self.jobs.wait_for_host_confirmation(job, claim.host):
                task_id = job.stored.task_id
                _log.warning("The engine does not report that the worker of task %s runs on %s", task_id, claim.host)
                return None
            if not job.is_claimed and self._drains.since(claim.host) is not None:
                # The engine started the worker before the drain. The job is submitted again without this host.
                raise ClaimRejectedError(f"The host {claim.host} is drained.")
        if (job := self.jobs.claim(claim)) is None:
            raise ClaimRejectedError("Another worker has this attempt, or the attempt has ended.")
        return job

    async def _check_first_claim(self, job: Job, claim: Claim, streams: StreamPair) -> None:
        """Check the worker's version and, if the server requires a proof, the worker's host proof.

        Without a verifier of identity tokens, the worker also needs a join token. Raises ClaimRejectedError,
        EngineUnavailableError, InvalidMessageError, OSError.
        """
        match self._proof_method:
            case ClusterKey():
                _check_version(claim, is_reconnection=False)
                await _check_cluster_key(claim, self._proof_method, streams)
            case None:
                _check_version(claim, is_reconnection=False)
            case verifier:
                await _check_identity(job, claim, verifier, streams)
                _check_version(claim, is_reconnection=False)
                return
        if claim.token == NO_JOIN_TOKEN:  # a public constant
            raise ClaimRejectedError("The worker has no join token.")

    def _record_rejection(self, job: Job, claim: Claim, reason: str) -> None:
        """Record a rejection, unless the task has ended or another worker has claimed the job in the meantime."""
        if self.jobs.find_claimable(claim) is job:
            self.jobs.rejections.record(job.stored.task_id, reason)


def _check_version(claim: Claim, *, is_reconnection: bool) -> None:
    """Check that the worker can run the task.

    A running worker survives an upgrade of the server if both versions use the same protocol. Raises
    ClaimRejectedError.
    """
    has_same_protocol = claim.protocol == PROTOCOL_VERSION
    if has_same_protocol and (is_reconnection or claim.version == __version__):
        return
    host = f"Sandbox {claim.version}" if claim.version else "an earlier version of Sandbox"
    server = f"Sandbox {__version__}"
    if not has_same_protocol:
        host, server = f"{host} (protocol {claim.protocol})", f"{server} (protocol {PROTOCOL_VERSION})"
    raise ClaimRejectedError(
        f"The host {claim.host} has {host}, and the server has {server}. Install Sandbox {__version__} on "
        f"{claim.host}, or restart the server if it was upgraded."
    )


async def _request_proof(challenge: bytes, streams: StreamPair) -> HostProof:
    """Return the worker's answer to the challenge. Raises InvalidMessageError, OSError."""
    reader, writer = streams
    writer.write(encode_message(ProveHost(challenge)))
    await writer.drain()
    async with asyncio.timeout(_PROOF_SECONDS):
        answer = await read_message(reader, _proof_decoder, FIRST_MESSAGE_BYTES_MAX)
    if answer is None:
        raise ConnectionError("the worker closed the connection")
    return answer


async def _check_identity(job: Job, claim: Claim, verifier: WorkerVerifier, streams: StreamPair) -> None:
    """Have the engine check the identity of the worker.

    Before this check, anyone may have sent the claim. Therefore, no reason contains values from the claim, and a
    missing or malformed proof is not recorded as a rejection. Raises ClaimRejectedError, EngineUnavailableError,
    OSError.
    """
    try:
        answer = await _request_proof(os.urandom(_CHALLENGE_BYTES), streams)
    except (InvalidMessageError, TimeoutError) as error:
        raise ConnectionError(f"no valid proof: {error_reason(error)}") from error
    try:
        await verifier.verify(job.name, claim.host, answer.identity_token)
    except WorkerRejectedError as error:
        raise ClaimRejectedError(str(error)) from error


async def _check_cluster_key(claim: Claim, cluster_key: ClusterKey, streams: StreamPair) -> None:
    """Require a proof that the worker can read the key. Raises ClaimRejectedError, InvalidMessageError, OSError."""
    challenge = os.urandom(_CHALLENGE_BYTES)
    answer = await _request_proof(challenge, streams)
    if answer.proof is None:
        raise ClaimRejectedError(
            f"The worker on {claim.host} cannot read the key of its host: see its log, and check cluster.host_key_file."
        )
    expected = compute_host_proof(
        cluster_key.key, challenge, claim.attempt_id, claim.host, claim.nonce, cluster_key.certificate_fingerprint
    )
    if not is_host_proof(answer.proof, expected):
        raise ClaimRejectedError(
            f"The host {claim.host} has a different key than the server: check cluster.host_key_file on both."
        )


FindCloneCredentials = Callable[[str, CredentialQuery], Credentials]
"""Finds the credentials for a clone of a repository URL, if the query is for its protocol and host.

Blocks. Raises NoCredentialsError.
"""

CREDENTIAL_LOOKUP_SECONDS = 30.0
"""Time limit for a lookup, including the wait for a thread."""

LOGGED_REFUSALS_MAX = 2 * CREDENTIAL_REQUESTS_MAX
"""Maximum number of refused requests of a job that are logged."""

_THREADS_MAX = 4


class WorkerCredentialRequests:
    """Answers the requests of workers for git credentials. Everything except the lookups runs on one event loop."""

    def __init__(self, replicas: TaskReplicas, find: FindCloneCredentials) -> None:
        self._replicas = replicas
        self._find = find
        self._counts: WeakKeyDictionary[Job, Counter[str]] = WeakKeyDictionary()
        """The number of requests since this server started, keyed by job and attempt id."""
        self._refusals: WeakKeyDictionary[Job, int] = WeakKeyDictionary()
        """The number of refused requests of each job. A host may send any number; few of them are logged."""
        self._threads = asyncio.Semaphore(_THREADS_MAX)

    async def find_url(self, job: Job, request: CredentialRequest) -> str:
        """Return the URL that the attempt is about to clone. Raises NoCredentialsError if it must not get credentials.

        An attempt may send CREDENTIAL_REQUESTS_MAX requests, and only before its workspace is prepared.
        """
        counts = self._counts.setdefault(job, Counter())
        if request.attempt_id != job.stored.attempt_ids[-1]:
            raise self._refuse(job, request, "another attempt is running")
        counts[request.attempt_id] += 1
        if counts[request.attempt_id] > CREDENTIAL_REQUESTS_MAX:
            raise self._refuse(job, request, f"the attempt has requested credentials {CREDENTIAL_REQUESTS_MAX} times")
        try:
            task = await asyncio.to_thread(self._replicas.read_task, job.stored.task_id)
        except (JournalDamagedError, OSError) as error:
            raise NoCredentialsError(f"The server cannot read the journal: {error_reason(error)}") from error
        if task is None or (attempt := task.attempt) is None or attempt.id != request.attempt_id:
            raise self._refuse(job, request, "the attempt has not started")
        if task.state.is_final or task.failure is not None or attempt.resumes or attempt.base_commit is not None:
            raise self._refuse(job, request, "the attempt does not clone its repository now")
        return task.manifest.repository.url

    async def find(self, job: Job, request: CredentialRequest, url: str) -> CredentialAnswer:
        """Look the credentials up in a separate thread, because a credential helper may block."""
        host, origin = job.identity.name, f"{request.protocol}://{request.host}"
        try:
            async with asyncio.timeout(CREDENTIAL_LOOKUP_SECONDS):
                found = await self._find_in_thread(url, CredentialQuery(request.protocol, request.host))
        except NoCredentialsError as error:
            _log.warning("The worker of task %s on %s gets no credentials: %s", job.stored.task_id, host, error)
            return CredentialAnswer(request.number, reason=str(error), is_transient=error.is_transient)
        except TimeoutError:
            _log.warning("The credentials for %s were not found within %d s", origin, CREDENTIAL_LOOKUP_SECONDS)
            reason = f"The server did not find credentials for {origin} in time: check its credential helpers."
            return CredentialAnswer(request.number, reason=reason, is_transient=True)
        except Exception:
            _log.exception("The lookup of credentials for %s failed", origin)
            reason = f"The server's lookup of credentials for {origin} failed; its log has the reason."
            return CredentialAnswer(request.number, reason=reason)
        _log.info("The worker of task %s on %s gets the credentials for %s", job.stored.task_id, host, origin)
        return CredentialAnswer(request.number, found)

    async def _find_in_thread(self, url: str, query: CredentialQuery) -> Credentials:
        """Look the credentials up in a daemon thread: a lookup that never ends must not delay the server's exit."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Credentials] = loop.create_future()

        def end(found: Credentials | Exception) -> None:
            self._threads.release()
            if result.done():
                return
            if isinstance(found, Exception):
                result.set_exception(found)
            else:
                result.set_result(found)

        def work() -> None:
            found: Credentials | Exception
            try:
                found = self._find(url, query)
            except Exception as error:
                found = error
            with contextlib.suppress(RuntimeError):  # the loop was closed in the meantime
                loop.call_soon_threadsafe(end, found)

        await self._threads.acquire()
        try:
            threading.Thread(target=work, name="git-credentials", daemon=True).start()
        except BaseException:
            self._threads.release()
            raise
        return await result

    def _refuse(self, job: Job, request: CredentialRequest, reason: str) -> NoCredentialsError:
        host = job.identity.name
        self._refusals[job] = refusals = self._refusals.get(job, 0) + 1
        if refusals <= LOGGED_REFUSALS_MAX:
            _log.warning("Attempt %s on %s gets no credentials, because %s", request.attempt_id, host, reason)
        return NoCredentialsError(f"The server refused a request for credentials, because {reason}.")
