"""The holder of a journal's lock is found in /proc, which also shows the processes of sandboxes."""

from pathlib import Path

from sandbox.placements.local.placement import _descriptor_holds_lock

_FDINFO_WITH_LOCK = "pos:\t0\nflags:\t02\nlock:\t1: FLOCK  ADVISORY  WRITE 123 00:29:1234 0 EOF\n"


def process_with(proc_directory: Path, file: Path, info: str) -> Path:
    """Create a directory like /proc/PID for a process that has the file open as descriptor 3."""
    (proc_directory / "fd").mkdir(parents=True)
    (proc_directory / "fdinfo").mkdir()
    (proc_directory / "fd/3").symlink_to(file)
    (proc_directory / "fdinfo/3").write_text(info)
    return proc_directory


def test_lock_holder_is_found(tmp_path: Path):
    journal = tmp_path / "journal"
    journal.touch()
    assert _descriptor_holds_lock(process_with(tmp_path / "1", journal, _FDINFO_WITH_LOCK), "3", journal.stat())
    assert not _descriptor_holds_lock(process_with(tmp_path / "2", journal, "pos:\t0\n"), "3", journal.stat())


def test_fdinfo_of_files_other_than_the_lock_is_not_read(tmp_path: Path, monkeypatch):
    journal, other = tmp_path / "journal", tmp_path / "other"
    journal.touch()
    other.touch()
    process = process_with(tmp_path / "1", other, _FDINFO_WITH_LOCK)
    read = []
    monkeypatch.setattr(Path, "read_text", lambda path: read.append(path) or _FDINFO_WITH_LOCK)
    assert not _descriptor_holds_lock(process, "3", journal.stat())
    assert read == []
