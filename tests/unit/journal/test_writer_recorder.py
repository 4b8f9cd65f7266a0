"""Recorded state changes and some other events are durable; output is flushed later."""

import os
from datetime import UTC, datetime

import pytest

from doubles.manifests import manifest
from sandbox.journal.journals import FileJournals
from sandbox.journal.writer import JournalRecorder
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.state_machine import IllegalEventError

TIMESTAMP = datetime(2026, 1, 29, 10, 10, 15, tzinfo=UTC)
TO_RUNNING = (
    e.TaskSubmitted("task-1", manifest()),
    e.AttemptStarted("abcdefghijkl", "bubblewrap", "here"),
    e.WorkspacePrepared("0" * 40),
    e.SandboxCreated("abcdefghijkl", "namespaces", "host"),
    e.AgentStarted("session"),
)
ARTIFACT = Artifact("a.md", "a.md", 1, "text/markdown", "sha256:" + "0" * 64)


@pytest.fixture
def recorder_of_running_task(tmp_path):
    writer = FileJournals(tmp_path).create("task-1")
    recorder = JournalRecorder(writer, None, lambda: TIMESTAMP)
    for event in TO_RUNNING:
        recorder.record(event)
    yield recorder
    writer.close()


def test_state_changes_are_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    writer = FileJournals(tmp_path).create("task-1")
    recorder = JournalRecorder(writer, None, lambda: TIMESTAMP)
    for count, event in enumerate((*TO_RUNNING, e.AgentExited(0, {"is_error": False}), e.TaskFinished()), 1):
        recorder.record(event)
        assert len(flushed) == count
    writer.close()


@pytest.mark.parametrize(
    "event",
    [
        e.CancelRequested("enough"),
        e.AttemptFailed(Failure(FailureCode.TIMEOUT, "late")),
        e.ArtifactCollected(ARTIFACT),
        e.Usage("m", 1, 2),
        e.FollowUpSkipped(e.FollowUp.RETRY, "the budget is spent"),
    ],
)
def test_durable_events_are_flushed(recorder_of_running_task, monkeypatch, event):
    flushed = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    recorder_of_running_task.record(event)
    assert len(flushed) == 1


def test_start_of_a_later_attempt_is_flushed_although_the_state_is_unchanged(tmp_path, monkeypatch):
    writer = FileJournals(tmp_path).create("task-1")
    recorder = JournalRecorder(writer, None, lambda: TIMESTAMP)
    for event in (
        *TO_RUNNING[:2],
        e.AttemptFailed(Failure(FailureCode.SANDBOX_LOST, "restarted")),
        e.AttemptTornDown(),
    ):
        recorder.record(event)
    flushed = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    record = recorder.record(e.AttemptStarted("lkjihgfedcba", "bubblewrap", "here"))
    assert (record.transition, len(flushed)) == (None, 1)
    writer.close()


def test_supersession_of_an_attempt_is_flushed(tmp_path, monkeypatch):
    writer = FileJournals(tmp_path).create("task-1")
    recorder = JournalRecorder(writer, None, lambda: TIMESTAMP)
    for event in (*TO_RUNNING[:2], e.AttemptFailed(Failure(FailureCode.SANDBOX_LOST, "restarted"))):
        recorder.record(event)
    flushed = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    record = recorder.record(e.AttemptTornDown())
    assert (record.transition, len(flushed)) == (None, 1)
    writer.close()


def test_start_of_a_later_agent_is_flushed_although_the_state_is_unchanged(tmp_path, monkeypatch):
    _, *start = TO_RUNNING
    retried = e.TaskSubmitted("task-1", manifest(lifecycle={"retries": 1}))
    failed = e.AgentExited(1, failure=Failure(FailureCode.AGENT_FAILED, "it failed"))
    again = e.AttemptStarted("lkjihgfedcba", "bubblewrap", "here")
    writer = FileJournals(tmp_path).create("task-1")
    recorder = JournalRecorder(writer, None, lambda: TIMESTAMP)
    for event in (retried, *start, failed, e.AttemptTornDown(), again, *start[1:3]):
        recorder.record(event)
    flushed = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    record = recorder.record(e.AgentStarted("session"))
    assert (record.transition, len(flushed)) == (None, 1)
    writer.close()


def test_output_is_not_flushed(recorder_of_running_task, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    recorder_of_running_task.record(e.Output.from_bytes("stdout", b"x"))
    assert flushed == []


def test_failed_write_has_no_effect(recorder_of_running_task, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    before, effects = recorder_of_running_task.task, []
    recorder = JournalRecorder(recorder_of_running_task.writer, before, lambda: TIMESTAMP, on_effect=effects.append)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", fail)
        with pytest.raises(OSError, match="No space"):
            recorder.record(e.CancelRequested())
    assert (recorder.task, effects) == (before, [])
    with pytest.raises(IllegalEventError):
        recorder.record(e.TaskFinished())
    recorder.record(e.CancelRequested())
    assert len(effects) == 1


def test_recorder_has_no_task_before_the_first_record(tmp_path):
    writer = FileJournals(tmp_path).create("task-1")
    recorder = JournalRecorder(writer, None, lambda: TIMESTAMP)
    with pytest.raises(IllegalEventError, match="no record yet"):
        _ = recorder.task
    recorder.record(TO_RUNNING[0])
    assert recorder.task.id == "task-1"
    writer.close()


def test_events_are_transformed_before_they_are_applied_and_written(recorder_of_running_task):
    task = recorder_of_running_task.task
    recorder = JournalRecorder(
        recorder_of_running_task.writer, task, lambda: TIMESTAMP, transform=lambda _: e.CancelRequested("changed")
    )
    assert recorder.record(e.CancelRequested("original")).event == e.CancelRequested("changed")
    assert recorder.task.cancel.reason == "changed"


def test_task_has_the_number_of_its_last_record(recorder_of_running_task):
    for event in (e.Output.from_bytes("stdout", b"one\n"), e.CancelRequested("enough")):
        record = recorder_of_running_task.record(event)
        assert recorder_of_running_task.task.last_seq == record.seq
