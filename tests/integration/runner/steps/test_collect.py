"""What an attempt leaves behind is told in bounds, and is there once however often it is tried."""

import asyncio
import errno
import hashlib
import json
import threading
import time

import pytest

from doubles.attempt_dependencies import BASE, Script
from sandbox.interfaces.workspace import PatchResult, SkippedFile
from sandbox.model.disk_space import DiskSpace
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.events import Artifact, ArtifactCollected, AttemptFailed, EgressDenied, ErrorReported
from sandbox.model.task_state import TaskState
from sandbox.runner import attempt as runner_attempt
from sandbox.runner.steps import collect
from sandbox.secrets.redactor import SecretRedactor
from sandbox.workspace.collect import ArtifactNames

SECRET = "s3cret-value-of-the-customer"


def test_of_many_refusals_the_first_are_told_and_all_are_counted(stage, monkeypatch):
    monkeypatch.setattr(collect, "_DENIALS_MAX", 3)
    scene = stage(Script(reports=[EgressDenied(f"host-{number}.test", 443, "not allowed") for number in range(7)]))
    asyncio.run(scene.life.run())
    metadata = json.loads((scene.attempt.task_files.artifacts / "metadata.json").read_text())
    assert [each["host"] for each in metadata["refusals"]] == ["host-0.test", "host-1.test", "host-2.test"]
    assert metadata["refusals_total"] == 7


def test_a_full_disk_multiplies_no_artifact_whose_name_had_to_be_changed(stage, monkeypatch):
    """The agent's own `redacted-1` keeps its name, also when everything is collected again and again."""
    monkeypatch.setattr("sandbox.runner.attempt.RETRY_SECONDS", 0.01)
    found = {f"{SECRET}-a.md": b"a\n", "redacted-1": b"the agent's\n", f"{SECRET}-b.md": b"b\n"}
    scene = stage(
        Script(collected=found), secrets={"KEY": SECRET}, lifecycle={"artifact_patterns": ("*",), "timeout": "20s"}
    )
    refused, keep = [], collect._store_chunks

    async def keep_when_there_is_room(attempt, directory, name, *rest):
        if name == "metadata.json" and len(refused) < 4:
            refused.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        await keep(attempt, directory, name, *rest)

    monkeypatch.setattr(collect, "_store_chunks", keep_when_there_is_room)
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    artifacts = scene.attempt.task_files.artifacts
    kept = {path.name: path.read_bytes() for path in artifacts.glob("redacted-*")}
    assert len(refused) == 4
    assert kept == {"redacted-1": b"the agent's\n", "redacted-2": b"a\n", "redacted-3": b"b\n"}
    assert scene.artifacts == {*kept, "task-1.patch", "transcript.ndjson", "metadata.json"}


def find_files(monkeypatch, paths):
    """The workspace has these files, and they are named as they really are."""

    async def collect_files(self, workspace, patterns, target, taken_names):
        names = ArtifactNames(taken_names)
        for path in paths:
            name = names.allocate(path.encode())
            (target / name).write_bytes(path.encode())
            yield Artifact(name, path, len(path), "text/markdown", "sha256:0")

    monkeypatch.setattr("doubles.attempt_dependencies.ScriptedWorkspaces.collect", collect_files)


def test_a_name_that_was_cut_within_a_secret_is_not_told(stage, monkeypatch):
    """Names lose their beginning, and with it what a value is recognised by; directories are told in the path alone."""
    paths = (f"{SECRET}-{'x' * 180}.md", f"{SECRET}/{'y' * 230}.md", f"{SECRET}/notes.md", f"out/{'z' * 230}.md")

    find_files(monkeypatch, paths)
    scene = stage(Script(), secrets={"KEY": SECRET}, lifecycle={"artifact_patterns": ("**",)})
    asyncio.run(scene.life.run())
    found = {one.name: one.path for one in scene.task.artifacts if not one.is_generated}
    mark = "[REDACTED:KEY]"
    assert found.pop("redacted-1") == f"{mark}-{'x' * 180}.md"
    assert found.pop("redacted-2") == f"{mark}/{'y' * 230}.md"
    assert found == {"notes.md": f"{mark}/notes.md", f"{'z' * 197}.md": f"out/{'z' * 230}.md"}
    assert scene.artifacts == {path.name for path in scene.attempt.task_files.artifacts.iterdir()}


def test_a_name_that_is_the_end_of_a_secret_with_slashes_is_not_told(stage, monkeypatch):
    """The path has all of the value, and is redacted; the name would tell what follows the last slash."""
    value = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
    find_files(monkeypatch, [f"out/{value}", f"out/{value}.md", f"{value}/notes.md", "K7MDENG/report.md"])
    scene = stage(Script(), secrets={"KEY": value}, lifecycle={"artifact_patterns": ("**",)})
    asyncio.run(scene.life.run())
    mark = "[REDACTED:KEY]"
    assert {one.name: one.path for one in scene.task.artifacts if not one.is_generated} == {
        "notes.md": f"{mark}/notes.md",
        "report.md": "K7MDENG/report.md",
        "redacted-1": f"out/{mark}",
        "redacted-2": f"out/{mark}.md",
    }


@pytest.mark.parametrize(("content", "is_flagged"), [(b"\x00" + SECRET.encode(), True), (b"\x00ordinary", False)])
def test_a_patch_is_flagged_for_what_stands_in_the_files_that_it_carries(stage, content, is_flagged):
    """In the patch itself git may have compressed it."""
    scene = stage(Script(patched=content), secrets={"KEY": SECRET})
    asyncio.run(scene.life.run())
    flags = {artifact.name: artifact.contains_secret for artifact in scene.task.artifacts}
    assert flags == {"task-1.patch": is_flagged, "transcript.ndjson": False, "metadata.json": False}


@pytest.mark.parametrize("value", [BASE[:8], "task-1.p", "transcript"])
def test_a_secret_that_is_part_of_a_name_of_ours_takes_no_artifact_away(stage, value):
    """Each value of eight characters is one: also a commit, or the word that a task is named after."""
    asked = []
    scene = stage(Script(), secrets={"WORD": value}, lifecycle={"artifact_patterns": ("*",)})
    workspaces = scene.attempt.dependencies.workspaces
    make = workspaces.patch
    workspaces.patch = lambda root, base, *rest: (asked.append(base), make(root, base, *rest))[1]
    asyncio.run(scene.life.run())
    assert (scene.task.state, scene.task.base_commit, asked) == (TaskState.COMPLETED, BASE, [BASE])
    assert scene.artifacts >= {"task-1.patch", "transcript.ndjson", "metadata.json"}
    assert scene.artifacts == {path.name for path in scene.attempt.task_files.artifacts.iterdir()}


def test_codes_are_told_as_they_are_though_a_secret_is_a_word_of_them(stage):
    scene = stage(Script(), secrets={"WORD": "artifact"})
    scene.recorder.record(ErrorReported("artifact_left_out", "An artifact was left out."))
    assert scene.events(ErrorReported) == [ErrorReported("artifact_left_out", "An [REDACTED:WORD] was left out.")]


@pytest.mark.parametrize("step", ["read_records", "replace_durably"], ids=["writing", "flushing"])
def test_what_a_full_disk_took_of_a_file_takes_no_room_until_the_next_try(stage, monkeypatch, step):
    """Else one task would hold all that others give back, again and again, for as long as collecting may take."""
    monkeypatch.setattr("sandbox.runner.attempt.RETRY_SECONDS", 0.01)
    scene = stage(Script(), claude={"output_format": "stream-json"}, lifecycle={"collect_timeout": "20s"})
    part, go_on, refused, left = scene.attempt.files.root / "transcript.ndjson", getattr(collect, step), [], []

    def refuse(*arguments):
        if len(refused) == 3 or not part.exists():
            return go_on(*arguments)
        refused.append(step)
        raise OSError(errno.ENOSPC, "No space left on device")

    async def patch(self, attempt_dir, base_commit, target, confine, contains_secret):
        left.append(part.exists())
        target.write_bytes(b"diff --git a/a b/a\n")
        return PatchResult()

    monkeypatch.setattr(collect, step, refuse)
    monkeypatch.setattr("doubles.attempt_dependencies.ScriptedWorkspaces.patch", patch)
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert (scene.task.state, len(refused), left) == (TaskState.COMPLETED, 3, [False] * 4)
    assert "transcript.ndjson" in scene.artifacts


@pytest.mark.parametrize("lacking_bytes", [0, 1])
def test_a_large_copy_that_would_fill_the_disk_is_not_begun(stage, monkeypatch, lacking_bytes):
    monkeypatch.setattr(collect, "_SMALL_TRANSCRIPT_BYTES", 10)
    said = b'{"type":"result"}\n' * 10
    scene = stage(
        Script(stdout=said, stderr=said), claude={"output_format": "stream-json"}, lifecycle={"collect_timeout": "1s"}
    )
    scene.space = DiskSpace(len(said) - lacking_bytes, 200)
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert ("transcript.ndjson" in scene.artifacts) is (not lacking_bytes)
    failure = scene.task.failure
    assert (failure and failure.code) == (FailureCode.DISK_FULL if lacking_bytes else None)


def test_what_is_tried_again_on_a_full_disk_tells_nothing_twice(stage, monkeypatch):
    """A try a second for as long as collecting may take, each of thousands of events, would fill what room there is."""
    monkeypatch.setattr("sandbox.runner.attempt.RETRY_SECONDS", 0.01)
    broken = AttemptError(FailureCode.COLLECT_FAILED, "The patch could not be made: it is odd.")
    scene = stage(Script(patch_error=broken), lifecycle={"artifact_patterns": ("*",), "collect_timeout": "20s"})
    refused, keep = [], collect._store_chunks

    async def leave_out(self, *_):
        for name in ("fifo", "link"):
            yield SkippedFile(name, "it is not a regular file")

    async def keep_when_there_is_room(attempt, directory, name, *rest):
        if name == "metadata.json" and len(refused) < 4:
            refused.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")
        await keep(attempt, directory, name, *rest)

    monkeypatch.setattr("doubles.attempt_dependencies.ScriptedWorkspaces.collect", leave_out)
    monkeypatch.setattr(collect, "_store_chunks", keep_when_there_is_room)
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert len(refused) == 4
    assert [trouble.message.partition(":")[0] for trouble in scene.events(ErrorReported)] == ["fifo", "link"]
    assert [failed.failure.code for failed in scene.events(AttemptFailed)] == [FailureCode.COLLECT_FAILED]
    assert [each.artifact.name for each in scene.events(ArtifactCollected)] == ["transcript.ndjson", "metadata.json"]


def test_a_transcript_that_is_kept_needs_no_room_for_another_one_when_the_rest_is_tried_again(stage, monkeypatch):
    monkeypatch.setattr("sandbox.runner.attempt.RETRY_SECONDS", 0.01)
    monkeypatch.setattr(collect, "_SMALL_TRANSCRIPT_BYTES", 10)
    scene = stage(Script(), claude={"output_format": "stream-json"}, lifecycle={"collect_timeout": "20s"})
    refused, keep = [], collect._store_chunks

    async def keep_when_there_is_room(attempt, directory, name, *rest):
        if name == "metadata.json" and len(refused) < 4:
            refused.append(name)
            scene.space = DiskSpace(10, 100)
            raise OSError(errno.ENOSPC, "No space left on device")
        await keep(attempt, directory, name, *rest)

    monkeypatch.setattr(collect, "_store_chunks", keep_when_there_is_room)
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert (scene.task.state, len(refused)) == (TaskState.COMPLETED, 4)
    assert (scene.attempt.task_files.artifacts / "transcript.ndjson").read_bytes() == scene.script.stdout


def test_what_there_was_no_time_to_look_through_is_kept_and_flagged(stage, look_slowly):
    """The time is of all together: none of these takes too long by itself."""
    names = [f"{letter}.md" for letter in "abcdef"]
    scene = stage(
        Script(collected=dict.fromkeys(names, b"slow " * 4)),
        secrets={"KEY": SECRET},
        lifecycle={"collect_timeout": "5s", "artifact_patterns": ("*",)},
    )
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert scene.task.state is TaskState.COMPLETED
    flags = {artifact.name: artifact.contains_secret for artifact in scene.task.artifacts}
    assert flags.keys() == {"task-1.patch", "transcript.ndjson", "metadata.json", *names}
    assert (flags["task-1.patch"], flags["f.md"], flags["metadata.json"]) == (False, True, False)


def test_no_patch_is_lost_because_looking_through_it_takes_long(stage, look_slowly, monkeypatch):
    async def patch(self, attempt_dir, base_commit, target, confine, contains_secret):
        target.write_bytes(b"diff --git a/a b/a\n")
        return PatchResult(contains_secret=await asyncio.to_thread(contains_secret, [b"slow"] * 50))

    monkeypatch.setattr("doubles.attempt_dependencies.ScriptedWorkspaces.patch", patch)
    scene = stage(Script(), secrets={"KEY": SECRET}, lifecycle={"collect_timeout": "5s"})
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert (scene.task.state, scene.events(ErrorReported)) == (TaskState.COMPLETED, [])
    flags = {artifact.name: artifact.contains_secret for artifact in scene.task.artifacts}
    assert (flags["task-1.patch"], flags["metadata.json"]) == (True, False)
    assert (scene.attempt.task_files.artifacts / "task-1.patch").read_bytes() == b"diff --git a/a b/a\n"


@pytest.fixture
def look_slowly(monkeypatch):
    """A tenth of a second for each `slow` that is looked through."""
    contains = SecretRedactor.contains

    def slowly(chunks):
        for chunk in chunks:
            time.sleep(0.1 * chunk.count(b"slow"))
            yield chunk

    monkeypatch.setattr(SecretRedactor, "contains", lambda self, chunks: contains(self, slowly(chunks)))
    monkeypatch.setattr(collect, "SECRET_SCAN_SECONDS_MIN", 0.1, raising=False)


def test_a_task_whose_artifacts_took_too_long_has_its_metadata_all_the_same(stage, monkeypatch):
    async def never_end(self, *_):
        await asyncio.Event().wait()
        yield

    monkeypatch.setattr("doubles.attempt_dependencies.ScriptedWorkspaces.collect", never_end)
    scene = stage(Script(), lifecycle={"artifact_patterns": ("*",), "collect_timeout": "1s"})
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, FailureCode.COLLECT_FAILED)
    assert scene.artifacts == {"task-1.patch", "transcript.ndjson", "metadata.json"}
    metadata = json.loads((scene.attempt.task_files.artifacts / "metadata.json").read_text())
    assert metadata["error"]["code"] == "collect_failed"


def test_the_metadata_outlive_who_began_to_write_them_and_came_to_no_end(stage, monkeypatch):
    """That thread is still busy when the time is over, and takes its part with it when it gives up."""
    scene = stage(Script(), lifecycle={"collect_timeout": "1s"})
    goes_on, has_ended, begun = threading.Event(), threading.Event(), []
    fill, store = collect._write_chunks, collect._finalize_file

    def fill_late(part, chunks, is_over):
        if part.name == "transcript.ndjson" or begun:
            return fill(part, chunks, is_over)
        begun.append(part)
        try:
            fill(part, (chunk for chunk in chunks if goes_on.wait(20)), is_over)
        finally:
            has_ended.set()

    def store_when_it_has_given_up(part, target, is_over):
        if target.name == "metadata.json":
            goes_on.set()
            assert has_ended.wait(20)
        return store(part, target, is_over)

    monkeypatch.setattr(collect, "_write_chunks", fill_late)
    monkeypatch.setattr(collect, "_finalize_file", store_when_it_has_given_up)
    asyncio.run(asyncio.wait_for(scene.life.run(), 60))
    assert (scene.task.failure.code, len(begun)) == ("collect_failed", 1)
    assert scene.artifacts == {"task-1.patch", "transcript.ndjson", "metadata.json"}
    assert (scene.attempt.task_files.artifacts / "metadata.json").is_file()


def test_what_takes_longer_than_collecting_may_is_no_artifact_of_which_nobody_tells(stage, monkeypatch):
    """The thread that stores the patch is still busy when the time is over, and goes on before all is removed."""
    scene = stage(Script(), lifecycle={"collect_timeout": "1s"})
    is_over, has_ended = threading.Event(), threading.Event()
    store, digest, teardown = collect._finalize_file, hashlib.file_digest, runner_attempt.teardown

    def digest_late(*arguments):
        assert is_over.wait(20)
        return digest(*arguments)

    def store_and_tell(*arguments):
        try:
            return store(*arguments)
        finally:
            has_ended.set()

    async def tear_down_late(*arguments):
        is_over.set()
        assert await asyncio.to_thread(has_ended.wait, 20)
        await teardown(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", digest_late)
    monkeypatch.setattr(collect, "_finalize_file", store_and_tell)
    monkeypatch.setattr(runner_attempt, "teardown", tear_down_late)
    monkeypatch.setattr(runner_attempt, "METADATA_SECONDS", 0.1)
    asyncio.run(asyncio.wait_for(scene.life.run(), 60))
    assert scene.task.failure.code == "collect_failed"
    assert scene.artifacts == {path.name for path in scene.attempt.task_files.artifacts.iterdir()} == set()
