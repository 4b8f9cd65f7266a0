"""A runner acquires its image before it creates the sandbox, and records the image."""

import asyncio

import msgspec
import pytest

from doubles.attempt_harness import AttemptScript
from sandbox.interfaces.images import Image
from sandbox.model.events import SandboxCreated
from sandbox.model.failure import AttemptError, FailureCode

IMAGE = Image("my-tools", "sha256:" + "0" * 64, "/data/profiles/my-tools/0/root")


@pytest.fixture
def run_in_image(make_harness):
    """Run an attempt with the given image until it ends."""

    def run(image, acquire=None):
        harness = make_harness(AttemptScript())
        if acquire is not None:
            harness.parts.image_locks.acquire = acquire
        asyncio.run(harness.run(msgspec.structs.replace(harness.attempt, image=image)))
        return harness

    return run


def test_image_is_acquired_and_recorded_before_the_sandbox_is_created(run_in_image):
    harness = run_in_image(IMAGE)
    assert harness.script.recorded_calls[:2] == [f"hold {IMAGE.name}", "create"]
    assert [event.image for event in harness.events(SandboxCreated)] == [f"my-tools@{IMAGE.digest}"]


def test_attempt_without_an_image_uses_the_root_directory_of_the_host(run_in_image):
    harness = run_in_image(None)
    assert harness.script.recorded_calls[0] == "create"
    assert [event.image for event in harness.events(SandboxCreated)] == ["host"]


def test_missing_image_prevents_the_creation_of_the_sandbox(run_in_image):
    def refuse(image):
        raise AttemptError(FailureCode.PROVISION_FAILED, f"{image.profile} is gone; build it again.")

    harness = run_in_image(IMAGE, refuse)
    assert (harness.states[-1], harness.task.failure.message) == ("failed", "my-tools is gone; build it again.")
    assert "create" not in harness.script.recorded_calls
