"""The placement of a cluster, apart from what `tests/contract/test_placement.py` tests with real workers."""

import asyncio
import ssl
import threading

import pytest

from doubles.cluster import OVERHEAD_BYTES, SMALL, ClusterServer, FakeEngine, make_request
from sandbox.images.catalog import ProfileCatalog
from sandbox.interfaces.journal import Liveness
from sandbox.interfaces.placement import (
    AttemptLocation,
    FinishAttempt,
    HostPendingError,
    HostUnreachableError,
    Leftover,
    RunnerNotStartedError,
)
from sandbox.model.failure import FailureCode
from sandbox.placements.cluster import jobs
from sandbox.placements.cluster.jobs import JobSettings
from sandbox.placements.cluster.placement import ClusterAddress, LoopThread, TaskStorage, create_cluster_placement

LOCATION = AttemptLocation("task-1", "abcdefghijkl", "cluster:host-1")


@pytest.fixture
async def placement(tmp_path):
    server = ClusterServer(tmp_path)  # only its files and its certificate are used
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(server.certificate)
    placement = await create_cluster_placement(
        tmp_path / "jobs",
        FakeEngine(),
        JobSettings(600, OVERHEAD_BYTES, make_request),
        ClusterAddress("127.0.0.1", server.port, tls),
        TaskStorage(server.replicas, None, lambda task_id: False),
        ProfileCatalog(server.data_dir),
    )
    running = asyncio.create_task(placement.run())
    yield placement
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_capacity_is_that_of_the_largest_host_without_the_overhead_of_a_worker(placement):
    assert placement.host.capacity.memory_bytes == 2**33 - OVERHEAD_BYTES
    assert placement.host.capacity.cpus == 8
    assert placement.host.blocked_reason() is None
    assert (await placement.host.probe()).failure is None


async def test_reservation_waits_for_a_worker_for_a_second_at_most(placement):
    started_at = asyncio.get_running_loop().time()
    with pytest.raises(HostPendingError):
        await placement.allocator.reserve("task-1", None, SMALL)
    assert asyncio.get_running_loop().time() - started_at < 5
    job = placement.allocator._workers.jobs.of_task("task-1")
    assert placement.find_runner(LOCATION).liveness() is Liveness.FREE
    assert not await placement.find_runner(LOCATION).kill()
    order = FinishAttempt("task-1", job.stored.attempt_id)
    with pytest.raises(RunnerNotStartedError):
        await placement.launch(order, UnusedWriter())
    await placement.allocator.release("task-1")
    assert placement.allocator._workers.jobs.of_task("task-1") is None


class UnusedWriter:
    def sync(self):
        pass


async def test_attempt_of_an_unknown_job_is_lost_only_after_a_lease(placement, monkeypatch):
    assert placement.find_runner(LOCATION).liveness() is Liveness.UNKNOWN
    assert placement.allocator.loss(LOCATION) is None
    monkeypatch.setattr(jobs, "takeover_seconds", lambda _: 0.0)
    assert placement.find_runner(LOCATION).liveness() is Liveness.FREE
    assert placement.allocator.loss(LOCATION) is FailureCode.HOST_LOST


async def test_attempt_of_an_unknown_job_has_no_files(placement):
    files = placement.files
    assert [files.has_disk(LOCATION), files.is_preserved(LOCATION), files.has_handle("task-1")] == [False] * 3
    assert not files.has_same_secrets(LOCATION, {"NAME": "value"})
    scan = await files.scan()
    assert (scan.leftovers, scan.unowned) == ((), {})
    await files.clean_up(Leftover(LOCATION, (), has_handle=False), keeps_disk=False)
    async with placement.preserved_disk(LOCATION).try_lock() as liveness:
        assert liveness is Liveness.UNKNOWN
    with pytest.raises(HostUnreachableError):
        placement.allocator.find_image(LOCATION, "agentic-dev")


async def test_closed_thread_runs_nothing(placement):
    thread = LoopThread()
    started = threading.Event()

    async def wait():
        started.set()
        await asyncio.Event().wait()

    waiting = asyncio.create_task(thread.run(wait()))
    await asyncio.to_thread(started.wait)
    await asyncio.to_thread(thread.close)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(HostUnreachableError):
        await thread.run(wait())
    with pytest.raises(HostUnreachableError):
        thread.wait_for(wait())
    thread.close()
