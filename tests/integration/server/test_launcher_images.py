"""A task is launched in what its profile stands for at that moment, or not at all."""

import asyncio

import pytest

from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING, Rooms
from sandbox.interfaces.images import Image
from sandbox.model.task_state import TaskState
from sandbox.store.sqlite import SqliteStore

IMAGE = Image("my-tools", "sha256:" + "0" * 64, "/data/profiles/my-tools/0/root")


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.LOSS_CHECK_SECONDS", 0.1)
    made = Rooms(tmp_path, SqliteStore(tmp_path / "index.sqlite"))
    made.images = {"my-tools": IMAGE}
    yield made
    for task_id in list(made.runners.recorders):
        made.runners.die(task_id)


def play(world, *steps, profile="my-tools"):
    """Submit a task of this profile, then take the steps with the server."""

    async def run():
        async with world.server() as service:
            await service.submit(manifest(vm={"profile": profile}))
            for step in steps:
                await step(service)
            return await service.status("task-1")

    return asyncio.run(run())


def test_the_runner_is_told_the_image(world):
    play(world, lambda _: world.launched("task-1"))
    assert [order.image for order in world.runners.orders] == [IMAGE]


def test_without_an_image_the_runner_is_told_none(world):
    play(world, lambda _: world.launched("task-1"), profile="basic")
    assert [order.image for order in world.runners.orders] == [None]


def test_a_finisher_needs_no_image(world):
    async def die(_):
        await world.launched("task-1")
        world.runners.play("task-1", *TO_RUNNING[:1])
        world.image_trouble = "The image is gone."
        world.runners.die("task-1")

    play(world, die, lambda _: world.launched("task-1", 2))
    assert [(order.finish, order.image) for order in world.runners.orders] == [(False, IMAGE), (True, None)]


def test_a_task_whose_image_cannot_be_used_fails_and_says_what_to_do(world):
    world.image_trouble = "The image of the profile my-tools is damaged; build it again."
    failed = play(world, lambda service: service.wait("task-1", 10))
    assert (failed.state, failed.failure.code) == (TaskState.FAILED, "provision_failed")
    assert failed.failure.message == world.image_trouble
    assert world.runners.orders == []
