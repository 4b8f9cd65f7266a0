"""Answers workers that need git credentials for a task: checks each request, then looks up the credentials.

A host may be compromised. It gets only the credentials of the repository that its task is about to clone.
"""

import asyncio
import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable
from weakref import WeakKeyDictionary

from sandbox.interfaces.git_credentials import (
    CREDENTIAL_REQUESTS_MAX,
    CredentialAnswer,
    CredentialQuery,
    CredentialRequest,
    Credentials,
    NoCredentialsError,
)
from sandbox.interfaces.journal import JournalDamagedError, TaskReplicas
from sandbox.model.errors import error_reason
from sandbox.placements.cluster.job_state import Job

FindCloneCredentials = Callable[[str, CredentialQuery], Credentials]
"""Finds the credentials for a clone of a repository URL, if the query is for its protocol and host.

Blocks. Raises NoCredentialsError.
"""

CREDENTIAL_LOOKUP_SECONDS = 30.0
"""Time limit for a lookup, including the wait for a thread."""

LOGGED_REFUSALS_MAX = 2 * CREDENTIAL_REQUESTS_MAX
"""Maximum number of refused requests of a job that are logged."""

_THREADS_MAX = 4
_log = logging.getLogger(__name__)


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
