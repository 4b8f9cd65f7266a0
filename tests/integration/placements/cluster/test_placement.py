"""The placement of a cluster. `tests/contract/test_placement.py` tests it with real workers."""

import asyncio
import contextlib
import errno
import ssl
import time

import msgspec
import pytest

from doubles.cluster_server import HOST, OVERHEAD_BYTES, SMALL, ClusterServer, create_job_request, wait_until
from sandbox.interfaces.cluster_engine import EngineUnavailableError
from sandbox.interfaces.images import Image, ImageReference, ImageUnusableError
from sandbox.interfaces.journal import JournalBusyError, LockState
from sandbox.interfaces.placement import (
    AttemptLocation,
    HostNotFoundError,
    HostPendingError,
    HostUnreachableError,
    Leftover,
    Loss,
)
from sandbox.interfaces.runner import FinishAttempt, RunAttempt, RunnerNotStartedError
from sandbox.interfaces.worker_messages import (
    CallResult,
    Claimed,
    HasDisk,
    Heartbeat,
    ImagePreparationStatus,
    Launch,
    LockDisk,
    PreparedImage,
    PrepareImage,
    ReadEndOffset,
    ReceiveRecords,
    ServerCall,
    UnlockDisk,
)
from sandbox.model.failure import FailureCode
from sandbox.placements.cluster import jobs
from sandbox.placements.cluster import placement as placement_module
from sandbox.placements.cluster.job_state import JobStore
from sandbox.placements.cluster.jobs import JobSettings
from sandbox.placements.cluster.placement import ServerTaskStorage, WorkerListenerSettings, create_cluster_placement

LOCATION = AttemptLocation("task-1", "abcdefghijkl", "cluster:host-1")


class FakeTaskStates:
    """Reports whether tasks have ended. errors: how many of the next queries fail."""

    def __init__(self):
        self.ended, self.errors = set(), 0

    def has_task_ended(self, task_id):
        if self.errors > 0:
            self.errors -= 1
            raise OSError(errno.EIO, "Input/output error")
        return task_id in self.ended


@pytest.fixture
def tasks():
    return FakeTaskStates()


@pytest.fixture
def server(tmp_path):
    """A server of which only the files, the certificate and the engine are used."""
    return ClusterServer(tmp_path)


@contextlib.asynccontextmanager
async def running_placement(server, tasks):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(server.certificate)
    placement = await create_cluster_placement(
        server.store,
        server.engine,
        JobSettings(600, OVERHEAD_BYTES, create_job_request),
        WorkerListenerSettings("127.0.0.1", server.port, tls),
        ServerTaskStorage(server.replicas, None, tasks.has_task_ended),
        server.images,
        server.find_credentials,
    )
    running = asyncio.create_task(placement.run())
    await asyncio.sleep(0)  # a task that is cancelled before it starts does not close anything
    yield placement
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
async def placement(server, tasks):
    async with running_placement(server, tasks) as placement:
        yield placement


async def reserve(server, placement, task_id="task-1"):
    """Reserve a host and record an attempt; return the job, which has been submitted."""
    with contextlib.suppress(HostPendingError):
        await placement.allocator.reserve_host(task_id, None, SMALL, "agentic-dev")
    job = placement.allocator._workers.jobs.of_task(task_id)
    server.record_attempt(job)
    await wait_until(lambda: server.tokens(job))
    return job


async def test_capacity_is_the_largest_host_minus_the_overhead_of_a_worker(placement):
    assert placement.host.capacity.memory_bytes == 2**33 - OVERHEAD_BYTES
    assert placement.host.capacity.cpus == 8
    assert placement.host.blocked_reason() is None
    assert (await placement.host.probe()).failure is None


async def test_each_of_the_largest_hosts_is_offered_without_the_overhead_of_a_worker(placement):
    assert [host.cpus for host in placement.allocator.maximal_host_sizes] == [1, 8, 64]
    assert placement.allocator.maximal_host_sizes[2].memory_bytes == 2**32 - OVERHEAD_BYTES


async def test_restarted_server_can_start_while_the_engine_does_not_respond(server, tasks):
    """The server must start without delay, because workers have to reconnect before their leases end."""
    available = server.engine.maximal_host_sizes

    async def fail():
        raise EngineUnavailableError("It is not responding.")

    server.engine.maximal_host_sizes = fail
    with pytest.raises(EngineUnavailableError):
        async with running_placement(server, tasks):
            pass
    server.engine.maximal_host_sizes = available
    async with running_placement(server, tasks) as placement:
        expected = placement.allocator.maximal_host_sizes
    server.engine.maximal_host_sizes = fail
    async with running_placement(server, tasks) as placement:
        assert placement.allocator.maximal_host_sizes == expected


async def test_reservation_waits_at_most_a_second_for_a_worker(placement):
    started_at = asyncio.get_running_loop().time()
    with pytest.raises(HostPendingError):
        await placement.allocator.reserve_host("task-1", None, SMALL, "agentic-dev")
    assert asyncio.get_running_loop().time() - started_at < 5
    job = placement.allocator._workers.jobs.of_task("task-1")
    assert placement.find_runner(LOCATION).lock_state() is LockState.FREE
    assert not await placement.find_runner(LOCATION).kill()
    order = FinishAttempt("task-1", job.stored.attempt_id)
    with pytest.raises(RunnerNotStartedError):
        await placement.launch(order, UnusedWriter())
    await placement.allocator.release_host("task-1")
    assert placement.allocator._workers.jobs.of_task("task-1") is None


class UnusedWriter:
    def sync(self):
        pass


async def test_attempt_of_an_unknown_job_is_lost_only_after_a_lease(placement, monkeypatch):
    assert placement.find_runner(LOCATION).lock_state() is LockState.UNKNOWN
    assert placement.allocator.find_loss(LOCATION) is None
    monkeypatch.setattr(jobs, "takeover_seconds", lambda _: 0.0)
    assert placement.find_runner(LOCATION).lock_state() is LockState.FREE
    assert placement.allocator.find_loss(LOCATION) == Loss(FailureCode.HOST_LOST)


async def test_attempt_of_an_unknown_job_has_no_files(placement):
    files = placement.files
    assert not files.has_disk(LOCATION)
    assert not files.has_disk_or_handle(LOCATION)
    assert not files.has_sandbox_handle("task-1")
    assert not files.has_same_secrets(LOCATION, {"NAME": "value"})
    scan = await files.scan()
    assert (scan.leftovers, scan.unowned) == ((), {})
    await files.clean_up(Leftover(LOCATION, (), has_sandbox_handle=False), keeps_disk=False)
    async with placement.preserved_disk(LOCATION).try_lock() as lock_state:
        assert lock_state is LockState.UNKNOWN
    with pytest.raises(HostUnreachableError):
        placement.allocator.find_image(LOCATION, "agentic-dev")


# Workers that a compromised host may have changed, and hosts that fail


@pytest.fixture
async def worker(server, placement):
    """A worker that has claimed its job."""
    worker = FakeWorker(server, await reserve(server, placement))
    async with server.connect(server.claim(worker.job), Heartbeat(1, "free", 0, 0, is_launching=False)) as client:
        serving = asyncio.create_task(worker.serve(client))
        await wait_until(lambda: worker.job.session and worker.job.session.lock_state is LockState.FREE)
        yield worker
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


class TestImages:
    """A task waits until its host has the server's image of its profile."""

    WANTED = ImageReference("tools", "sha256:" + "1" * 64, 1000)
    PREPARED = PreparedImage(WANTED.digest, "/images/1/root")

    @pytest.fixture(autouse=True)
    def image(self, server, monkeypatch):
        monkeypatch.setattr(
            server.images, "find_reference", lambda profile: self.WANTED if profile == "tools" else None
        )

    async def reserve(self, placement, profile="tools"):
        return await placement.allocator.reserve_host("task-1", None, SMALL, profile)

    async def test_attempt_gets_the_image_of_the_server(self, worker, placement):
        worker.answers[PrepareImage] = lambda _: ImagePreparationStatus(is_ready=True, image=self.PREPARED)
        reserved = await self.reserve(placement)
        assert worker.requests == [PrepareImage("tools", self.WANTED)]
        assert reserved.find_image("tools") == Image("tools", self.WANTED.digest, "/images/1/root")

    async def test_attempt_without_an_image_of_the_server_uses_the_host(self, worker, placement):
        worker.answers[PrepareImage] = lambda _: ImagePreparationStatus(is_ready=True)
        assert (await self.reserve(placement, "basic")).find_image("basic") is None
        assert worker.requests == [PrepareImage("basic", None)]

    async def test_task_waits_while_the_image_is_fetched(self, worker, placement):
        answer = ImagePreparationStatus(is_ready=False, received_bytes=430, problem="It was not fetched: \x1b[2J.")
        worker.answers[PrepareImage] = lambda _: answer
        with pytest.raises(HostPendingError) as caught:
            await self.reserve(placement)
        expected = f"The host {HOST} is fetching the image {self.WANTED.name} (43 %). It was not fetched: \ufffd[2J."
        assert caught.value.message == expected

    @pytest.mark.parametrize(
        "answer",
        [ImagePreparationStatus(is_ready=False), CallResult(0, error="OSError", message="No space left on device")],
    )
    async def test_image_is_requested_again_only_after_a_pause(self, worker, placement, monkeypatch, answer):
        monkeypatch.setattr("sandbox.placements.cluster.hosts._RESERVE_SECONDS", 0.5)
        worker.answers[PrepareImage] = lambda _: answer
        begin = time.monotonic()
        for _ in range(3):
            with pytest.raises(HostPendingError):
                await self.reserve(placement)
        assert time.monotonic() - begin >= 1.5

    async def test_image_that_cannot_be_used_fails_the_attempt(self, worker, placement):
        worker.answers[PrepareImage] = lambda request: CallResult(
            0, error="ImageUnusableError", message="It is broken."
        )
        reserved = await self.reserve(placement)
        with pytest.raises(ImageUnusableError, match="It is broken"):
            reserved.find_image("tools")

    @pytest.mark.parametrize("error", ["JournalBusyError", "RunnerNotStartedError", "Unknown"])
    async def test_task_waits_if_the_worker_reports_an_undeclared_error(self, worker, placement, error):
        worker.answers[PrepareImage] = lambda request: CallResult(0, error=error, message="Another process")
        with pytest.raises(HostPendingError, match=f"The host {HOST} cannot prepare the image .*: Another process"):
            await self.reserve(placement)

    async def test_task_waits_while_the_host_cannot_store_the_image(self, worker, placement):
        worker.answers[PrepareImage] = lambda request: CallResult(0, error="OSError", message="No space left on device")
        with pytest.raises(HostPendingError, match=f"The host {HOST} cannot prepare the image .*: No space left"):
            await self.reserve(placement)


class FakeWorker:
    """Answers requests. The test replaces the answers; None means that there is no answer."""

    def __init__(self, server, job):
        self.server, self.job = server, job
        self.requests, self.end = [], 0
        self.answers = {ReadEndOffset: lambda _: self.end, ReceiveRecords: self.receive, Launch: lambda _: 1}

    def receive(self, request):
        self.end = request.offset + len(request.data)
        return self.end

    def names(self):
        return [type(request).__name__ for request in self.requests]

    async def serve(self, client):
        while (message := await client.read()) is not None:
            if isinstance(message, ServerCall):
                self.requests.append(message.request)
                answer = self.answers.get(type(message.request), lambda _: None)(message.request)
                if isinstance(answer, CallResult):
                    await client.send(msgspec.structs.replace(answer, call_id=message.call_id))
                elif answer is not None:
                    await client.send(CallResult(message.call_id, msgspec.json.encode(answer)))

    async def launch(self, placement):
        """Launch the recorded attempt."""
        writer = self.server.journals.open("task-1")
        try:
            async with asyncio.timeout(15):
                await placement.launch(RunAttempt("task-1", self.job.stored.attempt_id), writer)
        finally:
            writer.close()


async def test_worker_gets_the_records_before_the_order(server, placement, worker):
    await worker.launch(placement)
    assert worker.names() == ["ReadEndOffset", "ReceiveRecords", "Launch"]
    assert worker.end == server.replicas.end_offset("task-1")
    assert not worker.job.stored.is_fenced


@pytest.mark.parametrize(
    ("request_type", "answer"),
    [
        (ReceiveRecords, lambda request: request.offset),
        (ReceiveRecords, lambda request: request.offset + 1),
        (ReceiveRecords, lambda request: request.offset + len(request.data) + 1),
        (ReadEndOffset, lambda _: -1),
        (ReadEndOffset, lambda _: 2**40),
    ],
)
async def test_worker_without_progress_is_fenced(placement, worker, request_type, answer):
    worker.answers[request_type] = answer
    with pytest.raises(RunnerNotStartedError, match="its journal has"):
        await worker.launch(placement)
    assert "Launch" not in worker.names()
    await wait_until(lambda: worker.job.stored.is_fenced)
    with pytest.raises(RunnerNotStartedError):
        await worker.launch(placement)


async def test_launch_fails_if_another_process_writes_the_journal_on_the_host(placement, worker):
    worker.answers[Launch] = lambda _: CallResult(0, error="JournalBusyError", message="Another process")
    with pytest.raises(JournalBusyError, match="Another process"):
        await worker.launch(placement)


async def test_undeclared_error_of_a_request_is_raised_as_a_host_error(placement, worker):
    location = AttemptLocation("task-1", worker.job.stored.attempt_id, f"cluster:{HOST}")
    worker.answers[HasDisk] = lambda _: CallResult(0, error="JournalBusyError", message="Another process")
    with pytest.raises(OSError, match="Another process"):
        await asyncio.to_thread(placement.files.has_disk, location)


async def test_launch_times_out_if_its_records_are_received_slowly(placement, worker, monkeypatch):
    """The next launch sends the remaining records."""
    monkeypatch.setattr(placement_module, "_COPY_SECONDS", 0.3)
    worker.answers[ReceiveRecords] = lambda _: None
    with pytest.raises(RunnerNotStartedError, match="timed out"):
        await worker.launch(placement)
    assert not worker.job.stored.is_fenced
    worker.answers[ReceiveRecords] = worker.receive
    monkeypatch.undo()
    await worker.launch(placement)
    assert worker.names()[-1] == "Launch"


@pytest.mark.parametrize("request_type", [ReadEndOffset, ReceiveRecords, Launch])
async def test_disk_error_on_a_host_allows_another_attempt(placement, worker, request_type):
    """The task does not end, because an attempt on another host may succeed."""
    worker.answers[request_type] = lambda _: CallResult(0, error="OSError", message="[Errno 30] Read-only file system")
    with pytest.raises(RunnerNotStartedError, match="Read-only file system"):
        await worker.launch(placement)
    assert not worker.job.stored.is_fenced


async def test_lock_that_the_worker_acquires_too_late_is_released(placement, worker):
    disk = placement.preserved_disk(LOCATION._replace(attempt_id=worker.job.stored.attempt_id))
    async with disk.try_lock() as lock_state:
        assert lock_state is LockState.UNKNOWN  # the worker has not answered
    [lock, unlock] = await wait_until(lambda: len(worker.requests) == 2 and worker.requests)
    assert (type(lock), unlock) == (LockDisk, UnlockDisk(lock.lock_id))


async def test_lock_of_a_cancelled_request_is_released(placement, worker):
    disk = placement.preserved_disk(LOCATION._replace(attempt_id=worker.job.stored.attempt_id))
    locking = asyncio.create_task(disk.try_lock().__aenter__())
    [lock] = await wait_until(lambda: worker.requests)
    locking.cancel()
    await asyncio.gather(locking, return_exceptions=True)
    assert await wait_until(lambda: worker.requests[1:]) == [UnlockDisk(lock.lock_id)]


async def test_acquired_lock_is_released_once(placement, worker):
    worker.answers |= {LockDisk: lambda _: "free", UnlockDisk: lambda _: CallResult(0)}
    disk = placement.preserved_disk(LOCATION._replace(attempt_id=worker.job.stored.attempt_id))
    async with disk.try_lock() as lock_state:
        assert lock_state is LockState.FREE
    worker.answers[LockDisk] = lambda _: "held"
    async with disk.try_lock() as lock_state:
        assert lock_state is LockState.HELD
    assert worker.names() == ["LockDisk", "UnlockDisk", "LockDisk"]


async def test_release_of_old_jobs_is_repeated_after_an_error(server, tasks, monkeypatch):
    """Workers can connect in the meantime."""
    async with running_placement(server, tasks) as placement:
        for task_id in ("task-1", "task-2", "task-3"):
            await reserve(server, placement, task_id)
    for name in ("_RELEASE_SECONDS", "_RELEASE_SECONDS_MAX"):
        monkeypatch.setattr(placement_module, name, 0.02)
    tasks.ended, tasks.errors, removed, errors = {"task-1", "task-3"}, 2, JobStore.remove, [errno.ENOSPC] * 2

    def remove(store, job):
        if errors:
            raise OSError(errors.pop(), "No space left on device")
        removed(store, job)

    monkeypatch.setattr(JobStore, "remove", remove)
    async with running_placement(server, tasks) as placement:
        remaining = placement.allocator._workers.jobs
        await wait_until(lambda: remaining.task_ids() == {"task-2"})
        assert (tasks.errors, errors) == (0, [])
        job = remaining.of_task("task-2")
        async with server.connect(server.claim(job)) as client:
            assert isinstance(await client.read(), Claimed)


async def test_drained_hosts_are_stored_and_listed(server, tasks):
    async with running_placement(server, tasks) as placement:
        await placement.allocator.drain_host(HOST)
        [status] = placement.allocator.host_statuses()
        assert status.draining_since is not None
    async with running_placement(server, tasks) as placement:
        assert [each.draining_since for each in placement.allocator.host_statuses()] == [status.draining_since]
        await placement.allocator.undo_host_drain(HOST)
        assert [each.draining_since for each in placement.allocator.host_statuses()] == [None]
        with pytest.raises(HostNotFoundError):
            await placement.allocator.drain_host("host-9")


async def test_server_does_not_start_if_the_drained_hosts_are_unknown(server, tasks):
    server.store.with_name("drained.json").write_bytes(b"{")
    with pytest.raises(OSError, match="is damaged"):
        async with running_placement(server, tasks):
            pass
