"""An attempt with a follow-up leaves only the files that the next attempt needs, and then records its end."""

import asyncio
import errno
import json
import time

import msgspec
import pytest

from doubles.attempt_harness import ATTEMPT_ID, BASE_COMMIT, BOOT_ID, AttemptScript, ScriptedAgentDriver
from doubles.memory_store import MemoryStore
from sandbox.agents.claude_code.driver import render_result
from sandbox.agents.claude_code.output_parser import ClaudeOutputParser, convert_recorded_line
from sandbox.disks import commands
from sandbox.disks.directory_disk import DirectoryDisk
from sandbox.interfaces.runner import CancelAttempt
from sandbox.interfaces.runtime import ExitStatus
from sandbox.interfaces.store import IndexedTask
from sandbox.model.events import (
    AgentStarted,
    AttemptFailed,
    AttemptStarted,
    AttemptTornDown,
    CancelRequested,
    ErrorReported,
    FollowUpSkipped,
    Output,
    Progress,
    SandboxCreated,
    Usage,
    WorkspacePrepared,
)
from sandbox.model.failure import AttemptError, Failure, FailureCode
from sandbox.model.task_state import TaskState
from sandbox.primitives.secret_digests import make_fingerprint
from sandbox.runner.attempt_context import write_handle
from sandbox.secrets.redaction.redactor import SecretRedactor
from sandbox.server.event_streams import Broadcast, EventStream
from sandbox.server.tracked_task import NoKnownOwner, TrackedTask

TO_RUNNING = (
    WorkspacePrepared(BASE_COMMIT),
    SandboxCreated("v", "scripted", "host"),
    AgentStarted("session", time.monotonic()),
)
SECOND_ID = "bcdefghijklm"


def remaining_files(harness, attempt_id=ATTEMPT_ID):
    root = harness.attempt.task_layout.attempt(attempt_id).root
    return {path.name for path in root.iterdir()} - {"runner.log"}


def leave_files_after(harness, *events):
    """Create the leftovers of a runner that was killed after it recorded these events."""
    for event in events:
        harness.recorder.record(event)
    for directory in (
        harness.attempt.layout.workspace,
        harness.attempt.layout.home,
        harness.attempt.layout.host_git_directory,
    ):
        directory.mkdir(parents=True, exist_ok=True)
    (harness.attempt.layout.workspace / "edited.txt").write_text("half done\n")
    write_handle(harness.attempt.layout.handle, harness.parts.runtime.prepare(ATTEMPT_ID))


def next_attempt(harness, *, resumes, **fields):
    """Record the start of the next attempt, as the server does; return the attempt."""
    harness.recorder.record(AttemptStarted(SECOND_ID, "scripted", "here", BOOT_ID, number=2, resumes=resumes))
    recorder = harness.recorder = harness.make_recorder(harness.recorder.task)
    attempt = msgspec.structs.replace(harness.attempt, id=SECOND_ID, recorder=recorder, **fields)
    attempt.layout.root.mkdir()
    return attempt


async def test_failed_attempt_with_a_retry_left_is_torn_down_without_collection(make_harness):
    harness = make_harness(AttemptScript(exit=ExitStatus(1)), lifecycle={"retries": 1})
    await harness.run()
    assert (harness.task.state, harness.task.attempt.follow_up) == (TaskState.RUNNING, "retry")
    assert harness.task.attempt.failure.code == "agent_failed"
    assert isinstance(harness.events(object)[-1], AttemptTornDown)
    assert harness.script.recorded_calls[-1] == "destroy"
    assert (remaining_files(harness), harness.artifacts) == (set(), set())


def test_artifacts_of_a_task_cancelled_between_attempts_are_not_flagged(make_harness):
    """No artifact comes from the disk, which is removed, so no artifact can contain an undetected secret."""
    harness = make_harness(
        AttemptScript(exit=ExitStatus(1)),
        secrets={"TOKEN": "the value of a token"},
        manifest_secrets=("TOKEN",),
        lifecycle={"retries": 1},
    )
    asyncio.run(harness.run())
    harness.recorder.record(CancelRequested())
    asyncio.run(harness.finish())
    assert harness.task.state is TaskState.CANCELLED
    flags = {artifact.name: artifact.contains_secret for artifact in harness.task.artifacts}
    assert flags == {"transcript.ndjson": False, "metadata.json": False}


def test_retry_starts_with_a_fresh_workspace_and_decides_the_outcome(make_harness):
    harness = make_harness(AttemptScript(exit=ExitStatus(1)), lifecycle={"retries": 1})
    asyncio.run(harness.run())
    harness.script.exit = ExitStatus(0)
    asyncio.run(harness.run(next_attempt(harness, resumes=False)))
    assert harness.task.state is TaskState.COMPLETED
    assert harness.states == ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
    assert {"task-1.patch", "metadata.json"} <= harness.artifacts
    assert [attempt.failure.code for attempt in harness.task.past_attempts] == ["agent_failed"]


def test_rendered_output_shows_only_the_last_attempt(make_harness):
    harness = make_harness(
        AttemptScript(exit=ExitStatus(1)), lifecycle={"retries": 1}, claude={"output_format": "json"}
    )
    asyncio.run(harness.run())
    assert harness.outputs("stdout") == []
    harness.script.exit = ExitStatus(0)
    asyncio.run(harness.run(next_attempt(harness, resumes=False)))
    assert harness.outputs("stdout") == [b"rendered\n"]


async def test_rendered_output_is_shown_when_the_retry_is_skipped(make_harness):
    script = AttemptScript(exit=ExitStatus(1), destroy_error=AttemptError(FailureCode.SANDBOX_LOST, "It does not end."))
    harness = make_harness(script, lifecycle={"retries": 1}, claude={"output_format": "json"})
    await harness.run()
    assert harness.task.state is TaskState.FAILED
    assert harness.outputs("stdout") == [b"rendered\n"]


def test_rendered_output_is_shown_when_the_task_is_cancelled_before_the_retry(make_harness):
    harness = make_harness(
        AttemptScript(exit=ExitStatus(1)), lifecycle={"retries": 1}, claude={"output_format": "text"}
    )
    asyncio.run(harness.run())
    assert harness.outputs("stdout") == []
    harness.recorder.record(CancelRequested("enough"))
    asyncio.run(harness.finish())
    assert harness.task.state is TaskState.CANCELLED
    assert harness.outputs("stdout") == [b"rendered\n"]


class ClaudeCodeFormatDriver(ScriptedAgentDriver):
    """Prints a failed result in Claude Code's format, and renders it in the output format of the task."""

    stdout = json.dumps({"type": "result", "session_id": "s", "is_error": True, "result": "Failed."}).encode() + b"\n"

    def create_parser(self, session_id):
        return ClaudeOutputParser("s")

    def render_output(self, manifest, result):
        return render_result(manifest.agent.output_format, result)


async def shown_results(harness):
    """Return the types of the events that show the agent's result to clients, including converted events."""
    replayed = harness.journals.replay("task-1")
    tracked = {"task-1": TrackedTask(IndexedTask(replayed.task, replayed.offset), NoKnownOwner())}
    stream = EventStream(tracked, harness.journals, MemoryStore(), Broadcast(), convert_recorded_line)
    shown = []
    async for event in stream.recorded_events("task-1"):
        shown += [item["type"] for item in (event, *event.get("conversation", ()))]
    return [kind for kind in shown if kind == "agent_result"]


def end_without_the_retry(make_harness, *, is_cancelled, **options):
    """Run an attempt in which Claude Code fails, and end the task without the pending retry."""
    script = AttemptScript(stdout=ClaudeCodeFormatDriver.stdout, exit=ExitStatus(1))
    harness = make_harness(script, lifecycle={"retries": 1}, **options)
    harness.agent = ClaudeCodeFormatDriver(script)
    if not is_cancelled:
        script.destroy_error = AttemptError(FailureCode.SANDBOX_LOST, "It does not end.")
    asyncio.run(harness.run())
    if is_cancelled:
        harness.recorder.record(CancelRequested("enough"))
        asyncio.run(harness.finish())
    assert harness.task.state.is_final
    return harness


@pytest.mark.parametrize("output_format", ["json", "text"])
@pytest.mark.parametrize("is_cancelled", [True, False])
def test_result_is_shown_once_when_no_retry_follows(make_harness, output_format, is_cancelled):
    harness = end_without_the_retry(make_harness, is_cancelled=is_cancelled, claude={"output_format": output_format})
    [rendered] = harness.outputs("stdout")
    assert b"Failed." in rendered
    assert asyncio.run(shown_results(harness)) == ["agent_result"]


def test_rendered_result_is_not_marked_as_parsed_if_its_conversation_was_not_recorded(make_harness):
    """An earlier version of the server, which could not read conversation events, started the attempt."""
    script = AttemptScript(stdout=ClaudeCodeFormatDriver.stdout, exit=ExitStatus(1))
    harness = make_harness(script, lifecycle={"retries": 1}, claude={"output_format": "json"})
    harness.agent = ClaudeCodeFormatDriver(script)
    asyncio.run(harness.run(msgspec.structs.replace(harness.attempt, records_conversation=False)))
    harness.recorder.record(CancelRequested("enough"))
    asyncio.run(harness.finish())
    assert [output.is_parsed for output in harness.events(Output) if output.stream == "stdout"] == [False]


async def test_retry_is_skipped_when_the_sandbox_cannot_be_destroyed(make_harness):
    script = AttemptScript(exit=ExitStatus(1), destroy_error=AttemptError(FailureCode.SANDBOX_LOST, "It does not end."))
    harness = make_harness(script, lifecycle={"retries": 5})
    await harness.run()
    [skipped] = harness.events(FollowUpSkipped)
    assert (skipped.follow_up, skipped.reason) == ("retry", "It does not end.")
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "agent_failed")
    assert harness.events(AttemptTornDown) == []
    assert "task-1.patch" in harness.artifacts


async def test_retry_is_skipped_when_the_kernel_never_frees_memory_of_the_sandbox(make_harness):
    """Each attempt could use up the same amount again."""
    script = AttemptScript(exit=ExitStatus(1), unfreed_bytes=2_000_000)
    harness = make_harness(script, lifecycle={"retries": 5})
    await harness.run()
    [skipped] = harness.events(FollowUpSkipped)
    assert skipped.follow_up == "retry"
    assert "did not free 2000000 bytes" in skipped.reason
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "agent_failed")
    assert harness.events(AttemptTornDown) == []
    assert "task-1.patch" in harness.artifacts
    assert script.recorded_destroyed_disks[1] == harness.attempt.layout.disk
    assert remaining_files(harness) == set()


async def test_unfreed_memory_is_reported_and_the_task_stays_completed(make_harness):
    harness = make_harness(AttemptScript(unfreed_bytes=2_000_000), lifecycle={"retries": 5})
    await harness.run()
    assert harness.task.state is TaskState.COMPLETED
    [report] = harness.events(ErrorReported)
    assert report.error == "teardown_failed"
    assert report.message.startswith("The sandbox was not removed completely: The kernel did not free 2000000 bytes")
    assert remaining_files(harness) == set()


async def test_partially_removed_workspace_produces_no_patch(make_harness):
    """A patch would show the removed files as deleted by the agent."""
    harness = make_harness(AttemptScript(exit=ExitStatus(1)), lifecycle={"retries": 1})

    async def fail_removal(paths):
        if paths:
            raise OSError("some files cannot be removed")

    harness.parts = msgspec.structs.replace(harness.parts, remove_paths=fail_removal)
    await harness.run()
    assert len(harness.events(FollowUpSkipped)) == 1
    assert harness.task.failure.code == "agent_failed"
    assert "metadata.json" in harness.artifacts
    assert "task-1.patch" not in harness.artifacts


@pytest.mark.parametrize("events_recorded", range(3))
async def test_finisher_schedules_another_attempt_if_the_agent_had_not_started(make_harness, events_recorded):
    harness = make_harness(AttemptScript())
    leave_files_after(harness, *TO_RUNNING[:events_recorded])
    await harness.finish()
    assert (harness.task.attempt.follow_up, harness.task.attempt.failure.code) == ("again", "runner_lost")
    assert harness.script.recorded_calls[0] == "destroy"
    assert remaining_files(harness) == set()


async def test_finisher_does_not_repeat_a_started_agent(make_harness):
    harness = make_harness(AttemptScript())
    leave_files_after(harness, *TO_RUNNING)
    await harness.finish()
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "runner_lost")


async def test_second_finisher_completes_the_work_of_a_killed_finisher(make_harness):
    """The first finisher recorded the failure and removed part of the workspace."""
    harness = make_harness(AttemptScript())
    leave_files_after(harness, AttemptFailed(Failure(FailureCode.RUNNER_LOST, "gone")))
    (harness.attempt.layout.workspace / "edited.txt").unlink()
    await harness.finish()
    assert harness.task.attempt.follow_up == "again"
    assert len(harness.events(AttemptFailed)) == 1


def test_resume_hands_over_the_disk_and_the_session(make_harness):
    harness = make_harness(AttemptScript(), lifecycle={"resume": True})
    leave_files_after(harness, *TO_RUNNING)
    asyncio.run(harness.finish())
    assert harness.task.attempt.follow_up == "resume"
    assert remaining_files(harness) == {"disk", "repository.git"}
    asyncio.run(harness.run(next_attempt(harness, resumes=True)))
    assert harness.task.state is TaskState.COMPLETED
    assert "resume" in harness.script.recorded_calls
    assert [event.session_id for event in harness.events(AgentStarted)] == ["session", "session"]
    assert [event.base_commit for event in harness.events(WorkspacePrepared)] == [BASE_COMMIT, BASE_COMMIT]
    assert "task-1.patch" in harness.artifacts
    assert (remaining_files(harness), remaining_files(harness, SECOND_ID)) == (set(), set())


@pytest.mark.parametrize("secrets", [{"TOKEN": "rotated since"}, {"TOKEN": "first of all", "MORE": "another one"}])
def test_resume_with_changed_secrets_fails_instead_of_using_the_old_disk(make_harness, secrets):
    original = {"TOKEN": "first of all"}
    harness = make_harness(AttemptScript(), secrets=original, manifest_secrets=("TOKEN",), lifecycle={"resume": True})
    leave_files_after(harness, *TO_RUNNING)
    harness.attempt.layout.secret_fingerprint.write_bytes(make_fingerprint(harness.attempt.secrets))
    asyncio.run(harness.finish())
    assert harness.task.attempt.follow_up == "resume"  # the secrets still had their original values
    asyncio.run(harness.run(next_attempt(harness, resumes=True, secrets=secrets, redactor=SecretRedactor(secrets))))
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "secret_unavailable")
    assert "start" not in harness.script.recorded_calls
    unflagged = {artifact.name for artifact in harness.task.artifacts if not artifact.contains_secret}
    assert unflagged == {"transcript.ndjson", "metadata.json"} < harness.artifacts
    assert (remaining_files(harness), remaining_files(harness, SECOND_ID)) == (set(), set())


@pytest.mark.parametrize(("retries", "follow_up"), [(1, "retry"), (0, None)])
async def test_resume_with_changed_secrets_falls_back_to_a_retry(make_harness, retries, follow_up):
    rotated = {"TOKEN": "rotated since"}
    harness = make_harness(
        AttemptScript(), secrets={"TOKEN": "first of all"}, lifecycle={"resume": True, "retries": retries}
    )
    leave_files_after(harness, *TO_RUNNING)
    harness.attempt.layout.secret_fingerprint.write_bytes(make_fingerprint(harness.attempt.secrets))
    attempt = msgspec.structs.replace(harness.attempt, secrets=rotated, redactor=SecretRedactor(rotated))
    await harness.finish(attempt)
    assert harness.task.attempt.follow_up == follow_up
    assert [event.follow_up for event in harness.events(FollowUpSkipped)] == ["resume"]


def test_resume_with_unchanged_secrets_continues_the_agent(make_harness):
    harness = make_harness(AttemptScript(), secrets={"TOKEN": "first of all"}, lifecycle={"resume": True})
    leave_files_after(harness, *TO_RUNNING)
    harness.attempt.layout.secret_fingerprint.write_bytes(make_fingerprint(harness.attempt.secrets))
    asyncio.run(harness.finish())
    asyncio.run(harness.run(next_attempt(harness, resumes=True)))
    assert harness.task.state is TaskState.COMPLETED
    assert "resume" in harness.script.recorded_calls


async def test_finisher_adds_uncounted_usage_and_clears_the_current_tool(make_harness):
    harness = make_harness(AttemptScript())
    leave_files_after(harness, *TO_RUNNING, Progress(turns=2, current_tool="Bash"), Usage("m", 100, 20, 0, 0, 0.25))
    await harness.finish()
    progress = harness.task.progress
    assert (progress.turns, progress.current_tool) == (2, None)
    assert (progress.input_tokens, progress.output_tokens, progress.cost_usd) == (100, 20, 0.25)


def test_finisher_completes_an_interrupted_disk_takeover(make_harness):
    harness = make_harness(AttemptScript(), lifecycle={"resume": True})
    leave_files_after(harness, *TO_RUNNING)
    asyncio.run(harness.finish())
    attempt = next_attempt(harness, resumes=True)
    files = harness.attempt.task_layout
    files.attempt(ATTEMPT_ID).disk.rename(files.attempt(SECOND_ID).disk)
    asyncio.run(harness.finish(attempt))
    assert harness.task.attempt.follow_up == "again"
    assert remaining_files(harness, SECOND_ID) == {"disk", "repository.git"}
    assert (files.attempt(SECOND_ID).workspace / "edited.txt").read_text() == "half done\n"


def test_cancel_before_a_resume_preserves_the_work(make_harness):
    harness = make_harness(AttemptScript(), lifecycle={"resume": True})
    leave_files_after(harness, *TO_RUNNING)
    asyncio.run(harness.finish())
    attempt = next_attempt(harness, resumes=True)
    assert harness.cancel(CancelAttempt("enough")).done
    asyncio.run(harness.finish(attempt))
    assert harness.task.state is TaskState.CANCELLED
    assert {"task-1.patch", "metadata.json"} <= harness.artifacts


def test_cancel_during_a_disk_takeover_preserves_the_work(make_harness):
    harness = make_harness(AttemptScript(), lifecycle={"resume": True})
    leave_files_after(harness, *TO_RUNNING)
    asyncio.run(harness.finish())
    attempt = next_attempt(harness, resumes=True)
    assert harness.cancel(CancelAttempt("enough")).done
    asyncio.run(harness.run(attempt))
    assert harness.task.state is TaskState.CANCELLED
    assert {"task-1.patch", "metadata.json"} <= harness.artifacts


def test_timeout_before_a_resume_preserves_the_work(make_harness):
    """A timeout before the resume means that the machine was down for longer than `lifecycle.timeout`."""
    harness = make_harness(AttemptScript(), lifecycle={"resume": True, "timeout": "1s"})
    leave_files_after(harness, *TO_RUNNING[:-1], AgentStarted("session", harness.parts.clock.monotonic() - 3600))
    asyncio.run(harness.finish())
    assert harness.task.attempt.follow_up == "resume"
    asyncio.run(harness.run(next_attempt(harness, resumes=True)))
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "timeout")
    assert "task-1.patch" in harness.artifacts
    assert (remaining_files(harness), remaining_files(harness, SECOND_ID)) == (set(), set())


def test_failure_action_preserve_applies_to_a_failed_resume(make_harness):
    harness = make_harness(AttemptScript(), lifecycle={"resume": True, "timeout": "1s", "failure_action": "preserve"})
    leave_files_after(harness, *TO_RUNNING[:-1], AgentStarted("session", harness.parts.clock.monotonic() - 3600))
    asyncio.run(harness.finish())
    asyncio.run(harness.run(next_attempt(harness, resumes=True)))
    assert harness.task.state is TaskState.FAILED_PRESERVED
    preserved = harness.attempt.task_layout.attempt(SECOND_ID).workspace / "edited.txt"
    assert preserved.read_text() == "half done\n"


def test_failure_between_attempts_preserves_nothing(make_harness):
    harness = make_harness(AttemptScript(exit=ExitStatus(1)), lifecycle={"retries": 1, "failure_action": "preserve"})
    asyncio.run(harness.run())
    harness.recorder.record(AttemptFailed(Failure(FailureCode.SECRET_UNAVAILABLE, "gone")))
    asyncio.run(harness.finish())
    assert remaining_files(harness) == set()
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "secret_unavailable")


@pytest.mark.parametrize(("retries", "follow_up"), [(0, None), (1, "retry")])
async def test_missing_session_prevents_a_resume(make_harness, retries, follow_up):
    harness = make_harness(AttemptScript(has_session=False), lifecycle={"resume": True, "retries": retries})
    leave_files_after(harness, *TO_RUNNING)
    await harness.finish()
    [skipped] = harness.events(FollowUpSkipped)
    assert skipped.follow_up == "resume"
    assert harness.task.attempt.follow_up == follow_up
    assert harness.task.state is (TaskState.RUNNING if retries else TaskState.FAILED)


def test_task_past_its_timeout_starts_no_further_agent(make_harness):
    harness = make_harness(AttemptScript(exit=ExitStatus(1)), lifecycle={"retries": 1, "timeout": "1s"})
    asyncio.run(harness.run())
    attempt = next_attempt(harness, resumes=False)

    async def run_after_timeout():
        async with asyncio.timeout(20):
            while harness.parts.clock.monotonic() - harness.task.agent_start_time.monotonic_seconds < 1:
                await asyncio.sleep(0.05)
        harness.script.recorded_calls.clear()
        await harness.run(attempt)

    asyncio.run(run_after_timeout())
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "timeout")
    assert "start" not in harness.script.recorded_calls


async def test_agent_start_is_recorded_before_the_gateway_serves(make_harness):
    harness = make_harness(AttemptScript())
    served = []

    async def serve(listeners):
        served.append(bool(harness.events(AgentStarted)))
        await asyncio.Event().wait()

    harness.gateways.serve = serve
    harness.script.runs_until_signal = True

    async def scenario():
        runner = asyncio.create_task(harness.run())
        async with asyncio.timeout(20):
            while not served:
                await asyncio.sleep(0.01)
        harness.cancel(CancelAttempt(force=True))
        await runner

    await scenario()
    assert served == [True]


async def test_invalid_model_url_fails_provisioning_with_its_message(make_harness):
    harness = make_harness(AttemptScript())

    def refuse(*_, **__):
        raise ValueError("ANTHROPIC_BASE_URL has no host.")

    harness.gateways.create = refuse
    await harness.run()
    outcome = (harness.task.state, harness.task.failure.code, harness.task.failure.message)
    assert outcome == (TaskState.FAILED, "provision_failed", "ANTHROPIC_BASE_URL has no host.")


@pytest.mark.parametrize(("retries", "follow_up"), [(0, None), (1, "retry")])
async def test_sandbox_is_lost_if_its_gateway_fails(make_harness, retries, follow_up):
    harness = make_harness(AttemptScript(runs_until_signal=True), lifecycle={"retries": retries})

    async def serve(listeners):
        raise OSError("a listener is gone")

    harness.gateways.serve = serve
    await harness.run()
    failure = harness.task.failure or harness.task.attempt.failure
    assert failure.code == "sandbox_lost"
    assert "gateway failed" in failure.message
    assert harness.task.attempt.follow_up == follow_up


@pytest.mark.parametrize(("retries", "follow_up"), [(0, None), (1, "retry")])
async def test_data_loss_on_the_disk_prevents_a_resume(make_harness, monkeypatch, retries, follow_up):
    """The disk is flushed after the sandbox is destroyed, because data can still be lost until then.

    The control is `test_resume_hands_over_the_disk_and_the_session`.
    """
    harness = make_harness(AttemptScript(), lifecycle={"resume": True, "retries": retries})
    leave_files_after(harness, *TO_RUNNING)

    async def sync(self):
        assert harness.script.recorded_calls[-1] == "destroy"
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(DirectoryDisk, "sync", sync)
    await harness.finish()
    [skipped] = harness.events(FollowUpSkipped)
    assert skipped.follow_up == "resume"
    assert "could not store everything that the agent wrote (Input/output error)" in skipped.reason
    assert harness.task.attempt.follow_up == follow_up
    if not retries:
        assert harness.events(AttemptFailed)[-1].failure.code == "disk_full"
        assert harness.task.state is TaskState.FAILED
        assert "task-1.patch" in harness.artifacts


class MountedDisk(DirectoryDisk):
    """A disk whose content is visible only between `open` and `close`, like a file system in an image file."""

    def __init__(self, layout):
        super().__init__(layout)
        self._layout = layout

    async def open(self, size_bytes):
        if self._layout.disk_image.exists():
            self._layout.disk.rmdir()
            self._layout.disk_image.rename(self._layout.disk)
        await super().open(size_bytes)

    async def sync(self):
        """Check that the content is visible, because collection and handover start with this call."""
        assert (self._layout.workspace / "edited.txt").exists()

    async def close(self):
        if any(self._layout.disk.iterdir()):
            self._layout.disk.rename(self._layout.disk_image)
            self._layout.disk.mkdir()


async def test_cancel_during_the_release_of_the_disk_preserves_the_work(make_harness):
    harness = make_harness(AttemptScript(), lifecycle={"resume": True})
    leave_files_after(harness, *TO_RUNNING)

    async def remove(paths):
        if harness.task.cancel is None:
            harness.recorder.record(CancelRequested("enough"))
        await commands.remove_trees(paths)

    harness.parts = msgspec.structs.replace(
        harness.parts, remove_paths=remove, disk=MountedDisk(harness.attempt.layout)
    )
    await harness.finish()
    assert harness.task.state is TaskState.CANCELLED
    assert {"task-1.patch", "metadata.json"} <= harness.artifacts
    assert remaining_files(harness) <= {"disk", "disk.img"}


@pytest.mark.parametrize("events", [TO_RUNNING, TO_RUNNING[:1]], ids=["the agent ran", "the agent had not started"])
async def test_finisher_without_the_agent_collects_the_workspace_instead_of_preparing_an_attempt(make_harness, events):
    harness = make_harness(AttemptScript(), lifecycle={"retries": 1, "resume": True})
    harness.agent = None
    leave_files_after(harness, *events)
    await harness.finish()
    task = harness.task
    assert (task.state, task.failure.code) == (TaskState.FAILED, FailureCode.RUNNER_LOST)
    assert "task-1.patch" in harness.artifacts
    reasons = {event.reason for event in harness.events(FollowUpSkipped)}
    assert reasons == {"This server does not have the agent claude."}
    assert remaining_files(harness) == set()
