"""The runtime is probed again only after a task whose sandbox could not be created."""

import asyncio

import pytest

from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING
from sandbox.model.events import AgentExited, AttemptFailed, TaskFinished
from sandbox.model.failure import Failure, FailureCode


async def count_probe_requests(components, monkeypatch, *events):
    """Run a task with these events; return how many probes were requested from the host."""
    requests = []
    async with components.server() as service:
        monkeypatch.setattr(service.host, "request_probe", lambda: requests.append(1))
        await service.submit(manifest())
        await components.wait_for_launch("task-1")
        components.placement.record("task-1", *events, TaskFinished())
        await service.wait("task-1", 10)
        async with asyncio.timeout(10):
            while "task-1" in service.tracked_tasks:
                await asyncio.sleep(0.01)
    return len(requests)


@pytest.mark.parametrize("code", [FailureCode.PROVISION_FAILED, FailureCode.PROVISION_TIMEOUT])
async def test_failed_provisioning_causes_a_probe(components, monkeypatch, code):
    failed = AttemptFailed(Failure(code, "The sandbox could not be created."))
    assert await count_probe_requests(components, monkeypatch, *TO_RUNNING[:1], failed) == 1


async def test_other_task_outcomes_cause_no_probe(components, monkeypatch):
    failed = AttemptFailed(Failure(FailureCode.CLONE_FAILED, "The repository does not exist."))
    assert await count_probe_requests(components, monkeypatch, failed) == 0


async def test_completed_task_causes_no_probe(components, monkeypatch):
    assert await count_probe_requests(components, monkeypatch, *TO_RUNNING, AgentExited(0, {"is_error": False})) == 0
