"""An attempt from its first step to the task's final record, with scripted equipment and a real journal."""

import asyncio
import json
from contextlib import contextmanager

import pytest

from doubles.attempt_dependencies import ATTEMPT_ID, BOOT_ID, Script
from sandbox.interfaces.journal import read_records
from sandbox.interfaces.placement import CancelOrder
from sandbox.interfaces.runtime import ExitStatus
from sandbox.model.errors import AttemptError, Failure, FailureCode
from sandbox.model.events import (
    METADATA_NAME,
    AgentExited,
    AgentStarted,
    Artifact,
    ArtifactCollected,
    ErrorReported,
    Output,
    SandboxCreated,
    WorkspacePrepared,
)
from sandbox.model.task_state import TaskState
from sandbox.runner.steps.provision import write_handle

AGENT_FAILED = Failure(FailureCode.AGENT_FAILED, "It failed.")


@contextmanager
def short_grace(monkeypatch, seconds):
    with monkeypatch.context() as patched:
        patched.setattr("sandbox.runner.steps.run.TERM_GRACE_SECONDS", seconds)
        yield


def test_a_task_walks_through_all_its_states(stage):
    script = Script(stdout=b"+Bash\n-Bash\nhello\nlast")
    scene = stage(script, lifecycle={"artifact_patterns": ("*.md",)})
    asyncio.run(scene.life.run())
    assert scene.states == ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
    assert scene.outputs() == [b"+Bash\n", b"-Bash\n", b"hello\n", b"last"]
    assert scene.artifacts == {"task-1.patch", "transcript.ndjson", "metadata.json", "report.md"}
    assert scene.task.progress.tool_calls == 1
    assert scene.task.exit_code == 0
    assert (scene.task.attempt.runtime, scene.task.attempt.tier) == ("scripted", "none")


def test_a_patch_that_does_not_hold_everything_comes_with_the_files_and_fails_nobody(stage):
    scene = stage(Script(patch_lacks="it is too large"))
    asyncio.run(scene.life.run())
    assert scene.states[-1] == "completed"
    assert scene.artifacts >= {"task-1.patch", "task-1.changes.tar"}
    [told] = [
        record.event for record in read_records(scene.journals, "task-1") if isinstance(record.event, ErrorReported)
    ]
    assert told.error == "patch_truncated"
    assert "it is too large" in told.message


def test_a_patch_that_takes_too_long_is_given_up_and_the_files_are_kept(stage):
    scene = stage(Script(patch_seconds=60), lifecycle={"collect_timeout": "2s"})
    asyncio.run(scene.life.run())
    assert scene.states[-1] == "completed"
    assert scene.artifacts >= {"task-1.patch", "task-1.changes.tar"}
    assert b"truncated" in (scene.attempt.task_files.artifacts / "task-1.patch").read_bytes()


def test_what_an_earlier_attempt_left_is_gone_before_the_clone_begins(stage):
    scene = stage(Script())
    earlier = scene.attempt.task_files.attempt("bcdefghijklm")
    (earlier.disk / "workspace").mkdir(parents=True)
    earlier.runner_log.write_text("killed\n")
    asyncio.run(scene.life.run())
    assert scene.states[-1] == "completed"
    assert list(earlier.root.iterdir()) == [earlier.runner_log]


def test_what_is_told_is_on_disk_and_nothing_else_is_left(stage):
    scene = stage(Script(stdout=b"one\ntwo\n", stderr=b"warn\n"))
    asyncio.run(scene.life.run())
    artifacts = scene.attempt.task_files.artifacts
    assert (artifacts / "transcript.ndjson").read_bytes() == b"one\ntwo\n"
    metadata = json.loads((artifacts / "metadata.json").read_text())
    assert metadata["state"] == "completed"
    assert metadata["repository"]["base_commit"].startswith("c0ffee")
    assert list(scene.attempt.files.root.iterdir()) == []
    assert not list(artifacts.glob("*.part"))


def test_everything_inside_is_dead_before_anything_is_collected(stage):
    script = Script()
    scene = stage(script)
    asyncio.run(scene.life.run())
    assert script.seen == ["create", "start", "kill", "destroy"]


@pytest.mark.parametrize(
    ("script", "states", "code"),
    [
        (
            Script(stage_error=AttemptError(FailureCode.CLONE_FAILED, "no branch")),
            ["pending", "staging", "failed"],
            "clone_failed",
        ),
        (
            Script(create_error=AttemptError(FailureCode.PROVISION_FAILED, "no room")),
            ["pending", "staging", "provisioning", "failed"],
            "provision_failed",
        ),
        (
            Script(exit=ExitStatus(3), stderr=b"boom"),
            ["pending", "staging", "provisioning", "ready", "running", "completing", "failed"],
            "agent_failed",
        ),
        (
            Script(patch_error=AttemptError(FailureCode.COLLECT_FAILED, "too big")),
            ["pending", "staging", "provisioning", "ready", "running", "completing", "failed"],
            "collect_failed",
        ),
    ],
)
def test_every_step_can_fail_and_says_so(stage, script, states, code):
    scene = stage(script)
    asyncio.run(scene.life.run())
    assert scene.states == states
    assert scene.task.failure.code == code
    metadata = json.loads((scene.attempt.task_files.artifacts / "metadata.json").read_text())
    assert metadata["error"]["code"] == code
    assert metadata["state"] == "failed"


def test_failing_to_clean_up_does_not_turn_success_into_failure(stage):
    scene = stage(Script(destroy_error=AttemptError(FailureCode.SANDBOX_LOST, "still there")))
    asyncio.run(scene.life.run())
    assert scene.task.state is TaskState.COMPLETED


def test_cancel_sends_term_and_the_task_is_cancelled_with_its_artifacts(stage):
    script = Script(stays=True)
    scene = stage(script)

    async def play():
        work = asyncio.create_task(scene.life.run())
        await scene.until(TaskState.RUNNING)
        assert scene.life.cancel(CancelOrder("changed my mind")).done
        await work

    asyncio.run(play())
    assert "signal SIGTERM" in script.seen
    assert scene.states[-2:] == ["completing", "cancelled"]
    assert "task-1.patch" in scene.artifacts
    assert scene.task.state_message == "Cancelled: changed my mind"


def test_an_agent_that_does_not_mind_term_is_killed_after_the_grace(stage, monkeypatch):
    script = Script(stays=True, deaf=True)
    scene = stage(script)

    async def play():
        work = asyncio.create_task(scene.life.run())
        await scene.until(TaskState.RUNNING)
        scene.life.cancel(CancelOrder())
        await work

    with short_grace(monkeypatch, 0.05):
        asyncio.run(play())
    assert script.seen.index("signal SIGTERM") < script.seen.index("kill")
    assert scene.task.state is TaskState.CANCELLED
    assert scene.task.exit_code == 137


def test_force_skips_the_grace_also_when_it_comes_later(stage):
    script = Script(stays=True, deaf=True)
    scene = stage(script)

    async def play():
        work = asyncio.create_task(scene.life.run())
        await scene.until(TaskState.RUNNING)
        scene.life.cancel(CancelOrder())
        await asyncio.sleep(0)
        scene.life.cancel(CancelOrder(force=True))
        await asyncio.wait_for(work, 5)

    asyncio.run(play())
    assert scene.task.state is TaskState.CANCELLED


def test_cancel_while_cloning_ends_the_clone(stage):
    scene = stage(Script(stage_seconds=60))

    async def play():
        work = asyncio.create_task(scene.life.run())
        await asyncio.sleep(0)
        scene.life.cancel(CancelOrder())
        await asyncio.wait_for(work, 5)

    asyncio.run(play())
    assert scene.states == ["pending", "staging", "cancelled"]


def test_after_the_outcome_a_wish_changes_nothing(stage):
    scene = stage(Script())
    asyncio.run(scene.life.run())
    receipt = scene.life.cancel(CancelOrder())
    assert not receipt.done
    assert scene.task.state is TaskState.COMPLETED


@pytest.mark.parametrize(
    ("lifecycle", "code", "script"),
    [
        ({"timeout": "1s"}, "timeout", Script(stays=True)),
        ({"hang_timeout": "1s"}, "hang", Script(stays=True, stdout=b"")),
        ({"stage_timeout": "1s"}, "stage_timeout", Script(stage_seconds=60)),
    ],
)
def test_every_bound_ends_the_task_with_its_own_code(stage, lifecycle, code, script):
    scene = stage(script, lifecycle=lifecycle)
    asyncio.run(scene.life.run())
    assert scene.task.state is TaskState.FAILED
    assert scene.task.failure.code == code
    assert next(iter(lifecycle)) in scene.task.failure.message


def test_the_finisher_ends_what_a_dead_runner_left(stage):
    script = Script()
    scene = stage(script)

    for event in (WorkspacePrepared("c0ffee" + "0" * 34), SandboxCreated("v", "scripted", "host"), AgentStarted("s")):
        scene.recorder.record(event)
    scene.recorder.record(Output.from_bytes("stdout", b"half a story\n"))
    scene.attempt.files.workspace.mkdir(parents=True)
    scene.attempt.files.repository.mkdir()
    write_handle(scene.attempt.files.handle, scene.attempt.dependencies.runtime.prepare(ATTEMPT_ID))
    asyncio.run(scene.life.finish())
    assert scene.task.failure.code == "runner_lost"
    assert scene.states[-2:] == ["completing", "failed"]
    assert script.seen[0] == "destroy"
    assert scene.outputs() == [b"half a story\n"]
    assert {"task-1.patch", "transcript.ndjson", "metadata.json"} <= scene.artifacts


def test_the_finisher_keeps_an_outcome_that_was_written(stage):

    scene = stage(Script())
    for event in (WorkspacePrepared("c0ffee" + "0" * 34), SandboxCreated("v", "scripted", "host"), AgentStarted("s")):
        scene.recorder.record(event)
    scene.recorder.record(AgentExited(0, {"is_error": False}, None))
    asyncio.run(scene.life.finish())
    assert scene.task.state is TaskState.COMPLETED


@pytest.mark.parametrize("exit_event", [AgentExited(0, {"is_error": False}, None), AgentExited(0, None, AGENT_FAILED)])
def test_a_finisher_of_a_task_that_is_collected_does_not_wait_for_what_does_not_end(stage, exit_event):
    scene = left_with(stage, exit_event, metadata=True)
    asyncio.run(scene.life.finish())
    assert scene.task.state is (TaskState.COMPLETED if exit_event.failure is None else TaskState.FAILED)
    assert [trouble.error for trouble in scene.events(ErrorReported)] == ["teardown_failed"]


def test_a_finisher_does_not_read_what_a_sandbox_may_still_write_to(stage):
    scene = left_with(stage, AgentExited(0, {"is_error": False}, None), metadata=False)
    with pytest.raises(AttemptError, match="still there"):
        asyncio.run(scene.life.finish())
    assert scene.task.state is TaskState.COMPLETING
    assert scene.artifacts == set()


def left_with(stage, exit_event, *, metadata):
    """What a dead runner left whose sandbox does not end."""
    scene = stage(Script(destroy_error=AttemptError(FailureCode.SANDBOX_LOST, "still there")))
    for event in (WorkspacePrepared("c0ffee" + "0" * 34), SandboxCreated("v", "scripted", "host"), AgentStarted("s")):
        scene.recorder.record(event)
    scene.recorder.record(exit_event)
    if metadata:
        artifact = Artifact(METADATA_NAME, f".sandbox/{METADATA_NAME}", 2, "application/json", "0" * 64)
        scene.recorder.record(ArtifactCollected(artifact))
    scene.attempt.files.workspace.mkdir(parents=True)
    write_handle(scene.attempt.files.handle, scene.attempt.dependencies.runtime.prepare(ATTEMPT_ID))
    return scene


def test_a_broken_step_is_an_internal_error_and_the_task_still_ends(stage, caplog):
    scene = stage(Script(create_error=ZeroDivisionError("bug")))
    asyncio.run(scene.life.run())
    assert scene.task.failure == Failure(
        FailureCode.INTERNAL, "The runner failed (ZeroDivisionError); please report this."
    )
    assert "ZeroDivisionError: bug" in caplog.text


@pytest.mark.parametrize(
    ("boot_id", "code"),
    [("an-earlier-boot", FailureCode.HOST_LOST), (BOOT_ID, FailureCode.RUNNER_LOST), ("", FailureCode.RUNNER_LOST)],
    ids=["another boot", "the same boot", "a journal that does not say"],
)
def test_what_is_left_of_an_earlier_boot_is_collected_and_told_apart_from_a_dead_runner(stage, boot_id, code):
    scene = stage(Script(), boot_id=boot_id, lifecycle={"artifact_patterns": ["*.md"]})
    for event in (WorkspacePrepared("c0ffee" + "0" * 34), SandboxCreated("vm", "none", "host"), AgentStarted("s")):
        scene.recorder.record(event)
    scene.attempt.files.workspace.mkdir(parents=True)
    scene.attempt.files.repository.mkdir()
    asyncio.run(scene.life.finish())
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, code)
    assert {"task-1.patch", "report.md", "metadata.json"} <= scene.artifacts
