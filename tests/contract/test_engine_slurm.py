"""Failures of Slurm: the controller is killed or paused, hosts are killed or cut off, jobs are lost or duplicated."""

import asyncio

import pytest

from doubles.engine_harnesses import TIMEOUT_SECONDS, status_of, wait_for_end, wait_for_phase, wait_until
from sandbox.cluster_engines.slurm import engine as slurm_engine
from sandbox.interfaces.cluster_engine import EngineRejectedError, EngineUnavailableError, JobPhase

HOST_LOST_SECONDS = TIMEOUT_SECONDS
"""A host that does not respond is DOWN after `SlurmdTimeout` and some failed requests: 20 s on an idle machine."""


@pytest.fixture
def harness(slurm_harness):
    return slurm_harness


@pytest.fixture
def engine_on_host(harness):
    """Return an engine whose jobs run on one host."""
    return lambda host: harness.create_engine(partition="all", extra_options=(f"--nodelist={host}",))


def submit_directly(cluster, job, *arguments):
    """Submit a job without looking it up first, as an earlier server did."""
    return cluster.run(
        "sbatch", "--parsable", f"--job-name={job.name}", "--dependency=singleton", "--output=/dev/null", *arguments
    ).strip()


async def test_killed_controller_is_reported_as_unavailable_and_jobs_continue(cluster, engine, create_job):
    job = create_job("wait")
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    cluster.wait_until_saved((await wait_for_phase(engine, job, JobPhase.RUNNING)).job_id)
    cluster.kill_controller()
    try:
        for call in (
            engine.submit(create_job("wait").request),
            engine.cancel(job.name),
            engine.reconcile_jobs([job.name]),
            engine.maximal_host_sizes(),
            engine.hosts(),
        ):
            with pytest.raises(EngineUnavailableError, match="scontrol ping"):
                await call
        assert await job.is_alive()
    finally:
        cluster.start_controller()
    assert (await status_of(engine, job)).phase is JobPhase.RUNNING
    assert len(job.starts()) == 1


async def test_paused_controller_is_reported_as_unavailable_in_time(cluster, engine, create_job, monkeypatch):
    monkeypatch.setattr(slurm_engine, "COMMAND_TIMEOUT_SECONDS", 2.0)
    job = create_job("wait")
    cluster.pause_controller()
    try:
        for call in (engine.submit(job.request), engine.reconcile_jobs([job.name]), engine.cancel(job.name)):
            async with asyncio.timeout(20):
                with pytest.raises(EngineUnavailableError, match="no response within 2 s"):
                    await call
    finally:
        cluster.resume_controller()
        monkeypatch.undo()
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    assert len(job.starts()) == 1


async def lose_job(cluster, harness, create_job, saved_job_id):
    """Submit a job that has to wait, and kill the controller before it saves its state. Return the job and its former
    id.

    The controller saves its state at most every five seconds. On a busy machine, it may save a job before it is killed.
    """
    engine = harness.create_engine()
    for _ in range(5):
        job = create_job("wait", resources=harness.whole_host)
        cluster.wait_until_saved(saved_job_id)
        await engine.submit(job.request)
        status = await status_of(engine, job)
        assert status.phase is JobPhase.WAITING
        cluster.kill_controller()
        cluster.start_controller()
        if (await status_of(engine, job)).phase is JobPhase.UNKNOWN:
            return job, status.job_id
        await engine.cancel(job.name)
    raise AssertionError("the controller lost no job")


async def test_job_that_a_killed_controller_lost_is_submitted_again(cluster, harness, engine, create_job):
    blocker = create_job("wait", resources=harness.whole_host)
    await engine.submit(blocker.request)
    await blocker.wait_for_heartbeat()
    lost, lost_id = await lose_job(cluster, harness, create_job, (await status_of(engine, blocker)).job_id)
    other = create_job("wait", resources=harness.whole_host)
    assert (await status_of(engine, blocker)).phase is JobPhase.RUNNING
    # Slurm reuses the lost job's id for another job. Only names identify jobs.
    await engine.submit(other.request)
    assert (await status_of(engine, other)).job_id == lost_id
    await engine.cancel(lost.name)
    assert (await status_of(engine, other)).phase is JobPhase.WAITING
    await engine.submit(lost.request)
    assert (await status_of(engine, lost)).phase is JobPhase.WAITING
    await engine.cancel(blocker.name)
    await other.wait_for_heartbeat()
    await engine.cancel(other.name)
    await lost.wait_for_heartbeat()
    assert [len(job.starts()) for job in (blocker, other, lost)] == [1, 1, 1]


async def test_job_on_a_killed_host_is_unreachable(cluster, engine_on_host, create_job):
    job, other = create_job("wait"), create_job("wait")
    engine = engine_on_host("n2")
    await engine.submit(job.request)
    await engine_on_host("n3").submit(other.request)
    await job.wait_for_heartbeat()
    await other.wait_for_heartbeat()
    cluster.kill_host("n2")
    try:
        status = await wait_for_phase(engine, job, JobPhase.UNREACHABLE, seconds=HOST_LOST_SECONDS)
        assert status.host == "n2"
        assert "has not confirmed" in status.reason
        assert (await status_of(engine, other)).phase is JobPhase.RUNNING
    finally:
        cluster.start_host("n2")
    assert (await status_of(engine, job)).phase is JobPhase.UNREACHABLE
    assert len(job.starts()) == 1


async def test_cancelled_job_on_a_host_without_network_has_not_ended(cluster, engine_on_host, create_job):
    """Slurm reports CANCELLED, as for every cancelled job, although the worker is running."""
    job, connected = create_job("wait"), create_job("wait")
    engine = engine_on_host("n2")
    await engine.submit(job.request)
    await engine.submit(connected.request)
    await job.wait_for_heartbeat()
    await connected.wait_for_heartbeat()
    await engine.cancel(connected.name)
    await wait_for_end(engine, connected)
    cluster.cut_off("n2")
    try:
        await engine.cancel(job.name)
        assert (await status_of(engine, job)).phase is JobPhase.RUNNING
        status = await wait_for_phase(engine, job, JobPhase.UNREACHABLE, JobPhase.ENDED, seconds=HOST_LOST_SECONDS)
        assert status.phase is JobPhase.UNREACHABLE
        assert "CANCELLED" in status.reason
        assert await job.is_alive()
    finally:
        cluster.kill_host("n2")
        cluster.start_host("n2")


async def test_job_that_may_have_been_started_twice_has_not_ended(cluster, engine_on_host, create_job):
    """Despite `--no-requeue`, Slurm requeues a job if its host did not respond to the request to start the job."""
    job = create_job("wait")
    engine = engine_on_host("n2")
    cluster.cut_off("n2")
    try:
        await engine.submit(job.request)
        assert (await wait_for_phase(engine, job, JobPhase.RUNNING)).host == "n2"
        assert (await wait_for_phase(engine, job, JobPhase.WAITING)).host == ""
        await engine.cancel(job.name)
        status = await wait_for_phase(engine, job, JobPhase.UNREACHABLE, JobPhase.ENDED)
        assert status.phase is JobPhase.UNREACHABLE
        assert "no host has confirmed" in status.reason
    finally:
        cluster.kill_host("n2")
        cluster.start_host("n2")


async def test_controller_that_forgot_a_start_reports_the_end_correctly(cluster, engine, create_job):
    """The killed controller had saved the job as waiting, or not at all. Slurm ends workers that it does not expect."""
    job = create_job("wait")
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    cluster.kill_controller()
    cluster.start_controller()
    status = await status_of(engine, job)
    if status.phase is not JobPhase.RUNNING:  # the controller forgot the start
        await wait_for_phase(engine, job, JobPhase.ENDED, JobPhase.UNKNOWN)
    await engine.cancel(job.name)
    await wait_for_phase(engine, job, JobPhase.ENDED, JobPhase.UNKNOWN)
    await wait_until_dead(job)
    assert len(job.starts()) == 1


async def wait_until_dead(job):
    async def is_dead():
        return not await job.is_alive()

    await wait_until(is_dead)


@pytest.mark.parametrize(("action", "phase"), [("wait", JobPhase.ENDED), ("clean", JobPhase.UNREACHABLE)])
async def test_exit_code_proves_the_end_of_a_cancelled_worker(engine, create_job, action, phase):
    job = create_job(action)
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    await engine.cancel(job.name)
    status = await wait_for_phase(engine, job, JobPhase.ENDED, JobPhase.UNREACHABLE)
    assert status.phase is phase


async def test_waiting_duplicate_is_reported_and_cancelled(cluster, engine, create_job):
    job = create_job("wait")
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    duplicate = submit_directly(cluster, job, "--wrap=exec sleep 100")
    status = await status_of(engine, job)
    assert status.phase is JobPhase.RUNNING
    assert status.duplicate_ids == (duplicate,)
    assert (await status_of(engine, job)).duplicate_ids == ()
    assert cluster.run("squeue", "--noheader", "--states=all", f"--jobs={duplicate}", "--format=%T") == "CANCELLED\n"
    assert (await status_of(engine, job)).phase is JobPhase.RUNNING
    assert await job.is_alive()


async def test_first_of_two_waiting_jobs_is_kept(cluster, harness, engine, create_job):
    blocker, job = create_job("wait", resources=harness.whole_host), create_job("wait")
    await engine.submit(blocker.request)
    await blocker.wait_for_heartbeat()
    await engine.submit(job.request)
    duplicate = submit_directly(cluster, job, "--partition=small", "--wrap=exec sleep 100")
    status = await status_of(engine, job)
    assert status.phase is JobPhase.WAITING
    assert status.duplicate_ids == (duplicate,)
    assert status.job_id != duplicate
    await engine.cancel(blocker.name)
    await job.wait_for_heartbeat()
    assert (await status_of(engine, job)).job_id == status.job_id


async def test_forgotten_job_is_unknown(cluster, engine, create_job):
    job = create_job("exit", "0")
    await engine.submit(job.request)
    await wait_for_end(engine, job)
    cluster.write_configuration(min_job_age=2)
    try:
        cluster.kill_controller()
        cluster.start_controller()
        status = await wait_for_phase(engine, job, JobPhase.UNKNOWN)
        assert status.reason
    finally:
        cluster.write_configuration()
        cluster.kill_controller()
        cluster.start_controller()


async def test_suspended_job_counts_as_running_and_can_be_cancelled(cluster, engine, create_job):
    job = create_job("wait")
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    cluster.run("scontrol", "suspend", (await status_of(engine, job)).job_id)
    await wait_until(lambda: "SUSPENDED" in cluster.run("squeue", "--noheader", "--format=%T"))
    assert (await status_of(engine, job)).phase is JobPhase.RUNNING
    await engine.cancel(job.name)
    await wait_for_end(engine, job)
    assert not await job.is_alive()


async def test_job_specification_contains_no_environment_values(cluster, engine, create_job, tmp_path):
    job = create_job("wait", environment={"TOKEN": "secret-token"})
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    job_id = (await status_of(engine, job)).job_id
    script = tmp_path / "script"
    cluster.run("scontrol", "write", "batch_script", job_id, str(script))
    assert script.read_text().startswith("#!/bin/sh\nexec ")
    specification = cluster.run("scontrol", "show", "job", "--details", job_id)
    assert f"JobName={job.name}" in specification
    assert "secret-token" not in specification + script.read_text()
    assert "Requeue=0" in specification
    assert "TimeLimit=00:12:00" in specification
    assert "NumCPUs=1" in specification
    assert "MinMemoryNode=100M" in specification


async def test_extra_options_select_the_host(engine_on_host, create_job):
    job = create_job("wait")
    await engine_on_host("n3").submit(job.request)
    await job.wait_for_heartbeat()
    assert (await status_of(engine_on_host("n3"), job)).host == "n3"


async def test_largest_hosts_are_limited_to_the_partition(harness):
    (small,) = await harness.create_engine(partition="small").maximal_host_sizes()
    (large,) = await harness.create_engine(partition="all").maximal_host_sizes()
    assert (large.cpus, large.memory_bytes) == (small.cpus, 2 * small.memory_bytes)
    assert await harness.create_engine(partition=None).maximal_host_sizes() == [large]
    with pytest.raises(EngineUnavailableError, match=r"none .*cluster\.slurm\.partition"):
        await harness.create_engine(partition="none").maximal_host_sizes()


async def test_listed_hosts_belong_to_the_partition_and_have_a_state(harness, cluster):
    assert [host.name for host in await harness.create_engine(partition="small").hosts()] == ["n1"]
    hosts = {host.name: host for host in await harness.create_engine(partition=None).hosts()}
    assert list(hosts) == ["n1", "n2", "n3"]
    assert hosts["n3"].resources.memory_bytes == 2 * hosts["n1"].resources.memory_bytes
    assert {host.problem for host in hosts.values()} == {""}
    cluster.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=a|b\nn9|idle|4|1|1|all*")
    cluster.run("scontrol", "update", "NodeName=n3", "State=DOWN", "Reason=test")
    try:
        hosts = await harness.create_engine(partition="all").hosts()
        assert [host.name for host in hosts] == ["n1", "n2", "n3"]
        problems = ["", "Slurm reports the state drained.", "Slurm reports the state down."]
        assert [host.problem for host in hosts] == problems
    finally:
        cluster.restrict_to("n1", "n2", "n3")
    with pytest.raises(EngineUnavailableError, match=r"none .*cluster\.slurm\.partition"):
        await harness.create_engine(partition="none").hosts()


async def test_jobs_start_on_hosts_that_are_not_excluded(harness, create_job):
    engine = harness.create_engine(partition="all", extra_options=("--exclude=n[1]",))
    jobs = [create_job("wait", excluded_hosts=("n2", "no-host")) for _ in range(3)]
    for job in jobs:
        await engine.submit(job.request)
        await job.wait_for_heartbeat()
        assert (await status_of(engine, job)).host == "n3"
    with pytest.raises(EngineRejectedError, match="node configuration is not available"):
        await engine.submit(create_job("wait", excluded_hosts=("n2", "n3")).request)
    with pytest.raises(EngineRejectedError, match="No host is left"):
        await engine.submit(create_job("wait", excluded_hosts=("n1", "n2", "n3")).request)


async def test_job_for_a_missing_partition_is_rejected(harness, create_job):
    job = create_job("wait")
    with pytest.raises(EngineRejectedError, match="Invalid partition name"):
        await harness.create_engine(partition="none").submit(job.request)
    await harness.create_engine().submit(job.request)
    await job.wait_for_heartbeat()
