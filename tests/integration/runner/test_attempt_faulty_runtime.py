"""An attempt whose runtime does not do what it says: it ends with the right code, and is not waited for for ever."""

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from doubles.attempt_dependencies import Script, Stage
from doubles.faulty_runtime import Lies, LyingRuntime
from sandbox.agents.claude_code.driver import ClaudeCodeDriver
from sandbox.interfaces.placement import CancelOrder
from sandbox.interfaces.runtime import Runtime
from sandbox.model.events import ErrorReported
from sandbox.model.task_state import TaskState
from sandbox.runner.attempt import AttemptRunner

PATIENCE_SECONDS = 20


@pytest.fixture
def play(tmp_path):
    """Carries an attempt out in a runtime with these lies; gives what became of it."""
    stages = []

    def play(lies, *, cancel_in=None, **parts):
        scene = Stage(tmp_path, Script(), **parts)
        stages.append(scene)
        runtime: Runtime = LyingRuntime(lies)
        agent = ClaudeCodeDriver(Path("/usr/bin/true"))
        scene.attempt = replace(
            scene.attempt, dependencies=replace(scene.attempt.dependencies, runtime=runtime, agent=agent)
        )
        scene.life = AttemptRunner(scene.attempt)

        async def story():
            work = asyncio.create_task(scene.life.run())
            if cancel_in is not None:
                await scene.until(cancel_in)
                async with asyncio.timeout(PATIENCE_SECONDS):
                    while not lies.seen:  # the state begins a little before there is anything to be made
                        await asyncio.sleep(0.005)
                scene.life.cancel(CancelOrder(force=True))
            await asyncio.wait_for(work, PATIENCE_SECONDS)

        asyncio.run(story())
        return scene

    yield play
    for each in stages:
        each.writer.close()


def test_a_command_that_cannot_begin_is_told_with_its_reason(play):
    lies = Lies(start_error="The disk of the image is broken.")
    scene = play(lies)
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, "provision_failed")
    assert "disk of the image" in scene.task.failure.message
    assert lies.seen[-1] == "destroy"


def test_a_sandbox_that_goes_without_a_word_is_lost_and_what_it_said_is_kept(play):
    lies = Lies(dies_silently=True)
    scene = play(lies)
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, "sandbox_lost")
    assert scene.outputs("stdout") == [b"half a line"]
    assert "task-1.patch" in scene.artifacts
    assert lies.seen[-1] == "destroy"


def test_a_sandbox_that_is_never_ready_ends_with_the_time_for_it(play):
    lies = Lies(never_ready=True)
    scene = play(lies, lifecycle={"provision_timeout": "1s"})
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, "provision_timeout")
    assert lies.seen == ["create", "destroy"]


def test_a_sandbox_that_is_never_ready_can_be_cancelled(play):
    lies = Lies(never_ready=True)
    scene = play(lies, cancel_in=TaskState.PROVISIONING)
    assert scene.task.state is TaskState.CANCELLED
    assert lies.seen == ["create", "destroy"]


def test_a_command_that_never_begins_ends_with_the_time_for_it(play, monkeypatch):
    monkeypatch.setattr("sandbox.runner.steps.run.SANDBOX_START_SECONDS", 0.1)
    lies = Lies(never_begins=True)
    scene = play(lies)
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, "provision_failed")
    assert "did not begin" in scene.task.failure.message
    assert lies.seen[-1] == "destroy"


def test_one_that_stops_slowly_is_waited_for(play):
    lies = Lies(slow_stop_seconds=0.5)
    scene = play(lies, cancel_in=TaskState.RUNNING)
    assert (scene.task.state, scene.task.exit_code) == (TaskState.CANCELLED, 137)
    assert "kill" in lies.seen


def test_one_that_stops_too_slowly_is_lost(play, monkeypatch):
    monkeypatch.setattr("sandbox.runner.steps.run.KILL_SECONDS", 0.1)
    lies = Lies(slow_stop_seconds=3600)
    scene = play(lies, cancel_in=TaskState.RUNNING)
    assert (scene.task.state, scene.task.failure.code) == (TaskState.CANCELLED, "sandbox_lost")
    assert lies.seen[-1] == "destroy"


def test_one_that_cannot_be_destroyed_in_time_changes_no_outcome(play, monkeypatch):
    monkeypatch.setattr("sandbox.runner.steps.teardown.SANDBOX_TEARDOWN_SECONDS", 0.1)
    scene = play(Lies(dies_silently=True, slow_destroy_seconds=3600))
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, "sandbox_lost")
    assert ("teardown_failed", "Something of the sandbox is left: it takes too long") in troubles(scene)


def test_a_sandbox_that_is_slower_than_it_has_to_be_says_why(play):
    slow = play(Lies(dies_silently=True, slow_reason="No guest booted with KVM."))
    assert ("sandbox_slow", "No guest booted with KVM.") in troubles(slow)


def test_one_that_is_not_says_nothing(play):
    assert "sandbox_slow" not in dict(troubles(play(Lies(dies_silently=True))))


def troubles(scene):
    return [(trouble.error, trouble.message) for trouble in scene.events(ErrorReported)]
