"""Ownership of a task's journal: an owner whose host is not responding is never treated as dead."""

import asyncio

import pytest

from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from doubles.server_components import GIB
from doubles.unreachable_journals import UnreachableJournals
from sandbox.interfaces.journal import JournalBusyError, LockState
from sandbox.interfaces.placement import HostIdentity
from sandbox.interfaces.runner import FinishAttempt, RunAttempt
from sandbox.interfaces.server_services import UnavailableError
from sandbox.model.events import AgentExited, TaskFinished
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.task_state import TaskState
from sandbox.server.tracked_task import NoKnownOwner, RunnerOwned, ServerOwned

LOST = (AgentExited(None, None, Failure(FailureCode.RUNNER_LOST, "lost")), TaskFinished())
UNKNOWN_MESSAGE = "The runner's host is not responding; the task's current state is unknown."


@pytest.fixture
def components(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 0.01)
    return components


def make_lock_state_unknown(components):
    components.placement.lock_state = lambda _: LockState.UNKNOWN


def restore_lock_state(components):
    components.placement.lock_state = components.journals.lock_state


def owner(service, task_id="task-1"):
    return service.tracked_tasks[task_id].owner


async def wait_for_message(service, message):
    async with asyncio.timeout(10):
        while (await service.status("task-1")).state_message != message:
            await asyncio.sleep(0.005)


async def submit_waiting(components, service):
    """Submit a task that waits for memory."""
    components.available_memory_bytes = 0
    await service.submit(manifest())


async def start_waiting_task(components, service):
    components.available_memory_bytes = 100 * GIB
    await service.undo_drain()  # this call makes the server schedule pending tasks
    await components.wait_for_launch("task-1")


async def test_owner_is_the_server_then_the_runner_then_nobody(components, monkeypatch):
    monkeypatch.setattr("sandbox.model.state_machine.RETRY_BACKOFF_SECONDS", 300.0)
    async with components.server() as service:
        await submit_waiting(components, service)
        assert isinstance(owner(service), ServerOwned)
        await start_waiting_task(components, service)
        async with asyncio.timeout(10):
            while not isinstance(owner(service), RunnerOwned):
                await asyncio.sleep(0.005)
        assert owner(service).runner.attempt_id == components.placement.orders[0].attempt_id
        components.placement.launch_error = OSError("no more processes")
        components.placement.kill("task-1")
        async with asyncio.timeout(10):
            while not isinstance(owner(service), NoKnownOwner):
                await asyncio.sleep(0.005)


async def test_no_finisher_starts_while_the_runner_may_be_alive(components):
    pings = []

    async def ping(attempt_id):
        pings.append(attempt_id)
        return False

    components.placement.may_be_responsive = ping
    async with components.server() as service:
        await components.start_running_task(service)
        make_lock_state_unknown(components)
        components.placement.kill("task-1")
        await wait_for_message(service, UNKNOWN_MESSAGE)
        await asyncio.sleep(0.3)
        assert [type(order) for order in components.placement.orders] == [RunAttempt]
        assert pings == []
        restore_lock_state(components)
        await components.wait_for_launch("task-1", 2)
        assert isinstance(components.placement.orders[1], FinishAttempt)
        components.placement.record("task-1", *LOST)
        assert (await service.wait("task-1", 10)).state is TaskState.FAILED


async def test_runner_that_responds_again_continues(components):
    async with components.server() as service:
        await components.start_running_task(service)
        make_lock_state_unknown(components)
        await wait_for_message(service, UNKNOWN_MESSAGE)
        restore_lock_state(components)
        await wait_for_message(service, "The agent is working")
        components.placement.record("task-1", *TO_COMPLETED)
        assert (await service.wait("task-1", 10)).state is TaskState.COMPLETED


async def test_cancel_is_not_recorded_while_the_runner_may_be_alive(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.task_services.CANCEL_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr("sandbox.server.task_services.CANCEL_TIMEOUT_SECONDS_MIN", 0.1)
    async with components.server() as service:
        await components.start_running_task(service)
        make_lock_state_unknown(components)
        components.placement.kill("task-1")
        seq = components.journals.replay("task-1").task.last_seq
        with pytest.raises(UnavailableError, match="The runner of task task-1 is not responding; try again"):
            await service.cancel("task-1", reason="", force=False)
        assert components.journals.replay("task-1").task.last_seq == seq
        restore_lock_state(components)
        cancelled = await service.cancel("task-1", reason="", force=False)
        assert cancelled.message == "The task is being stopped; its results so far are stored."
        await components.wait_for_launch("task-1", 2)
        components.placement.record("task-1", *LOST)


async def test_pending_task_waits_until_its_journal_is_known_to_be_free(components):
    async with components.server() as service:
        await submit_waiting(components, service)
    components.available_memory_bytes = 100 * GIB
    journals = components.journals = UnreachableJournals(components.data_dir)
    async with components.server() as service:
        assert isinstance(owner(service), NoKnownOwner)
        await wait_for_message(service, UNKNOWN_MESSAGE)
        await asyncio.sleep(0.3)
        assert components.placement.orders == []
        journals.is_unknown = False
        await components.wait_for_launch("task-1")


def test_journals_of_unknown_lock_state_cannot_be_opened(tmp_path):
    journals = UnreachableJournals(tmp_path)
    journals.create("task-1").close()
    with pytest.raises(JournalBusyError):
        journals.open("task-1")


async def test_cancel_reaches_a_runner_whose_attempt_is_not_indexed(components):
    """The server was killed before it indexed the attempt. The runner continues."""
    async with components.server() as service:
        await submit_waiting(components, service)
        row = components.store.load("task-1")
        await start_waiting_task(components, service)
        await components.wait_for_state(service, "task-1", TaskState.STAGING)
    components.store.save(row)
    async with components.server() as service:
        await components.wait_for_state(service, "task-1", TaskState.STAGING)
        assert isinstance(owner(service), RunnerOwned)
        await service.cancel("task-1", reason="enough", force=False)
        assert components.placement.recorders["task-1"].task.cancel.reason == "enough"
        components.placement.record("task-1", TaskFinished())


async def test_lock_state_of_a_runner_is_unknown_if_its_placement_is_missing(components, monkeypatch):
    """The journal's lock on this host is free, but the runner may hold the lock on its own host."""
    monkeypatch.setattr("sandbox.server.task_services.CANCEL_TIMEOUT_SECONDS", 0.2)
    components.placement_names, components.identity = ["", "far"], HostIdentity("far:one", "b")
    async with components.server() as service:
        await components.start_running_task(service)
    components.placement.kill("task-1")
    components.placement_names = [""]
    async with components.server() as service:
        await wait_for_message(service, UNKNOWN_MESSAGE)
        with pytest.raises(UnavailableError, match="is not responding"):
            await service.cancel("task-1", reason="", force=True)
        assert owner(service).runner.lock_state() is LockState.UNKNOWN
        assert not await owner(service).runner.kill()
        assert len(components.placement.orders) == 1
    components.placement_names = ["far", ""]
    async with components.server() as service:
        await components.wait_for_launch("task-1", 2)
        assert isinstance(components.placement.orders[-1], FinishAttempt)
        components.placement.record("task-1", *LOST)
        assert (await service.wait("task-1", 10)).failure.code is FailureCode.RUNNER_LOST


async def test_renamed_host_still_has_the_runners_of_its_data_directory(components):
    async with components.server() as service:
        await components.start_running_task(service)
    components.identity = HostIdentity("renamed", "b")
    async with components.server() as service:
        assert owner(service).runner.lock_state() is LockState.HELD
        components.placement.record("task-1", *TO_COMPLETED)
        assert (await service.wait("task-1", 10)).state is TaskState.COMPLETED
