"""What the disk does not give of one task costs no other task anything, whichever command looks."""

import errno
import io
import json
import os

import pytest

from doubles.stored_tasks import KeptTasks
from sandbox.bootstrap.backup.create import create_backup
from sandbox.bootstrap.backup.restore import restore
from sandbox.journal.journals import FileJournals


@pytest.fixture
def kept(tmp_path):
    """Three tasks; of the second something stands in the journal's place that no system reads as a file."""
    made = KeptTasks.of_three(tmp_path / "data")
    made.records("task-2").unlink()
    made.records("task-2").mkdir()
    return made


@pytest.fixture
def admin(sandbox, kept):
    return lambda *words: sandbox("admin", *words, "--data-dir", str(kept.data_dir), "--format", "json")


def test_check_tells_of_it_and_looks_at_all_others(admin, kept):
    (kept.data_dir / "tasks" / "task-3" / "artifacts" / "notes.txt").unlink()
    done = admin("check", "--deep")
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)["findings"]
    assert [(each["task_id"], each["kind"]) for each in told] == [
        ("task-2", "journal_unreadable"), ("task-3", "artifact_missing"),
    ]  # fmt: skip


def test_rebuild_tells_of_it_and_takes_in_all_others(admin):
    done = admin("rebuild")
    assert done.returncode == 1, done.stderr
    assert list(json.loads(done.stdout)["refused"]) == ["task-2"]


def test_prune_removes_the_others(admin, kept):
    done = admin("prune", "--offline", "--keep", "1")
    assert done.returncode == 0, done.stderr
    assert not kept.records("task-1").exists()


def test_a_backup_tells_of_it_and_has_all_others(admin, kept, tmp_path):
    done = admin("backup", str(tmp_path / "backup.tar"))
    assert done.returncode == 1, done.stderr
    (remark,) = json.loads(done.stdout)["remarks"]
    assert "task-2 is left out" in remark
    restore(tmp_path / "backup.tar", tmp_path / "new")
    assert list(FileJournals(tmp_path / "new").task_ids()) == ["task-1", "task-3"]


def test_a_lock_that_cannot_be_opened_is_told_too(kept, tmp_path):
    lock = kept.records("task-1").with_name("lock")
    lock.unlink()
    lock.mkdir()
    assert any(
        "task-1 is left out" in remark for remark in create_backup(kept.data_dir, tmp_path / "backup.tar").remarks
    )


def test_an_artifact_whose_disk_gives_up_in_the_middle_is_told_and_what_follows_is_whole(kept, tmp_path, monkeypatch):
    whole = os.urandom(300_000)
    kept.finish("broken", artifacts=(("big.bin", whole), ("small.txt", b"kept\n")))
    monkeypatch.setattr(io, "FileIO", _weak_after(100_000))
    manifest = create_backup(kept.data_dir, tmp_path / "backup.tar")
    monkeypatch.undo()
    assert any("big.bin" in remark and "zeros" in remark for remark in manifest.remarks)
    restore(tmp_path / "backup.tar", tmp_path / "new")
    artifacts = tmp_path / "new" / "tasks" / "broken" / "artifacts"
    found = (artifacts / "big.bin").read_bytes()
    assert len(found) == len(whole)
    assert found != whole
    assert (artifacts / "small.txt").read_bytes() == b"kept\n"


def _weak_after(size_bytes):
    class Weak(io.FileIO):
        def readinto(self, buffer):
            if self.tell() >= size_bytes:
                raise OSError(errno.EIO, "Input/output error")
            return super().readinto(buffer)

    return Weak


def test_a_backup_whose_own_disk_is_full_fails_and_leaves_nothing(kept, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tarfile.TarFile.addfile", refuse)
    with pytest.raises(OSError, match="No space left"):
        create_backup(kept.data_dir, tmp_path / "backup.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_journal_that_is_packed_while_the_backup_opens_it_is_in_it(kept, tmp_path, monkeypatch):
    opened = os.open

    def pack_first(path, *rest):
        if str(path).endswith("task-3/journal/records"):
            monkeypatch.undo()
            kept.journals.compress("task-3")
        return opened(path, *rest)

    # As when the janitor holds the lock, so that the backup does not.
    monkeypatch.setattr("sandbox.journal.lock.acquire", lambda _: opened(os.devnull, os.O_RDONLY))
    monkeypatch.setattr(os, "open", pack_first)
    assert "tasks/task-3/journal/records.gz" in create_backup(kept.data_dir, tmp_path / "backup.tar").files
