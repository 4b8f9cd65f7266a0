"""Crashes, killed processes, time limits and the queue of the engine that starts local processes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from doubles.engine_harnesses import GIB, MIB, ProcessHarness, status_of, wait_for_end, wait_for_phase, wait_until
from sandbox.cluster_engines.processes import engine as process_engine
from sandbox.cluster_engines.processes.engine import JobDirectory, ProcessEngine, StoredRequest
from sandbox.cluster_engines.processes.supervisor import read_boot_id, read_start_time
from sandbox.interfaces.cluster_engine import EngineUnavailableError, JobPhase
from sandbox.model.resources import Resources


@pytest.fixture
def harness(process_harness):
    return process_harness


def job_directory(harness, job):
    return harness.directory / job.name


def supervisor_pid(harness, job):
    return json.loads((job_directory(harness, job) / "started.json").read_bytes())["pid"]


def store(harness, job):
    """Store a job without starting it, as if the server had died before the start."""
    harness.directory.mkdir(exist_ok=True)
    JobDirectory(harness.directory, job.name).create(StoredRequest(1, job.request))


async def test_job_is_started_by_the_next_server(harness, create_job):
    job = create_job("wait")
    store(harness, job)
    engine = harness.create_engine()
    assert (await status_of(engine, job)).phase in {JobPhase.WAITING, JobPhase.RUNNING}
    await job.wait_for_heartbeat()
    assert (await status_of(engine, job)).phase is JobPhase.RUNNING


async def test_incomplete_request_is_not_a_job(harness, engine, create_job):
    job = create_job("wait")
    job_directory(harness, job).mkdir(parents=True)
    (job_directory(harness, job) / "request.part").write_text("{")
    assert (await status_of(engine, job)).phase is JobPhase.UNKNOWN
    await engine.submit(job.request)
    await job.wait_for_heartbeat()


async def test_started_job_is_never_started_again(harness, engine, create_job):
    """If a supervisor is killed between its start and the worker's end, its lock is free."""
    job = create_job("exit", "0")
    await engine.submit(job.request)
    await wait_for_end(engine, job)
    (job_directory(harness, job) / "ended.json").unlink()
    await wait_for_end(engine, job)  # the supervisor may still hold its lock
    assert "restarted" in (await status_of(engine, job)).reason
    await engine.submit(job.request)
    start_supervisor(job_directory(harness, job))
    assert len(job.starts()) == 1


def start_supervisor(directory):
    command = [sys.executable, "-I", "-m", "sandbox.cluster_engines.processes.supervisor", str(directory)]
    subprocess.run(command, check=True, timeout=30)


async def test_concurrent_supervisors_start_one_worker(harness, engine, create_job):
    job = create_job("wait")
    store(harness, job)
    await asyncio.gather(*(asyncio.to_thread(start_supervisor, job_directory(harness, job)) for _ in range(6)))
    await job.wait_for_heartbeat()
    assert len(job.starts()) == 1
    await engine.cancel(job.name)
    await wait_for_end(engine, job)
    assert len(job.starts()) == 1


async def test_concurrent_servers_share_the_queue(harness, create_job):
    jobs = [create_job("wait") for _ in range(4)]
    engines = [harness.create_engine() for _ in range(3)]
    await asyncio.gather(*(engine.submit(job.request) for engine in engines for job in jobs))
    for job in jobs:
        await job.wait_for_heartbeat()
    assert [len(job.starts()) for job in jobs] == [1, 1, 1, 1]


async def test_worker_dies_with_its_supervisor(harness, engine, create_job):
    job = create_job("stubborn")
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    os.kill(supervisor_pid(harness, job), signal.SIGKILL)
    status = await wait_for_end(engine, job)
    assert "killed together with its supervisor" in status.reason
    assert not await job.is_alive()


async def test_job_does_not_end_while_its_worker_is_alive(harness, engine, create_job):
    """The worker inherits the lock, so the job is running even while its supervisor is stopped."""
    job = create_job("wait")
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    pid = supervisor_pid(harness, job)
    os.kill(pid, signal.SIGSTOP)
    assert (await status_of(engine, job)).phase is JobPhase.RUNNING
    await engine.cancel(job.name)  # resumes the supervisor
    status = await wait_for_end(engine, job)
    assert "143" in status.reason


async def test_processes_of_an_ended_worker_are_killed(engine, create_job):
    job = create_job("leave")
    await engine.submit(job.request)
    await wait_for_end(engine, job)
    assert len(job.starts()) == 2
    assert not await job.is_alive()


@pytest.mark.parametrize(("action", "reason"), [("wait", "143"), ("stubborn", "signal 9")])
async def test_worker_is_stopped_at_its_time_limit(engine, create_job, action, reason):
    job = create_job(action, time_limit_seconds=2, grace_seconds=1)
    await engine.submit(job.request)
    assert reason in (await wait_for_end(engine, job)).reason
    assert len(job.activity.read("term")) == 1
    assert not await job.is_alive()


async def test_process_with_a_reused_id_is_not_signaled(harness, engine, create_job):
    job, other = create_job("wait"), create_job("wait")
    await engine.submit(job.request)
    await engine.submit(other.request)
    await job.wait_for_heartbeat()
    await other.wait_for_heartbeat()
    started = json.loads((job_directory(harness, other) / "started.json").read_bytes())
    for change in ({"start_time": started["start_time"] + 1}, {"boot_id": "another boot"}):
        (job_directory(harness, job) / "started.json").write_text(json.dumps(started | change))
        await engine.cancel(job.name)
    assert await other.is_alive()
    assert other.activity.read("term") == []
    # Control: with the right start time and boot id, the process is signaled.
    (job_directory(harness, job) / "started.json").write_text(json.dumps(started))
    await engine.cancel(job.name)
    await wait_for_end(engine, other)


async def test_ended_process_is_not_signaled(harness, engine, create_job):
    job = create_job("exit", "0")
    await engine.submit(job.request)
    await wait_for_end(engine, job)
    await wait_until(lambda: read_start_time(supervisor_pid(harness, job)) is None)
    await engine.cancel(job.name)
    assert "exited with 0" in (await status_of(engine, job)).reason


async def test_jobs_start_in_submission_order(harness, engine, create_job):
    first = create_job("wait", resources=harness.whole_host)
    large = create_job("wait", resources=harness.whole_host)
    small = create_job("wait")
    for job in (first, large, small):
        await engine.submit(job.request)
    assert (await status_of(engine, small)).phase is JobPhase.WAITING
    await engine.cancel(large.name)
    await engine.cancel(first.name)
    await wait_for_phase(engine, small, JobPhase.RUNNING)
    await small.wait_for_heartbeat()
    assert large.starts() == []


async def test_running_jobs_never_exceed_the_capacity(engine, create_job):
    jobs = [create_job("wait", resources=Resources(2, 100 * MIB, GIB)) for _ in range(5)]
    for job in jobs:
        await engine.submit(job.request)
    statuses = await engine.reconcile_jobs([job.name for job in jobs])
    phases = [statuses[job.name].phase for job in jobs]
    assert phases == [JobPhase.RUNNING] * 2 + [JobPhase.WAITING] * 3


async def test_old_ended_jobs_are_forgotten(harness, engine, create_job, monkeypatch):
    monkeypatch.setattr(process_engine, "ENDED_JOBS_MAX", 2)
    jobs = [create_job("exit", "0") for _ in range(3)]
    for job in jobs:
        await engine.submit(job.request)
        await wait_for_end(engine, job)
    running = create_job("wait")
    await engine.submit(running.request)
    await running.wait_for_heartbeat()
    await status_of(engine, running)
    statuses = await engine.reconcile_jobs([job.name for job in (*jobs, running)])
    assert [statuses[job.name].phase for job in (*jobs, running)] == [
        *(JobPhase.UNKNOWN, JobPhase.ENDED, JobPhase.ENDED, JobPhase.RUNNING)
    ]
    assert not job_directory(harness, jobs[0]).exists()


async def test_engine_files_are_private(harness, engine, create_job):
    job = create_job("wait", environment={"TOKEN": "secret"})
    await engine.submit(job.request)
    await job.wait_for_heartbeat()
    assert harness.directory.stat().st_mode & 0o077 == 0
    assert job_directory(harness, job).stat().st_mode & 0o077 == 0
    arguments = Path(f"/proc/{supervisor_pid(harness, job)}/cmdline").read_bytes()
    environment = Path(f"/proc/{supervisor_pid(harness, job)}/environ").read_bytes()
    assert b"secret" not in arguments + environment


async def test_environment_is_stored_only_until_the_worker_is_started(harness, create_job):
    """The environment contains the join token."""
    started, cancelled = (create_job("wait", environment={"TOKEN": "secret"}) for _ in range(2))
    for job in (started, cancelled):
        store(harness, job)
        [path] = [path for path in job_directory(harness, job).iterdir() if b"secret" in path.read_bytes()]
        assert path.stat().st_mode & 0o777 == 0o600
    engine = harness.create_engine()
    await engine.cancel(cancelled.name)
    await status_of(engine, started)
    await started.wait_for_heartbeat()
    assert started.activity.read("start")[0]["environment"]["TOKEN"] == "secret"
    assert not [path for path in harness.directory.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]


async def test_worker_without_its_environment_is_started(harness, create_job):
    """Without its join token, the worker exits. A job that waited forever would not be replaced."""
    job = create_job("exit", "3", environment={"TOKEN": "secret"})
    store(harness, job)
    (job_directory(harness, job) / "environment").unlink()
    status = await wait_for_phase(harness.create_engine(), job, JobPhase.ENDED)
    assert "exited with 3" in status.reason


async def test_unusable_directory_makes_the_engine_unavailable(tmp_path, create_job):
    (tmp_path / "file").write_text("")
    engine = ProcessEngine(tmp_path / "file", "this-host", ProcessHarness.whole_host)
    with pytest.raises(EngineUnavailableError, match="cannot be managed"):
        await engine.submit(create_job("wait").request)


async def test_unrelated_files_are_ignored(harness, engine, create_job):
    job = create_job("wait")
    await engine.submit(job.request)
    (harness.directory / "lost+found").mkdir()
    (harness.directory / "sandbox-aaaaaaaaaaaa").write_text("")
    await job.wait_for_heartbeat()
    assert (await status_of(engine, job)).phase is JobPhase.RUNNING


def test_start_time_identifies_a_process():
    process = subprocess.Popen(["sleep", "100"])
    try:
        start_time = read_start_time(process.pid)
        assert start_time == read_start_time(process.pid)
        assert start_time is not None
    finally:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert read_start_time(process.pid) is None  # a zombie
        process.wait()
    assert read_start_time(process.pid) is None
    assert len(read_boot_id()) == 36
