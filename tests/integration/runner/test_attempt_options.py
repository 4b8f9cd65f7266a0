"""Manifest options: secret redaction, budgets, the check of the agent's start, and preserved failures."""

import asyncio
import json
import time
from types import SimpleNamespace

import pytest

from doubles.attempt_harness import AttemptScript
from sandbox.interfaces.gateway import BudgetExhausted
from sandbox.interfaces.runtime import ExitStatus
from sandbox.model.artifacts import Artifact
from sandbox.model.egress import EgressRule
from sandbox.model.events import (
    AgentStarted,
    ArtifactCollected,
    EgressDenied,
    ErrorReported,
    Metrics,
    SandboxCreated,
    WorkspacePrepared,
)
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import FINAL_MESSAGE_CHARACTERS_MAX
from sandbox.model.task_state import TaskState
from sandbox.primitives.secret_digests import make_fingerprint
from sandbox.runner.steps.collect import ArtifactRecorder

VALUE = "hunter2-hunter2-hunter2"
SECRETS = {"TOKEN": VALUE}
ARTIFACTS_FROM_THE_JOURNAL = {"transcript.ndjson", "metadata.json"}


async def test_secret_value_is_in_no_stored_file(make_harness, tmp_path):
    script = AttemptScript(
        stdout=f"+{VALUE}\n-{VALUE}\nit is {VALUE}!\n".encode(), stderr=VALUE.encode(), exit=ExitStatus(3)
    )
    harness = make_harness(script, secrets=SECRETS)
    await harness.run()
    assert b"it is [REDACTED:TOKEN]!\n" in harness.outputs()
    stored = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in stored if VALUE.encode() in path.read_bytes()]
    assert "[REDACTED:TOKEN]" in harness.task.failure.message


async def test_host_of_denied_egress_is_redacted(make_harness):
    script = AttemptScript(runs_until_signal=True)
    harness = make_harness(script, secrets=SECRETS)

    async def scenario():
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        script.report_to_runner(EgressDenied(f"{VALUE}.evil.example", 443, "not allowed"))
        script.report_to_runner(BudgetExhausted("enough"))
        await work

    await scenario()
    assert [event.host for event in harness.events(EgressDenied)] == ["[REDACTED:TOKEN].evil.example"]


async def test_gateway_redacts_a_name_before_truncation(make_harness):
    script = AttemptScript()
    harness = make_harness(script, secrets=SECRETS)
    await harness.run()
    assert script.redact(f"{'x' * 250}.{VALUE}") == f"{'x' * 250}.[REDACTED:TOKEN]"


async def test_output_without_secrets_is_unchanged(make_harness):
    script = AttemptScript(stdout=f"it is {VALUE}!\n".encode())
    harness = make_harness(script)
    await harness.run()
    assert script.redact(VALUE) == VALUE
    assert f"it is {VALUE}!\n".encode() in harness.outputs()


async def test_artifact_with_a_secret_is_delivered_and_flagged(make_harness):
    harness = make_harness(
        AttemptScript(files_to_collect={"report.md": VALUE.encode()}),
        secrets=SECRETS,
        lifecycle={"artifact_patterns": ("*.md",)},
    )
    await harness.run()
    flags = {artifact.name: artifact.contains_secret for artifact in harness.task.artifacts}
    assert flags == {
        "report.md": True,
        "task-1.patch": False,
        "transcript.ndjson": False,
        "metadata.json": False,
    }
    assert (harness.attempt.task_layout.artifacts / "report.md").read_bytes() == VALUE.encode()


async def test_secret_too_short_for_redaction_is_reported(make_harness):
    harness = make_harness(AttemptScript(), secrets={"PIN": "1234"})
    await harness.run()
    reports = [event for event in harness.events(ErrorReported) if event.error == "secret_not_redacted"]
    assert len(reports) == 1
    assert "PIN" in reports[0].message


async def test_exhausted_budget_ends_the_task(make_harness):
    script = AttemptScript(runs_until_signal=True)
    harness = make_harness(script, lifecycle={"budget_usd": 0.05, "budget_tokens": 1000})

    async def scenario():
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        assert (script.gateway_rules.budget.usd, script.gateway_rules.budget.tokens) == (0.05, 1000)
        script.report_to_runner(BudgetExhausted("0.05 USD are spent; raise lifecycle.budget_usd."))
        await work

    await scenario()
    assert harness.task.failure.code == "budget_exceeded"
    assert "signal SIGTERM" in script.recorded_calls


@pytest.mark.parametrize("claude", [{"allowed_tools": ("Read",)}, {"allowed_tools": ()}])
async def test_model_requests_are_held_until_the_start_is_checked(make_harness, claude):
    script = AttemptScript(stdout=b"!\nhello\n")
    harness = make_harness(script, claude=claude)
    await harness.run()
    assert script.gateway_rules.hold_model_requests
    assert "release model" in script.recorded_calls


async def test_failed_start_check_ends_the_task_before_a_model_request(make_harness):
    failure = Failure(FailureCode.MCP_FAILED, "The MCP server 'github' did not connect.")
    script = AttemptScript(stdout=b"!\n", runs_until_signal=True, start_check_failure=failure)
    harness = make_harness(script, claude={"allowed_tools": ("mcp__github",)})
    await harness.run()
    assert harness.task.failure == failure
    assert "release model" not in script.recorded_calls


async def test_model_requests_are_not_held_without_a_start_check(make_harness):
    script = AttemptScript(stdout=b"!\n")
    harness = make_harness(script)
    await harness.run()
    assert not script.gateway_rules.hold_model_requests


async def test_gateway_receives_the_egress_rules(make_harness):
    script = AttemptScript()
    harness = make_harness(script, vm={"network_mode": "outbound", "allowed_hosts": ("api.github.com",)})
    await harness.run()
    assert script.gateway_rules.egress.rules == (EgressRule("api.github.com"),)


async def test_rendered_output_is_stdout_and_events_are_the_transcript(make_harness):
    harness = make_harness(AttemptScript(stdout=b"event one\nevent two\n"), claude={"output_format": "text"})
    await harness.run()
    assert harness.outputs("stdout") == [b"rendered\n"]
    transcript = harness.attempt.task_layout.artifacts / "transcript.ndjson"
    assert transcript.read_bytes() == b"event one\nevent two\n"


@pytest.mark.parametrize("exit_code", [0, 3])
async def test_last_message_is_recorded_with_the_exit(make_harness, exit_code):
    harness = make_harness(
        AttemptScript(stdout=b"<.tsriF\n+Bash\n-Bash\n<.tsaL\nnot a message\n", exit=ExitStatus(exit_code))
    )
    await harness.run()
    assert harness.task.final_message == "Last."


async def test_agent_without_a_message_has_no_final_message(make_harness):
    harness = make_harness(AttemptScript())
    await harness.run()
    assert (harness.task.state, harness.task.final_message) == (TaskState.COMPLETED, None)


async def test_final_message_is_cut_after_secrets_are_redacted(make_harness):
    text = "x" * (FINAL_MESSAGE_CHARACTERS_MAX - len(VALUE) // 2) + VALUE
    harness = make_harness(AttemptScript(stdout=f"<{text[::-1]}\n".encode()), secrets=SECRETS)
    await harness.run()
    message = harness.task.final_message
    assert (len(message), message[-1]) == (FINAL_MESSAGE_CHARACTERS_MAX, "…")
    assert message.rstrip("…").lstrip("x")
    assert not VALUE.startswith(message.rstrip("…").lstrip("x"))


@pytest.mark.parametrize("output_format", ["stream-json", "text"])
async def test_terminal_output_is_not_parsed_as_events(make_harness, output_format):
    terminal_output = b'\x1b[2J{"type":"result","is_error":false}\n'
    harness = make_harness(
        AttemptScript(stdout=terminal_output), claude={"headless": False, "output_format": output_format}
    )
    await asyncio.wait_for(harness.run(), 20)
    assert harness.states[-1] == "completed"
    assert harness.outputs("stdout") == [terminal_output]
    assert (harness.attempt.task_layout.artifacts / "transcript.ndjson").read_bytes() == b""


async def test_preserved_failure_keeps_only_the_workspace_files(make_harness):
    harness = make_harness(AttemptScript(exit=ExitStatus(3)), lifecycle={"failure_action": "preserve"})
    await harness.run()
    assert harness.task.state is TaskState.FAILED_PRESERVED
    assert harness.attempt.layout.workspace.is_dir()
    assert not harness.attempt.layout.handle.exists()
    assert harness.script.recorded_destroyed_disks == [harness.attempt.layout.disk]
    metadata = json.loads((harness.attempt.task_layout.artifacts / "metadata.json").read_text())
    assert metadata["state"] == "failed_preserved"


async def test_success_preserves_no_files(make_harness):
    harness = make_harness(AttemptScript(), lifecycle={"failure_action": "preserve"})
    await harness.run()
    assert harness.task.state is TaskState.COMPLETED
    assert not harness.attempt.layout.disk.exists()
    assert harness.script.recorded_destroyed_disks == [None]


async def test_sandbox_resource_usage_is_sampled(make_harness):
    harness = make_harness(AttemptScript(), vm={"memory": "2G"})
    await harness.run()
    samples = harness.events(Metrics)
    assert samples
    assert (samples[0].memory_used_bytes, samples[0].memory_total_bytes) == (4096, 2 * 1024**3)


async def test_artifacts_with_secret_names_get_distinct_redacted_names(make_harness):
    """The files are not merged, and the recorded names match the files."""
    script = AttemptScript(
        files_to_collect={f"a-{VALUE}.txt": b"one", f"b-{VALUE}.txt": b"two", "redacted-1": b"three"}
    )
    harness = make_harness(script, secrets=SECRETS, lifecycle={"artifact_patterns": ("*",)})
    await harness.run()
    directory = harness.attempt.task_layout.artifacts
    contents = {artifact.name: (directory / artifact.name).read_bytes() for artifact in harness.task.artifacts}
    assert sorted(contents[name] for name in contents if "redacted" in name) == [b"one", b"three", b"two"]
    assert not [path for path in directory.iterdir() if VALUE in path.name]


@pytest.mark.parametrize("secrets", [None, {"TOKEN": "another-value-since-then"}])
async def test_finisher_without_secret_values_redacts_names_and_flags_everything(make_harness, secrets):
    names = (f"a-{VALUE}.txt", f"b-{VALUE}.txt", "redacted-1")
    script = AttemptScript(files_to_collect={name: name.encode() for name in names})
    harness = attempt_of_dead_runner(make_harness, script, secrets)
    await harness.finish()
    directory = harness.attempt.task_layout.artifacts
    contents = {artifact.name: (directory / artifact.name).read_bytes().decode() for artifact in harness.task.artifacts}
    assert sorted(contents[name] for name in contents if name.startswith("redacted-")) == sorted(names)
    assert artifacts_without_secret(harness) == ARTIFACTS_FROM_THE_JOURNAL
    assert VALUE not in repr(harness.events(object))
    assert VALUE not in repr(harness.task.artifacts)


@pytest.mark.parametrize(
    ("secrets", "reason"),
    [
        (None, "the reason is withheld, because the values of the secrets are unknown"),
        (
            {"TOKEN": "another-value-since-then"},
            "the reason is withheld, because the values of the secrets are unknown",
        ),
        (SECRETS, "[REDACTED:TOKEN].bin exceeds the limit"),
    ],
)
async def test_finisher_reports_no_secret_in_the_name_of_a_file_that_is_too_large_for_the_patch(
    make_harness, secrets, reason
):
    script = AttemptScript(patch_incomplete_reason=f"{VALUE}.bin exceeds the limit")
    harness = attempt_of_dead_runner(make_harness, script, secrets)
    harness.attempt.layout.host_git_directory.mkdir()
    await harness.finish()
    reported = [event.message for event in harness.events(ErrorReported) if event.error == "patch_truncated"]
    assert len(reported) == 1
    assert reason in reported[0]
    assert VALUE not in repr(harness.events(object))


async def test_finisher_preserves_names_and_flags_that_the_runner_recorded(make_harness):
    """The runner died immediately after it had stored the artifact."""
    harness = attempt_of_dead_runner(
        make_harness, AttemptScript(files_to_collect={"report.md": b"ours\n", "other.md": b"x\n"}), None
    )
    directory = harness.attempt.task_layout.artifacts
    directory.mkdir()
    (directory / "report.md").write_bytes(b"ours\n")
    report = Artifact("report.md", "report.md", 5, "text/markdown", "sha256:0")
    harness.recorder.record(ArtifactCollected(report))
    await harness.finish()
    assert artifacts_without_secret(harness) == {"report.md"} | ARTIFACTS_FROM_THE_JOURNAL
    assert harness.artifacts == {path.name for path in directory.iterdir()}
    assert harness.artifacts == {"report.md", "redacted-1"} | ARTIFACTS_FROM_THE_JOURNAL


@pytest.mark.parametrize("checksum", ["sha256:0", "sha256:1"])
async def test_finisher_records_no_new_path_for_an_existing_artifact_name(make_harness, monkeypatch, checksum):
    """The agent may have continued after its runner died, so the file with this name may now be at another path."""

    async def collect_report(self, workspace, patterns, target, taken_names):
        (target / "report.md").write_bytes(VALUE.encode())
        yield Artifact("report.md", f"{VALUE}/report.md", len(VALUE), "text/markdown", checksum)

    monkeypatch.setattr("doubles.attempt_harness.ScriptedWorkspaces.collect", collect_report)
    harness = attempt_of_dead_runner(make_harness, AttemptScript(), None)
    harness.recorder.record(ArtifactCollected(Artifact("report.md", "docs/report.md", 5, "text/markdown", "sha256:0")))
    await harness.finish()
    assert VALUE not in repr(harness.task.artifacts)
    assert artifacts_without_secret(harness) == ARTIFACTS_FROM_THE_JOURNAL
    assert harness.artifacts == {path.name for path in harness.attempt.task_layout.artifacts.iterdir()}
    assert harness.artifacts == {"report.md"} | ARTIFACTS_FROM_THE_JOURNAL


def artifacts_without_secret(harness):
    return {artifact.name for artifact in harness.task.artifacts if not artifact.contains_secret}


async def test_finisher_with_secret_values_flags_only_matches(make_harness):
    script = AttemptScript(files_to_collect={"a.txt": VALUE.encode(), "b.txt": b"plain"})
    harness = attempt_of_dead_runner(make_harness, script, SECRETS)
    await harness.finish()
    flags = {artifact.name: artifact.contains_secret for artifact in harness.task.artifacts}
    assert (flags["a.txt"], flags["b.txt"], flags["metadata.json"]) == (True, False, False)


def attempt_of_dead_runner(make_harness, script, secrets):
    """Create the attempt of a dead runner whose agent had SECRETS; the finisher has `secrets`."""
    harness = make_harness(
        script, secrets=secrets, manifest_secrets=("TOKEN",), lifecycle={"artifact_patterns": ("*",)}
    )
    for event in (WorkspacePrepared("c0ffee" + "0" * 34), SandboxCreated("v", "scripted", "host"), AgentStarted("s")):
        harness.recorder.record(event)
    harness.attempt.layout.workspace.mkdir(parents=True)
    harness.attempt.layout.secret_fingerprint.write_bytes(make_fingerprint(SECRETS))
    return harness


async def test_secret_scan_stops_soon_after_the_collection_timeout(tmp_path):
    """A thread cannot be cancelled, and a runner does not exit before its threads have ended."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1024**3)

    class SlowRedaction:
        chunks = 0

        def contains(self, chunks):
            for _ in chunks:
                self.chunks += 1
                time.sleep(0.01)

    async def scenario():
        slow = SlowRedaction()
        large = Artifact("large", "large", 0, "", "")
        attempt = SimpleNamespace(task_layout=SimpleNamespace(artifacts=tmp_path))
        checking = asyncio.create_task(ArtifactRecorder(attempt, slow).record(large))
        while not slow.chunks:
            await asyncio.sleep(0.005)
        checking.cancel()
        await asyncio.gather(checking, return_exceptions=True)
        return slow

    slow = await scenario()  # returns only when the threads have ended
    assert slow.chunks < 50
