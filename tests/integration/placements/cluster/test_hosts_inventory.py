"""The hosts on which workers have run are listed, even after a restart of the server."""

import time

import msgspec
import pytest

from doubles.cluster_server import BOOT_ID, HOST, SMALL, wait_until
from sandbox import __version__
from sandbox.interfaces.cluster_engine import EngineHost, EngineUnavailableError, JobPhase, JobStatus
from sandbox.interfaces.worker_messages import Claimed, Heartbeat
from sandbox.placements.cluster import jobs
from sandbox.placements.cluster.hosts import SeenHost, SeenHosts, host_statuses

REPORTED = {"cpus": 4, "memory_bytes": 2**34}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.02)


def statuses(server, now=None):
    jobs = server.jobs.snapshot()
    found = host_statuses(server.hosts.snapshot(), jobs, now or time.time(), server.engine_hosts.by_name, server.drains)
    return {status.name: status for status in found}


async def test_host_of_a_connected_worker_is_ready(server, job):
    started_at = time.time()
    async with server.connect(server.claim(job, **REPORTED)) as client:
        assert isinstance(await client.read(), Claimed)
        status = statuses(server)[HOST]
        assert (status.state, status.reason, status.version) == ("ready", "", __version__)
        assert (status.cpus, status.memory_bytes) == (4, 2**34)
        assert started_at <= status.last_contact_at.timestamp() <= time.time()


async def test_host_is_listed_without_resources_that_its_worker_does_not_report(server, job):
    async with server.connect(server.claim(job)) as client:
        assert isinstance(await client.read(), Claimed)
        status = statuses(server)[HOST]
        assert (status.state, status.cpus, status.memory_bytes) == ("ready", None, None)


async def test_each_heartbeat_updates_the_time_of_the_last_contact(server, job):
    async with server.connect(server.claim(job)) as client:
        assert isinstance(await client.read(), Claimed)
        before = statuses(server)[HOST].last_contact_at
        await client.send(Heartbeat(1, "free", 0, 0, is_launching=False))
        await wait_until(lambda: statuses(server)[HOST].last_contact_at > before)


async def test_silent_worker_makes_its_host_unreachable(server, job):
    async with server.connect(server.claim(job)) as client:
        assert isinstance(await client.read(), Claimed)
        assert statuses(server, time.time() + 10)[HOST].state == "ready"
        assert statuses(server, time.time() + 20)[HOST].state == "unreachable"


async def test_host_is_unreachable_without_a_connection_and_idle_after_the_end_of_the_job(server, job):
    async with server.connect(server.claim(job)) as client:
        assert isinstance(await client.read(), Claimed)
    await wait_until(lambda: job.session is None)
    assert (statuses(server)[HOST].state, statuses(server)[HOST].reason) == (
        "unreachable",
        "No worker on the host is responding.",
    )
    server.engine.set_phase(job, JobPhase.UNREACHABLE)
    await wait_until(lambda: "It is unreachable." in statuses(server)[HOST].reason)
    server.engine.set_phase(job, JobPhase.ENDED)
    await wait_until(lambda: statuses(server)[HOST].state == "idle")


async def test_host_of_an_abandoned_worker_is_idle(server, job):
    """The journal was taken over, and the task may run on another host."""
    async with server.connect(server.claim(job)) as client:
        assert isinstance(await client.read(), Claimed)
    await wait_until(lambda: statuses(server)[HOST].state == "unreachable")
    server.jobs._abandon(job)
    assert job in server.jobs.snapshot()
    assert statuses(server)[HOST].state == "idle"


async def test_one_connected_worker_makes_a_host_ready(server, job):
    other = await server.submit("task-2")
    async with server.connect(server.claim(other)) as client:
        assert isinstance(await client.read(), Claimed)
    await wait_until(lambda: other.session is None)
    async with server.connect(server.claim(job)) as client:
        assert isinstance(await client.read(), Claimed)
        assert statuses(server)[HOST].state == "ready"


async def test_host_on_which_a_worker_does_not_connect_is_listed(server):
    """A worker does not connect if, for example, a firewall blocks the connection."""
    job = server.jobs.reserve("task-1", None, SMALL)
    server.engine.statuses[job.name] = JobStatus(JobPhase.RUNNING, "host-9")
    status = await wait_until(lambda: statuses(server).get("host-9"))
    assert (status.state, status.reason) == ("idle", "A worker is starting on the host.")
    assert status.last_contact_at is None


async def test_list_of_hosts_survives_a_restart_of_the_server(server, job):
    async with server.connect(server.claim(job, **REPORTED)) as client:
        assert isinstance(await client.read(), Claimed)
    before = statuses(server)[HOST]
    await server.restart()
    after = statuses(server)[HOST]
    assert after == msgspec.structs.replace(before, state=after.state, reason=after.reason)
    assert after.state == "unreachable"


async def test_reconnection_does_not_write_the_file(server, job, monkeypatch):
    """All workers reconnect at the same time after a restart of the server."""
    saved, nonce = [], bytes(32)
    monkeypatch.setattr("sandbox.placements.cluster.hosts.write_durably", lambda *arguments: saved.append(arguments))
    for _ in range(3):
        async with server.connect(server.claim(job, nonce=nonce)) as client:
            assert isinstance(await client.read(), Claimed)
    assert len(saved) == 1


async def test_packages_of_a_host_are_stored(server, job):
    packages = "sha256:" + "1" * 64
    async with server.connect(server.claim(job, packages_digest=packages)) as client:
        assert isinstance(await client.read(), Claimed)
    assert [host.packages_digest for host in server.hosts.snapshot()] == [packages]


@pytest.mark.parametrize("packages", ["x", "sha256:1", "sha256:" + "1" * 64 + "\n", "x" * 5000])
async def test_claim_with_malformed_packages_is_refused(server, job, packages):
    async with server.connect(server.claim(job, packages_digest=packages)) as client:
        assert await client.read() is None
    assert not job.is_claimed


@pytest.mark.parametrize("content", [b"", b"{", b'[{"name": 1}]'])
def test_damaged_file_counts_as_empty(tmp_path, content):
    (tmp_path / "hosts.json").write_bytes(content)
    assert SeenHosts(tmp_path / "hosts.json").snapshot() == []


async def test_number_of_remembered_hosts_is_limited(server, job, monkeypatch, tmp_path):
    """The host with the earliest contact is forgotten."""
    monkeypatch.setattr("sandbox.placements.cluster.hosts.HOSTS_MAX", 3)
    seen = SeenHosts(tmp_path / "seen.json")
    for number in range(5):
        seen.record_claim(server.claim(job, host=f"host-{number}", boot_id=BOOT_ID))
    assert [host.name for host in seen.snapshot()] == ["host-2", "host-3", "host-4"]
    assert [host.name for host in SeenHosts(tmp_path / "seen.json").snapshot()] == ["host-2", "host-3", "host-4"]


def test_contact_does_not_add_a_host_that_was_forgotten(monkeypatch, tmp_path):
    monkeypatch.setattr("sandbox.placements.cluster.hosts.HOSTS_MAX", 2)
    seen = SeenHosts(tmp_path / "seen.json")
    for number in range(3):
        seen.add(SeenHost(f"host-{number}", float(number)))
    for name in ("host-0", "host-1"):
        seen.record_contact(name)
    assert {host.name: host.last_contact > 1 for host in seen.snapshot()} == {"host-1": True, "host-2": True}


def test_list_is_saved_later_after_a_failed_save(tmp_path, caplog):
    seen = SeenHosts(tmp_path / "missing" / "hosts.json")
    seen.add(SeenHost("host-1", 1.0))
    assert "The list of hosts was not saved" in caplog.text
    (tmp_path / "missing").mkdir()
    seen.save()
    assert [host.name for host in SeenHosts(tmp_path / "missing" / "hosts.json").snapshot()] == ["host-1"]


async def test_hosts_of_the_engine_are_listed_before_they_run_a_worker(server):
    """A host on which the engine starts no workers is not ready."""
    server.engine.host_list = [EngineHost("host-2", SMALL), EngineHost("host-3", SMALL, "The state is down.")]
    server.engine_hosts.start()
    await wait_until(lambda: len(statuses(server)) == 2)
    second, third = statuses(server).values()
    assert (second.state, second.reason) == ("idle", "No worker is running on the host.")
    assert (second.cpus, second.memory_bytes, second.last_contact_at) == (SMALL.cpus, SMALL.memory_bytes, None)
    assert (third.state, third.reason) == ("not_ready", "The state is down.")


async def test_state_of_a_host_comes_from_its_worker_and_its_reason_from_the_engine(server, job):
    server.engine.host_list = [EngineHost(HOST, SMALL, "The state is draining.")]
    await server.engine_hosts.refresh()
    async with server.connect(server.claim(job, **REPORTED)) as client:
        assert isinstance(await client.read(), Claimed)
        status = statuses(server)[HOST]
        assert (status.state, status.reason) == ("ready", "The state is draining.")
        assert (status.cpus, status.memory_bytes) == (4, 2**34)
    await wait_until(lambda: job.session is None)
    assert statuses(server)[HOST].state == "unreachable"


async def test_host_that_the_engine_does_not_list_is_not_ready(server):
    server.hosts.add(SeenHost("removed", 1.0))
    assert statuses(server)["removed"].state == "idle"
    await server.engine_hosts.refresh()
    status = statuses(server)["removed"]
    assert (status.state, status.reason) == ("not_ready", "The engine has no host with this name.")


async def test_last_list_of_the_engine_is_kept_while_it_does_not_respond(server, monkeypatch, caplog):
    monkeypatch.setattr("sandbox.placements.cluster.hosts.ENGINE_POLL_SECONDS", 0.01)
    server.engine_hosts.start()
    await wait_until(lambda: statuses(server))
    server.engine.error = EngineUnavailableError("It is not responding.")
    await wait_until(lambda: "The engine does not list its hosts: It is not responding." in caplog.text)
    assert list(statuses(server)) == [HOST]
    server.engine.error = None
    server.engine.host_list = [EngineHost("host-2", SMALL)]
    await wait_until(lambda: "host-2" in statuses(server))
    assert caplog.text.count("does not list its hosts") == 1


async def test_number_of_hosts_listed_by_the_engine_is_limited(server, monkeypatch):
    monkeypatch.setattr("sandbox.placements.cluster.hosts.HOSTS_MAX", 3)
    server.engine.host_list = [EngineHost(f"host-{number}", SMALL) for number in range(9)]
    await server.engine_hosts.refresh()
    await server.cluster_hosts.drain("host-8")
    assert list(statuses(server)) == ["host-0", "host-1", "host-2", "host-8"]
