"""The server launches the next attempt after the retry backoff, unless the task was cancelled."""

import asyncio

import pytest
from msgspec import structs

from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING
from sandbox.interfaces.runner import FinishAttempt, RunAttempt
from sandbox.model.events import AgentExited, AttemptFailed, AttemptTornDown, TaskFinished
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.task_state import TaskState

FAILED = AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "it failed"))
LOST = AgentExited(None, None, Failure(FailureCode.RUNNER_LOST, "gone"))


@pytest.fixture
def no_backoff(monkeypatch):
    monkeypatch.setattr("sandbox.model.state_machine.RETRY_BACKOFF_SECONDS", 0.0)


@pytest.fixture
def long_backoff(monkeypatch):
    monkeypatch.setattr("sandbox.model.state_machine.RETRY_BACKOFF_SECONDS", 300.0)


def end_attempt(components, end):
    """Record an attempt that ends and may be retried, then end its runner."""
    components.placement.record("task-1", *TO_RUNNING, end, AttemptTornDown())
    components.placement.kill("task-1")


def orders(components):
    return [
        (isinstance(order, FinishAttempt), isinstance(order, RunAttempt) and order.resumes)
        for order in components.placement.orders
    ]


async def test_retry_is_launched_with_a_new_attempt_id(components, no_backoff):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest(lifecycle={"retries": 1}))
            await components.wait_for_launch("task-1")
            end_attempt(components, FAILED)
            await components.wait_for_launch("task-1", 2)
            components.placement.record("task-1", *TO_RUNNING, *TO_COMPLETED)
            return await service.wait("task-1", 10)

    task = await scenario()
    assert (task.state, task.attempt_count) == (TaskState.COMPLETED, 2)
    assert orders(components) == [(False, False), (False, False)]
    assert len({order.attempt_id for order in components.placement.orders}) == 2


async def test_resuming_attempt_has_the_resume_flag(components):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest(lifecycle={"resume": True}))
            await components.wait_for_launch("task-1")
            end_attempt(components, LOST)
            await components.wait_for_launch("task-1", 2)
            components.placement.kill("task-1")
            await components.wait_for_launch("task-1", 3)

    await scenario()
    assert orders(components) == [(False, False), (False, True), (True, False)]


def test_backoff_survives_a_server_restart(components, long_backoff):
    async def before():
        async with components.server() as service:
            await service.submit(manifest(lifecycle={"retries": 1}))
            await components.wait_for_launch("task-1")
            end_attempt(components, FAILED)
            await asyncio.sleep(0.3)

    async def after():
        async with components.server() as service:
            await asyncio.sleep(0.3)
            return await service.status("task-1")

    asyncio.run(before())
    task = asyncio.run(after())
    assert task.state_message == "Attempt 1 ended with agent_failed; another attempt follows in 300 s"
    assert orders(components) == [(False, False)]


async def test_cancel_during_backoff_launches_a_finisher(components, long_backoff):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest(lifecycle={"retries": 1}))
            await components.wait_for_launch("task-1")
            end_attempt(components, FAILED)
            await service.cancel("task-1", reason="enough", force=False)
            await components.wait_for_launch("task-1", 2)
            components.placement.record("task-1", TaskFinished())
            return await service.wait("task-1", 10)

    task = await scenario()
    assert (task.state, task.state_message) == (TaskState.CANCELLED, "Cancelled: enough")
    assert orders(components) == [(False, False), (True, False)]


@pytest.mark.parametrize("backoff_seconds", [0.0, 300.0])
async def test_cancel_between_attempts_does_not_wait_for_secrets(components, monkeypatch, backoff_seconds):
    monkeypatch.setattr("sandbox.model.state_machine.RETRY_BACKOFF_SECONDS", backoff_seconds)
    vault = components.resolve

    async def scenario():
        is_requested, may_respond = asyncio.Event(), asyncio.Event()

        async def slow_vault(secrets):
            if components.placement.orders:
                is_requested.set()
                await may_respond.wait()
            return await vault(secrets)

        components.resolve = slow_vault
        async with components.server() as service:
            await service.submit(manifest(lifecycle={"retries": 1}))
            await components.wait_for_launch("task-1")
            end_attempt(components, FAILED)
            async with asyncio.timeout(8):
                if not backoff_seconds:
                    await is_requested.wait()
                await service.cancel("task-1", reason="enough", force=False)
            may_respond.set()
            await components.wait_for_launch("task-1", 2)
            components.placement.record("task-1", TaskFinished())
            return await service.wait("task-1", 10)

    task = await scenario()
    assert (task.state, task.state_message) == (TaskState.CANCELLED, "Cancelled: enough")
    assert orders(components) == [(False, False), (True, False)]


async def test_retry_with_missing_secrets_fails_the_task(components, no_backoff):
    async def scenario():
        components.secrets = {"TOKEN": "value-of-the-token"}
        async with components.server() as service:
            await service.submit(manifest(lifecycle={"retries": 1}, manifest_secrets=("TOKEN",)))
            await components.wait_for_launch("task-1")
            components.secrets = {}
            end_attempt(components, FAILED)
            await components.wait_for_launch("task-1", 2)
            components.placement.record("task-1", TaskFinished())
            return await service.wait("task-1", 10)

    task = await scenario()
    assert (task.state, task.failure.code) == (TaskState.FAILED, "secret_unavailable")
    assert task.past_attempts == ()
    assert task.attempt.failure.code == "agent_failed"


async def test_task_finalized_by_the_server_is_not_retried(components, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHERS_MAX", 1)
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest(lifecycle={"retries": 5, "resume": True}))
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING)
            components.placement.kill("task-1")
            await components.wait_for_launch("task-1", 2)
            components.placement.kill("task-1")
            return await service.wait("task-1", 10)

    task = await scenario()
    assert (task.state, task.failure.code) == (TaskState.FAILED, "runner_lost")
    assert orders(components) == [(False, False), (True, False)]


async def test_next_attempt_waits_for_a_working_runtime(components):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record(
                "task-1", AttemptFailed(Failure(FailureCode.RUNNER_LOST, "gone")), AttemptTornDown()
            )
            components.placement.kill("task-1")
        components.runtime_failure = "The runtime does not work here."
        async with components.server() as service:
            async with asyncio.timeout(10):
                while not (message := (await service.status("task-1")).state_message).startswith("Waiting:"):
                    await asyncio.sleep(0.01)
            assert "The runtime does not work here." in message
            assert len(components.placement.orders) == 1
            probe_result = service.host.result
            service.host.result = structs.replace(probe_result, failure=None)
            await components.wait_for_launch("task-1", 2)
            components.placement.record("task-1", *TO_RUNNING, *TO_COMPLETED)
            return await service.wait("task-1", 10)

    assert (await scenario()).state is TaskState.COMPLETED


async def test_cancel_between_attempts_works_without_a_runtime(components):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record(
                "task-1", AttemptFailed(Failure(FailureCode.RUNNER_LOST, "gone")), AttemptTornDown()
            )
            components.placement.kill("task-1")
        components.runtime_failure = "The runtime does not work here."
        async with components.server() as service:
            await service.cancel("task-1", reason="", force=False)
            await components.wait_for_launch("task-1", 2)
            components.placement.record("task-1", TaskFinished())
            return await service.wait("task-1", 10)

    assert (await scenario()).state is TaskState.CANCELLED
    assert orders(components)[1] == (True, False)
