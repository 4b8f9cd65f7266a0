"""Requests of workers for git credentials. A compromised host may send any request."""

import asyncio
import contextlib
import threading

import msgspec
import pytest

from doubles.cluster_server import NOW, TIMEOUT_SECONDS
from sandbox.interfaces.worker_messages import Claimed, Heartbeat, HeartbeatAnswer, WorkerDismissed
from sandbox.interfaces.workspace import (
    CREDENTIAL_REQUESTS_MAX,
    CredentialAnswer,
    CredentialQuery,
    CredentialRequest,
    Credentials,
    NoCredentialsError,
)
from sandbox.model.events import AttemptFailed, AttemptStarted, AttemptTornDown, WorkspacePrepared
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.task_state import TaskState
from sandbox.placements.cluster import worker_authorization
from sandbox.primitives.message_stream import encode_message

FOUND = Credentials(b"me", b"let-me-in")
HEARTBEAT = Heartbeat(1, "held", 0, 0, is_launching=False)
REPOSITORY = "https://example.org/r.git"
LOOKUP = (REPOSITORY, CredentialQuery("https", "example.org"))


@pytest.fixture(autouse=True)
def credentials(server):
    server.credentials = FOUND


def make_request(job, number=1, **changes):
    request = CredentialRequest(number, job.stored.attempt_id, "https", "example.org")
    return msgspec.structs.replace(request, **changes)


@contextlib.asynccontextmanager
async def claimed(server, job):
    async with server.connect(server.claim(job)) as client:
        assert isinstance(await client.read(), Claimed)
        yield client


def record(server, *events):
    """Append records, as the worker would."""
    writer = server.journals.open("task-1")
    recorder = server.journals.recorder(writer, server.journals.replay("task-1").task, lambda: NOW)
    for event in events:
        recorder.record(event)
    writer.close()


async def check_refused(server, client, request, reason):
    """Check that the request causes no lookup and gets no credentials, and that the worker continues."""
    before = len(server.credential_lookups)
    await client.send(request)
    answer = await client.read()
    assert isinstance(answer, CredentialAnswer)
    assert (answer.number, answer.credentials) == (request.number, None)
    assert reason in answer.reason
    assert len(server.credential_lookups) == before


async def test_worker_gets_the_credentials_for_the_repository_of_its_task(server, job):
    async with claimed(server, job) as client:
        await client.send(make_request(job, 7))
        assert await client.read() == CredentialAnswer(7, FOUND)
    assert server.credential_lookups == [LOOKUP]


async def test_url_comes_from_the_manifest(server, job):
    """The lookup compares the worker's host and protocol with the URL. No worker can name another path or user."""
    server.credentials = NoCredentialsError("The server refused it.")
    async with claimed(server, job) as client:
        await client.send(make_request(job, protocol="http", host="github.com"))
        assert await client.read() == CredentialAnswer(1, reason="The server refused it.")
    assert server.credential_lookups == [(REPOSITORY, CredentialQuery("http", "github.com"))]


async def test_credentials_are_refused_once_the_workspace_is_prepared(server, job):
    async with claimed(server, job) as client:
        await client.send(make_request(job))
        assert (await client.read()).credentials == FOUND
        record(server, WorkspacePrepared("c" * 40))
        await check_refused(server, client, make_request(job), "does not clone its repository now")


async def test_failed_attempt_gets_no_credentials(server, job):
    async with claimed(server, job) as client:
        record(server, AttemptFailed(Failure(FailureCode.CLONE_FAILED, "It failed.")))
        await check_refused(server, client, make_request(job), "does not clone its repository now")


async def test_number_of_requests_is_limited_across_reconnections(server, job):
    claim = server.claim(job)
    for _ in range(2):
        async with server.connect(claim) as client:
            await client.read()
            for number in range(CREDENTIAL_REQUESTS_MAX // 2):
                await client.send(make_request(job, number))
                assert await client.read() == CredentialAnswer(number, FOUND)
    async with server.connect(claim) as client:
        await client.read()
        await check_refused(
            server, client, make_request(job), f"has requested credentials {CREDENTIAL_REQUESTS_MAX} times"
        )


async def test_refused_requests_count_toward_the_limit(server, job):
    server.credentials = NoCredentialsError("There are none.")
    async with claimed(server, job) as client:
        for _ in range(CREDENTIAL_REQUESTS_MAX):
            await client.send(make_request(job))
            await client.read()
        server.credentials = FOUND
        await check_refused(server, client, make_request(job), "times")


async def test_only_the_newest_attempt_gets_credentials(server, job):
    first = job.stored.attempt_id
    async with claimed(server, job) as client:
        record(server, AttemptFailed(Failure(FailureCode.INTERNAL, "It failed.", is_transient=True)))
        server.jobs.reserve("task-1", first, job.stored.resources)
        second = job.stored.attempt_ids[-1]
        assert second != first
        await check_refused(server, client, make_request(job), "another attempt is running")
        await check_refused(server, client, make_request(job, attempt_id=second), "has not started")
        record(server, AttemptTornDown(), AttemptStarted(second, "bubblewrap", "cluster:host-1"))
        await check_refused(server, client, make_request(job), "another attempt is running")
        await client.send(make_request(job, attempt_id=second))
        assert (await client.read()).credentials == FOUND


async def test_attempt_that_resumes_gets_no_credentials(server, job):
    async with claimed(server, job) as client:
        task = server.journals.replay("task-1").task
        resumed = msgspec.structs.replace(task, attempt=msgspec.structs.replace(task.attempt, resumes=True))
        server.replicas.read_task = lambda task_id: resumed
        await check_refused(server, client, make_request(job), "does not clone its repository now")


async def test_task_that_has_ended_gets_no_credentials(server, job):
    async with claimed(server, job) as client:
        task = server.journals.replay("task-1").task
        server.replicas.read_task = lambda task_id: msgspec.structs.replace(task, state=TaskState.CANCELLED)
        await check_refused(server, client, make_request(job), "does not clone its repository now")


async def test_attempt_of_another_job_gets_no_credentials(server, job):
    other = await server.submit("task-2")
    async with claimed(server, job) as client:
        await check_refused(server, client, make_request(other), "another attempt is running")
        await client.send(make_request(job))
        assert await client.read() == CredentialAnswer(1, FOUND)


async def test_unreadable_journal_gives_no_credentials(server, job):
    async with claimed(server, job) as client:
        server.replicas.read_task = raise_os_error
        await check_refused(server, client, make_request(job), "cannot read the journal")


def raise_os_error(task_id):
    raise OSError("Input/output error")


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "h" * 301},
        {"host": ""},
        {"host": "a b"},
        {"host": "a\nhost=b"},
        {"protocol": "ftp"},
        {"protocol": "https\n"},
        {"attempt_id": "../../../etc"},
        {"number": -1},
        {"number": 2**63},
    ],
)
async def test_invalid_request_fences_the_worker(server, job, changes):
    async with claimed(server, job) as client:
        await client.send(encode_message(make_request(job, **changes)))
        assert isinstance(await client.read(), WorkerDismissed)
    assert server.credential_lookups == []
    assert job.stored.is_fenced


async def test_request_before_the_claim_gets_no_answer(server, job):
    async with server.connect(make_request(job)) as client:
        assert await client.read() is None
    assert server.credential_lookups == []


async def test_slow_lookup_does_not_delay_heartbeats_and_times_out(server, job, monkeypatch):
    """A credential helper may wait for a network or for user input."""
    monkeypatch.setattr(worker_authorization, "CREDENTIAL_LOOKUP_SECONDS", 0.5)
    blocked = threading.Event()
    server.find_credentials_now = lambda: blocked.wait(TIMEOUT_SECONDS)
    async with claimed(server, job) as client:
        await client.send(make_request(job))
        await client.send(HEARTBEAT)
        assert await client.read() == HeartbeatAnswer(1)
        answer = await client.read()
        assert (answer.credentials, answer.is_transient) == (None, True)
        assert "did not find credentials for https://example.org in time" in answer.reason
        blocked.set()
        await asyncio.sleep(0.1)
        await client.send(make_request(job, 2))
        assert await client.read() == CredentialAnswer(2, FOUND)


async def test_stuck_lookups_delay_other_lookups_for_a_limited_time(server, job, monkeypatch):
    monkeypatch.setattr(worker_authorization, "CREDENTIAL_LOOKUP_SECONDS", 0.3)
    monkeypatch.setattr(worker_authorization, "_THREADS_MAX", 1)
    await server.restart()
    job = server.jobs.of_task("task-1")
    blocked = threading.Event()
    server.find_credentials_now = lambda: blocked.wait(TIMEOUT_SECONDS)
    async with claimed(server, job) as client:
        for number in (1, 2):
            await client.send(make_request(job, number))
        answers = [await client.read() for _ in range(2)]
        assert [(answer.credentials, answer.is_transient) for answer in answers] == [(None, True)] * 2
    assert len(server.credential_lookups) == 1
    blocked.set()


async def test_result_of_a_lookup_is_not_sent_to_a_worker_that_was_fenced(server, job):
    blocked = threading.Event()
    server.find_credentials_now = lambda: blocked.wait(TIMEOUT_SECONDS)
    async with claimed(server, job) as client:
        await client.send(make_request(job))
        await client.send(b"\xff\xff\xff\xff")
        assert isinstance(await client.read(), WorkerDismissed)
        blocked.set()
        assert await client.read() is None


async def test_unexpected_error_of_a_lookup_gives_no_credentials(server, job):
    server.credentials = RuntimeError("let-me-in")
    async with claimed(server, job) as client:
        await client.send(make_request(job))
        answer = await client.read()
        assert answer.credentials is None
        assert "let-me-in" not in answer.reason
        await client.send(HEARTBEAT)
        assert await client.read() == HeartbeatAnswer(1)


async def test_password_is_not_logged(server, job, caplog):
    caplog.set_level("DEBUG")
    async with claimed(server, job) as client:
        await client.send(make_request(job))
        await client.read()
    assert "gets the credentials for https://example.org" in caplog.text
    assert "let-me-in" not in caplog.text


async def test_host_cannot_fill_the_log_with_refused_requests(server, job, caplog):
    async with claimed(server, job) as client:
        for number in range(worker_authorization.LOGGED_REFUSALS_MAX + 5):
            await check_refused(
                server, client, make_request(job, number, attempt_id="a" * 12), "another attempt is running"
            )
    refused = [each for each in caplog.messages if "gets no credentials" in each]
    assert len(refused) == worker_authorization.LOGGED_REFUSALS_MAX
