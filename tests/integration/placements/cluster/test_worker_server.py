"""Claims by workers, and messages from workers that a compromised host may have changed."""

import asyncio
import contextlib
import hashlib
import os

import msgspec
import pytest

from doubles.cluster_server import BOOT_ID, wait_until
from sandbox.interfaces.cluster_engine import EngineUnavailableError, JobPhase, JobStatus
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.worker_messages import (
    CallResult,
    Claimed,
    EndedTasks,
    FindEndedTasks,
    Heartbeat,
    HeartbeatAnswer,
    JoinStream,
    Records,
    RecordsReceived,
    RunnerLog,
    Upload,
    WorkDone,
    WorkerDismissed,
)
from sandbox.journal import record_format
from sandbox.model.artifacts import Artifact
from sandbox.model.events import AttemptFailed, AttemptStarted, Output, Record, TaskFinished, WorkspacePrepared
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.state_machine import advance
from sandbox.placements.cluster import job_state, jobs, worker_server
from sandbox.primitives.message_stream import encode_message

HEARTBEAT_WITH_FREE_LOCK, HEARTBEAT_WITH_HELD_LOCK = (
    Heartbeat(1, lock_state, 0, 0, is_launching=False) for lock_state in ("free", "held")
)


async def check_rejected(server, claim):
    async with server.connect(claim) as client:
        assert isinstance(await client.read(), WorkerDismissed)
        assert await client.read() is None


# Claims.


async def test_worker_with_the_token_gets_the_task(server, job):
    async with server.connect(server.claim(job)) as client:
        claimed = await client.read()
        assert isinstance(claimed, Claimed)
        assert (claimed.task_id, claimed.lease_seconds) == ("task-1", server.lease_seconds)
        assert claimed.end_offset == server.replicas.end_offset("task-1")
        assert job.identity == ("cluster:host-1", BOOT_ID)
    await wait_until(lambda: job.session is None)


async def test_connection_keeps_a_small_buffer(server, job):
    """A server has a thousand connections, and asyncio keeps a buffer for each of them."""
    async with server.connect(server.claim(job)) as client:
        await client.read()
        tls = job.session._writer.transport._ssl_protocol
        assert len(tls._ssl_buffer) <= 2**14


async def test_token_is_stored_only_as_a_hash(server, job):
    [token], [file] = server.tokens(job), server.store.iterdir()
    content = msgspec.json.decode(file.read_bytes())
    assert token not in file.read_bytes()
    assert token.hex().encode() not in file.read_bytes()
    assert content["token_hashes"] == msgspec.to_builtins([hashlib.sha256(token).digest()])


async def test_wrong_tokens_and_unknown_attempts_are_rejected(server, job):
    await check_rejected(server, server.claim(job, token=os.urandom(32)))
    await check_rejected(server, msgspec.structs.replace(server.claim(job), attempt_id="abcdefghijkl"))
    assert not job.is_claimed


async def test_second_worker_is_rejected_and_the_first_one_continues(server, job):
    async with server.connect(server.claim(job)) as first:
        assert isinstance(await first.read(), Claimed)
        await check_rejected(server, server.claim(job))
        await first.send(HEARTBEAT_WITH_FREE_LOCK)
        assert await first.read() == HeartbeatAnswer(1)


async def test_worker_can_repeat_its_claim(server, job):
    """If the answer to a claim is lost, the worker connects again. The server then closes the earlier connection."""
    claim = server.claim(job)
    async with server.connect(claim) as first:
        await first.read()
        async with server.connect(claim) as second:
            assert isinstance(await second.read(), Claimed)
            assert await first.read() is None
            await second.send(HEARTBEAT_WITH_FREE_LOCK)
            assert await second.read() == HeartbeatAnswer(1)
        await check_rejected(server, server.claim(job, nonce=claim.nonce, boot_id="boot-2"))


async def test_worker_that_is_abandoned_during_its_claim_gets_no_answer(server, job, monkeypatch):
    """The answer would extend the lease."""
    claim, end_offset = server.claim(job), server.replicas.end_offset
    async with server.connect(claim) as client:
        await client.read()

    def abandon(task_id):
        server.jobs._save(job, is_abandoned=True)
        return end_offset(task_id)

    monkeypatch.setattr(server.replicas, "end_offset", abandon)
    await check_rejected(server, claim)
    assert job.session is None


@pytest.mark.parametrize(
    "status",
    [
        JobStatus(JobPhase.RUNNING, "host-2"),
        JobStatus(JobPhase.RUNNING, "host-1", is_ending=True),
        JobStatus(JobPhase.WAITING),
        JobStatus(JobPhase.ENDED, "host-1"),
        JobStatus(JobPhase.UNREACHABLE, "host-1"),
        JobStatus(JobPhase.UNKNOWN),
        None,
    ],
)
async def test_worker_gets_its_task_only_on_the_host_where_the_engine_runs_the_job(server, job, monkeypatch, status):
    """The token alone is not enough. The same worker gets the task as soon as the engine confirms its host."""
    monkeypatch.setattr(jobs, "_HOST_CONFIRMATION_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(jobs.Jobs, "_act", keep_job)
    reconcile_jobs, claim = server.engine.reconcile_jobs, server.claim(job)

    async def report(names):
        if status is None:
            raise EngineUnavailableError("It is not responding.")
        return dict.fromkeys(names, status)

    server.engine.reconcile_jobs = report
    await wait_until(lambda: job.phase is (None if status is None else status.phase))
    async with server.connect(claim) as client:
        assert await client.read() is None
    assert not job.is_claimed
    server.engine.reconcile_jobs = reconcile_jobs
    async with server.connect(claim) as client:
        assert isinstance(await client.read(), Claimed)
        server.engine.reconcile_jobs = report
        await wait_until(lambda: job_state.confirmed_host(job) != "host-1")
        async with server.connect(claim) as again:  # a reconnection
            assert isinstance(await again.read(), Claimed)


async def keep_job(self, job):
    """Do nothing, instead of replacing a job whose worker the engine reports as lost."""


async def test_claim_waits_until_the_engine_reports_the_start(server, job):
    """A worker may connect before the next look-up."""
    server.engine.statuses[job.name] = JobStatus(JobPhase.WAITING)
    await wait_until(lambda: job.phase is JobPhase.WAITING)
    async with server.connect(server.claim(job)) as client:
        await asyncio.sleep(0.1)
        assert not job.is_claimed
        server.engine.set_phase(job, JobPhase.RUNNING)
        assert isinstance(await client.read(), Claimed)


async def test_claim_survives_a_restart_of_the_server(server, job):
    claim = server.claim(job)
    async with server.connect(claim) as client:
        await client.read()
    await server.restart()
    assert server.jobs.lock_state("task-1") is LockState.UNKNOWN
    await check_rejected(server, server.claim(job))
    async with server.connect(claim) as client:
        assert isinstance(await client.read(), Claimed)


async def test_tokens_of_all_submissions_are_valid(server, job):
    """A server may die after it stores the token and before the engine responds."""
    server.engine.statuses.clear()
    await server.restart()
    job = server.jobs.of_task("task-1")
    await wait_until(lambda: len(server.tokens(job)) == 2)
    first, second = server.tokens(job)
    claim = server.claim(job, token=first)
    async with server.connect(claim) as client:
        assert isinstance(await client.read(), Claimed)
    await check_rejected(server, server.claim(job, token=second))


# Messages before the claim.


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00\x00\x05hello",
        b"\x00\x00\x20\x01" + bytes(0x2001),
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
        encode_message(HEARTBEAT_WITH_FREE_LOCK),
        encode_message(JoinStream(bytes(32), 1)),
        encode_message(Upload(bytes(32), Artifact("a", "a", 1, "text/plain", "sha256:" + "0" * 64))),
        b"",
    ],
)
async def test_connection_without_a_claim_gets_no_answer(server, job, data):
    async with server.connect(data) as client:
        if data:
            assert await client.read() is None
    assert not job.is_claimed
    async with server.connect(server.claim(job)) as client:
        assert isinstance(await client.read(), Claimed)


async def test_end_of_the_server_aborts_streams_whose_worker_does_not_confirm_the_end(server, job):
    async with server.connect(server.claim(job)) as client:
        session_key = (await client.read()).session_key
        opening = asyncio.create_task(job.session.open_stream(job.stored.attempt_id))
        stream_id = (await client.read()).stream_id
        async with server.connect(JoinStream(session_key, stream_id)) as worker:
            _, writer = await opening
            connection = writer.get_extra_info("socket")
            worker.writer.transport.pause_reading()
            writer.close()
            async with server.connect(JoinStream(bytes(32), 1)) as stranger:
                assert await stranger.read() is None
            await server.stop()
            async with asyncio.timeout(1):
                while connection.fileno() != -1:
                    await asyncio.sleep(0.01)


async def test_end_of_the_server_aborts_the_connection_of_a_session_that_was_closed(server, job):
    async with server.connect(server.claim(job)) as client:
        assert isinstance(await client.read(), Claimed)
        session = job.session
        connection = session._writer.get_extra_info("socket")
        client.writer.transport.pause_reading()
        session.close()
        await asyncio.sleep(0.1)
        await server.stop()
        async with asyncio.timeout(1):
            while connection.fileno() != -1:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def connections_without_handshake(server, count):
    """Connections that do not even begin the TLS handshake."""
    async with contextlib.AsyncExitStack() as stack:
        streams = []
        for _ in range(count):
            streams.append(await asyncio.open_connection("127.0.0.1", server.port))
            stack.callback(streams[-1][1].transport.abort)
        yield [reader for reader, _ in streams]


async def is_closed(reader):
    try:
        async with asyncio.timeout(5):
            return await reader.read(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


@pytest.mark.parametrize("uses_tls", [False, True])
async def test_idle_connections_do_not_block_workers(server, job, monkeypatch, uses_tls):
    monkeypatch.setattr(worker_server, "UNAUTHENTICATED_CONNECTIONS_MAX", 8)
    async with contextlib.AsyncExitStack() as idle:
        claimed = await idle.enter_async_context(server.connect(server.claim(job)))
        assert isinstance(await claimed.read(), Claimed)
        clients = [await idle.enter_async_context(server.connect(uses_tls=uses_tls)) for _ in range(20)]
        async with asyncio.timeout(5):
            for client in clients[:12]:
                assert await client.read() is None
        async with server.connect(server.claim(await server.submit("task-2"))) as other:
            assert isinstance(await other.read(), Claimed)
        await claimed.send(HEARTBEAT_WITH_FREE_LOCK)
        assert await claimed.read() == HeartbeatAnswer(1)


async def test_connections_without_a_handshake_are_closed(server, job, monkeypatch):
    monkeypatch.setattr(worker_server, "_FIRST_MESSAGE_SECONDS", 0.3)
    async with connections_without_handshake(server, 2) as readers:
        assert [await is_closed(reader) for reader in readers] == [True, True]
        async with server.connect(b"") as stranger:
            assert await stranger.read() is None


# Messages after the claim.


class RecordEncoder:
    """Encodes the records of a runner."""

    def __init__(self, server):
        self.task = server.journals.replay("task-1").task
        self.end = server.replicas.end_offset("task-1")

    def line(self, event, /, **changes):
        seq = self.task.last_seq + 1
        at = self.task.state_changed_at
        result = advance(self.task, event, seq=seq, at=at)
        self.task = result.task
        fields = {"seq": seq, "epoch": 2, "at": at, "event": event, "transition": result.transition}
        return record_format.encode(Record(**(fields | changes)))

    def records(self, *events):
        """Return the message with these events."""
        data = b"".join(self.line(event) for event in events)
        message = Records(self.end, data)
        self.end += len(data)
        return message


OUTPUT = Output.from_bytes("stdout", b"x\n")
ENDED = (AttemptFailed(Failure(FailureCode.INTERNAL, "It failed.")), TaskFinished())


def illegal_messages(server):
    """Yield messages that no correct worker sends."""
    end = server.replicas.end_offset("task-1")
    yield b"\x00\x00\x00\x05hello"
    yield b"\xff\xff\xff\xff"
    yield encode_message(server.claim(server.jobs.of_task("task-1")))
    yield encode_message(msgspec.structs.replace(HEARTBEAT_WITH_FREE_LOCK, number=-1))
    yield encode_message(msgspec.structs.replace(HEARTBEAT_WITH_FREE_LOCK, lock_state="maybe"))
    yield encode_message(CallResult(1, error="x" * 65))
    yield encode_message(WorkDone())
    yield encode_message(RunnerLog("abcdefghijkl", b"of another task"))
    yield encode_message(RunnerLog("../../../x", b""))
    yield encode_message(RunnerLog(server.jobs.of_task("task-1").stored.attempt_id, bytes(2**20 + 1)))
    yield encode_message(Records(end, b"not a record\n"))
    yield encode_message(Records(end, RecordEncoder(server).line(OUTPUT, epoch=7)))
    yield encode_message(Records(end, RecordEncoder(server).line(OUTPUT, event=TaskFinished())))
    yield encode_message(Records(end, RecordEncoder(server).line(OUTPUT, event=AttemptStarted("a", "b", "c"))))
    yield encode_message(Records(0, RecordEncoder(server).line(OUTPUT)))


@pytest.mark.parametrize("number", range(15))
async def test_illegal_message_fences_the_worker(server, job, number):
    """The worker gets no further answers. It may still be running, so its journal is not taken over yet."""
    illegal, before = list(illegal_messages(server))[number], server.replicas.end_offset("task-1")
    claim = server.claim(job)
    async with server.connect(claim, HEARTBEAT_WITH_FREE_LOCK) as client:
        await client.read()
        assert await client.read() == HeartbeatAnswer(1)
        await client.send(illegal)
        await client.send(HEARTBEAT_WITH_FREE_LOCK)
        assert isinstance(await client.read(), WorkerDismissed)
        assert await client.read() is None
    await wait_until(lambda: job.name in server.engine.cancelled)
    await check_rejected(server, claim)
    await server.restart()
    await check_rejected(server, claim)
    assert server.jobs.lock_state("task-1") is LockState.UNKNOWN
    assert not server.jobs.of_task("task-1").stored.is_abandoned
    assert server.replicas.end_offset("task-1") == before


async def test_worker_with_many_messages_does_not_delay_the_others(server, job):
    """Between two messages of one worker, all other tasks on the event loop get a turn."""
    turns = 0

    async def count_turns():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with server.connect(server.claim(job), HEARTBEAT_WITH_FREE_LOCK) as client:
        for _ in range(2):
            await client.read()
        counting = asyncio.create_task(count_turns())
        await client.send(encode_message(HEARTBEAT_WITH_FREE_LOCK) * 1000)
        before = turns
        for _ in range(1000):
            await client.read()
        counting.cancel()
        assert turns - before >= 900


async def test_records_are_copied_and_repeated_ones_have_no_effect(server, job):
    writer = RecordEncoder(server)
    first, second = writer.records(WorkspacePrepared("c" * 40), OUTPUT), writer.records(*ENDED)
    async with server.connect(server.claim(job), first, first, second) as client:
        ends = [await client.read() for _ in range(4)][1:]
        assert ends == [RecordsReceived(second.offset), RecordsReceived(second.offset), RecordsReceived(writer.end)]
        await client.send(WorkDone())
        assert await client.read() is None
    assert server.has_task_ended("task-1")
    assert server.jobs.of_task("task-1") is None
    assert server.jobs.lock_state("task-1") is LockState.FREE
    assert list(server.store.iterdir()) == []


async def test_records_after_a_gap_are_requested_again(server, job):
    writer = RecordEncoder(server)
    first, second = writer.records(OUTPUT), writer.records(OUTPUT)
    async with server.connect(server.claim(job), second, first, second) as client:
        answers = [await client.read() for _ in range(4)][1:]
    assert answers[0] == RecordsReceived(first.offset, is_accepted=False)
    assert answers[1:] == [RecordsReceived(second.offset), RecordsReceived(writer.end)]


async def test_records_wait_while_the_server_writes(server, job):
    message = RecordEncoder(server).records(OUTPUT)
    writer = server.journals.open("task-1")
    async with server.connect(server.claim(job), message) as client:
        await client.read()
        assert await client.read() == RecordsReceived(message.offset, is_accepted=False)
        writer.close()
        await client.send(message)
        assert (await client.read()).is_accepted


async def test_lock_is_free_only_after_the_last_record(server, job):
    writer = RecordEncoder(server)
    message = writer.records(OUTPUT)
    async with server.connect(server.claim(job), HEARTBEAT_WITH_HELD_LOCK) as client:
        await client.read()
        await client.read()
        assert job.session.lock_state is LockState.HELD
        await client.send(msgspec.structs.replace(HEARTBEAT_WITH_FREE_LOCK, end_offset=writer.end))
        await client.read()
        assert job.session.lock_state is LockState.UNKNOWN
        await client.send(message)
        await client.read()
        assert job.session.lock_state is LockState.FREE


async def test_worker_receives_the_tasks_that_have_ended(server, job):
    server.jobs.notify_task_ended("task-1")
    other = await server.submit("task-2")
    async with server.connect(server.claim(other), FindEndedTasks(("task-1", "task-2", "task-3"))) as client:
        assert isinstance(await client.read(), Claimed)
        assert await client.read() == EndedTasks(("task-3",))  # task-3 has no journal, so it counts as ended


async def test_log_of_an_attempt_is_stored(server, job):
    attempt_id = job.stored.attempt_id
    async with server.connect(server.claim(job), RunnerLog(attempt_id, b"line\n"), HEARTBEAT_WITH_FREE_LOCK) as client:
        await client.read()
        assert await client.read() == HeartbeatAnswer(1)
    log = server.data_dir / "tasks" / "task-1" / "attempts" / attempt_id / "runner.log"
    assert log.read_bytes() == b"line\n"
