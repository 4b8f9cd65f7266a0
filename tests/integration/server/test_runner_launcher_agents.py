"""A task whose agent the server does not have ends without a new runner; it stays readable."""

import pytest

from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING
from sandbox.interfaces.store import TaskQuery
from sandbox.model.events import AgentExited, AttemptEnded, Output
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import AgentSection
from sandbox.model.task_state import TaskState

OTHER = AgentSection("other", {"prompt": "Do it.", "model": "m", "effort": "high"})
FAILED = AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "it failed"))
MISSING = Failure(
    FailureCode.AGENT_NOT_OFFERED,
    "This server does not have the agent other, only claude; submit the task to a server that has it, or with another "
    "agent.",
)


def task_of_other_agent(**parts):
    return manifest(**parts).replace(agent=OTHER)


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch):
    monkeypatch.setattr("sandbox.model.retry.RETRY_BACKOFF_SECONDS", 0.0)


async def end_on_a_server_without_the_agent(components):
    """Return the task at its end, and the types of its events."""
    components.agent_kinds = ["claude"]
    async with components.server() as service:
        task = await service.wait("task-1", 10)
        (listed,) = (await service.query(TaskQuery())).tasks
        assert (listed.id, listed.manifest.agent.kind) == ("task-1", "other")
        types = [event["type"] async for event in service.replay("task-1")]
    assert task.manifest.agent == OTHER
    components.journals.open("task-1").close()
    return task, types


async def test_waiting_task_fails_without_a_runner(components):
    async with components.server() as service:
        await service.submit(task_of_other_agent())
        task = await service.wait("task-1", 10)
    assert (task.state, task.failure) == (TaskState.FAILED, MISSING)
    assert components.runners.orders == []
    assert (await end_on_a_server_without_the_agent(components))[0] == task


@pytest.mark.parametrize("events", [(FAILED, AttemptEnded()), ()], ids=["retry", "finisher"])
async def test_started_task_ends_without_another_runner(components, events):
    components.agent_kinds = ["claude", "other"]
    async with components.server() as service:
        await service.submit(task_of_other_agent(lifecycle={"retries": 1}))
        await components.wait_for_launch("task-1")
    components.runners.record("task-1", *TO_RUNNING, Output("stdout", "from the agent\n"), *events)
    components.runners.kill("task-1")
    task, types = await end_on_a_server_without_the_agent(components)
    assert (task.state, task.failure, task.attempt_count) == (TaskState.FAILED, MISSING, 1)
    assert len(components.runners.orders) == 1
    assert "output" in types
