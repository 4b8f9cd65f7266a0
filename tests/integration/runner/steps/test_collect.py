"""The artifacts of an attempt are bounded, and retries do not duplicate them."""

import asyncio
import errno
import hashlib
import json
import threading
import time

import pytest

from doubles.attempt_harness import BASE_COMMIT, AttemptScript
from sandbox.interfaces.workspace import PatchResult, SkippedFile
from sandbox.model.artifacts import Artifact
from sandbox.model.events import ArtifactCollected, AttemptFailed, EgressDenied, ErrorReported
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.resources import DiskSpace
from sandbox.model.task_state import TaskState
from sandbox.runner import attempt
from sandbox.runner.steps import collect
from sandbox.runner.steps.teardown import TeardownStep
from sandbox.secrets.redaction.redactor import SecretRedactor
from sandbox.workspace.artifacts import ArtifactNames

SECRET = "s3cret-value-of-the-customer"


async def test_denied_egress_is_counted_and_listed_up_to_a_limit(make_harness, monkeypatch):
    monkeypatch.setattr(collect, "_DENIALS_MAX", 3)
    harness = make_harness(
        AttemptScript(
            events_when_serving=[EgressDenied(f"host-{number}.test", 443, "not allowed") for number in range(7)]
        )
    )
    await harness.run()
    metadata = json.loads((harness.attempt.task_layout.artifacts / "metadata.json").read_text())
    assert [each["host"] for each in metadata["refusals"]] == ["host-0.test", "host-1.test", "host-2.test"]
    assert metadata["refusals_total"] == 7


async def test_retries_on_a_full_disk_do_not_duplicate_renamed_artifacts(make_harness, monkeypatch):
    """The agent's file `redacted-1` keeps its name when the artifacts are collected again."""
    monkeypatch.setattr("sandbox.runner.attempt.HOST_ERROR_PAUSE_SECONDS", 0.01)
    collected = {f"{SECRET}-a.md": b"a\n", "redacted-1": b"the agent's\n", f"{SECRET}-b.md": b"b\n"}
    harness = make_harness(
        AttemptScript(files_to_collect=collected),
        secrets={"KEY": SECRET},
        lifecycle={"artifact_patterns": ("*",), "timeout": "20s"},
    )
    refused, store_chunks = [], collect.ArtifactRecorder.store_chunks

    async def fail_while_disk_is_full(artifacts, name, *rest):
        if name == "metadata.json" and len(refused) < 4:
            refused.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        await store_chunks(artifacts, name, *rest)

    monkeypatch.setattr(collect.ArtifactRecorder, "store_chunks", fail_while_disk_is_full)
    await asyncio.wait_for(harness.run(), 20)
    artifacts = harness.attempt.task_layout.artifacts
    stored = {path.name: path.read_bytes() for path in artifacts.glob("redacted-*")}
    assert len(refused) == 4
    assert stored == {"redacted-1": b"the agent's\n", "redacted-2": b"a\n", "redacted-3": b"b\n"}
    assert harness.artifacts == {*stored, "task-1.patch", "transcript.ndjson", "metadata.json"}


def simulate_workspace_files(monkeypatch, paths):
    """Simulate a workspace with these files. The artifacts get the names that they would get from a real workspace."""

    async def collect_files(self, workspace, patterns, target, taken_names):
        names = ArtifactNames(taken_names)
        for path in paths:
            name = names.allocate(path.encode())
            (target / name).write_bytes(path.encode())
            yield Artifact(name, path, len(path), "text/markdown", "sha256:0")

    monkeypatch.setattr("doubles.attempt_harness.ScriptedWorkspaces.collect", collect_files)


async def test_name_truncated_within_a_secret_is_redacted(make_harness, monkeypatch):
    """Truncation removes the start of a name, and thus part of the secret. Only the path contains directories."""
    paths = (f"{SECRET}-{'x' * 180}.md", f"{SECRET}/{'y' * 230}.md", f"{SECRET}/notes.md", f"out/{'z' * 230}.md")
    simulate_workspace_files(monkeypatch, paths)
    harness = make_harness(AttemptScript(), secrets={"KEY": SECRET}, lifecycle={"artifact_patterns": ("**",)})
    await harness.run()
    paths_by_name = {artifact.name: artifact.path for artifact in harness.task.artifacts if not artifact.is_generated}
    replacement = "[REDACTED:KEY]"
    assert paths_by_name.pop("redacted-1") == f"{replacement}-{'x' * 180}.md"
    assert paths_by_name.pop("redacted-2") == f"{replacement}/{'y' * 230}.md"
    assert paths_by_name == {"notes.md": f"{replacement}/notes.md", f"{'z' * 197}.md": f"out/{'z' * 230}.md"}
    assert harness.artifacts == {path.name for path in harness.attempt.task_layout.artifacts.iterdir()}


async def test_name_equal_to_the_end_of_a_secret_with_slashes_is_redacted(make_harness, monkeypatch):
    """The path contains the whole value and is redacted. The name would reveal the text after the last slash."""
    value = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
    simulate_workspace_files(monkeypatch, [f"out/{value}", f"out/{value}.md", f"{value}/notes.md", "K7MDENG/report.md"])
    harness = make_harness(AttemptScript(), secrets={"KEY": value}, lifecycle={"artifact_patterns": ("**",)})
    await harness.run()
    replacement = "[REDACTED:KEY]"
    assert {one.name: one.path for one in harness.task.artifacts if not one.is_generated} == {
        "notes.md": f"{replacement}/notes.md",
        "report.md": "K7MDENG/report.md",
        "redacted-1": f"out/{replacement}",
        "redacted-2": f"out/{replacement}.md",
    }


@pytest.mark.parametrize(("content", "is_flagged"), [(b"\x00" + SECRET.encode(), True), (b"\x00ordinary", False)])
async def test_patch_is_flagged_for_secrets_in_its_files(make_harness, content, is_flagged):
    """Git may have compressed the content in the patch."""
    harness = make_harness(AttemptScript(patch_content=content), secrets={"KEY": SECRET})
    await harness.run()
    flags = {artifact.name: artifact.contains_secret for artifact in harness.task.artifacts}
    assert flags == {"task-1.patch": is_flagged, "transcript.ndjson": False, "metadata.json": False}


@pytest.mark.parametrize("value", [BASE_COMMIT[:8], "task-1.p", "transcript"])
async def test_secret_within_a_generated_name_does_not_remove_artifacts(make_harness, value):
    """Any value of eight characters can be a secret, even a commit id or a word in a task's name."""
    base_commits = []
    harness = make_harness(AttemptScript(), secrets={"WORD": value}, lifecycle={"artifact_patterns": ("*",)})
    workspaces = harness.parts.workspaces
    make_patch = workspaces.write_patch
    workspaces.write_patch = lambda root, base, *rest: (base_commits.append(base), make_patch(root, base, *rest))[1]
    await harness.run()
    assert (harness.task.state, harness.task.base_commit, base_commits) == (
        TaskState.COMPLETED,
        BASE_COMMIT,
        [BASE_COMMIT],
    )
    assert harness.artifacts >= {"task-1.patch", "transcript.ndjson", "metadata.json"}
    assert harness.artifacts == {path.name for path in harness.attempt.task_layout.artifacts.iterdir()}


def test_error_codes_are_not_redacted(make_harness):
    harness = make_harness(AttemptScript(), secrets={"WORD": "artifact"})
    harness.recorder.record(ErrorReported("artifact_left_out", "An artifact was left out."))
    assert harness.events(ErrorReported) == [ErrorReported("artifact_left_out", "An [REDACTED:WORD] was left out.")]


@pytest.mark.parametrize("step", ["read_records", "replace_durably"], ids=["writing", "flushing"])
async def test_partial_file_is_removed_before_the_next_try_on_a_full_disk(make_harness, monkeypatch, step):
    """If the file remained, one task would occupy the space that other tasks free, until its collection times out."""
    monkeypatch.setattr("sandbox.runner.attempt.HOST_ERROR_PAUSE_SECONDS", 0.01)
    harness = make_harness(
        AttemptScript(), claude={"output_format": "stream-json"}, lifecycle={"collect_timeout": "20s"}
    )
    part, original, refused, leftovers = (
        harness.attempt.layout.root / "transcript.ndjson",
        getattr(collect, step),
        [],
        [],
    )

    def refuse(*arguments):
        if len(refused) == 3 or not part.exists():
            return original(*arguments)
        refused.append(step)
        raise OSError(errno.ENOSPC, "No space left on device")

    async def patch(self, attempt_dir, base_commit, target, confine, detect_secret):
        leftovers.append(part.exists())
        target.write_bytes(b"diff --git a/a b/a\n")
        return PatchResult()

    monkeypatch.setattr(collect, step, refuse)
    monkeypatch.setattr("doubles.attempt_harness.ScriptedWorkspaces.write_patch", patch)
    await asyncio.wait_for(harness.run(), 20)
    assert (harness.task.state, len(refused), leftovers) == (TaskState.COMPLETED, 3, [False] * 4)
    assert "transcript.ndjson" in harness.artifacts


@pytest.mark.parametrize("missing_bytes", [0, 1])
async def test_large_transcript_that_would_fill_the_disk_is_not_copied(make_harness, monkeypatch, missing_bytes):
    monkeypatch.setattr(collect, "_SMALL_TRANSCRIPT_BYTES", 10)
    output = b'{"type":"result"}\n' * 10
    harness = make_harness(
        AttemptScript(stdout=output, stderr=output),
        claude={"output_format": "stream-json"},
        lifecycle={"collect_timeout": "1s"},
    )
    harness.space = DiskSpace(len(output) - missing_bytes, 200)
    await asyncio.wait_for(harness.run(), 20)
    assert ("transcript.ndjson" in harness.artifacts) is (not missing_bytes)
    failure = harness.task.failure
    assert (failure and failure.code) == (FailureCode.DISK_FULL if missing_bytes else None)


async def test_retries_on_a_full_disk_do_not_repeat_events(make_harness, monkeypatch):
    """If each retry, one per second, recorded thousands of events, the remaining space would fill up."""
    monkeypatch.setattr("sandbox.runner.attempt.HOST_ERROR_PAUSE_SECONDS", 0.01)
    patch_error = AttemptError(FailureCode.COLLECT_FAILED, "The patch could not be created: it is odd.")
    harness = make_harness(
        AttemptScript(patch_error=patch_error), lifecycle={"artifact_patterns": ("*",), "collect_timeout": "20s"}
    )
    refused, store_chunks = [], collect.ArtifactRecorder.store_chunks

    async def skip_files(self, *_):
        for name in ("fifo", "link"):
            yield SkippedFile(name, "it is not a regular file")

    async def fail_while_disk_is_full(artifacts, name, *rest):
        if name == "metadata.json" and len(refused) < 4:
            refused.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        await store_chunks(artifacts, name, *rest)

    monkeypatch.setattr("doubles.attempt_harness.ScriptedWorkspaces.collect", skip_files)
    monkeypatch.setattr(collect.ArtifactRecorder, "store_chunks", fail_while_disk_is_full)
    await asyncio.wait_for(harness.run(), 20)
    assert len(refused) == 4
    assert [report.message.partition(":")[0] for report in harness.events(ErrorReported)] == ["fifo", "link"]
    assert [failed.failure.code for failed in harness.events(AttemptFailed)] == [FailureCode.COLLECT_FAILED]
    assert [each.artifact.name for each in harness.events(ArtifactCollected)] == ["transcript.ndjson", "metadata.json"]


async def test_stored_transcript_needs_no_additional_space_on_a_retry(make_harness, monkeypatch):
    monkeypatch.setattr("sandbox.runner.attempt.HOST_ERROR_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(collect, "_SMALL_TRANSCRIPT_BYTES", 10)
    harness = make_harness(
        AttemptScript(), claude={"output_format": "stream-json"}, lifecycle={"collect_timeout": "20s"}
    )
    refused, store_chunks = [], collect.ArtifactRecorder.store_chunks

    async def fail_while_disk_is_full(artifacts, name, *rest):
        if name == "metadata.json" and len(refused) < 4:
            refused.append(name)
            harness.space = DiskSpace(10, 100)
            raise OSError(errno.ENOSPC, "No space left on device")
        await store_chunks(artifacts, name, *rest)

    monkeypatch.setattr(collect.ArtifactRecorder, "store_chunks", fail_while_disk_is_full)
    await asyncio.wait_for(harness.run(), 20)
    assert (harness.task.state, len(refused)) == (TaskState.COMPLETED, 4)
    assert (harness.attempt.task_layout.artifacts / "transcript.ndjson").read_bytes() == harness.script.stdout


async def test_artifact_without_time_for_a_secret_scan_is_stored_and_flagged(make_harness, slow_secret_scan):
    """The time limit applies to the total for all artifacts; no single artifact exceeds the limit."""
    names = [f"{letter}.md" for letter in "abcdef"]
    harness = make_harness(
        AttemptScript(files_to_collect=dict.fromkeys(names, b"slow " * 4)),
        secrets={"KEY": SECRET},
        lifecycle={"collect_timeout": "5s", "artifact_patterns": ("*",)},
    )
    await asyncio.wait_for(harness.run(), 20)
    assert harness.task.state is TaskState.COMPLETED
    flags = {artifact.name: artifact.contains_secret for artifact in harness.task.artifacts}
    assert flags.keys() == {"task-1.patch", "transcript.ndjson", "metadata.json", *names}
    assert (flags["task-1.patch"], flags["f.md"], flags["metadata.json"]) == (False, True, False)


async def test_slow_secret_scan_does_not_lose_the_patch(make_harness, slow_secret_scan, monkeypatch):
    async def patch(self, attempt_dir, base_commit, target, confine, detect_secret):
        target.write_bytes(b"diff --git a/a b/a\n")
        return PatchResult(contains_secret=await asyncio.to_thread(detect_secret, [b"slow"] * 50))

    monkeypatch.setattr("doubles.attempt_harness.ScriptedWorkspaces.write_patch", patch)
    harness = make_harness(AttemptScript(), secrets={"KEY": SECRET}, lifecycle={"collect_timeout": "5s"})
    await asyncio.wait_for(harness.run(), 20)
    assert (harness.task.state, harness.events(ErrorReported)) == (TaskState.COMPLETED, [])
    flags = {artifact.name: artifact.contains_secret for artifact in harness.task.artifacts}
    assert (flags["task-1.patch"], flags["metadata.json"]) == (True, False)
    assert (harness.attempt.task_layout.artifacts / "task-1.patch").read_bytes() == b"diff --git a/a b/a\n"


@pytest.fixture
def slow_secret_scan(monkeypatch):
    """The scan takes a tenth of a second for each occurrence of `slow`."""
    contains = SecretRedactor.contains

    def delay(chunks):
        for chunk in chunks:
            time.sleep(0.1 * chunk.count(b"slow"))
            yield chunk

    monkeypatch.setattr(SecretRedactor, "contains", lambda self, chunks: contains(self, delay(chunks)))
    monkeypatch.setattr(collect, "SECRET_SCAN_SECONDS_MIN", 0.1, raising=False)


async def test_metadata_is_stored_after_a_collection_timeout(make_harness, monkeypatch):
    async def never_end(self, *_):
        await asyncio.Event().wait()
        yield

    monkeypatch.setattr("doubles.attempt_harness.ScriptedWorkspaces.collect", never_end)
    harness = make_harness(AttemptScript(), lifecycle={"artifact_patterns": ("*",), "collect_timeout": "1s"})
    await asyncio.wait_for(harness.run(), 20)
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, FailureCode.COLLECT_FAILED)
    assert harness.artifacts == {"task-1.patch", "transcript.ndjson", "metadata.json"}
    metadata = json.loads((harness.attempt.task_layout.artifacts / "metadata.json").read_text())
    assert metadata["error"]["code"] == "collect_failed"


async def test_metadata_survives_an_abandoned_writer_thread(make_harness, monkeypatch):
    """The abandoned thread is still running at the timeout, and removes its partial file when it stops."""
    harness = make_harness(AttemptScript(), lifecycle={"collect_timeout": "1s"})
    may_continue, has_ended, started = threading.Event(), threading.Event(), []
    write_chunks, finalize_file = collect._write_chunks, collect._finalize_file

    def write_late(part, chunks, is_over):
        if part.name == "transcript.ndjson" or started:
            return write_chunks(part, chunks, is_over)
        started.append(part)
        try:
            write_chunks(part, (chunk for chunk in chunks if may_continue.wait(20)), is_over)
        finally:
            has_ended.set()

    def finalize_after_writer_ended(part, target, is_over):
        if target.name == "metadata.json":
            may_continue.set()
            assert has_ended.wait(20)
        return finalize_file(part, target, is_over)

    monkeypatch.setattr(collect, "_write_chunks", write_late)
    monkeypatch.setattr(collect, "_finalize_file", finalize_after_writer_ended)
    await asyncio.wait_for(harness.run(), 60)
    assert (harness.task.failure.code, len(started)) == ("collect_failed", 1)
    assert harness.artifacts == {"task-1.patch", "transcript.ndjson", "metadata.json"}
    assert (harness.attempt.task_layout.artifacts / "metadata.json").is_file()


async def test_file_stored_after_a_collection_timeout_is_removed(make_harness, monkeypatch):
    """The thread that stores the patch is still running at the timeout, and continues before the teardown."""
    harness = make_harness(AttemptScript(), lifecycle={"collect_timeout": "1s"})
    is_over, has_ended = threading.Event(), threading.Event()
    finalize_file, digest, teardown = collect._finalize_file, hashlib.file_digest, TeardownStep.run

    def digest_late(*arguments):
        assert is_over.wait(20)
        return digest(*arguments)

    def finalize_and_signal(*arguments):
        try:
            return finalize_file(*arguments)
        finally:
            has_ended.set()

    async def delay_teardown(*arguments):
        is_over.set()
        assert await asyncio.to_thread(has_ended.wait, 20)
        await teardown(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", digest_late)
    monkeypatch.setattr(collect, "_finalize_file", finalize_and_signal)
    monkeypatch.setattr(TeardownStep, "run", delay_teardown)
    monkeypatch.setattr(attempt, "METADATA_TIMEOUT_SECONDS", 0.1)
    await asyncio.wait_for(harness.run(), 60)
    assert harness.task.failure.code == "collect_failed"
    assert harness.artifacts == {path.name for path in harness.attempt.task_layout.artifacts.iterdir()} == set()
