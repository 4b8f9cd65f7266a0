"""What a manifest may ask of a run: secrets kept out of everything told, budgets, a judged start, a preserved end."""

import asyncio
import json
import time
from types import SimpleNamespace

import pytest

from doubles.attempt_dependencies import Script
from sandbox.interfaces.gateway import BudgetExhausted
from sandbox.interfaces.runtime import ExitStatus
from sandbox.interfaces.secrets import make_fingerprint
from sandbox.model.egress import EgressRule
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import (
    AgentStarted,
    Artifact,
    ArtifactCollected,
    EgressDenied,
    ErrorReported,
    Metrics,
    SandboxCreated,
    WorkspacePrepared,
)
from sandbox.model.task_state import TaskState
from sandbox.runner.steps.collect import _flag_secrets

VALUE = "hunter2-hunter2-hunter2"
SECRETS = {"TOKEN": VALUE}
FROM_THE_JOURNAL = {"transcript.ndjson", "metadata.json"}


def test_the_value_of_a_secret_is_in_nothing_that_is_kept(stage, tmp_path):
    script = Script(stdout=f"+{VALUE}\n-{VALUE}\nit is {VALUE}!\n".encode(), stderr=VALUE.encode(), exit=ExitStatus(3))
    scene = stage(script, secrets=SECRETS)
    asyncio.run(scene.life.run())
    assert b"it is [REDACTED:TOKEN]!\n" in scene.outputs()
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if VALUE.encode() in path.read_bytes()]
    assert "[REDACTED:TOKEN]" in scene.task.failure.message


def test_what_a_refusal_names_is_redacted_too(stage):
    script = Script(stays=True)
    scene = stage(script, secrets=SECRETS)

    async def play():
        work = asyncio.create_task(scene.life.run())
        await scene.until(TaskState.RUNNING)
        script.report(EgressDenied(f"{VALUE}.evil.example", 443, "not allowed"))
        script.report(BudgetExhausted("enough"))
        await work

    asyncio.run(play())
    assert [event.host for event in scene.events(EgressDenied)] == ["[REDACTED:TOKEN].evil.example"]


def test_the_gateway_can_redact_a_name_before_it_cuts_it(stage):
    script = Script()
    scene = stage(script, secrets=SECRETS)
    asyncio.run(scene.life.run())
    assert script.redact(f"{'x' * 250}.{VALUE}") == f"{'x' * 250}.[REDACTED:TOKEN]"


def test_without_secrets_nothing_is_changed(stage):
    script = Script(stdout=f"it is {VALUE}!\n".encode())
    scene = stage(script)
    asyncio.run(scene.life.run())
    assert script.redact(VALUE) == VALUE
    assert f"it is {VALUE}!\n".encode() in scene.outputs()


def test_an_artifact_that_holds_a_secret_is_delivered_and_flagged(stage):
    scene = stage(
        Script(collected={"report.md": VALUE.encode()}), secrets=SECRETS, lifecycle={"artifact_patterns": ("*.md",)}
    )
    asyncio.run(scene.life.run())
    flags = {artifact.name: artifact.contains_secret for artifact in scene.task.artifacts}
    assert flags == {
        "report.md": True,
        "task-1.patch": False,
        "transcript.ndjson": False,
        "metadata.json": False,
    }
    assert (scene.attempt.task_files.artifacts / "report.md").read_bytes() == VALUE.encode()


def test_a_value_too_short_to_be_found_is_told(stage):
    scene = stage(Script(), secrets={"PIN": "1234"})
    asyncio.run(scene.life.run())
    told = [event for event in scene.events(ErrorReported) if event.error == "secret_not_redacted"]
    assert len(told) == 1
    assert "PIN" in told[0].message


def test_a_budget_that_is_reached_ends_the_task(stage):
    script = Script(stays=True)
    scene = stage(script, lifecycle={"budget_usd": 0.05, "budget_tokens": 1000})

    async def play():
        work = asyncio.create_task(scene.life.run())
        await scene.until(TaskState.RUNNING)
        assert (script.rules.budget.usd, script.rules.budget.tokens) == (0.05, 1000)
        script.report(BudgetExhausted("0.05 USD are spent; raise lifecycle.budget_usd."))
        await work

    asyncio.run(play())
    assert scene.task.failure.code == "budget_exceeded"
    assert "signal SIGTERM" in script.seen


@pytest.mark.parametrize("claude", [{"allowed_tools": ("Read",)}, {"allowed_tools": ()}])
def test_the_model_waits_until_the_start_is_judged(stage, claude):
    script = Script(stdout=b"!\nhello\n")
    scene = stage(script, claude=claude)
    asyncio.run(scene.life.run())
    assert script.rules.hold_model_requests
    assert "release model" in script.seen


def test_a_start_without_what_was_asked_for_ends_the_task_before_the_model_is_asked(stage):
    lost = Failure(FailureCode.MCP_FAILED, "The MCP server 'github' did not connect.")
    script = Script(stdout=b"!\n", stays=True, start_failure=lost)
    scene = stage(script, claude={"allowed_tools": ("mcp__github",)})
    asyncio.run(scene.life.run())
    assert scene.task.failure == lost
    assert "release model" not in script.seen


def test_nothing_to_judge_holds_nothing_back(stage):
    script = Script(stdout=b"!\n")
    scene = stage(script)
    asyncio.run(scene.life.run())
    assert not script.rules.hold_model_requests


def test_the_gateway_is_told_which_hosts_are_allowed(stage):
    script = Script()
    scene = stage(script, vm={"network_mode": "outbound", "allowed_hosts": ("api.github.com",)})
    asyncio.run(scene.life.run())
    assert script.rules.egress.rules == (EgressRule("api.github.com"),)


def test_rendered_output_is_stdout_and_the_events_are_the_transcript(stage):
    scene = stage(Script(stdout=b"event one\nevent two\n"), claude={"output_format": "text"})
    asyncio.run(scene.life.run())
    assert scene.outputs("stdout") == [b"rendered\n"]
    transcript = scene.attempt.task_files.artifacts / "transcript.ndjson"
    assert transcript.read_bytes() == b"event one\nevent two\n"


@pytest.mark.parametrize("output_format", ["stream-json", "text"])
def test_a_terminal_tells_no_events_whatever_is_written_to_it(stage, output_format):
    drawn = b'\x1b[2J{"type":"result","is_error":false}\n'
    scene = stage(Script(stdout=drawn), claude={"headless": False, "output_format": output_format})
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert scene.states[-1] == "completed"
    assert scene.outputs("stdout") == [drawn]
    assert (scene.attempt.task_files.artifacts / "transcript.ndjson").read_bytes() == b""


def test_a_preserved_failure_keeps_the_files_and_nothing_else(stage):
    scene = stage(Script(exit=ExitStatus(3)), lifecycle={"failure_action": "preserve"})
    asyncio.run(scene.life.run())
    assert scene.task.state is TaskState.FAILED_PRESERVED
    assert scene.attempt.files.workspace.is_dir()
    assert not scene.attempt.files.handle.exists()
    assert scene.script.taken_back == [scene.attempt.files.disk]
    metadata = json.loads((scene.attempt.task_files.artifacts / "metadata.json").read_text())
    assert metadata["state"] == "failed_preserved"


def test_a_success_preserves_nothing(stage):
    scene = stage(Script(), lifecycle={"failure_action": "preserve"})
    asyncio.run(scene.life.run())
    assert scene.task.state is TaskState.COMPLETED
    assert not scene.attempt.files.disk.exists()
    assert scene.script.taken_back == [None]


def test_what_the_sandbox_uses_is_sampled(stage):
    scene = stage(Script(), vm={"memory": "2G"})
    asyncio.run(scene.life.run())
    samples = scene.events(Metrics)
    assert samples
    assert (samples[0].memory_used_bytes, samples[0].memory_total_bytes) == (4096, 2 * 1024**3)


def test_artifacts_whose_names_hold_a_secret_get_names_of_their_own(stage):
    """Two of them never become one file, and what is recorded is what is there."""
    script = Script(collected={f"a-{VALUE}.txt": b"one", f"b-{VALUE}.txt": b"two", "redacted-1": b"three"})
    scene = stage(script, secrets=SECRETS, lifecycle={"artifact_patterns": ("*",)})
    asyncio.run(scene.life.run())
    directory = scene.attempt.task_files.artifacts
    contents = {artifact.name: (directory / artifact.name).read_bytes() for artifact in scene.task.artifacts}
    assert sorted(contents[name] for name in contents if "redacted" in name) == [b"one", b"three", b"two"]
    assert not [path for path in directory.iterdir() if VALUE in path.name]


@pytest.mark.parametrize("secrets", [None, {"TOKEN": "another-value-since-then"}])
def test_a_finisher_that_does_not_know_the_values_flags_everything_and_names_nothing(stage, secrets):
    names = (f"a-{VALUE}.txt", f"b-{VALUE}.txt", "redacted-1")
    script = Script(collected={name: name.encode() for name in names})
    scene = left_by_a_dead_runner(stage, script, secrets)
    asyncio.run(scene.life.finish())
    directory = scene.attempt.task_files.artifacts
    kept = {one.name: (directory / one.name).read_bytes().decode() for one in scene.task.artifacts}
    assert sorted(kept[name] for name in kept if name.startswith("redacted-")) == sorted(names)
    assert unflagged(scene) == FROM_THE_JOURNAL
    assert VALUE not in repr(scene.events(object))
    assert VALUE not in repr(scene.task.artifacts)


def test_what_was_named_and_flagged_by_who_knew_the_values_stays_so(stage):
    """The runner had just kept it when it died."""
    scene = left_by_a_dead_runner(stage, Script(collected={"report.md": b"ours\n", "other.md": b"x\n"}), None)
    directory = scene.attempt.task_files.artifacts
    directory.mkdir()
    (directory / "report.md").write_bytes(b"ours\n")
    report = Artifact("report.md", "report.md", 5, "text/markdown", "sha256:0")
    scene.recorder.record(ArtifactCollected(report))
    asyncio.run(scene.life.finish())
    assert unflagged(scene) == {"report.md"} | FROM_THE_JOURNAL
    assert scene.artifacts == {path.name for path in directory.iterdir()}
    assert scene.artifacts == {"report.md", "redacted-1"} | FROM_THE_JOURNAL


@pytest.mark.parametrize("checksum", ["sha256:0", "sha256:1"])
def test_what_has_the_name_of_something_kept_tells_no_path_that_was_not_told_before(stage, monkeypatch, checksum):
    """The agent went on for a while after its runner had died, and what was kept first may be called another name."""

    async def find(self, workspace, patterns, target, taken_names):
        (target / "report.md").write_bytes(VALUE.encode())
        yield Artifact("report.md", f"{VALUE}/report.md", len(VALUE), "text/markdown", checksum)

    monkeypatch.setattr("doubles.attempt_dependencies.ScriptedWorkspaces.collect", find)
    scene = left_by_a_dead_runner(stage, Script(), None)
    scene.recorder.record(ArtifactCollected(Artifact("report.md", "docs/report.md", 5, "text/markdown", "sha256:0")))
    asyncio.run(scene.life.finish())
    assert VALUE not in repr(scene.task.artifacts)
    assert unflagged(scene) == FROM_THE_JOURNAL
    assert scene.artifacts == {path.name for path in scene.attempt.task_files.artifacts.iterdir()}
    assert scene.artifacts == {"report.md"} | FROM_THE_JOURNAL


def unflagged(scene):
    return {artifact.name for artifact in scene.task.artifacts if not artifact.contains_secret}


def test_a_finisher_that_knows_the_values_names_and_flags_as_ever(stage):
    script = Script(collected={"a.txt": VALUE.encode(), "b.txt": b"plain"})
    scene = left_by_a_dead_runner(stage, script, SECRETS)
    asyncio.run(scene.life.finish())
    flags = {artifact.name: artifact.contains_secret for artifact in scene.task.artifacts}
    assert (flags["a.txt"], flags["b.txt"], flags["metadata.json"]) == (True, False, False)


def left_by_a_dead_runner(stage, script, secrets):
    """A task whose agent had the values, as a finisher finds it that has `secrets`."""
    scene = stage(script, secrets=secrets, manifest_secrets=("TOKEN",), lifecycle={"artifact_patterns": ("*",)})
    for event in (WorkspacePrepared("c0ffee" + "0" * 34), SandboxCreated("v", "scripted", "host"), AgentStarted("s")):
        scene.recorder.record(event)
    scene.attempt.files.workspace.mkdir(parents=True)
    scene.attempt.files.secret_fingerprint.write_bytes(make_fingerprint(SECRETS))
    return scene


def test_looking_for_secrets_ends_soon_after_the_time_for_collecting(tmp_path):
    """A thread cannot be cancelled, and a runner lives as long as its threads."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1024**3)

    class SlowRedaction:
        chunks = 0

        def contains(self, chunks):
            for _ in chunks:
                self.chunks += 1
                time.sleep(0.01)

    async def play():
        slow = SlowRedaction()
        large = Artifact("large", "large", 0, "", "")
        checking = asyncio.create_task(_flag_secrets(SimpleNamespace(redaction=slow), tmp_path, large))
        while not slow.chunks:
            await asyncio.sleep(0.005)
        checking.cancel()
        await asyncio.gather(checking, return_exceptions=True)
        return slow

    slow = asyncio.run(play())  # which waits for its threads
    assert slow.chunks < 50
