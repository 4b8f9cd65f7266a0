"""A task is launched with the current image of its profile, or fails."""

import asyncio

import pytest

from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING, ServerComponents
from sandbox.interfaces.images import Image
from sandbox.interfaces.placement import FinishAttempt
from sandbox.model.task_state import TaskState
from sandbox.store.sqlite import SqliteStore

IMAGE = Image("my-tools", "sha256:" + "0" * 64, "/data/profiles/my-tools/0/root")


@pytest.fixture
def components(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.LOSS_CHECK_INTERVAL_SECONDS", 0.1)
    instance = ServerComponents(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    instance.profile_images = {"my-tools": IMAGE}
    yield instance
    for task_id in list(instance.placement.recorders):
        instance.placement.kill(task_id)


def run_task(components, *steps, profile="my-tools"):
    """Submit a task with the profile, call each step with the service, and return the task's status."""

    async def run():
        async with components.server() as service:
            await service.submit(manifest(vm={"profile": profile}))
            for step in steps:
                await step(service)
            return await service.status("task-1")

    return asyncio.run(run())


def test_runner_order_contains_the_image(components):
    run_task(components, lambda _: components.wait_for_launch("task-1"))
    assert [order.image for order in components.placement.orders] == [IMAGE]


def test_runner_order_for_a_profile_without_an_image_has_no_image(components):
    run_task(components, lambda _: components.wait_for_launch("task-1"), profile="basic")
    assert [order.image for order in components.placement.orders] == [None]


def test_finisher_order_has_no_image(components):
    async def kill_runner(_):
        await components.wait_for_launch("task-1")
        components.placement.record("task-1", *TO_RUNNING[:1])
        components.image_error = "The image is gone."
        components.placement.kill("task-1")

    run_task(components, kill_runner, lambda _: components.wait_for_launch("task-1", 2))
    first, finisher = components.placement.orders
    assert (first.image, type(finisher)) == (IMAGE, FinishAttempt)


def test_unusable_image_fails_the_task_with_a_remedy(components):
    components.image_error = "The image of the profile my-tools is damaged; build it again."
    failed = run_task(components, lambda service: service.wait("task-1", 10))
    assert (failed.state, failed.failure.code) == (TaskState.FAILED, "provision_failed")
    assert failed.failure.message == components.image_error
    assert components.placement.orders == []
