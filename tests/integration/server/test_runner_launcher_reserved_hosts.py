"""A placement with several hosts: a task waits for its host, and a lost host ends the attempt."""

import asyncio

import pytest

from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING
from sandbox.interfaces.images import Image
from sandbox.interfaces.placement import HostIdentity, HostPendingError, Loss, ReservedHost
from sandbox.interfaces.runner import FinishAttempt, RunAttempt
from sandbox.interfaces.task_file_layout import new_attempt_id
from sandbox.model.artifacts import Artifact
from sandbox.model.events import (
    AgentExited,
    ArtifactCollected,
    AttemptStarted,
    AttemptTornDown,
    FollowUp,
    FollowUpSkipped,
)
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.task import METADATA_NAME
from sandbox.model.task_state import TaskState

IMAGE = Image("agentic-dev", "sha256:" + "0" * 64, "/images/0")
LOST_AGENT = AgentExited(None, None, Failure(FailureCode.SANDBOX_LOST, "gone"))
HOST = HostIdentity("cluster:host-1", "boot-1")


class FakeAllocator:
    """Implements `HostAllocator`."""

    def __init__(self):
        self.is_ready, self.failure_code, self.reason = True, None, ""
        self.reserved, self.released = [], []

    async def reserve_host(self, task_id, last_attempt_id, resources, profile):
        await asyncio.sleep(0.01)
        if not self.is_ready:
            raise HostPendingError("All hosts are busy.")
        self.reserved.append((task_id, last_attempt_id, resources, profile))
        return ReservedHost(new_attempt_id(), HOST, "gvisor", lambda _: IMAGE)

    def find_loss(self, location):
        is_lost = self.failure_code is not None and location.host == HOST.name
        return Loss(self.failure_code, self.reason) if is_lost else None

    async def release_host(self, task_id):
        self.released.append(task_id)


@pytest.fixture
def allocator(components):
    components.placement_names = ["", "cluster"]
    components.placement.allocator = FakeAllocator()
    components.secrets = {"TOKEN": "value"}
    return components.placement.allocator


async def wait_until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def wait_for_message(service, message):
    async with asyncio.timeout(10):
        while (await service.status("task-1")).state_message != message:
            await asyncio.sleep(0.005)


def started(components):
    return [one.event for one in components.journals.read("task-1").records if isinstance(one.event, AttemptStarted)]


async def test_attempt_starts_on_its_reserved_host(components, allocator):
    async with components.server() as service:
        await service.submit(manifest())
        await components.wait_for_launch("task-1")
        [(task_id, last_attempt_id, resources, profile)] = allocator.reserved
        assert (task_id, last_attempt_id, resources.cpus) == ("task-1", None, manifest().vm.cpus)
        assert profile == "agentic-dev"
        [event], [order] = started(components), components.placement.orders
        assert (event.host, event.boot_id, event.runtime) == (*HOST, "gvisor")
        assert (order.attempt_id, order.image) == (event.attempt_id, IMAGE)
        components.placement.record("task-1", *TO_RUNNING, *TO_COMPLETED)
        assert (await service.wait("task-1", 10)).state is TaskState.COMPLETED
        await wait_until(lambda: "task-1" in allocator.released)


async def test_task_waits_for_its_host_before_its_secrets_are_read(components, allocator):
    allocator.is_ready = False
    async with components.server() as service:
        await service.submit(manifest(manifest_secrets=["TOKEN"]))
        await wait_for_message(service, "Waiting for a host: All hosts are busy.")
        assert (components.requested_secrets, started(components)) == ([], [])
        allocator.is_ready = True
        await components.wait_for_launch("task-1")
        assert components.placement.orders[0].secrets == {"TOKEN": "value"}


async def test_task_that_waits_for_its_host_can_be_cancelled(components, allocator):
    allocator.is_ready = False
    async with components.server() as service:
        await service.submit(manifest())
        await wait_for_message(service, "Waiting for a host: All hosts are busy.")
        await service.cancel("task-1", reason="", force=False)
        assert (await service.wait("task-1", 10)).state is TaskState.CANCELLED
        await wait_until(lambda: "task-1" in allocator.released)
        await asyncio.sleep(0.1)  # an earlier request for a host ends
        allocator.is_ready = True
        await asyncio.sleep(0.1)
    assert (components.placement.orders, allocator.reserved) == ([], [])


@pytest.mark.parametrize("code", [FailureCode.RUNNER_LOST, FailureCode.HOST_LOST])
async def test_attempt_on_a_lost_host_is_retried_without_a_finisher(components, allocator, code):
    async with components.server() as service:
        await service.submit(manifest(lifecycle={"retries": 1, "resume": True}))
        await components.wait_for_launch("task-1")
        components.placement.record("task-1", *TO_RUNNING)
        allocator.failure_code = code
        components.placement.kill("task-1")
        await wait_until(
            lambda: FollowUpSkipped(FollowUp.RESUME, "The disk of the attempt was lost.") in events(components)
        )
        allocator.failure_code = None
        await components.wait_for_launch("task-1", 2)
        components.placement.record("task-1", *TO_RUNNING, *TO_COMPLETED)
        task = await service.wait("task-1", 10)
    assert [type(order) for order in components.placement.orders] == [RunAttempt] * 2
    assert not components.placement.orders[1].resumes
    assert (task.state, task.past_attempts[0].failure.code) == (TaskState.COMPLETED, code)
    assert allocator.reserved[1][1] == task.past_attempts[0].id


def events(components):
    return [one.event for one in components.journals.read("task-1").records]


OOM_REASON = "The worker was ended by signal 9 on host-1 (OOMKilled)."


@pytest.mark.parametrize(
    ("code", "reason", "cause"),
    [
        (FailureCode.RUNNER_LOST, OOM_REASON, OOM_REASON),
        (FailureCode.RUNNER_LOST, "", "The worker of the task was ended."),
        (FailureCode.HOST_LOST, "Kubernetes has no Job with this name", "Kubernetes has no Job with this name."),
        (FailureCode.HOST_LOST, "", "The task's host is no longer responding."),
    ],
)
async def test_failure_of_a_lost_attempt_contains_the_reason_from_the_engine(
    components, allocator, code, reason, cause
):
    async with components.server() as service:
        await service.submit(manifest())
        await components.wait_for_launch("task-1")
        components.placement.record("task-1", *TO_RUNNING)
        allocator.failure_code, allocator.reason = code, reason
        components.placement.kill("task-1")
        task = await service.wait("task-1", 10)
    assert task.failure.code is code
    assert task.failure.message == f"{cause} The work of the task is lost. Submit the task again."


@pytest.mark.parametrize("code", [FailureCode.RUNNER_LOST, FailureCode.HOST_LOST])
async def test_agent_whose_results_are_lost_after_its_exit_is_retried(components, allocator, code):
    """The state stays `completing`, because a state never moves back. The agent is not resumed: it had finished."""
    async with components.server() as service:
        await service.submit(manifest(lifecycle={"retries": 1, "resume": True}))
        await components.wait_for_launch("task-1")
        components.placement.record("task-1", *TO_RUNNING, AgentExited(0, {}))
        allocator.failure_code = code
        components.placement.kill("task-1")
        await wait_until(lambda: AttemptTornDown() in events(components))
        allocator.failure_code = None
        await components.wait_for_launch("task-1", 2)
        components.placement.record("task-1", *TO_RUNNING)
        async with asyncio.timeout(10):
            while (running := await service.status("task-1")).attempt_state is not TaskState.RUNNING:
                await asyncio.sleep(0.005)
        assert running.state is TaskState.COMPLETING
        components.placement.record("task-1", *TO_COMPLETED)
        task = await service.wait("task-1", 10)
    assert (task.state, task.past_attempts[0].failure.code) == (TaskState.COMPLETED, code)
    assert not components.placement.orders[1].resumes
    assert not any(isinstance(event, FollowUpSkipped) for event in events(components))


@pytest.mark.parametrize("retries", [0, 1])
async def test_collected_results_of_a_lost_host_are_kept(components, allocator, retries):
    collected = ArtifactCollected(Artifact(METADATA_NAME, METADATA_NAME, 1, "application/json", "sha256:0"))
    async with components.server() as service:
        await service.submit(manifest(lifecycle={"retries": retries}))
        await components.wait_for_launch("task-1")
        components.placement.record("task-1", *TO_RUNNING, AgentExited(0, {}), collected)
        allocator.failure_code = FailureCode.HOST_LOST
        components.placement.kill("task-1")
        task = await service.wait("task-1", 10)
    assert (task.state, len(components.placement.orders)) == (TaskState.COMPLETED, 1)


@pytest.mark.parametrize("agent_has_exited", [False, True])
async def test_task_on_a_lost_host_fails_without_retries(components, allocator, agent_has_exited):
    async with components.server() as service:
        await service.submit(manifest())
        await components.wait_for_launch("task-1")
        components.placement.record("task-1", *TO_RUNNING, *([AgentExited(0, {})] if agent_has_exited else []))
        allocator.failure_code = FailureCode.HOST_LOST
        components.placement.kill("task-1")
        task = await service.wait("task-1", 10)
        await wait_until(lambda: "task-1" in allocator.released)
    assert (task.state, task.failure.code) == (TaskState.FAILED, FailureCode.HOST_LOST)
    assert len(components.placement.orders) == 1


async def test_runner_that_dies_on_a_host_that_is_not_lost_gets_a_finisher(components, allocator):
    async with components.server() as service:
        await service.submit(manifest())
        await components.wait_for_launch("task-1")
        components.placement.record("task-1", *TO_RUNNING)
        components.placement.kill("task-1")
        await components.wait_for_launch("task-1", 2)
    assert isinstance(components.placement.orders[1], FinishAttempt)


async def test_attempt_that_would_take_over_a_lost_disk_ends_the_task(components, allocator):
    """The host is lost after its attempt ended, and before the attempt that resumes the agent starts."""
    async with components.server() as service:
        await service.submit(manifest(lifecycle={"resume": True}))
        await components.wait_for_launch("task-1")
        allocator.is_ready = False
        components.placement.record("task-1", *TO_RUNNING, LOST_AGENT, AttemptTornDown())
        components.placement.kill("task-1")
        await wait_for_message(service, "Waiting for a host: All hosts are busy.")
        allocator.failure_code = FailureCode.HOST_LOST
        task = await service.wait("task-1", 10)
    assert (task.state, task.failure.code) == (TaskState.FAILED, FailureCode.HOST_LOST)
    assert len(components.placement.orders) == 1


async def test_follow_up_waits_for_its_host(components, allocator):
    async with components.server() as service:
        await service.submit(manifest(lifecycle={"retries": 1}))
        await components.wait_for_launch("task-1")
        components.placement.record("task-1", *TO_RUNNING)
        allocator.is_ready, allocator.failure_code = False, FailureCode.RUNNER_LOST
        components.placement.kill("task-1")
        await wait_for_message(service, "Waiting for a host: All hosts are busy.")
        await service.cancel("task-1", reason="", force=False)
        assert (await service.wait("task-1", 10)).state is TaskState.CANCELLED
    assert len(components.placement.orders) == 1
