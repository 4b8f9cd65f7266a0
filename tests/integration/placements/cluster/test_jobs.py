"""The jobs of a server are stored before they are submitted, and survive a restart of the server."""

import asyncio
import contextlib
import time

import pytest

from doubles.cluster_server import SMALL, ClusterServer, wait_until
from sandbox.interfaces.cluster_engine import EngineRejectedError, EngineUnavailableError, JobPhase, JobStatus
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.worker_messages import Claimed
from sandbox.placements.cluster import claim_and_takeover_rules, job_state, jobs


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    for name in ("POLL_SECONDS", "_RESUBMIT_SECONDS", "_REPLACE_SECONDS_MAX"):
        monkeypatch.setattr(jobs, name, 0.02)


@contextlib.asynccontextmanager
async def claimed(server, job):
    async with server.connect(server.claim(job)) as client:
        assert isinstance(await client.read(), Claimed)
        yield client


async def lose_contact(server, job):
    """Let a worker claim the job and lose its connection."""
    async with claimed(server, job):
        pass
    await wait_until(lambda: job.session is None)


async def test_job_is_submitted_once_despite_a_restart(server, job):
    await server.restart()
    again = server.jobs.reserve("task-1", None, SMALL)
    await wait_until(lambda: again.phase is JobPhase.RUNNING)
    assert again.stored == job.stored
    assert [request.name for request in server.engine.submitted] == [job.name]
    assert server.jobs.lock_state("task-1") is LockState.FREE


async def test_status_of_a_waiting_job_contains_the_reason_from_the_engine(server, job):
    """The status of a job contains the host, the engine's job id and the engine's reason."""
    server.engine.statuses[job.name] = JobStatus(JobPhase.WAITING, reason="It waits (Resources).", job_id="7")
    await wait_until(lambda: job.reason == "It waits (Resources).")
    server.engine.statuses[job.name] = JobStatus(JobPhase.RUNNING, "host-1", job_id="7")
    await wait_until(lambda: job.reason == "The worker is starting on host-1.")
    assert (job.status.host, job.status.job_id) == ("host-1", "7")


async def test_job_that_the_engine_has_lost_is_submitted_again(server, job):
    server.engine.statuses.clear()
    await wait_until(lambda: len(server.tokens(job)) == 2)
    assert len(set(server.tokens(job))) == 2


@pytest.mark.parametrize(
    "error", [EngineUnavailableError("It is busy."), EngineRejectedError("It is too large."), OSError("It is full.")]
)
async def test_failed_submission_is_repeated(server, error):
    server.engine.error = error
    job = server.jobs.reserve("task-1", None, SMALL)
    await wait_until(lambda: str(error) in job.reason)
    server.engine.error = None
    await wait_until(lambda: server.tokens(job))


async def test_status_of_a_job_has_its_host_and_the_reason_why_it_waits(server):
    assert server.jobs.status("task-1") is None
    server.engine.error = EngineUnavailableError("It is busy.")
    job = server.jobs.reserve("task-1", None, SMALL)
    await wait_until(lambda: "It is busy." in server.jobs.status("task-1").reason)
    server.engine.error = None
    await wait_until(lambda: server.tokens(job))
    server.engine.statuses[job.name] = JobStatus(JobPhase.WAITING, reason="All hosts are busy.", job_id="7")
    waiting = JobStatus(JobPhase.WAITING, reason="All hosts are busy.", job_id="7")
    await wait_until(lambda: server.jobs.status("task-1") == waiting)
    server.engine.statuses[job.name] = JobStatus(JobPhase.RUNNING, "host-2", job_id="7")
    await wait_until(lambda: server.jobs.status("task-1").phase is JobPhase.RUNNING)
    assert server.jobs.status("task-1").host == "host-2"


async def test_error_of_one_job_does_not_affect_the_others(server, monkeypatch):
    submit = server.engine.submit

    async def fail(request):
        if request.name == first.name:
            raise ValueError("unexpected")
        await submit(request)

    monkeypatch.setattr(server.engine, "submit", fail)
    first, second = (server.jobs.reserve(task_id, None, SMALL) for task_id in ("task-1", "task-2"))
    await wait_until(lambda: server.tokens(second))
    assert server.tokens(first) == []


async def test_submissions_do_not_delay_the_workers_of_other_tasks(server, job, monkeypatch):
    """A user may submit thousands of tasks, and each submission may take a second."""
    monkeypatch.setattr(jobs, "_HOST_CONFIRMATION_TIMEOUT_SECONDS", 0.5)
    started, may_submit, submit = [], asyncio.Event(), server.engine.submit

    async def submit_slowly(request):
        started.append(request.name)
        await may_submit.wait()
        await submit(request)

    monkeypatch.setattr(server.engine, "submit", submit_slowly)
    others = [server.jobs.reserve(f"other-{number}", None, SMALL) for number in range(5)]
    await wait_until(lambda: started)
    server.engine.statuses[job.name] = JobStatus(JobPhase.RUNNING, "host-2")
    async with server.connect(server.claim(job, host="host-2")) as client:
        assert isinstance(await client.read(), Claimed)
    assert started == [others[0].name]
    may_submit.set()
    await wait_until(lambda: server.tokens(others[-1]))
    await wait_until(lambda: all(other.phase is JobPhase.RUNNING for other in others))
    assert started == [other.name for other in others]


async def test_job_is_not_submitted_if_its_task_has_already_ended(server, monkeypatch):
    started, may_submit = [], asyncio.Event()

    async def submit_slowly(request):
        started.append(request.name)
        await may_submit.wait()

    monkeypatch.setattr(server.engine, "submit", submit_slowly)
    first, ended, last = (server.jobs.reserve(f"task-{number}", None, SMALL) for number in range(3))
    await wait_until(lambda: started)
    server.jobs.notify_task_ended("task-1")
    may_submit.set()
    await wait_until(lambda: last.name in started)
    assert first.name in started
    assert ended.name not in started


async def test_number_of_concurrent_cancellations_is_limited(server, monkeypatch):
    """Too many cancellations would delay the engine's look-ups of other jobs."""
    running, counts, may_cancel, cancel = set(), [], asyncio.Event(), server.engine.cancel

    async def cancel_slowly(name):
        running.add(name)
        counts.append(len(running))
        await may_cancel.wait()
        await cancel(name)
        running.discard(name)

    monkeypatch.setattr(server.engine, "cancel", cancel_slowly)
    many = [server.jobs.reserve(f"task-{number}", None, SMALL) for number in range(10)]
    await wait_until(lambda: all(server.tokens(each) for each in many))
    for each in many:
        server.jobs.notify_task_ended(each.stored.task_id)
    await wait_until(lambda: running)
    may_cancel.set()
    await wait_until(lambda: len(server.engine.cancelled) == len(many))
    assert max(counts) <= jobs.CONCURRENT_CANCELLATIONS_MAX
    assert set(server.engine.cancelled) == {each.name for each in many}


@pytest.mark.parametrize("phase", [JobPhase.ENDED, JobPhase.UNREACHABLE])
async def test_worker_that_does_not_start_is_replaced(server, job, phase):
    server.engine.set_phase(job, phase)
    new = await wait_until(lambda: (found := server.jobs.of_task("task-1")) is not job and found)
    assert new.stored.attempt_id != job.stored.attempt_id
    await wait_until(lambda: server.tokens(new))
    await wait_until(lambda: job.name in server.engine.cancelled)
    assert [path.stem for path in server.store.iterdir()] == [new.stored.attempt_id]
    assert server.jobs.reserve("task-1", None, SMALL) is new


@pytest.mark.parametrize("host", ["host-2", ""])
async def test_end_of_a_job_on_another_host_does_not_prove_the_end_of_the_worker(server, job, host):
    """While the host of the first worker is unreachable, Slurm may start the job again, or start a duplicate."""
    await lose_contact(server, job)
    server.engine.statuses[job.name] = JobStatus(JobPhase.ENDED, host)
    await wait_until(lambda: job.phase is JobPhase.UNREACHABLE)
    assert server.jobs.lock_state("task-1") is LockState.UNKNOWN
    server.engine.set_phase(job, JobPhase.ENDED)
    await wait_until(lambda: job.stored.was_end_confirmed)


async def test_worker_of_a_job_that_was_started_again_must_run_on_the_new_host(server, job, monkeypatch):
    """Both workers have the token. The attempt goes to the worker on the host that the engine reports."""
    monkeypatch.setattr(jobs, "_HOST_CONFIRMATION_TIMEOUT_SECONDS", 0.2)
    server.engine.statuses[job.name] = JobStatus(JobPhase.RUNNING, "host-2")
    await wait_until(lambda: job_state.confirmed_host(job) == "host-2")
    async with server.connect(server.claim(job)) as first:
        assert await first.read() is None
    async with server.connect(server.claim(job, host="host-2")) as second:
        assert isinstance(await second.read(), Claimed)
    assert job.stored.host == "host-2"


async def test_task_of_an_ended_worker_is_taken_over(server, job):
    await lose_contact(server, job)
    assert server.jobs.lock_state("task-1") is LockState.UNKNOWN
    reason = "The worker was ended by signal 9 on host-1 (OOMKilled)."
    server.engine.statuses[job.name] = JobStatus(JobPhase.ENDED, "host-1", reason=reason)
    await wait_until(lambda: server.jobs.lock_state("task-1") is LockState.FREE)
    assert (job.stored.is_abandoned, job.stored.was_end_confirmed, job.stored.loss_reason) == (True, True, reason)
    await server.restart()
    assert server.jobs.lock_state("task-1") is LockState.FREE
    assert server.jobs.of_attempt(job.stored.attempt_id).stored.loss_reason == reason
    assert server.jobs.reserve("task-1", None, SMALL).stored.attempt_id != job.stored.attempt_id


@pytest.mark.parametrize("phase", [JobPhase.RUNNING, JobPhase.WAITING, JobPhase.UNREACHABLE, JobPhase.UNKNOWN])
async def test_task_of_a_worker_without_contact_is_taken_over_after_its_lease(tmp_path, monkeypatch, phase):
    monkeypatch.setattr(claim_and_takeover_rules, "LEASE_MARGIN_SECONDS", 0.5)
    server = ClusterServer(tmp_path, lease_seconds=0.5)
    await server.start()
    try:
        job = await server.submit()
        await lose_contact(server, job)
        server.engine.set_phase(job, phase)
        assert not job.stored.is_abandoned
        await wait_until(lambda: server.jobs.lock_state("task-1") is LockState.FREE)
        assert (job.stored.is_abandoned, job.stored.was_end_confirmed) == (True, False)
        await wait_until(lambda: job.name in server.engine.cancelled)
    finally:
        await server.stop()


async def test_restarted_server_waits_for_the_end_of_the_original_lease(tmp_path, monkeypatch):
    """The server waits until the worker's lease has expired, even if its own setting is now shorter."""
    monkeypatch.setattr(claim_and_takeover_rules, "LEASE_MARGIN_SECONDS", 0.0)
    server = ClusterServer(tmp_path, lease_seconds=2.0)
    await server.start()
    try:
        job = await server.submit()
        await lose_contact(server, job)
        server.lease_seconds = 0.1
        await server.restart()
        started_at = time.monotonic()
        job = server.jobs.of_task("task-1")
        await wait_until(lambda: job.stored.is_abandoned)
        assert time.monotonic() - started_at > 1.9
    finally:
        await server.stop()


async def test_lock_state_is_unknown_while_the_engine_does_not_respond(server, job):
    await lose_contact(server, job)

    async def fail(names):
        raise EngineUnavailableError("It is not responding.")

    server.engine.reconcile_jobs = fail
    await wait_until(lambda: job.phase is None)
    assert server.jobs.lock_state("task-1") is LockState.UNKNOWN


async def test_next_attempt_gets_a_new_id_on_the_same_worker(server, job):
    first = job.stored.attempt_ids[-1]
    assert server.jobs.reserve("task-1", None, SMALL).stored.attempt_ids == (first,)
    assert server.jobs.reserve("task-1", first, SMALL) is job
    [_, second] = job.stored.attempt_ids
    server.jobs.reserve("task-1", first, SMALL)
    assert job.stored.attempt_ids == (first, second)
    assert server.jobs.of_attempt(second) is job


async def test_job_of_a_task_that_ended_before_its_worker_started_is_removed(server, job):
    claim = server.claim(job)
    server.jobs.notify_task_ended("task-1")
    await wait_until(lambda: job.name in server.engine.cancelled)
    assert list(server.store.iterdir()) == []
    async with server.connect(claim) as client:
        assert not isinstance(await client.read(), Claimed)


async def test_job_of_a_lost_worker_is_removed_with_its_task(server, job):
    await lose_contact(server, job)
    server.engine.set_phase(job, JobPhase.ENDED)
    await wait_until(lambda: job.stored.is_abandoned)
    server.jobs.notify_task_ended("task-1")
    assert list(server.store.iterdir()) == []


async def test_worker_that_is_lost_after_its_task_ended_is_forgotten(server, job):
    await lose_contact(server, job)
    server.jobs.notify_task_ended("task-1")
    assert server.jobs.of_task("task-1") is job
    server.engine.set_phase(job, JobPhase.ENDED)
    await wait_until(lambda: server.jobs.of_task("task-1") is None)
    assert list(server.store.iterdir()) == []


async def test_workers_that_end_soon_after_their_claim_are_replaced_after_growing_pauses(server, job, monkeypatch):
    """A worker that has kept its job for a while is replaced without a pause."""
    monkeypatch.setattr(jobs, "_REPLACE_SECONDS_MAX", 60.0)
    pauses = []
    for number in range(4):
        if number == 3:
            monkeypatch.setattr(jobs, "_STABLE_SECONDS", 0.0)
        await wait_until(lambda job=job: server.tokens(job), "the submission")
        await lose_contact(server, job)
        server.engine.set_phase(job, JobPhase.ENDED)
        await wait_until(lambda job=job: job.stored.is_abandoned)
        lost, job = job, server.jobs.reserve("task-1", None, SMALL)
        pauses.append(job._not_before - time.monotonic())
        if number < 3:
            assert job.reason.startswith("The worker was lost")
            assert "It is ended." in job.reason
            await wait_until(lambda job=job: job.phase is JobPhase.UNKNOWN)
            assert job.reason.startswith("The worker was lost")
        assert server.jobs.of_attempt(lost.stored.attempt_id) is lost
        job.postpone(0, "")
    assert [round(pause) for pause in pauses] == [2, 4, 8, 0]


async def test_lock_state_is_unknown_for_the_duration_of_one_lease_if_the_stored_job_is_lost(server, monkeypatch):
    assert server.jobs.lock_state("task-9") is LockState.UNKNOWN
    monkeypatch.setattr(jobs, "takeover_seconds", lambda _: 0.0)
    assert server.jobs.lock_state("task-9") is LockState.FREE


async def test_damaged_stored_job_is_reported(server, job):
    next(server.store.iterdir()).write_text("{")
    with pytest.raises(OSError, match="is damaged"):
        await server.restart()
