"""A worker with a real server for workers in the same process, and a runner that the test controls."""

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import threading
import time
from typing import Any

import msgspec
import pytest

from doubles.cluster_server import NOW, ClusterServer, wait_until
from doubles.manifests import manifest
from sandbox.bootstrap.cluster_placement import load_or_create_certificate
from sandbox.disks.commands import remove_trees
from sandbox.images.image_store import ImageMetadata, ImageStore
from sandbox.images.image_transfer import HostImageCopies
from sandbox.interfaces.cluster_engine import WorkerRejectedError
from sandbox.interfaces.images import Image, ImageReference
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.placement import AttemptLocation, HostUnreachableError, Leftover, LeftoverScan
from sandbox.interfaces.runner import RunAttempt, RunDebugSession
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.interfaces.worker_messages import (
    Claim,
    HasDisk,
    HostProof,
    Launch,
    LockDisk,
    PrepareImage,
    ReadEndOffset,
    ReceiveRecords,
    RemoveDisk,
    StartDebugSession,
    UnlockDisk,
)
from sandbox.interfaces.workspace import CredentialQuery, Credentials, NoCredentialsError
from sandbox.journal.journals import FileJournals
from sandbox.journal.task_replicas import FileTaskReplicas
from sandbox.journal.writer import JournalRecorder
from sandbox.model.artifacts import Artifact
from sandbox.model.errors import SandboxError
from sandbox.model.events import (
    AgentStarted,
    ArtifactCollected,
    AttemptFailed,
    Output,
    SandboxCreated,
    TaskFinished,
    TaskSubmitted,
    WorkspacePrepared,
)
from sandbox.model.failure import Failure, FailureCode
from sandbox.primitives.message_stream import encode_message, read_message
from sandbox.worker import server_session as session_module
from sandbox.worker import task_requests
from sandbox.worker.server_session import Lease, seconds_since_boot
from sandbox.worker.task_image import TaskImage
from sandbox.worker.task_requests import OtherTaskLeftovers, RunnerCredentialRequests, WorkerTask
from sandbox.worker.worker import (
    EXIT_DISMISSED,
    EXIT_DONE,
    EXIT_HOST_FAILED,
    EXIT_TERMINATED,
    HostProofReaders,
    ServerAddress,
    Worker,
)
from sandbox.workspace.clone.remote_access import ServerCredentials

LEASE_SECONDS = 30.0
PREPARED = WorkspacePrepared("c" * 40)
CREATED = SandboxCreated("vm", "namespaces", "")
STARTED = AgentStarted("00000000-0000-0000-0000-000000000000")
ENDED = (AttemptFailed(Failure(FailureCode.INTERNAL, "It failed.")), TaskFinished())


def output(text):
    return Output.from_bytes("stdout", text.encode() + b"\n")


class FakeHost:
    """The placement, the files and the sockets of the worker's host. The test acts as the runner."""

    def __init__(self, data_dir):
        self.data_dir, self.journals = data_dir, FileJournals(data_dir)
        self.recorder, self.order, self.kills, self.deadlines = None, None, 0, []
        self.files, self.is_disk_locked, self.removals = self, False, 0
        self.locked, self.cleaned = set(), []
        self.launch_error, self.scan_errors, self.may_lock = None, 0, asyncio.Event()
        self.hanging_scans, self.renewal_errors = 0, 0
        self.may_lock.set()
        self.images = HostImageCopies(data_dir)
        self.cluster_key, self.claim_changes, self.read_identity_token = None, {}, None
        self.worker_end, self.runner_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.credential_requests = RunnerCredentialRequests(self.worker_end)

    def read_cluster_key(self):
        if self.cluster_key is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/etc/sandbox-host.key")
        return self.cluster_key

    async def launch(self, order, writer):
        if self.launch_error is not None:
            raise self.launch_error
        self.order = order
        with self.journals.hand_over(writer) as lock_fd:
            adopted = self.journals.adopt(order.task_id, os.dup(lock_fd))
        task = self.journals.replay(order.task_id).task
        self.recorder = JournalRecorder(adopted, task, lambda: NOW)

    def record(self, *events):
        for event in events:
            self.recorder.record(event)
        self.recorder.writer.sync()

    def end(self):
        self.recorder.writer.close()

    def find_runner(self, location):
        return self

    async def kill(self):
        self.kills += 1
        if self.recorder is not None:
            self.end()
        return self.recorder is not None

    def preserved_disk(self, location):
        return self

    @contextlib.asynccontextmanager
    async def try_lock(self):
        await self.may_lock.wait()
        if self.is_disk_locked:
            yield LockState.HELD
            return
        self.is_disk_locked = True
        try:
            yield LockState.FREE
        finally:
            self.is_disk_locked = False

    async def remove(self):
        self.removals += 1

    async def scan(self):
        if self.hanging_scans > 0:
            self.hanging_scans -= 1
            await asyncio.Event().wait()
        if self.scan_errors > 0:
            self.scan_errors -= 1
            raise OSError(errno.EIO, "Input/output error")
        attempts = self.data_dir.glob("tasks/*/attempts/*")
        locations = [AttemptLocation(path.parent.parent.name, path.name, "") for path in sorted(attempts)]
        return LeftoverScan([Leftover(location, (), has_sandbox_handle=True) for location in locations], {})

    async def clean_up(self, leftover, *, keeps_disk):
        self.cleaned.append(leftover.location.task_id)

    async def renew_lease(self, attempt_id, deadline):
        if self.order is None or self.order.attempt_id != attempt_id:
            raise SandboxError("There is no runner.")
        if self.renewal_errors > 0:
            self.renewal_errors -= 1
            raise SandboxError("No runner is listening.")
        self.deadlines.append(deadline)

    async def connect(self, attempt_id):
        raise ConnectionRefusedError


class RunningWorker:
    """A worker in this process."""

    def __init__(self, server, job, host):
        self.server, self.job, self.host = server, job, host
        self.locks = 0
        self.lease = Lease()
        address = ServerAddress("127.0.0.1", server.port, server.certificate_fingerprint)
        other_leftovers = OtherTaskLeftovers(host.data_dir, host, host.journals, self.lock_other_task, remove_trees)
        self.worker = Worker(
            address,
            server.claim(job, **host.claim_changes),
            self.lease,
            self.create_worker_task,
            other_leftovers,
            self.lock_task,
            HostProofReaders(host.read_cluster_key, host.read_identity_token),
        )
        self.running = asyncio.create_task(self.worker.run())

    @contextlib.contextmanager
    def lock_task(self, task_id):
        if self.locks:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        self.locks += 1
        yield

    @contextlib.contextmanager
    def lock_other_task(self, task_id):
        if task_id in self.host.locked:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        yield

    def create_worker_task(self, task_id):
        host, replicas = self.host, FileTaskReplicas(self.host.data_dir)
        layout = TaskLayout(host.data_dir, task_id)
        return WorkerTask(
            layout, host, TaskImage(host.images, "namespaces"), host.journals, replicas, host, remove_trees
        )

    async def session(self):
        return await wait_until(lambda: self.job.session, "the claim")

    async def launch(self, image=None):
        """Send the records and the order, as the placement does."""
        session = await self.session()
        offset = await session.call(ReadEndOffset(), int)
        data = self.server.replicas.read("task-1", offset, 2**20)
        assert await session.call(ReceiveRecords(offset, data), int) == offset + len(data)
        await session.launch(Launch(RunAttempt("task-1", self.job.stored.attempt_id, image=image)), 10)
        await self.wait_for_lock_state(LockState.HELD)

    async def launch_until_ended(self):
        """Launch repeatedly, as a server does, until the worker has ended."""
        while not self.running.done():
            with contextlib.suppress(OSError):
                await self.launch()
            await asyncio.sleep(0.02)

    async def wait_for_lock_state(self, expected):
        await wait_until(lambda: self.server.jobs.lock_state("task-1") is expected, expected)

    async def wait_until_copied(self):
        records = self.host.journals.read("task-1").records
        await wait_until(lambda: list(self.server.journals.read("task-1").records) == list(records), "the copy")

    async def exit_code(self):
        async with asyncio.timeout(20):
            return await self.running


@pytest.fixture
async def server(tmp_path):
    server = ClusterServer(tmp_path, lease_seconds=LEASE_SECONDS)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def start(server, tmp_path):
    workers = []

    async def start(**attributes):
        host = FakeHost(tmp_path / "host")
        for name, value in attributes.items():
            setattr(host, name, value)
        worker = RunningWorker(server, await server.submit(), host)
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.running.cancel()
        await asyncio.gather(worker.running, return_exceptions=True)
        worker.host.worker_end.close()
        worker.host.runner_end.close()


async def test_worker_copies_the_records_and_exits_when_the_task_has_ended(server, start):
    worker = await start()
    await worker.launch()
    worker.host.record(PREPARED, output("x"))
    await worker.wait_until_copied()
    worker.host.record(*ENDED)
    assert not worker.running.done()
    attempt = TaskLayout(worker.host.data_dir, "task-1").attempt(worker.job.stored.attempt_id)
    attempt.root.mkdir(parents=True)
    attempt.runner_log.write_bytes(b"start" + bytes(2**20) + b"end")
    worker.host.end()
    assert await worker.exit_code() == EXIT_DONE
    assert server.has_task_ended("task-1")
    await wait_until(lambda: server.jobs.of_task("task-1") is None)
    assert not TaskLayout(worker.host.data_dir, "task-1").root.exists()
    log = TaskLayout(server.data_dir, "task-1").attempt(attempt.root.name).runner_log.read_bytes()
    assert (len(log), log[-4:]) == (2**20, b"\0end")


async def test_lock_is_free_without_a_runner_and_the_worker_exits_when_its_task_has_ended(server, start):
    worker = await start()
    await worker.session()
    await worker.wait_for_lock_state(LockState.FREE)
    server.jobs.notify_task_ended("task-1")
    assert await worker.exit_code() == EXIT_DONE


async def test_lease_is_measured_from_the_time_of_sending(start):
    worker = await start()
    await worker.launch()
    worker.host.record(PREPARED, CREATED, STARTED, output("x"))
    await wait_until(lambda: len(worker.host.deadlines) >= 2)
    assert worker.host.deadlines == sorted(set(worker.host.deadlines))
    now = seconds_since_boot()
    assert all(now < deadline <= now + LEASE_SECONDS for deadline in worker.host.deadlines)
    assert worker.lease.deadline <= now + LEASE_SECONDS


async def test_agent_has_no_network_until_the_server_has_the_record_of_its_start(server, start):
    """If the host were lost before that, the server would start another agent."""
    worker = await start()
    await worker.launch()
    worker.host.record(PREPARED, CREATED)
    await worker.wait_until_copied()
    deadline = worker.lease.deadline
    await wait_until(lambda: worker.lease.deadline > deadline)
    assert worker.host.deadlines == []
    writer = server.journals.open("task-1")  # the server can store nothing
    worker.host.record(STARTED)
    deadline = worker.lease.deadline
    await wait_until(lambda: worker.lease.deadline > deadline + 0.2)
    assert worker.host.deadlines == []
    writer.close()
    await wait_until(lambda: worker.host.deadlines)
    await worker.wait_until_copied()
    # Renewals continue with the next connection.
    await server.stop()
    await server.start()
    renewals = len(worker.host.deadlines)
    await wait_until(lambda: len(worker.host.deadlines) > renewals)


async def test_renewal_that_fails_is_repeated_after_the_next_answer(start, monkeypatch):
    """A successful renewal is repeated only once the lease has grown by a minute."""
    monkeypatch.setattr(session_module, "_RENEWAL_SECONDS_MAX", 60.0)
    worker = await start(renewal_errors=1)
    worker.job.set_stored(msgspec.structs.replace(worker.job.stored, lease_seconds=1200.0))
    await worker.launch()
    worker.host.record(PREPARED, CREATED, STARTED)
    await wait_until(lambda: worker.host.renewal_errors == 0)
    await wait_until(lambda: worker.host.deadlines)
    for number in range(3):
        deadline = worker.lease.deadline
        worker.host.record(output(str(number)))
        await wait_until(lambda earlier=deadline: worker.lease.deadline > earlier)
    assert len(worker.host.deadlines) == 1


async def test_lease_is_not_renewed_without_answers(server, start):
    worker = await start()
    await worker.launch()
    worker.host.record(PREPARED, CREATED, STARTED)
    await wait_until(lambda: worker.host.deadlines)
    await server.stop()
    stopped_at, deadline = seconds_since_boot(), worker.lease.deadline
    worker.host.record(output("x"))
    await asyncio.sleep(0.5)
    assert worker.lease.deadline == deadline <= stopped_at + LEASE_SECONDS
    await server.start()
    await wait_until(lambda: worker.lease.deadline > deadline)


async def test_records_written_while_no_server_runs_are_copied_later(server, start):
    worker = await start()
    await worker.launch()
    await server.stop()
    worker.host.record(PREPARED, output("x"))
    await server.start()
    worker.job = server.jobs.of_task("task-1")
    await worker.session()
    await worker.wait_until_copied()
    await worker.wait_for_lock_state(LockState.HELD)
    worker.host.record(*ENDED)
    worker.host.end()
    assert await worker.exit_code() == EXIT_DONE


async def test_records_are_sent_again_if_the_server_cannot_store_them(server, start):
    worker = await start()
    await worker.launch()
    writer = server.journals.open("task-1")
    worker.host.record(PREPARED, output("x"))
    await asyncio.sleep(0.3)
    assert len(server.journals.read("task-1").records) == 2
    writer.close()
    await worker.wait_until_copied()


async def test_launch_during_which_the_server_dies_leaves_no_locked_journal(server, start):
    worker = await start()
    session, opened = await worker.session(), worker.host.journals.open

    def open_slowly(task_id):
        started.set()
        time.sleep(0.5)
        return opened(task_id)

    started, worker.host.journals.open = threading.Event(), open_slowly
    data = server.replicas.read("task-1", 0, 2**20)
    await session.call(ReceiveRecords(0, data), int)
    launching = asyncio.create_task(session.launch(Launch(RunAttempt("task-1", worker.job.stored.attempt_id)), 10))
    await wait_until(started.is_set)
    await server.restart()
    await asyncio.gather(launching, return_exceptions=True)
    worker.job = server.jobs.of_task("task-1")
    await worker.wait_for_lock_state(LockState.HELD)
    assert worker.host.order is not None
    worker.host.end()
    await worker.wait_for_lock_state(LockState.FREE)


async def test_disk_is_locked_until_the_session_ends(server, start):
    worker = await start()
    session = await worker.session()
    assert [await session.call(LockDisk(number, "abcdefghijkl"), str) for number in (1, 2)] == ["free", "held"]
    await session.call(RemoveDisk(1), None)
    await server.restart()
    worker.job = server.jobs.of_task("task-1")
    session = await worker.session()
    with pytest.raises(OSError, match="try again"):
        await session.call(RemoveDisk(1), None)
    assert await session.call(LockDisk(3, "abcdefghijkl"), str) == "free"
    await session.call(UnlockDisk(3), None)
    assert await session.call(LockDisk(4, "abcdefghijkl"), str) == "free"
    assert worker.host.removals == 1


async def test_disk_that_is_locked_after_the_request_timed_out_is_unlocked(start):
    worker = await start()
    session = await worker.session()
    worker.host.may_lock.clear()
    with pytest.raises(HostUnreachableError):
        await session.call(LockDisk(1, "abcdefghijkl"), str, 0.2)
    session.post(UnlockDisk(1))
    waiting = asyncio.create_task(session.call(LockDisk(2, "abcdefghijkl"), str))
    await session.call(ReadEndOffset(), int)
    worker.host.may_lock.set()
    assert await waiting in {"free", "held"}
    await session.call(UnlockDisk(2), None)
    assert await session.call(LockDisk(3, "abcdefghijkl"), str) == "free"


# Leftovers of other tasks.


def leave_task(worker, task_id, *ends):
    """Record a task on the server, and leave an attempt of the task on the host."""
    writer = worker.server.journals.create(task_id)
    recorder = worker.server.journals.recorder(writer, None, lambda: NOW)
    for event in (TaskSubmitted(task_id, manifest(task_id)), *ends):
        recorder.record(event)
    writer.close()
    return leave_attempt(worker.host, task_id)


def leave_attempt(host, task_id):
    layout = TaskLayout(host.data_dir, task_id)
    layout.attempt("abcdefghijkl").root.mkdir(parents=True)
    return layout


async def test_worker_removes_leftovers_of_killed_workers_whose_tasks_have_ended(server, start):
    """Tasks that have not ended, or that have a worker or a runner on this host, keep their files."""
    worker = await start()
    await worker.session()
    ended = [leave_task(worker, f"ended-{number}", *ENDED).root for number in range(20)]
    removed = leave_attempt(worker.host, "removed-from-the-server").root
    unfinished = leave_task(worker, "unfinished").root
    preserved = leave_task(worker, "preserved", *ENDED).root
    worker.host.locked.add("preserved")
    running = leave_task(worker, "running", *ENDED).root
    writer = worker.host.journals.create("running")
    await server.restart()  # a worker looks for leftovers when it connects
    await wait_until(lambda: not any(path.exists() for path in (*ended, removed)), "the removal")
    await wait_until(lambda: set(worker.host.cleaned) == {path.name for path in (*ended, removed)})
    assert all(path.exists() for path in (unfinished, preserved, running))
    writer.close()
    worker.host.locked.clear()
    await server.restart()
    await wait_until(lambda: not preserved.exists(), "the removal")
    await wait_until(lambda: not running.exists(), "the removal")
    assert unfinished.exists()


async def test_files_that_belong_to_no_task_are_kept_and_do_not_fence_the_worker(server, start):
    """A file system may have directories such as `lost+found` or `.snapshot`."""
    worker = await start()
    await worker.session()
    ended = leave_task(worker, "ended", *ENDED).root
    others = [ended.with_name(name) for name in ("lost+found", ".snapshot", "a..b", "x" * 200)]
    for path in others:
        path.mkdir()
    await server.restart()
    await wait_until(lambda: not ended.exists(), "the removal")
    assert all(path.exists() for path in others)
    worker.job = server.jobs.of_task("task-1")
    await worker.session()
    assert not worker.job.stored.is_fenced


async def test_error_while_leftovers_are_removed_does_not_end_the_worker(server, start):
    worker = await start()
    await worker.session()
    left = leave_task(worker, "ended", *ENDED).root
    worker.host.scan_errors = 1
    await server.restart()
    await wait_until(lambda: worker.host.scan_errors == 0)
    worker.job = server.jobs.of_task("task-1")
    await worker.session()
    await worker.launch()
    await server.restart()
    await wait_until(lambda: not left.exists(), "the removal")


# Errors of the host.


async def test_worker_that_fails_to_prepare_its_host_keeps_the_lock_and_continues(start):
    worker = await start(scan_errors=2)
    await wait_until(lambda: worker.host.scan_errors == 0)
    await worker.session()
    await worker.wait_for_lock_state(LockState.FREE)
    assert worker.locks == 1
    await worker.launch()


async def test_search_for_leftovers_that_a_sandbox_delays_does_not_stop_the_worker(server, start, monkeypatch):
    monkeypatch.setattr(task_requests, "SANDBOX_TEARDOWN_SECONDS", 0.2)
    worker = await start(hanging_scans=1)
    await wait_until(lambda: worker.host.hanging_scans == 0)
    await worker.wait_for_lock_state(LockState.FREE)
    await worker.launch()
    worker.host.hanging_scans = 1
    worker.host.record(PREPARED, *ENDED)
    worker.host.end()
    assert await worker.exit_code() == EXIT_DONE
    await wait_until(lambda: server.jobs.of_task("task-1") is None)
    assert worker.host.hanging_scans == 0


async def test_worker_on_a_host_that_cannot_be_prepared_ends(start, monkeypatch):
    monkeypatch.setattr(task_requests, "PERMANENT_AFTER_SECONDS", 0.5)
    worker = await start(scan_errors=10**9)
    assert await worker.exit_code() == EXIT_HOST_FAILED


async def test_worker_that_cannot_launch_ends(start, monkeypatch):
    """The engine confirms the end, so another attempt can follow on another host."""
    monkeypatch.setattr(task_requests, "PERMANENT_AFTER_SECONDS", 0.5)
    worker = await start(launch_error=OSError(errno.EROFS, "Read-only file system"))
    await worker.session()
    launching = asyncio.create_task(worker.launch_until_ended())
    assert await worker.exit_code() == EXIT_HOST_FAILED
    launching.cancel()
    await asyncio.gather(launching, return_exceptions=True)


async def test_launch_after_a_transient_error_succeeds(start, monkeypatch):
    monkeypatch.setattr(task_requests, "PERMANENT_AFTER_SECONDS", 0.5)
    worker = await start(launch_error=OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        await worker.launch()
    worker.host.launch_error = None
    await worker.launch()
    worker.host.record(*ENDED)
    worker.host.end()
    assert await worker.exit_code() == EXIT_DONE


async def test_worker_whose_artifact_is_missing_ends_and_kills_its_runner(start, monkeypatch):
    """The worker does not keep reconnecting."""
    monkeypatch.setattr(task_requests, "PERMANENT_AFTER_SECONDS", 0.5)
    worker = await start()
    await worker.launch()
    worker.host.record(PREPARED, ArtifactCollected(Artifact("a", "a", 1, "text/plain", "sha256:" + "0" * 64)))
    assert await worker.exit_code() == EXIT_HOST_FAILED
    assert worker.host.kills == 1


async def test_worker_whose_journal_is_damaged_ends(start, monkeypatch):
    monkeypatch.setattr(task_requests, "PERMANENT_AFTER_SECONDS", 0.5)
    monkeypatch.setattr(session_module, "_DAMAGED_JOURNAL_TIMEOUT_SECONDS", 0.2)
    worker = await start()
    await worker.launch()
    worker.host.record(PREPARED)
    await worker.wait_until_copied()
    worker.host.record(output("damaged"), output("whole"))
    records = worker.host.data_dir / "tasks" / "task-1" / "journal" / "records"
    records.write_bytes(records.read_bytes().replace(b"damaged", b"DAMAGED"))
    assert await worker.exit_code() == EXIT_HOST_FAILED


async def test_fenced_worker_kills_its_runner(server, start):
    worker = await start()
    await worker.launch()
    server.jobs.fence(worker.job, "a test")
    assert await worker.exit_code() == EXIT_DISMISSED
    assert worker.host.kills == 1
    assert not TaskLayout(worker.host.data_dir, "task-1").root.exists()
    await wait_until(lambda: worker.job.session is None)
    assert server.jobs.lock_state("task-1") is LockState.UNKNOWN


async def test_terminated_worker_kills_its_runner_and_sends_the_last_records(server, start):
    worker = await start()
    await worker.launch()
    worker.host.record(PREPARED, output("last"))
    worker.worker.terminate()
    assert await worker.exit_code() == EXIT_TERMINATED
    assert worker.host.kills == 1
    assert server.journals.read("task-1").records[-1].event == output("last")


async def test_worker_that_is_terminated_without_a_server_ends(server, start):
    worker = await start()
    await worker.launch()
    await server.stop()
    started_at = time.monotonic()
    worker.worker.terminate()
    assert await worker.exit_code() == EXIT_TERMINATED
    assert worker.host.kills == 1
    assert time.monotonic() - started_at < 15


async def require_cluster_key(server, key=b"k" * 32):
    server.cluster_key = key
    await server.restart()


async def test_worker_proves_its_host(server, start):
    await require_cluster_key(server)
    worker = await start(cluster_key=b"k" * 32)
    await worker.launch()
    worker.host.record(PREPARED, output("x"))
    await server.restart()
    worker.job = server.jobs.of_task("task-1")
    await worker.session()
    await worker.wait_until_copied()


@pytest.mark.parametrize(
    ("cluster_key", "reason", "cause"),
    [
        (b"x" * 32, "The host host-1 has a different key than the server", ""),
        (None, "The worker on host-1 cannot read the key of its host", "/etc/sandbox-host.key"),
    ],
)
async def test_worker_that_cannot_prove_its_host_ends(server, start, caplog, cluster_key, reason, cause):
    """The reason is in the logs of both, and in the status of the task."""
    await require_cluster_key(server)
    worker = await start(cluster_key=cluster_key)
    assert await worker.exit_code() == EXIT_DISMISSED
    assert f"The server does not accept this worker: {reason}" in caplog.text
    assert f"A worker of task task-1 is rejected: {reason}" in caplog.text
    assert cause in caplog.text
    assert reason in server.jobs.status("task-1").reason
    assert not worker.job.is_claimed


class FakeVerifier:
    async def verify(self, name, host, token):
        if token != "a.b.c":
            raise WorkerRejectedError("The token is not valid.")


async def test_worker_sends_its_identity_token(server, start):
    server.verifier = FakeVerifier()
    await server.restart()
    worker = await start(read_identity_token=lambda: "a.b.c")
    await worker.launch()
    worker.host.record(PREPARED, output("x"))
    await worker.wait_until_copied()


async def test_worker_that_cannot_read_its_identity_token_ends(server, start, caplog):
    def fail():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/var/run/secrets/sandbox/token")

    server.verifier = FakeVerifier()
    await server.restart()
    worker = await start(read_identity_token=fail)
    assert await worker.exit_code() == EXIT_DISMISSED
    assert "/var/run/secrets/sandbox/token" in caplog.text
    assert "The token is not valid." in server.jobs.status("task-1").reason


async def test_worker_of_another_version_ends(server, start, caplog):
    worker = await start(claim_changes={"version": "0.0.9"})
    assert await worker.exit_code() == EXIT_DISMISSED
    assert "The server does not accept this worker: The host host-1 has Sandbox 0.0.9, and the server" in caplog.text


async def test_another_server_cannot_pass_on_the_proof_of_a_worker(server, tmp_path):
    """An attacker has a join token and can make a worker connect to another server, which relays the challenge."""
    await require_cluster_key(server)
    job, proofs = await server.submit(), []
    other = tmp_path / "other"
    other.mkdir()
    certificate, fingerprint = load_or_create_certificate(other)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    claims = msgspec.msgpack.Decoder(Claim | HostProof)

    async def relay(reader, writer):
        async with server.connect(await read_message(reader, claims, 2**13)) as client:
            writer.write(encode_message(await client.read()))
            proofs.append(await read_message(reader, claims, 2**13))
            await client.send(proofs[-1])
            writer.write(encode_message(await client.read()))
        writer.close()

    attacker = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=tls)
    address = ServerAddress("127.0.0.1", attacker.sockets[0].getsockname()[1], fingerprint)
    worker = Worker(address, server.claim(job), Lease(), None, None, None, HostProofReaders(lambda: b"k" * 32))
    assert await worker.run() == EXIT_DISMISSED
    assert proofs[0].proof is not None
    assert not job.is_claimed
    attacker.close()


async def test_token_is_not_sent_to_a_server_with_another_certificate(server, tmp_path):
    received = bytearray()

    async def serve(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                received.extend(data)
        writer.close()

    job = await server.submit()
    other = tmp_path / "other"
    other.mkdir()
    certificate, _ = load_or_create_certificate(other)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    attacker = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    port = attacker.sockets[0].getsockname()[1]
    address = ServerAddress("127.0.0.1", port, server.certificate_fingerprint)
    worker = Worker(address, server.claim(job), Lease(), None, None, None, None)
    running = asyncio.create_task(worker.run())
    try:
        await asyncio.sleep(1)
        assert not running.done()
        assert bytes(received) == b""
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        attacker.close()


# Git credentials.

FOUND = Credentials(b"me", b"let-me-in")


def find_credentials(worker, host="example.org"):
    """Ask for credentials as the runner does."""
    credentials = ServerCredentials(worker.host.runner_end, worker.job.stored.attempt_id)
    return asyncio.wait_for(credentials.find(CredentialQuery("https", host)), 20)


async def test_runner_gets_the_credentials_of_the_server(server, start):
    server.credentials = FOUND
    worker = await start()
    await worker.launch()
    assert await find_credentials(worker) == FOUND
    worker.host.record(PREPARED)
    await worker.wait_until_copied()
    with pytest.raises(NoCredentialsError, match="does not clone its repository now"):
        await find_credentials(worker)
    assert len(server.credential_lookups) == 1


async def test_runner_gets_the_reason_if_the_server_has_no_credentials(server, start):
    worker = await start()
    await worker.launch()
    with pytest.raises(NoCredentialsError, match=r"The server has no credentials\."):
        await find_credentials(worker)


async def test_request_for_credentials_survives_a_restart_of_the_server(server, start):
    server.credentials = FOUND
    may_answer = threading.Event()
    server.find_credentials_now = lambda: may_answer.wait(20)
    worker = await start()
    await worker.launch()
    finding = asyncio.create_task(find_credentials(worker))
    await wait_until(lambda: server.credential_lookups, "the lookup")
    await server.restart()
    may_answer.set()
    assert await finding == FOUND
    assert len(server.credential_lookups) == 2


async def test_late_answer_to_a_request_for_credentials_is_ignored(server, start, monkeypatch):
    monkeypatch.setattr(session_module, "_CREDENTIAL_SECONDS", 0.3)
    server.credentials = FOUND
    may_answer = threading.Event()
    server.find_credentials_now = lambda: may_answer.wait(20)
    worker = await start()
    await worker.launch()
    with pytest.raises(NoCredentialsError, match="did not send the credentials in time") as raised:
        await find_credentials(worker)
    assert raised.value.is_transient
    may_answer.set()
    monkeypatch.setattr(session_module, "_CREDENTIAL_SECONDS", 20)
    assert await find_credentials(worker) == FOUND


class TestImages:
    """Which image the server may order."""

    DIGEST = f"sha256:{'0' * 64}"

    @pytest.fixture
    def prepared(self, worker):
        """An image that the host has, and that was prepared for the task."""
        return Image("tools", self.DIGEST, str(ImageStore(worker.host.data_dir, "tools").rootfs_path(self.DIGEST)))

    @pytest.fixture
    async def worker(self, start):
        """A worker on a host with an image."""
        worker = await start()
        root = ImageStore(worker.host.data_dir, "tools").rootfs_path(self.DIGEST)
        root.mkdir(parents=True)
        metadata = ImageMetadata("tools", self.DIGEST, NOW, "a test", 1, 1)
        root.with_name("record.json").write_bytes(msgspec.json.encode(metadata))
        session = await worker.session()
        preparation = await session.call(PrepareImage("tools", ImageReference("tools", self.DIGEST, 1)), Any)
        assert preparation["is_ready"]
        return worker

    async def test_prepared_image_is_used(self, worker, prepared):
        await worker.launch(prepared)
        assert worker.host.order.image == prepared

    @pytest.mark.parametrize(
        "changes",
        [
            {"digest": "sha256:../../../etc"},
            {"digest": "/etc"},
            {"digest": f"sha256:{'1' * 64}"},
            {"directory": "/"},
            {"profile": "../tools"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("order_type", [RunAttempt, RunDebugSession])
    async def test_request_for_a_different_image_is_a_protocol_violation(
        self, worker, prepared, order_type, changes, caplog
    ):
        image = msgspec.structs.replace(prepared, **changes)
        order = order_type("task-1", worker.job.stored.attempt_id, image=image)
        request = Launch(order) if order_type is RunAttempt else StartDebugSession(1, order)
        await self.check_violation(worker, request, caplog)
        assert worker.host.order is None

    @pytest.mark.parametrize(
        "request_",
        [
            PrepareImage("tools", ImageReference("tools", "sha256:../../../etc", 1)),
            PrepareImage("tools", ImageReference("tools", DIGEST, -1)),
            HasDisk("../../../etc"),
            LockDisk(1, "../../../etc"),
            Launch(RunAttempt("task-1", "../../../etc")),
        ],
        ids=str,
    )
    async def test_malformed_request_is_a_protocol_violation(self, worker, request_, caplog):
        await self.check_violation(worker, request_, caplog)

    async def check_violation(self, worker, request, caplog):
        """Check that the worker ends the session, and connects again."""
        session = worker.job.session
        with pytest.raises(HostUnreachableError):
            await session.call(request, Any, 20)
        assert [each for each in caplog.messages if "was not prepared for this task" in each or "malformed" in each]
        await wait_until(lambda: worker.job.session not in {None, session})
