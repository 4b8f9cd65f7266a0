"""Drained hosts get no new tasks: their jobs exclude these hosts, and workers that were started there are rejected."""

from datetime import UTC, datetime

import pytest

from doubles.cluster_server import HOST, SMALL, wait_until
from sandbox.interfaces.cluster_engine import (
    EngineHost,
    EngineRejectedError,
    EngineUnavailableError,
    JobPhase,
    JobStatus,
)
from sandbox.interfaces.placement import HostDrainError, HostNotFoundError
from sandbox.interfaces.worker_messages import Claimed, Heartbeat, HeartbeatAnswer, WorkerDismissed
from sandbox.placements.cluster import host_drains, jobs
from sandbox.placements.cluster.host_drains import HostDrains

OTHER = "host-2"
DAMAGED = ((b"a", b"null"), (b"a", b'"x"'), (b"a", b'"2026-01-29T10:00:00"'), (b"a,b", b'"2026-01-29T10:00:00Z"'))
"""Pairs of a host name and a time. In each pair, one of them is invalid."""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(jobs, "_HOST_CONFIRMATION_TIMEOUT_SECONDS", 1.0)


@pytest.fixture(autouse=True)
def two_hosts(server):
    server.engine.host_list = [EngineHost(HOST, SMALL), EngineHost(OTHER, SMALL)]


def current_request(server, task_id="task-1"):
    """Return the request with which the task's current job was last submitted; None before the submission."""
    job = server.jobs.of_task(task_id)
    return next((each for each in reversed(server.engine.submitted) if each.name == job.name), None)


async def wait_until_excluded(server, *hosts):
    """Wait until the task's current job has been submitted with these excluded hosts; return the job."""
    await wait_until(lambda: (found := current_request(server)) is not None and found.excluded_hosts == hosts)
    return server.jobs.of_task("task-1")


async def test_new_jobs_exclude_drained_hosts(server):
    await server.cluster_hosts.drain(OTHER)
    await server.cluster_hosts.drain(HOST)
    job = server.jobs.reserve("task-1", None, SMALL)
    await wait_until_excluded(server, HOST, OTHER)
    assert server.jobs.of_task("task-1") is job
    assert job.stored.excluded_hosts == (HOST, OTHER)


@pytest.mark.parametrize("phase", [JobPhase.WAITING, JobPhase.UNKNOWN])
async def test_waiting_job_is_submitted_again_under_another_name(server, job, phase):
    """The excluded hosts of a name never change, so a delayed submission under the old name has no effect."""
    server.engine.statuses[job.name] = JobStatus(phase)
    await wait_until(lambda: job.phase is phase)
    await server.cluster_hosts.drain(HOST)
    moved = await wait_until_excluded(server, HOST)
    assert moved.name != job.name
    await wait_until(lambda: server.engine.cancelled == [job.name])
    server.engine.statuses[moved.name] = JobStatus(JobPhase.WAITING)
    await wait_until(lambda: moved.phase is JobPhase.WAITING)
    await server.cluster_hosts.undo_drain(HOST)
    again = await wait_until_excluded(server)
    assert again.name not in {job.name, moved.name}
    async with server.connect(server.claim(again)) as client:
        assert isinstance(await client.read(), Claimed)


async def test_running_task_stays_on_a_drained_host(server, job):
    """The worker of the task may also reconnect, and gets the next attempt."""
    claim = server.claim(job)
    async with server.connect(claim) as client:
        assert isinstance(await client.read(), Claimed)
    await server.cluster_hosts.drain(HOST)
    await server.restart()
    async with server.connect(claim) as client:
        assert isinstance(await client.read(), Claimed)
        await client.send(Heartbeat(1, "free", 0, 0, is_launching=False))
        assert await client.read() == HeartbeatAnswer(1)
        job = server.jobs.of_task("task-1")
        assert server.jobs.reserve("task-1", job.stored.attempt_id, SMALL) is job
    assert [request.name for request in server.engine.submitted] == [job.name]
    assert server.engine.cancelled == []


async def test_worker_that_was_started_on_a_host_before_its_drain_is_rejected(server, job):
    """The engine may start a waiting job on the host at the same moment, so the claim decides."""
    claim = server.claim(job)
    server.drains.start(HOST, datetime.now(UTC))
    async with server.connect(claim) as client:
        answer = await client.read()
    assert isinstance(answer, WorkerDismissed) or answer is None
    moved = await wait_until_excluded(server, HOST)
    assert not moved.is_claimed
    await wait_until(lambda: job.name in server.engine.cancelled)
    async with server.connect(claim) as client:
        assert isinstance(await client.read(), WorkerDismissed)
    server.engine.statuses[moved.name] = JobStatus(JobPhase.RUNNING, OTHER)
    async with server.connect(server.claim(moved, host=OTHER)) as client:
        assert isinstance(await client.read(), Claimed)


async def test_claim_is_rejected_even_if_the_job_has_not_been_checked_since_the_drain(server, job, monkeypatch):
    async def do_nothing(_):
        pass

    monkeypatch.setattr(server.jobs, "_act", do_nothing)
    server.drains.start(HOST, datetime.now(UTC))
    async with server.connect(server.claim(job)) as client:
        answer = await client.read()
    assert isinstance(answer, WorkerDismissed)
    assert "The host host-1 is drained." in answer.reason
    assert not job.is_claimed


async def test_moving_a_job_does_not_count_as_a_loss_of_the_job(server, job):
    server.engine.statuses[job.name] = JobStatus(JobPhase.WAITING)
    await wait_until(lambda: job.phase is JobPhase.WAITING)
    for _ in range(4):
        await server.cluster_hosts.drain(HOST)
        moved = await wait_until_excluded(server, HOST)
        server.engine.statuses[moved.name] = JobStatus(JobPhase.WAITING)
        await wait_until(lambda: server.jobs.of_task("task-1").phase is JobPhase.WAITING)
        await server.cluster_hosts.undo_drain(HOST)
        again = await wait_until_excluded(server)
        server.engine.statuses[again.name] = JobStatus(JobPhase.WAITING)
        await wait_until(lambda: server.jobs.of_task("task-1").phase is JobPhase.WAITING)
    assert server.jobs._losses["task-1"] == 0


async def test_job_waits_and_shows_a_reason_while_all_hosts_are_drained(server, monkeypatch):
    submit = server.engine.submit

    async def submit_unless_all_are_excluded(request):
        if {*request.excluded_hosts} >= {HOST, OTHER}:
            raise EngineRejectedError("No host is left.")
        await submit(request)

    monkeypatch.setattr(server.engine, "submit", submit_unless_all_are_excluded)
    for host in (HOST, OTHER):
        await server.cluster_hosts.drain(host)
    job = server.jobs.reserve("task-1", None, SMALL)
    reason = "No host is left. Drained hosts: host-1, host-2. `sandbox admin drain --host NAME --undo` ends a drain."
    await wait_until(lambda: server.jobs.status("task-1").reason == reason)
    assert server.engine.submitted == []
    await server.cluster_hosts.undo_drain(OTHER)
    moved = await wait_until_excluded(server, HOST)
    assert moved.name != job.name


async def test_drains_and_moved_jobs_survive_a_restart_of_the_server(server, job):
    server.engine.statuses[job.name] = JobStatus(JobPhase.WAITING)
    await server.cluster_hosts.drain(HOST)
    moved = await wait_until_excluded(server, HOST)
    since = server.drains.since(HOST)
    server.engine.statuses[moved.name] = JobStatus(JobPhase.WAITING)
    await server.restart()
    assert (server.drains.names, server.drains.since(HOST)) == ((HOST,), since)
    restored = server.jobs.of_task("task-1")
    await wait_until(lambda: restored.phase is JobPhase.WAITING)
    assert server.jobs.of_task("task-1") is restored
    assert restored.name == moved.name
    server.drains.undo(HOST)
    await server.restart()
    await wait_until_excluded(server)


async def test_unknown_host_cannot_be_drained(server):
    """The engine is queried again, because the host may be new. A drain can be undone after its host is removed."""
    for change in (server.cluster_hosts.drain, server.cluster_hosts.undo_drain):
        with pytest.raises(HostNotFoundError, match="has no host 'new'"):
            await change("new")
    server.engine.host_list = [*server.engine.host_list, EngineHost("new", SMALL)]
    await server.cluster_hosts.drain("new")
    server.engine.host_list = server.engine.host_list[:2]
    await server.engine_hosts.refresh()
    await server.cluster_hosts.undo_drain("new")
    assert server.drains.names == ()


async def test_known_host_can_be_drained_while_the_engine_does_not_respond(server, job):
    async with server.connect(server.claim(job)) as client:
        assert isinstance(await client.read(), Claimed)
    server.engine.error = EngineUnavailableError("It does not respond.")
    with pytest.raises(HostDrainError, match="It does not respond"):
        await server.cluster_hosts.drain(OTHER)
    await server.cluster_hosts.drain(HOST)
    assert server.drains.names == (HOST,)


async def test_drain_that_cannot_be_stored_has_no_effect(server, monkeypatch):
    def fail(*_):
        raise OSError("full")

    await server.cluster_hosts.drain(OTHER)
    monkeypatch.setattr(host_drains, "write_durably", fail)
    for change, host in ((server.cluster_hosts.drain, HOST), (server.cluster_hosts.undo_drain, OTHER)):
        with pytest.raises(OSError, match="full"):
            await change(host)
    assert server.drains.names == (OTHER,)


def test_first_start_time_is_kept_and_number_of_drained_hosts_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(host_drains, "DRAINED_HOSTS_MAX", 2)
    drains = HostDrains(tmp_path / "drained.json")
    first = datetime.now(UTC)
    drains.start("a", first)
    drains.start("a", datetime.now(UTC))
    assert drains.since("a") == first
    drains.start("b", first)
    with pytest.raises(HostDrainError, match="2 hosts are drained already"):
        drains.start("c", first)
    assert HostDrains(tmp_path / "drained.json").names == ("a", "b")
    drains.undo("a")
    drains.undo("a")
    drains.start("c", first)
    assert HostDrains(tmp_path / "drained.json").names == ("b", "c")


def test_description_of_drained_hosts_contains_at_most_five_names(tmp_path):
    drains = HostDrains(tmp_path / "drained.json")
    assert drains.describe() == ""
    for number in range(7):
        drains.start(f"n{number}", datetime.now(UTC))
    assert drains.describe().startswith("Drained hosts: n0, n1, n2, n3, n4 and 2 more. ")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"a": null}',
        b'{"a": "x"}',
        b'{"a": "2026-01-29T10:00:00"}',
        b'{"a,b": "2026-01-29T10:00:00Z"}',
    ],
)
def test_damaged_file_is_an_error(tmp_path, content):
    """If damage were ignored, tasks would start on drained hosts."""
    (tmp_path / "drained.json").write_bytes(content)
    with pytest.raises(OSError, match="is damaged"):
        HostDrains(tmp_path / "drained.json")


async def test_status_of_a_drained_host_contains_the_time_of_its_drain(server):
    await server.cluster_hosts.drain(OTHER)
    first, second = server.cluster_hosts.statuses()
    assert (first.name, first.draining_since) == (HOST, None)
    assert (second.name, second.draining_since) == (OTHER, server.drains.since(OTHER))
