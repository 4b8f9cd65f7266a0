"""If a server does not have the agent of a task, the task ends without another attempt, and its work is collected.

A task whose agent has no model key waits for a server with the key. New tasks for this agent are rejected.
"""

import asyncio

import pytest

from doubles.manifests import manifest
from doubles.server_components import GIB, TO_RUNNING
from sandbox.interfaces.runner import FinishAttempt
from sandbox.interfaces.server_services import UnavailableError
from sandbox.interfaces.store import TaskQuery
from sandbox.model.events import AgentExited, AttemptTornDown, FollowUp, FollowUpSkipped, Output, TaskFinished
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import AgentSection
from sandbox.model.resources import DiskSpace
from sandbox.model.task_state import TaskState

OTHER = AgentSection("other", {"prompt": "Do it.", "model": "m", "effort": "high"})
FAILED = AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "it failed"))
MISSING = Failure(
    FailureCode.AGENT_NOT_OFFERED,
    "This server does not have the agent other, only claude; submit the task to a server that has other, or choose "
    "another agent.",
)


def task_of_other_agent(**sections):
    return manifest(**sections).replace(agent=OTHER)


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch):
    monkeypatch.setattr("sandbox.model.state_machine.RETRY_BACKOFF_SECONDS", 0.0)


async def test_pending_task_whose_agent_is_missing_fails_and_starts_no_runner(components):
    async with components.server() as service:
        await service.submit(task_of_other_agent())
        task = await service.wait("task-1", 10)
        (listed,) = (await service.query(TaskQuery())).tasks
    assert (task.state, task.failure, task.manifest.agent.kind) == (TaskState.FAILED, MISSING, "other")
    assert (listed.id, listed.state) == ("task-1", TaskState.FAILED)
    assert components.placement.orders == []
    components.journals.open("task-1").close()


async def start_on_a_server_with_the_agent(components, *events):
    """Start a task for the other agent. The runner records these events and dies, and then the server stops."""
    components.agent_kinds = ["claude", "other"]
    async with components.server() as service:
        await service.submit(task_of_other_agent(lifecycle={"retries": 1}))
        await components.wait_for_launch("task-1")
    components.placement.record("task-1", *TO_RUNNING, Output("stdout", "from the agent\n"), *events)
    components.placement.kill("task-1")


async def finish_on_a_server_without_the_agent(components, *events):
    """Let the task's finisher record these events. Return the task and the types of all its events."""
    components.agent_kinds = ["claude"]
    async with components.server() as service:
        await components.wait_for_launch("task-1", 2)
        components.placement.record("task-1", *events)
        task = await service.wait("task-1", 10)
        types = [event["type"] async for event in service.recorded_events("task-1")]
    assert isinstance(components.placement.orders[-1], FinishAttempt)
    assert task.manifest.agent == OTHER
    return task, types


async def test_dead_runner_is_followed_by_a_finisher_that_collects_its_work(components):
    await start_on_a_server_with_the_agent(components)
    lost = Failure(FailureCode.RUNNER_LOST, "lost")
    ended = (AgentExited(None, None, lost), FollowUpSkipped(FollowUp.RETRY, "no agent"), TaskFinished())
    task, types = await finish_on_a_server_without_the_agent(components, *ended)
    assert (task.state, task.failure, task.attempt_count) == (TaskState.FAILED, lost, 1)
    assert "output" in types


async def test_task_that_waits_for_another_attempt_fails_and_a_finisher_collects_its_work(components):
    await start_on_a_server_with_the_agent(components, FAILED, AttemptTornDown())
    task, types = await finish_on_a_server_without_the_agent(components, TaskFinished())
    assert (task.state, task.failure, task.attempt_count) == (TaskState.FAILED, MISSING, 1)
    assert "output" in types


async def test_only_tasks_whose_agent_has_a_model_key_are_accepted(components):
    components.agent_kinds, components.kinds_without_key = ["claude", "other"], {"other"}
    async with components.server() as service:
        assert (await service.health()).is_ready
        for refuse in (service.submit, service.check_acceptance):
            with pytest.raises(UnavailableError, match="No model key is set: set OTHER_KEY and restart the server"):
                await refuse(task_of_other_agent())
        await service.check_acceptance(manifest())
        await service.submit(manifest())
        await components.wait_for_launch("task-1")
    assert components.journals.task_ids() == ["task-1"]


async def test_waiting_task_without_a_model_key_gets_no_runner_and_delays_no_other_task(components):
    # Enough space to accept tasks, but not to start them.
    ample_space, components.space = components.space, DiskSpace(GIB, 1000 * GIB)
    components.agent_kinds = ["claude", "other"]
    async with components.server() as service:
        await service.submit(task_of_other_agent())
        await service.submit(manifest("task-2"))
    components.space, components.kinds_without_key = ample_space, {"other"}
    async with components.server() as service:
        await components.wait_for_launch("task-2")
        await asyncio.sleep(0.05)
        waiting = await service.status("task-1")
        assert (waiting.state, waiting.failure) == (TaskState.PENDING, None)
        assert waiting.state_message == "Waiting: No model key is set: set OTHER_KEY and restart the server."
        assert [order.task_id for order in components.placement.orders] == ["task-2"]
    components.kinds_without_key = set()
    async with components.server():
        await components.wait_for_launch("task-1")


async def test_next_attempt_without_a_model_key_waits_for_a_server_that_has_one(components):
    await start_on_a_server_with_the_agent(components, FAILED, AttemptTornDown())
    components.kinds_without_key = {"other"}
    async with components.server() as service:
        async with asyncio.timeout(10):
            while "model key" not in (waiting := await service.status("task-1")).state_message:
                await asyncio.sleep(0.01)
        assert waiting.state_message == "Waiting: No model key is set: set OTHER_KEY and restart the server."
        assert (waiting.state.is_final, len(components.placement.orders)) == (False, 1)
    components.kinds_without_key = set()
    async with components.server():
        await components.wait_for_launch("task-1", 2)
    assert components.placement.orders[-1].upstream is not None
