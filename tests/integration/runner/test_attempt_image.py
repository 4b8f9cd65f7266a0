"""A runner holds its image before it makes a sandbox of it, and writes down which one it was."""

import asyncio

import msgspec
import pytest

from doubles.attempt_dependencies import Script
from sandbox.interfaces.images import Image
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.events import SandboxCreated
from sandbox.runner.attempt import AttemptRunner

IMAGE = Image("my-tools", "sha256:" + "0" * 64, "/data/profiles/my-tools/0/root")


@pytest.fixture
def carried(stage):
    """An attempt in this image, carried to its end."""

    def carry(image, hold=None):
        scene = stage(Script())
        if hold is not None:
            scene.attempt.dependencies.images.acquire = hold
        asyncio.run(AttemptRunner(msgspec.structs.replace(scene.attempt, image=image)).run())
        return scene

    return carry


def test_the_image_is_held_before_the_sandbox_is_made_and_told(carried):
    scene = carried(IMAGE)
    assert scene.script.seen[:2] == [f"hold {IMAGE.name}", "create"]
    assert [event.image for event in scene.events(SandboxCreated)] == [f"my-tools@{IMAGE.digest}"]


def test_without_an_image_it_is_the_hosts_own(carried):
    scene = carried(None)
    assert scene.script.seen[0] == "create"
    assert [event.image for event in scene.events(SandboxCreated)] == ["host"]


def test_an_image_that_is_gone_makes_no_sandbox(carried):
    def refuse(image):
        raise AttemptError(FailureCode.PROVISION_FAILED, f"{image.profile} is gone; build it again.")

    scene = carried(IMAGE, refuse)
    assert (scene.states[-1], scene.task.failure.message) == ("failed", "my-tools is gone; build it again.")
    assert "create" not in scene.script.seen
