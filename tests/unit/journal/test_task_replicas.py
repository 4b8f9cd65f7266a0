"""Copying journals and artifacts is exact and repeatable. Records of a replaced writer are rejected."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox.interfaces.journal import JournalBusyError, JournalDamagedError, JournalOffsetError
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.journal.journals import FileJournals
from sandbox.journal.task_replicas import FileTaskReplicas
from sandbox.model.artifacts import Artifact
from sandbox.model.events import Output

NOW = datetime(2026, 1, 29, 10, tzinfo=UTC)


def records(data_dir):
    return data_dir / "tasks" / "task-1" / "journal" / "records"


def append(writer, *texts):
    for text in texts:
        writer.append(Output.from_bytes("stdout", text), at=NOW)


@pytest.fixture
def original(tmp_path):
    """A journal with three records; its copy is in `tmp_path / "copy"`."""
    writer = FileJournals(tmp_path / "original").create("task-1")
    append(writer, b"one\n", b"two\n", b"three\n")
    writer.close()
    return records(tmp_path / "original").read_bytes()


@pytest.fixture
def replicas(tmp_path):
    return FileTaskReplicas(tmp_path / "copy")


def test_copy_grows_by_whole_records_and_ignores_repetitions(tmp_path, original, replicas):
    first, second, third = original.splitlines(keepends=True)
    assert replicas.end_offset("task-1") == 0
    assert replicas.receive("task-1", 0, first) == len(first)
    assert replicas.receive("task-1", 0, first + second) == len(first + second)
    assert replicas.receive("task-1", 0, first) == len(first + second)
    assert replicas.receive("task-1", len(first), b"") == len(first + second)
    assert replicas.receive("task-1", len(first), second + third) == len(original) == replicas.end_offset("task-1")
    assert records(tmp_path / "copy").read_bytes() == original


def test_reads_return_whole_records_in_the_given_range(tmp_path, original):
    first, second, _ = original.splitlines(keepends=True)
    source = FileTaskReplicas(tmp_path / "original")
    assert source.read("task-1", 0, 10**6) == original
    assert source.read("task-1", len(first), len(second)) == second
    assert source.read("task-1", len(first), len(second) + 5) == second
    assert source.read("task-1", len(original), 10**6) == b""


def test_copy_continues_after_an_incomplete_record_from_a_crash(tmp_path, original, replicas):
    first = original.splitlines(keepends=True)[0]
    replicas.receive("task-1", 0, first)
    with records(tmp_path / "copy").open("ab") as copy:
        copy.write(original[len(first) : len(first) + 5])
    assert replicas.end_offset("task-1") == len(first)
    replicas.receive("task-1", len(first), original[len(first) :])
    assert records(tmp_path / "copy").read_bytes() == original


def test_writer_continues_the_copied_journal(tmp_path, original, replicas):
    replicas.receive("task-1", 0, original)
    writer = FileJournals(tmp_path / "copy").open("task-1")
    append(writer, b"four\n")
    assert writer.last_seq == 4
    with pytest.raises(JournalBusyError):
        replicas.receive("task-1", 0, original)
    writer.close()
    replicas.receive("task-1", 0, original)


def test_records_of_a_replaced_writer_are_rejected(tmp_path, original, replicas):
    """The server recorded an event in the next epoch before the last event of the old writer arrived."""
    *begin, last = original.splitlines(keepends=True)
    offset = replicas.receive("task-1", 0, b"".join(begin))
    writer = FileJournals(tmp_path / "copy").open("task-1")
    append(writer, b"three\n")
    writer.close()
    before = records(tmp_path / "copy").read_bytes()
    with pytest.raises(JournalOffsetError, match="Another writer has continued"):
        replicas.receive("task-1", offset, last)
    assert records(tmp_path / "copy").read_bytes() == before


@pytest.mark.parametrize("bytes_left", [1, 5, 30])
def test_part_of_a_record_is_rejected(original, replicas, bytes_left):
    with pytest.raises(JournalDamagedError):
        replicas.receive("task-1", 0, original[:-bytes_left])
    assert replicas.end_offset("task-1") == 0


def test_missing_records_are_rejected(original, replicas):
    first, second, third = original.splitlines(keepends=True)
    with pytest.raises(JournalOffsetError, match="ends at byte 0"):
        replicas.receive("task-1", len(first), second)
    for offset, data in ((0, second), (0, first + third)):
        with pytest.raises(JournalDamagedError, match="missing"):
            replicas.receive("task-1", offset, data)
    replicas.receive("task-1", 0, first)
    with pytest.raises(JournalDamagedError, match="missing"):
        replicas.receive("task-1", len(first), third)
    assert replicas.end_offset("task-1") == len(first)


@pytest.mark.parametrize("task_id", ["", "..", "a/b"])
def test_invalid_task_id_is_rejected(original, replicas, task_id):
    with pytest.raises(FileNotFoundError):
        replicas.receive(task_id, 0, original)


def artifact_of(content, name="report.txt"):
    return Artifact(name, name, len(content), "text/plain", f"sha256:{hashlib.sha256(content).hexdigest()}")


def artifact_files(data_dir):
    root = TaskLayout(data_dir, "task-1").root
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and "journal" not in path.parts}


def store(replicas, artifact, content):
    copy = replicas.create_artifact("task-1", artifact)
    try:
        for data in content:
            copy.write(data)
        copy.flush()
        copy.publish()
    finally:
        copy.close()


def test_artifact_is_stored_completely_or_not_at_all(tmp_path, original, replicas):
    replicas.receive("task-1", 0, original)
    artifact = artifact_of(b"a report")
    assert replicas.artifact_sizes("task-1") == {}
    for content in ([b"a rep"], [b"a rep", b"Ort"], [b"a report", b"!"]):
        with pytest.raises(OSError, match="differs from its record"):
            store(replicas, artifact, content)
    assert artifact_files(tmp_path / "copy") == set()
    for _ in range(2):
        store(replicas, artifact, [b"a ", b"report"])
    stored = TaskLayout(tmp_path / "copy", "task-1").artifacts / "report.txt"
    assert (stored.read_bytes(), stored.stat().st_mode & 0o777) == (b"a report", 0o600)
    assert artifact_files(tmp_path / "copy") == {"artifacts/report.txt"}
    assert replicas.artifact_sizes("task-1") == {"report.txt": 8}


def test_artifacts_that_are_stored_at_the_same_time_do_not_mix(tmp_path, original, replicas):
    replicas.receive("task-1", 0, original)
    copies = [replicas.create_artifact("task-1", artifact_of(content, "a.txt")) for content in (b"first", b"second")]
    for copy, content in zip(copies, (b"first", b"second"), strict=True):
        copy.write(content)
        copy.flush()
    copies[1].publish()
    for copy in copies:
        copy.close()
    assert (TaskLayout(tmp_path / "copy", "task-1").artifacts / "a.txt").read_bytes() == b"second"
    assert artifact_files(tmp_path / "copy") == {"artifacts/a.txt"}


def test_closed_artifact_accepts_nothing(tmp_path, original, replicas):
    replicas.receive("task-1", 0, original)
    copy = replicas.create_artifact("task-1", artifact_of(b""))
    copy.close()
    copy.close()
    with pytest.raises(OSError, match="is closed"):
        copy.write(b"x")
    with pytest.raises(OSError, match="is closed"):
        copy.flush()
    with pytest.raises(FileNotFoundError):
        copy.publish()
    assert artifact_files(tmp_path / "copy") == set()


def test_incomplete_artifact_of_a_killed_process_is_removed(tmp_path, original, replicas):
    replicas.receive("task-1", 0, original)
    killed, running = replicas.create_artifact("task-1", artifact_of(b"")), FileTaskReplicas(tmp_path / "copy")
    assert artifact_files(tmp_path / "copy") == {"artifact-1.part"}
    store(running, artifact_of(b"a report"), [b"a report"])
    assert artifact_files(tmp_path / "copy") == {"artifacts/report.txt"}
    killed.close()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd"])
def test_artifact_outside_the_directory_is_rejected(tmp_path, original, replicas, name):
    replicas.receive("task-1", 0, original)
    with pytest.raises(OSError, match="not a file name"):
        replicas.create_artifact("task-1", artifact_of(b"a report", name))
    assert artifact_files(tmp_path / "copy") == set()


def test_copied_task_is_replayed(tmp_path, replicas):
    from doubles.stored_tasks import StoredTasks

    stored = StoredTasks(tmp_path / "original")
    stored.add_completed_task("task-1")
    data = Path(records(tmp_path / "original")).read_bytes()
    replicas.receive("task-1", 0, data)
    copy, original = (FileJournals(tmp_path / name).replay("task-1") for name in ("copy", "original"))
    assert copy == original
