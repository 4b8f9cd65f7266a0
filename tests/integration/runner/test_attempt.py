"""An attempt from its first step to its final record, with scripted dependencies and a real journal."""

import asyncio
import json
from contextlib import contextmanager

import pytest

from doubles.attempt_harness import ATTEMPT_ID, BOOT_ID, AttemptScript
from sandbox.interfaces.runner import CancelAttempt
from sandbox.interfaces.runtime import ExitStatus
from sandbox.model.artifacts import METADATA_NAME, Artifact
from sandbox.model.events import (
    AgentExited,
    AgentStarted,
    ArtifactCollected,
    ErrorReported,
    Output,
    SandboxCreated,
    WorkspacePrepared,
)
from sandbox.model.failure import AttemptError, Failure, FailureCode
from sandbox.model.task_state import TaskState
from sandbox.runner.attempt_context import read_records, write_handle

AGENT_FAILED = Failure(FailureCode.AGENT_FAILED, "It failed.")


@contextmanager
def short_grace(monkeypatch, seconds):
    with monkeypatch.context() as patched:
        patched.setattr("sandbox.runner.agent_process.TERM_GRACE_SECONDS", seconds)
        yield


async def test_task_passes_through_all_states(make_harness):
    script = AttemptScript(stdout=b"+Bash\n-Bash\nhello\nlast")
    harness = make_harness(script, lifecycle={"artifact_patterns": ("*.md",)})
    await harness.run()
    assert harness.states == ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
    assert harness.outputs() == [b"+Bash\n", b"-Bash\n", b"hello\n", b"last"]
    assert harness.artifacts == {"task-1.patch", "transcript.ndjson", "metadata.json", "report.md"}
    assert harness.task.progress.tool_calls == 1
    assert harness.task.exit_code == 0
    assert (harness.task.attempt.runtime, harness.task.attempt.tier) == ("scripted", "none")


async def test_task_with_a_truncated_patch_completes_and_its_changed_files_are_stored(make_harness):
    harness = make_harness(AttemptScript(patch_incomplete_reason="it is too large"))
    await harness.run()
    assert harness.states[-1] == "completed"
    assert harness.artifacts >= {"task-1.patch", "task-1.changes.tar"}
    [error] = [
        record.event for record in read_records(harness.journals, "task-1") if isinstance(record.event, ErrorReported)
    ]
    assert error.error == "patch_truncated"
    assert "it is too large" in error.message


async def test_slow_patch_is_abandoned_and_changed_files_are_stored(make_harness):
    harness = make_harness(AttemptScript(patch_seconds=60), lifecycle={"collect_timeout": "2s"})
    await harness.run()
    assert harness.states[-1] == "completed"
    assert harness.artifacts >= {"task-1.patch", "task-1.changes.tar"}
    assert b"truncated" in (harness.attempt.task_layout.artifacts / "task-1.patch").read_bytes()


async def test_files_from_an_earlier_attempt_are_removed_before_the_clone(make_harness):
    harness = make_harness(AttemptScript())
    earlier = harness.attempt.task_layout.attempt("bcdefghijklm")
    (earlier.disk / "workspace").mkdir(parents=True)
    earlier.runner_log.write_text("killed\n")
    await harness.run()
    assert harness.states[-1] == "completed"
    assert list(earlier.root.iterdir()) == [earlier.runner_log]


async def test_recorded_artifacts_are_on_disk_and_no_other_files_remain(make_harness):
    harness = make_harness(AttemptScript(stdout=b"one\ntwo\n", stderr=b"warn\n"))
    await harness.run()
    artifacts = harness.attempt.task_layout.artifacts
    assert (artifacts / "transcript.ndjson").read_bytes() == b"one\ntwo\n"
    metadata = json.loads((artifacts / "metadata.json").read_text())
    assert metadata["state"] == "completed"
    assert metadata["repository"]["base_commit"].startswith("c0ffee")
    assert list(harness.attempt.layout.root.iterdir()) == []
    assert not list(artifacts.glob("*.part"))


async def test_sandbox_is_killed_before_artifacts_are_collected(make_harness):
    script = AttemptScript()
    harness = make_harness(script)
    await harness.run()
    assert script.recorded_calls == ["create", "start", "kill", "destroy"]


@pytest.mark.parametrize(
    ("script", "states", "code"),
    [
        (
            AttemptScript(stage_error=AttemptError(FailureCode.CLONE_FAILED, "no branch")),
            ["pending", "staging", "failed"],
            "clone_failed",
        ),
        (
            AttemptScript(create_error=AttemptError(FailureCode.PROVISION_FAILED, "No space was left")),
            ["pending", "staging", "provisioning", "failed"],
            "provision_failed",
        ),
        (
            AttemptScript(exit=ExitStatus(3), stderr=b"boom"),
            ["pending", "staging", "provisioning", "ready", "running", "completing", "failed"],
            "agent_failed",
        ),
        (
            AttemptScript(patch_error=AttemptError(FailureCode.COLLECT_FAILED, "too big")),
            ["pending", "staging", "provisioning", "ready", "running", "completing", "failed"],
            "collect_failed",
        ),
    ],
)
async def test_failure_of_a_step_is_recorded_with_its_code(make_harness, script, states, code):
    harness = make_harness(script)
    await harness.run()
    assert harness.states == states
    assert harness.task.failure.code == code
    metadata = json.loads((harness.attempt.task_layout.artifacts / "metadata.json").read_text())
    assert metadata["error"]["code"] == code
    assert metadata["state"] == "failed"


async def test_teardown_error_does_not_fail_a_successful_task(make_harness):
    harness = make_harness(AttemptScript(destroy_error=AttemptError(FailureCode.SANDBOX_LOST, "still there")))
    await harness.run()
    assert harness.task.state is TaskState.COMPLETED


async def test_cancel_sends_sigterm_and_collects_artifacts(make_harness):
    script = AttemptScript(runs_until_signal=True)
    harness = make_harness(script)

    async def scenario():
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        assert harness.cancel(CancelAttempt("changed my mind")).done
        await work

    await scenario()
    assert "signal SIGTERM" in script.recorded_calls
    assert harness.states[-2:] == ["completing", "cancelled"]
    assert "task-1.patch" in harness.artifacts
    assert harness.task.state_message == "Cancelled: changed my mind"


async def test_agent_that_ignores_sigterm_is_killed_after_a_grace_period(make_harness, monkeypatch):
    script = AttemptScript(runs_until_signal=True, ignores_term=True)
    harness = make_harness(script)

    async def scenario():
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        harness.cancel(CancelAttempt())
        await work

    with short_grace(monkeypatch, 0.05):
        await scenario()
    assert script.recorded_calls.index("signal SIGTERM") < script.recorded_calls.index("kill")
    assert harness.task.state is TaskState.CANCELLED
    assert harness.task.exit_code == 137


async def test_later_forced_cancel_skips_the_grace_period(make_harness):
    script = AttemptScript(runs_until_signal=True, ignores_term=True)
    harness = make_harness(script)

    async def scenario():
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        harness.cancel(CancelAttempt())
        await asyncio.sleep(0)
        harness.cancel(CancelAttempt(force=True))
        await asyncio.wait_for(work, 5)

    await scenario()
    assert harness.task.state is TaskState.CANCELLED


async def test_cancel_during_the_clone_stops_the_clone(make_harness):
    harness = make_harness(AttemptScript(stage_seconds=60))

    async def scenario():
        work = asyncio.create_task(harness.run())
        await asyncio.sleep(0)
        harness.cancel(CancelAttempt())
        await asyncio.wait_for(work, 5)

    await scenario()
    assert harness.states == ["pending", "staging", "cancelled"]


async def test_cancel_after_the_outcome_is_recorded_is_rejected(make_harness):
    harness = make_harness(AttemptScript())
    await harness.run()
    reply = harness.cancel(CancelAttempt())
    assert not reply.done
    assert harness.task.state is TaskState.COMPLETED


@pytest.mark.parametrize(
    ("lifecycle", "code", "script"),
    [
        ({"timeout": "1s"}, "timeout", AttemptScript(runs_until_signal=True)),
        ({"hang_timeout": "1s"}, "hang", AttemptScript(runs_until_signal=True, stdout=b"")),
        ({"stage_timeout": "1s"}, "stage_timeout", AttemptScript(stage_seconds=60)),
    ],
)
async def test_each_time_limit_ends_the_task_with_its_code(make_harness, lifecycle, code, script):
    harness = make_harness(script, lifecycle=lifecycle)
    await harness.run()
    assert harness.task.state is TaskState.FAILED
    assert harness.task.failure.code == code
    assert next(iter(lifecycle)) in harness.task.failure.message


async def test_finisher_completes_the_attempt_of_a_dead_runner(make_harness):
    script = AttemptScript()
    harness = make_harness(script)

    for event in (WorkspacePrepared("c0ffee" + "0" * 34), SandboxCreated("v", "scripted", "host"), AgentStarted("s")):
        harness.recorder.record(event)
    harness.recorder.record(Output.from_bytes("stdout", b"half a line\n"))
    harness.attempt.layout.workspace.mkdir(parents=True)
    harness.attempt.layout.host_git_directory.mkdir()
    write_handle(harness.attempt.layout.handle, harness.parts.runtime.prepare(ATTEMPT_ID))
    await harness.finish()
    assert harness.task.failure.code == "runner_lost"
    assert harness.states[-2:] == ["completing", "failed"]
    assert script.recorded_calls[0] == "destroy"
    assert harness.outputs() == [b"half a line\n"]
    assert {"task-1.patch", "transcript.ndjson", "metadata.json"} <= harness.artifacts


async def test_finisher_preserves_the_recorded_outcome(make_harness):

    harness = make_harness(AttemptScript())
    for event in (WorkspacePrepared("c0ffee" + "0" * 34), SandboxCreated("v", "scripted", "host"), AgentStarted("s")):
        harness.recorder.record(event)
    harness.recorder.record(AgentExited(0, {"is_error": False}, None))
    await harness.finish()
    assert harness.task.state is TaskState.COMPLETED


@pytest.mark.parametrize("exit_event", [AgentExited(0, {"is_error": False}, None), AgentExited(0, None, AGENT_FAILED)])
async def test_finisher_ends_a_collected_task_despite_a_teardown_failure(make_harness, exit_event):
    harness = attempt_with_undestroyable_sandbox(make_harness, exit_event, metadata=True)
    await harness.finish()
    assert harness.task.state is (TaskState.COMPLETED if exit_event.failure is None else TaskState.FAILED)
    assert [report.error for report in harness.events(ErrorReported)] == ["teardown_failed"]


async def test_finisher_does_not_read_the_workspace_of_a_live_sandbox(make_harness):
    harness = attempt_with_undestroyable_sandbox(
        make_harness, AgentExited(0, {"is_error": False}, None), metadata=False
    )
    with pytest.raises(AttemptError, match="still there"):
        await harness.finish()
    assert harness.task.state is TaskState.COMPLETING
    assert harness.artifacts == set()


def attempt_with_undestroyable_sandbox(make_harness, exit_event, *, metadata):
    """Return a dead runner's attempt whose sandbox cannot be destroyed."""
    harness = make_harness(AttemptScript(destroy_error=AttemptError(FailureCode.SANDBOX_LOST, "still there")))
    for event in (WorkspacePrepared("c0ffee" + "0" * 34), SandboxCreated("v", "scripted", "host"), AgentStarted("s")):
        harness.recorder.record(event)
    harness.recorder.record(exit_event)
    if metadata:
        artifact = Artifact(METADATA_NAME, f".sandbox/{METADATA_NAME}", 2, "application/json", "sha256:" + "0" * 64)
        harness.recorder.record(ArtifactCollected(artifact))
    harness.attempt.layout.workspace.mkdir(parents=True)
    write_handle(harness.attempt.layout.handle, harness.parts.runtime.prepare(ATTEMPT_ID))
    return harness


async def test_unexpected_exception_is_recorded_as_an_internal_error(make_harness, caplog):
    harness = make_harness(AttemptScript(create_error=ZeroDivisionError("bug")))
    await harness.run()
    assert harness.task.failure == Failure(
        FailureCode.INTERNAL, "The runner failed (ZeroDivisionError); please report this."
    )
    assert "ZeroDivisionError: bug" in caplog.text


@pytest.mark.parametrize(
    ("boot_id", "code"),
    [("an-earlier-boot", FailureCode.HOST_LOST), (BOOT_ID, FailureCode.RUNNER_LOST), ("", FailureCode.RUNNER_LOST)],
    ids=["another boot", "the same boot", "a journal without a boot id"],
)
async def test_finisher_distinguishes_a_lost_host_from_a_lost_runner(make_harness, boot_id, code):
    harness = make_harness(AttemptScript(), boot_id=boot_id, lifecycle={"artifact_patterns": ["*.md"]})
    for event in (WorkspacePrepared("c0ffee" + "0" * 34), SandboxCreated("vm", "none", "host"), AgentStarted("s")):
        harness.recorder.record(event)
    harness.attempt.layout.workspace.mkdir(parents=True)
    harness.attempt.layout.host_git_directory.mkdir()
    await harness.finish()
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, code)
    assert {"task-1.patch", "report.md", "metadata.json"} <= harness.artifacts
