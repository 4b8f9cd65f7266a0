"""In every admin command, one task's unreadable files do not affect other tasks."""

import errno
import io
import json
import os

import pytest

from doubles.stored_tasks import StoredTasks
from sandbox.bootstrap.data_dir_backup import create_backup, restore
from sandbox.journal.journals import FileJournals


@pytest.fixture
def stored(tmp_path):
    """Three tasks; the journal of the second one is a directory."""
    tasks = StoredTasks.with_three_tasks(tmp_path / "data")
    tasks.records("task-2").unlink()
    tasks.records("task-2").mkdir()
    return tasks


@pytest.fixture
def admin(run_cli, stored):
    return lambda *arguments: run_cli("admin", *arguments, "--data-dir", str(stored.data_dir), "--format", "json")


def test_check_reports_the_unreadable_journal_and_checks_other_tasks(admin, stored):
    (stored.data_dir / "tasks" / "task-3" / "artifacts" / "notes.txt").unlink()
    result = admin("check", "--deep")
    assert result.returncode == 1, result.stderr
    findings = json.loads(result.stdout)["findings"]
    assert [(each["task_id"], each["kind"]) for each in findings] == [
        ("task-2", "journal_unreadable"), ("task-3", "artifact_missing"),
    ]  # fmt: skip


def test_rebuild_reports_the_unreadable_journal_and_indexes_other_tasks(admin):
    result = admin("rebuild")
    assert result.returncode == 1, result.stderr
    assert list(json.loads(result.stdout)["refused"]) == ["task-2"]


def test_unreadable_journal_does_not_block_prune_of_other_tasks(admin, stored):
    result = admin("prune", "--yes", "--offline", "--keep", "1")
    assert result.returncode == 0, result.stderr
    assert not stored.records("task-1").exists()


def test_backup_reports_the_unreadable_journal_and_contains_other_tasks(admin, stored, tmp_path):
    result = admin("backup", str(tmp_path / "backup.tar"))
    assert result.returncode == 1, result.stderr
    (remark,) = json.loads(result.stdout)["remarks"]
    assert "task-2 is left out" in remark
    restore(tmp_path / "backup.tar", tmp_path / "new")
    assert list(FileJournals(tmp_path / "new").task_ids()) == ["task-1", "task-3"]


def test_backup_reports_a_lock_that_cannot_be_opened(stored, tmp_path):
    lock = stored.records("task-1").with_name("lock")
    lock.unlink()
    lock.mkdir()
    assert any(
        "task-1 is left out" in remark for remark in create_backup(stored.data_dir, tmp_path / "backup.tar").remarks
    )


def test_backup_pads_a_partially_unreadable_artifact(stored, tmp_path, monkeypatch):
    content = os.urandom(300_000)
    stored.add_completed_task("broken", artifacts=(("big.bin", content), ("small.txt", b"kept\n")))
    monkeypatch.setattr(io, "FileIO", _failing_after(100_000))
    manifest = create_backup(stored.data_dir, tmp_path / "backup.tar")
    monkeypatch.undo()
    assert any("big.bin" in remark and "zeros" in remark for remark in manifest.remarks)
    restore(tmp_path / "backup.tar", tmp_path / "new")
    artifacts = tmp_path / "new" / "tasks" / "broken" / "artifacts"
    restored = (artifacts / "big.bin").read_bytes()
    assert len(restored) == len(content)
    assert restored != content
    assert (artifacts / "small.txt").read_bytes() == b"kept\n"


def _failing_after(size_bytes):
    class FailingFile(io.FileIO):
        def readinto(self, buffer):
            if self.tell() >= size_bytes:
                raise OSError(errno.EIO, "Input/output error")
            return super().readinto(buffer)

    return FailingFile


def test_backup_to_a_full_disk_fails_without_leftovers(stored, tmp_path, monkeypatch):
    def raise_disk_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tarfile.TarFile.addfile", raise_disk_full)
    with pytest.raises(OSError, match="No space left"):
        create_backup(stored.data_dir, tmp_path / "backup.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_journal_compressed_during_backup_is_included(stored, tmp_path, monkeypatch):
    open_file = os.open

    def compress_first(path, *options):
        if str(path).endswith("task-3/journal/records"):
            monkeypatch.undo()
            stored.journals.compress("task-3")
        return open_file(path, *options)

    # Let every `acquire_lock` succeed, so that `compress` runs although the backup holds the lock.
    monkeypatch.setattr("sandbox.journal.writer.acquire_lock", lambda _: open_file(os.devnull, os.O_RDONLY))
    monkeypatch.setattr(os, "open", compress_first)
    assert "tasks/task-3/journal/records.gz" in create_backup(stored.data_dir, tmp_path / "backup.tar").files
