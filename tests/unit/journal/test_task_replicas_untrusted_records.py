"""Records from an untrusted host are copied only if a runner may write them now."""

import tracemalloc
from datetime import UTC, datetime

import msgspec
import pytest

from doubles.manifests import manifest
from sandbox.interfaces.journal import JournalDamagedError
from sandbox.journal import record_format, task_replicas
from sandbox.journal.journals import FileJournals
from sandbox.journal.task_replicas import FileTaskReplicas
from sandbox.model.artifacts import Artifact
from sandbox.model.events import (
    AgentExited,
    AgentStarted,
    ArtifactCollected,
    AttemptFailed,
    AttemptStarted,
    ErrorReported,
    FollowUp,
    FollowUpSkipped,
    Metrics,
    Output,
    Progress,
    Record,
    SandboxCreated,
    TaskFinished,
    TaskSubmitted,
    Transition,
    Usage,
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
def test_records_that_a_runner_may_not_write_now_are_rejected(copy, event, changes):
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
    monkeypatch.setattr(task_replicas, "WORKER_ARTIFACTS_MAX", 3)

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


RUNNING = (PREPARED, SandboxCreated("vm", "bubblewrap", "host"), AgentStarted("s"))


def receive_all(copy, *events):
    for event in events:
        copy.receive(copy.line(event))
        copy.task = advance(copy.task, event, seq=copy.task.last_seq + 1, at=NOW).task


def check_rejected_only(copy, rejected, accepted):
    """Check that one event is rejected and changes nothing, and that the other event is accepted."""
    before = copy.end
    with pytest.raises(JournalDamagedError):
        copy.receive(copy.line(rejected))
    assert copy.end == before
    copy.receive(copy.line(accepted))


@pytest.mark.parametrize("session_id", ["../../../../etc/x", "/etc/x", "a/b", "..", "--allowedTools=Bash", "", "a\n"])
def test_session_id_that_is_not_a_plain_file_name_is_rejected(copy, session_id):
    """A task that continues this one writes a file with this name, on another host."""
    receive_all(copy, *RUNNING[:2])
    check_rejected_only(copy, AgentStarted(session_id), AgentStarted("6a204bd8-9a83-4d2a-b0c5-0123456789ab"))


@pytest.mark.parametrize("commit", ["--output=/etc/x", "main", "c" * 40 + "\n", ""])
def test_commit_that_is_not_an_object_name_is_rejected(copy, commit):
    check_rejected_only(copy, WorkspacePrepared(commit), PREPARED)


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("rejected", "accepted"),
    [
        (Usage("m", 2**53, 1), Usage("m", 2**53 - 1, 1)),
        (Usage("m", -(2**60), 1), Usage("m", 0, 1)),
        (Usage("m", -1, 1), Usage("m", 0, 1)),
        (Usage("m", 1, 1, cache_write_tokens=-1), Usage("m", 1, 1, cache_write_tokens=0)),
        (Usage("m", 1, 1, cost_usd=-1e-9), Usage("m", 1, 1, cost_usd=0.0)),
        (Usage("m", 1, 1, cost_usd=1.1e9), Usage("m", 1, 1, cost_usd=1e9)),
        (Progress(cost_usd=-1.0), Progress(cost_usd=0.0)),
        (Progress(output_bytes=-1), Progress()),
        (Usage("m", 1, 1, cost_usd=1e300), Usage("m", 1, 1, cost_usd=1e3)),
        (Progress(cost_usd=1e300), Progress(cost_usd=1e3)),
        (Metrics(memory_used_bytes=2**60), Metrics(memory_used_bytes=2**50)),
        (AgentExited(2**60, None), AgentExited(255, None)),
        (AgentExited(0, {"a": nested(40)}), AgentExited(0, {"a": nested(20)})),
        (AgentExited(0, {"a": [[]] * 210_000}), AgentExited(0, {"a": [[]] * 100_000})),
        (ErrorReported("a", "x" * 300_000), ErrorReported("a", "x" * 200_000)),
        (Output("stdout", text="x" * 2**22), Output("stdout", text='"' * 2**20)),
    ],
)
def test_values_that_no_runner_writes_are_rejected(copy, rejected, accepted):
    receive_all(copy, *RUNNING)
    check_rejected_only(copy, rejected, accepted)


def test_records_of_artifacts_are_limited_in_size(copy, monkeypatch):
    """The size is also limited for artifacts that replace others, and across restarts of the server."""
    monkeypatch.setattr(task_replicas, "WORKER_ARTIFACT_RECORDS_BYTES_MAX", 100_000)

    def artifact(path):
        return ArtifactCollected(Artifact("a", path, 1, "text/plain", "sha256:" + "0" * 64))

    receive_all(copy, *RUNNING, AgentExited(0, None), artifact("p" * 48_000), artifact("p" * 50_000))
    copy.replicas = FileTaskReplicas(copy.replicas._data_dir)
    check_rejected_only(copy, artifact("p" * 2_000), artifact("p"))
    receive_all(copy, TaskFinished())


def test_skipped_follow_ups_do_not_accumulate(copy):
    receive_all(copy, *RUNNING, *[FollowUpSkipped(FollowUp.RETRY, "no") for _ in range(20)])
    assert copy.journals.replay("task-1").task.skipped_follow_ups == (FollowUp.RETRY,)


def test_token_totals_are_capped_at_the_largest_safe_integer(copy):
    receive_all(copy, *RUNNING, *[Usage("m", 2**53 - 1, 2**53 - 1) for _ in range(20)])
    spent = copy.journals.replay("task-1").task.spent
    assert (spent.input_tokens, spent.output_tokens) == (2**53 - 1, 2**53 - 1)


@pytest.mark.parametrize("data", [b"x\n" * 1_000_000, b"\n" * 2_000_000])
def test_short_lines_do_not_use_much_memory(copy, data):
    end = copy.end
    tracemalloc.start()
    try:
        with pytest.raises(JournalDamagedError):
            copy.replicas.receive_untrusted("task-1", end, data)
        with pytest.raises(JournalDamagedError):
            copy.replicas.receive("task-1", end, data)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
