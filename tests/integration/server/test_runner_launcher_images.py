"""A task is launched with the current image of its profile, or fails."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING, ServerComponents
from sandbox.interfaces.images import Image
from sandbox.interfaces.runner import FinishAttempt
from sandbox.model.task_state import TaskState
from sandbox.store.sqlite import SqliteStore

IMAGE = Image("my-tools", "sha256:" + "0" * 64, "/data/profiles/my-tools/0/root")


@pytest.fixture
def components(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 0.1)
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


async def test_host_that_finds_an_image_slowly_uses_no_shared_thread(components, monkeypatch):
    is_asked, go_on = threading.Event(), threading.Event()

    def find_image(*_):
        is_asked.set()
        assert go_on.wait(20)
        return IMAGE

    async with components.server() as service:
        monkeypatch.setattr(components, "find_image", find_image)
        await service.submit(manifest(vm={"profile": "my-tools"}))
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        try:
            async with asyncio.timeout(20):
                while not is_asked.is_set():
                    await asyncio.sleep(0.01)
                assert await asyncio.to_thread(lambda: "free") == "free"
        finally:
            go_on.set()
        await components.wait_for_launch("task-1")
    assert [order.image for order in components.placement.orders] == [IMAGE]
