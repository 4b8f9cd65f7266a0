"""Records from an untrusted host are copied only if a runner may write them now."""

from datetime import UTC, datetime

import msgspec
import pytest

from doubles.manifests import manifest
from sandbox.interfaces.journal import JournalDamagedError
from sandbox.journal import record_format, replication
from sandbox.journal.journals import FileJournals
from sandbox.journal.replication import FileTaskReplicas
from sandbox.model.events import (
    AgentExited,
    AgentStarted,
    Artifact,
    ArtifactCollected,
    AttemptFailed,
    AttemptStarted,
    Output,
    Record,
    SandboxCreated,
    TaskFinished,
    TaskSubmitted,
    Transition,
    WorkspacePrepared,
)
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.state_machine import advance
from sandbox.model.task_state import TaskState

NOW = datetime(2026, 1, 29, 10, tzinfo=UTC)
PREPARED = WorkspacePrepared("c" * 40)
FAILED = AttemptFailed(Failure(FailureCode.INTERNAL, "It failed."))


class ServerCopy:
    """The server's copy of a task with one attempt, and the records that a worker may send next."""

    def __init__(self, data_dir):
        journals = FileJournals(data_dir)
        writer = journals.create("task-1")
        recorder = journals.recorder(writer, None, lambda: NOW)
        recorder.record(TaskSubmitted("task-1", manifest("task-1")))
        recorder.record(AttemptStarted("abcdefghijkl", "bubblewrap", "cluster:host"))
        writer.close()
        self.journals, self.replicas = journals, FileTaskReplicas(data_dir)
        self.task = recorder.task

    @property
    def end(self):
        return self.replicas.end_offset("task-1")

    def line(self, event, /, **changes):
        """Return the next line, for a record of the event with these changes. Without changes, the line is valid."""
        seq = self.task.last_seq + 1
        transition = advance(self.task, event, seq=seq, at=NOW).transition
        record = msgspec.structs.replace(Record(seq, 2, NOW, event, transition), **changes)
        return record_format.encode(record)

    def receive(self, data):
        return self.replicas.receive_untrusted("task-1", self.end, data)


@pytest.fixture
def copy(tmp_path):
    return ServerCopy(tmp_path)


def test_records_of_a_runner_are_copied(copy):
    data, offset = b"", copy.end
    for event in (PREPARED, Output.from_bytes("stdout", b"x\n"), FAILED, TaskFinished()):
        line = copy.line(event)
        copy.task = advance(copy.task, event, seq=copy.task.last_seq + 1, at=NOW).task
        data += line
        assert copy.replicas.receive_untrusted("task-1", offset, data) == offset + len(data)
    assert copy.journals.replay("task-1").task.state is TaskState.FAILED


def test_records_that_the_server_has_added_are_taken_into_account(copy):
    copy.receive(copy.line(PREPARED))
    writer = copy.journals.open("task-1")
    recorder = copy.journals.recorder(writer, copy.journals.replay("task-1").task, lambda: NOW)
    recorder.record(FAILED)
    writer.close()
    copy.task = recorder.task
    copy.receive(copy.line(TaskFinished(), epoch=3))
    assert copy.journals.replay("task-1").task.state is TaskState.FAILED


@pytest.mark.parametrize(
    ("event", "changes"),
    [
        (PREPARED, {"epoch": 0}),
        (PREPARED, {"epoch": 3}),
        (PREPARED, {"transition": None}),
        (PREPARED, {"transition": Transition(TaskState.STAGING, TaskState.COMPLETED, "Done")}),
        (Output.from_bytes("stdout", b"x\n"), {"transition": Transition(TaskState.STAGING, TaskState.FAILED, "No")}),
        (Output.from_bytes("stdout", b"x\n"), {"event": TaskFinished()}),
        (Output.from_bytes("stdout", b"x\n"), {"event": AttemptStarted("mnopqrstuvwx", "bubblewrap", "x")}),
        (Output.from_bytes("stdout", b"x\n"), {"event": TaskSubmitted("task-1", manifest("task-1"))}),
    ],
)
def test_other_records_are_rejected(copy, event, changes):
    before = copy.end
    with pytest.raises(JournalDamagedError):
        copy.receive(copy.line(event, **changes))
    assert copy.end == before
    copy.receive(copy.line(event))


def test_a_host_cannot_create_a_journal(tmp_path):
    replicas = FileTaskReplicas(tmp_path)
    task = TaskSubmitted("task-1", manifest("task-1"))
    line = record_format.encode(Record(1, 1, NOW, task, advance(None, task, seq=1, at=NOW).transition))
    with pytest.raises(JournalDamagedError):
        replicas.receive_untrusted("task-1", 0, line)
    assert not (tmp_path / "tasks").exists()


def test_artifacts_are_limited_in_number(copy, monkeypatch):
    monkeypatch.setattr(replication, "WORKER_ARTIFACTS_MAX", 3)

    def receive(event):
        copy.receive(copy.line(event))
        copy.task = advance(copy.task, event, seq=copy.task.last_seq + 1, at=NOW).task

    def artifact(name):
        return ArtifactCollected(Artifact(name, name, 1, "text/plain", "sha256:" + "0" * 64))

    for event in (PREPARED, SandboxCreated("vm", "bubblewrap", "host"), AgentStarted("s"), AgentExited(0, None)):
        receive(event)
    for name in ("a", "b", "c", "a"):  # a finisher replaces an artifact that an earlier process collected
        receive(artifact(name))
    with pytest.raises(JournalDamagedError, match="more than 3 artifacts"):
        receive(artifact("d"))
    receive(TaskFinished())
