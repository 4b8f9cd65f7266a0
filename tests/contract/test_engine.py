"""The contract of engines, tested with real workers: local processes, Jobs of a Kubernetes double, and Slurm jobs."""

import asyncio
import re

import msgspec
import pytest

from doubles.engine_harnesses import (
    SMALL,
    status_of,
    wait_for_end,
    wait_for_phase,
    wait_until,
)
from sandbox.interfaces.cluster_engine import EngineRejectedError, JobPhase, JobRequest, job_name
from sandbox.interfaces.task_file_layout import new_attempt_id
from sandbox.model.resources import Resources

HOSTILE_ARGUMENTS = ("a b", "'", '"', "$HOME", "`id`", "%j\\", "*", "line\n#SBATCH --hold", ";exit 3", "é\x1b[31m", "")
HOSTILE_NAMES = (
    "",
    "sandbox-",
    "other",
    f"sandbox-{'a' * 13}",
    "sandbox-aaaaaaaaaaa,",
    "../sandbox-aaaaaaaaaaaa",
    "-x",
)


async def test_worker_runs_and_ends(engine, create_job):
    job = create_job("wait")
    assert (await status_of(engine, job)).phase is JobPhase.UNKNOWN
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    status = await status_of(engine, job)
    assert status.phase is JobPhase.RUNNING
    assert status.host
    assert status.job_id
    assert status.duplicate_ids == ()
    await engine.cancel(job.name)
    await wait_for_end(engine, job)
    assert not await job.is_alive()


@pytest.mark.parametrize("code", [0, 7])
async def test_job_ends_with_its_worker(engine, create_job, code):
    job = create_job("exit", str(code))
    await engine.submit(job.request)
    status = await wait_for_end(engine, job)
    assert len(job.starts()) == 1
    assert status.reason
    assert not code or str(code) in status.reason


async def test_job_whose_worker_cannot_be_executed_ends(engine, create_job):
    job = create_job("exit", "0")
    await engine.submit(JobRequest(job.name, ("/does/not/exist",), {}, SMALL, time_limit_seconds=60))
    assert re.search(r"\b12[78]\b", (await wait_for_end(engine, job)).reason)


async def test_arguments_and_environment_reach_the_worker_unchanged(engine, create_job):
    environment = {"PATH": "/usr/bin:/bin", "TOKEN": "a,b =$x\n'\"", "EMPTY": ""}
    job = create_job("wait", *HOSTILE_ARGUMENTS, environment=environment)
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    (start,) = job.activity.read("start")
    assert start["arguments"] == list(HOSTILE_ARGUMENTS)
    assert environment.items() <= start["environment"].items()
    assert not {"HOME", "LOGNAME", "SHELL", "PYTHONPATH"} & start["environment"].keys()


async def test_output_is_appended_to_the_file(engine, create_job, tmp_path):
    output = tmp_path / "100%j output"
    output.write_text("earlier\n")
    job = create_job("exit", "0", output_file=str(output))
    command = ("/bin/sh", "-c", "echo out; echo error >&2")
    await engine.submit(JobRequest(job.name, command, {}, SMALL, 60, output_file=str(output)))
    await wait_for_end(engine, job)
    assert output.read_text() == "earlier\nout\nerror\n"


async def test_job_submitted_repeatedly_starts_once(harness, create_job):
    job = create_job("wait")
    engine = harness.create_engine()
    await asyncio.gather(*(engine.submit(job.request) for _ in range(3)))
    await job.wait_for_heartbeat()
    await harness.create_engine().submit(job.request)  # a server without a record of the first submission
    await engine.cancel(job.name)
    await wait_for_end(engine, job)
    await engine.submit(job.request)
    assert (await status_of(engine, job)).phase is JobPhase.ENDED
    assert len(job.starts()) == 1
    assert (await status_of(engine, job)).duplicate_ids == ()


async def test_job_waits_until_it_fits(harness, engine, create_job):
    first, second = (create_job("wait", resources=harness.whole_host) for _ in range(2))
    await engine.submit(first.request)
    await first.wait_for_heartbeat()
    await engine.submit(second.request)
    status = await status_of(engine, second)
    assert (status.phase, status.host) == (JobPhase.WAITING, "")
    assert status.reason
    await engine.cancel(first.name)
    await wait_for_phase(engine, second, JobPhase.RUNNING)
    await second.wait_for_heartbeat()
    assert len(first.starts()) == len(second.starts()) == 1


async def test_cancelled_waiting_job_is_never_started(harness, engine, create_job):
    first, second, third = (create_job("wait", resources=harness.whole_host) for _ in range(3))
    for job in (first, second, third):
        await engine.submit(job.request)
    await first.wait_for_heartbeat()
    await engine.cancel(second.name)
    assert (await wait_for_end(engine, second)).host == ""
    await engine.cancel(first.name)
    await wait_for_phase(engine, third, JobPhase.RUNNING)
    await third.wait_for_heartbeat()
    assert second.starts() == []


async def test_worker_that_ignores_the_signal_is_killed(engine, create_job):
    job = create_job("stubborn")
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    await engine.cancel(job.name)
    await engine.cancel(job.name)
    await wait_for_end(engine, job)
    assert len(job.activity.read("term")) >= 1
    assert not await job.is_alive()


async def test_cancelling_an_unknown_job_has_no_effect(engine, create_job):
    job, other = create_job("wait"), create_job("wait")
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    await engine.cancel(other.name)
    assert (await status_of(engine, other)).phase is JobPhase.UNKNOWN
    assert (await status_of(engine, job)).phase is JobPhase.RUNNING


async def test_many_names_are_looked_up_in_one_call(engine, create_job):
    jobs = [create_job("wait") for _ in range(2)]
    for job in jobs:
        await engine.submit(job.request)
        await job.wait_for_heartbeat()
    others = {job_name(new_attempt_id()) for _ in range(3000)}
    statuses = await engine.reconcile_jobs([*others, *(job.name for job in jobs)])
    assert {name for name, status in statuses.items() if status.phase is JobPhase.RUNNING} == {job.name for job in jobs}
    assert {statuses[name].phase for name in others} == {JobPhase.UNKNOWN}
    assert await engine.reconcile_jobs([]) == {}


async def test_job_that_no_host_can_run_is_rejected(engine, create_job):
    (largest,) = await engine.maximal_host_sizes()
    fitting = create_job("exit", "0", resources=Resources(largest.cpus, largest.memory_bytes, largest.disk_bytes))
    await engine.submit(fitting.request)
    await wait_for_end(engine, fitting)
    for resources in (Resources(largest.cpus + 1, 1, 1), Resources(1, largest.memory_bytes + 1, 1)):
        job = create_job("wait", resources=resources)
        with pytest.raises(EngineRejectedError, match="request"):
            await engine.submit(job.request)
        assert (await status_of(engine, job)).phase is JobPhase.UNKNOWN


@pytest.mark.parametrize("name", HOSTILE_NAMES)
async def test_invalid_names_are_rejected(engine, create_job, name):
    request = JobRequest(name, ("/bin/true",), {}, SMALL, time_limit_seconds=60)
    for call in (engine.submit(request), engine.cancel(name), engine.reconcile_jobs([name])):
        with pytest.raises(ValueError, match="not the name of a job"):
            await call


async def test_environment_is_not_in_repr(create_job):
    job = create_job("wait", environment={"TOKEN": "secret-token"})
    assert "secret-token" not in repr(job.request)
    assert job.name in repr(job.request)


async def test_jobs_survive_the_server(harness, create_job):
    job, waiting = create_job("wait", resources=harness.whole_host), create_job("wait", resources=harness.whole_host)
    first = harness.create_engine()
    await first.submit(job.request)
    await job.wait_for_heartbeat()
    await first.submit(waiting.request)
    second = harness.create_engine()
    assert (await status_of(second, job)).phase is JobPhase.RUNNING
    await second.cancel(job.name)
    await wait_for_phase(second, waiting, JobPhase.RUNNING)
    await wait_until(waiting.starts)


async def test_hosts_are_listed_with_their_resources(engine):
    (largest,) = await engine.maximal_host_sizes()
    [host] = await engine.hosts()
    assert (host.resources, host.problem) == (largest, "")


async def test_job_never_starts_on_an_excluded_host(harness, engine, create_job):
    """Names that the engine does not have are ignored: a host may have been removed from the cluster."""
    [host] = await engine.hosts()
    excluded, other = create_job("wait", excluded_hosts=(host.name, "no-host")), create_job("exit", "0")
    with pytest.raises(EngineRejectedError, match="No host is left"):
        await engine.submit(excluded.request)
    assert (await status_of(engine, excluded)).phase is JobPhase.UNKNOWN
    await engine.submit(msgspec.structs.replace(other.request, excluded_hosts=("no-host",)))
    await wait_for_end(engine, other)
    assert (len(excluded.starts()), len(other.starts())) == (0, 1)
