"""The server begins the attempt that follows another: after its pause, and unless somebody is against it."""

import asyncio
from dataclasses import replace

import pytest

from doubles.manifests import manifest
from doubles.server_components import TO_END, TO_RUNNING
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import AgentExited, AttemptEnded, AttemptFailed, TaskFinished
from sandbox.model.task_state import TaskState

FAILED = AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "it failed"))
LOST = AgentExited(None, None, Failure(FailureCode.RUNNER_LOST, "gone"))


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr("sandbox.model.retry.RETRY_BACKOFF_SECONDS", 0.0)


@pytest.fixture
def long_pause(monkeypatch):
    monkeypatch.setattr("sandbox.model.retry.RETRY_BACKOFF_SECONDS", 300.0)


def one_attempt(world, end):
    """Play the runner of the attempt that was launched last, to where another one may follow."""
    world.runners.play("task-1", *TO_RUNNING, end, AttemptEnded())
    world.runners.die("task-1")


def orders(world):
    return [(order.finish, order.resumes) for order in world.runners.orders]


def test_a_retry_is_launched_like_the_first_attempt_with_an_id_of_its_own(world, no_pause):
    async def play():
        async with world.server() as service:
            await service.submit(manifest(lifecycle={"retries": 1}))
            await world.launched("task-1")
            one_attempt(world, FAILED)
            await world.launched("task-1", 2)
            world.runners.play("task-1", *TO_RUNNING, *TO_END)
            return await service.wait("task-1", 10)

    task = asyncio.run(play())
    assert (task.state, task.attempts) == (TaskState.COMPLETED, 2)
    assert orders(world) == [(False, False), (False, False)]
    assert len({order.attempt_id for order in world.runners.orders}) == 2


def test_an_attempt_that_resumes_is_told_so_and_so_is_its_finisher(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest(lifecycle={"resume": True}))
            await world.launched("task-1")
            one_attempt(world, LOST)
            await world.launched("task-1", 2)
            world.runners.die("task-1")
            await world.launched("task-1", 3)

    asyncio.run(play())
    assert orders(world) == [(False, False), (False, True), (True, True)]


def test_a_pause_is_kept_also_by_the_next_server(world, long_pause):
    async def before():
        async with world.server() as service:
            await service.submit(manifest(lifecycle={"retries": 1}))
            await world.launched("task-1")
            one_attempt(world, FAILED)
            await asyncio.sleep(0.3)

    async def after():
        async with world.server() as service:
            await asyncio.sleep(0.3)
            return await service.status("task-1")

    asyncio.run(before())
    task = asyncio.run(after())
    assert task.state_message == "Attempt 1 ended with agent_failed; another one follows in 300 s"
    assert orders(world) == [(False, False)]


def test_a_wish_to_cancel_in_the_pause_ends_the_task_by_a_finisher(world, long_pause):
    async def play():
        async with world.server() as service:
            await service.submit(manifest(lifecycle={"retries": 1}))
            await world.launched("task-1")
            one_attempt(world, FAILED)
            await service.cancel("task-1", reason="enough", force=False)
            await world.launched("task-1", 2)
            world.runners.play("task-1", TaskFinished())
            return await service.wait("task-1", 10)

    task = asyncio.run(play())
    assert (task.state, task.state_message) == (TaskState.CANCELLED, "Cancelled: enough")
    assert orders(world) == [(False, False), (True, False)]


@pytest.mark.parametrize("pause_seconds", [0.0, 300.0])
def test_a_wish_to_cancel_between_attempts_waits_for_no_vault(world, monkeypatch, pause_seconds):
    monkeypatch.setattr("sandbox.model.retry.RETRY_BACKOFF_SECONDS", pause_seconds)
    vault = world.resolve

    async def play():
        asked, answers = asyncio.Event(), asyncio.Event()

        async def slow_vault(secrets):
            if world.runners.orders:
                asked.set()
                await answers.wait()
            return await vault(secrets)

        world.resolve = slow_vault
        async with world.server() as service:
            await service.submit(manifest(lifecycle={"retries": 1}))
            await world.launched("task-1")
            one_attempt(world, FAILED)
            async with asyncio.timeout(8):
                if not pause_seconds:
                    await asked.wait()
                await service.cancel("task-1", reason="enough", force=False)
            answers.set()
            await world.launched("task-1", 2)
            world.runners.play("task-1", TaskFinished())
            return await service.wait("task-1", 10)

    task = asyncio.run(play())
    assert (task.state, task.state_message) == (TaskState.CANCELLED, "Cancelled: enough")
    assert orders(world) == [(False, False), (True, False)]


def test_secrets_that_are_gone_meanwhile_end_the_task_with_that_reason(world, no_pause):
    async def play():
        world.secrets = {"TOKEN": "value-of-the-token"}
        async with world.server() as service:
            await service.submit(manifest(lifecycle={"retries": 1}, manifest_secrets=("TOKEN",)))
            await world.launched("task-1")
            world.secrets = {}
            one_attempt(world, FAILED)
            await world.launched("task-1", 2)
            world.runners.play("task-1", TaskFinished())
            return await service.wait("task-1", 10)

    task = asyncio.run(play())
    assert (task.state, task.failure.code) == (TaskState.FAILED, "secret_unavailable")
    assert task.past_attempts == ()
    assert task.attempt.failure.code == "agent_failed"


def test_a_server_that_ends_the_books_itself_begins_no_other_attempt(world, monkeypatch):
    monkeypatch.setattr("sandbox.server.launcher.FINISHERS_MAX", 1)
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)

    async def play():
        async with world.server() as service:
            await service.submit(manifest(lifecycle={"retries": 5, "resume": True}))
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING)
            world.runners.die("task-1")
            await world.launched("task-1", 2)
            world.runners.die("task-1")
            return await service.wait("task-1", 10)

    task = asyncio.run(play())
    assert (task.state, task.failure.code) == (TaskState.FAILED, "runner_lost")
    assert orders(world) == [(False, False), (True, False)]


def test_no_attempt_follows_while_no_runtime_works_and_the_task_says_so(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", AttemptFailed(Failure(FailureCode.RUNNER_LOST, "gone")), AttemptEnded())
            world.runners.die("task-1")
        world.runtime_failure = "The runtime does not work here."
        async with world.server() as service:
            async with asyncio.timeout(10):
                while not (told := (await service.status("task-1")).state_message).startswith("Waiting:"):
                    await asyncio.sleep(0.01)
            assert "The runtime does not work here." in told
            assert len(world.runners.orders) == 1
            works = service.dependencies.prober.result
            service.dependencies.prober.result = replace(works, failure=None)
            await world.launched("task-1", 2)
            world.runners.play("task-1", *TO_RUNNING, *TO_END)
            return await service.wait("task-1", 10)

    assert asyncio.run(play()).state is TaskState.COMPLETED


def test_a_task_between_attempts_is_cancelled_while_no_runtime_works(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", AttemptFailed(Failure(FailureCode.RUNNER_LOST, "gone")), AttemptEnded())
            world.runners.die("task-1")
        world.runtime_failure = "The runtime does not work here."
        async with world.server() as service:
            await service.cancel("task-1", reason="", force=False)
            await world.launched("task-1", 2)
            world.runners.play("task-1", TaskFinished())
            return await service.wait("task-1", 10)

    assert asyncio.run(play()).state is TaskState.CANCELLED
    assert orders(world)[1] == (True, False)
