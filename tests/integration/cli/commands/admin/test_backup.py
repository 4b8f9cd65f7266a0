"""`sandbox admin backup` saves a data directory; `restore` validates a backup and recreates the directory."""

import io
import json
import os
import subprocess
import tarfile
import tracemalloc

import pytest

from doubles.stored_tasks import StoredTasks
from doubles.unreachable_journals import UnreachableJournals
from sandbox.access_tokens.token_file import TokenFile
from sandbox.bootstrap import data_dir_backup as backup_restore
from sandbox.bootstrap import data_dir_backup as backups
from sandbox.bootstrap.data_dir_backup import (
    BackupExistsError,
    BackupTooLargeError,
    BackupUnusableError,
    RestoreTargetUnusableError,
    create_backup,
)
from sandbox.bootstrap.data_dir_backup import restore as restore_here
from sandbox.bootstrap.data_dir_maintenance import prune_data_dir
from sandbox.interfaces.auth import Role
from sandbox.interfaces.journal import JournalDamagedError
from sandbox.interfaces.server_services import Retention
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.journal import compressed
from sandbox.journal.journals import FileJournals
from sandbox.model.artifacts import Artifact
from sandbox.model.display_text import format_size
from sandbox.model.events import AgentExited, ArtifactCollected, Output, TaskFinished
from sandbox.model.failure import Failure, FailureCode


@pytest.fixture
def stored(tmp_path):
    """Finished, compressed, running and pending tasks, and a token. The running task is writing a record."""
    tasks = StoredTasks(tmp_path / "data")
    tasks.add_completed_task("done", artifacts=(("notes.txt", b"kept\n"), ("größer – λ.bin", os.urandom(3_000_000))))
    tasks.add_completed_task("packed", lines=40, line_bytes=8000)  # more than one chunk
    tasks.journals.compress("packed")
    tasks.running = tasks.add_running_task("running")
    tasks.waiting = tasks.add_task("waiting")
    tasks.exited = tasks.add_running_task("exited")
    tasks.exited.record(AgentExited(0, {"is_error": False}))
    tasks.exited.record(tasks.store_artifact("exited", "metadata.json", b"{}"))
    tasks.index()
    with tasks.records("running").open("ab") as records:
        records.write(b'01234567 {"seq":')
    TokenFile(tasks.data_dir).create(Role.VIEWER, "wall", None)
    yield tasks
    for recorder in (tasks.running, tasks.waiting, tasks.exited):
        recorder.writer.close()


@pytest.fixture
def backup(run_cli, stored, tmp_path):
    """A backup file and the result of the command."""
    file = tmp_path / "backup.tar"
    result = run_cli("admin", "backup", str(file), "--data-dir", str(stored.data_dir), "-f", "json")
    assert result.returncode == 0, result.stderr
    return file, json.loads(result.stdout)


@pytest.fixture
def restore(run_cli, tmp_path):
    return lambda file, *options: run_cli("admin", "restore", str(file), "--data-dir", str(tmp_path / "new"), *options)


def test_backup_contains_tasks_whose_writer_may_be_alive(stored, tmp_path, monkeypatch):
    """No process removes or compresses a journal whose writer may be alive, so the complete records can be read."""
    monkeypatch.setattr(backups, "FileJournals", UnreachableJournals)
    create_backup(stored.data_dir, tmp_path / "backup.tar")
    with tarfile.open(tmp_path / "backup.tar") as tar:
        found = {name.split("/")[1] for name in tar.getnames() if name.startswith("tasks/")}
    assert found == {"done", "packed", "running", "waiting", "exited"}


def test_backup_of_running_tasks_is_restored(run_cli, backup, restore, stored, tmp_path):
    file, summary = backup
    assert summary == {"file": str(file), "tasks": 5, "size_bytes": file.stat().st_size, "remarks": []}
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if "backup" in path.name] == ["backup.tar"]
    stored.running.record(Output.from_bytes("stdout", b"after the backup\n"))

    result = restore(file, "-f", "json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "tasks_count": 5, "lost": ["exited", "running"], "remarks": [], "discrepancies": [],
    }  # fmt: skip
    new = tmp_path / "new"
    assert new.stat().st_mode & 0o777 == 0o700
    assert run_cli("admin", "check", "--deep", "--data-dir", str(new)).returncode == 0
    journals = FileJournals(new)
    tasks = {task_id: journals.replay(task_id).task for task_id in journals.task_ids()}
    assert {task_id: task.state for task_id, task in tasks.items()} == {
        "done": "completed", "packed": "completed", "exited": "completed", "running": "failed", "waiting": "pending",
    }  # fmt: skip
    assert tasks["running"].failure.code == "host_lost"
    assert [artifact.name for artifact in tasks["running"].artifacts] == ["notes.txt"]
    assert tasks["done"] == stored.journals.replay("done").task
    assert [token.name for token in TokenFile(new).list()] == ["wall"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in new.rglob("*"))


def test_backup_and_restore_overwrite_nothing(run_cli, backup, restore, stored, tmp_path):
    file, _ = backup
    content = file.read_bytes()
    second = run_cli("admin", "backup", str(file), "--data-dir", str(stored.data_dir))
    assert (second.returncode, file.read_bytes()) == (4, content)
    assert b"already exists" in second.stderr
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    result = restore(file)
    assert result.returncode == 4
    assert b"is not empty" in result.stderr
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine"]
    (tmp_path / "new" / "mine").unlink()
    result = restore(file)
    assert result.returncode == 0
    assert result.stderr.decode().splitlines()[-1] == f"  sandbox serve --data-dir {tmp_path}/new"


def test_missing_target_directory_is_reported(run_cli, stored, tmp_path):
    missing = tmp_path / "missing"
    result = run_cli("admin", "backup", str(missing / "backup.tar"), "--data-dir", str(stored.data_dir))
    assert result.returncode == 10
    assert result.stderr.decode() == f"Error: {missing}: No such directory; create it first\n"


def test_unwritable_target_error_names_the_path(stored, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"/file/backup\.tar'$"):
        create_backup(stored.data_dir, tmp_path / "file" / "backup.tar")


def test_restore_rejects_special_files_without_blocking(restore, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", "/dev/zero", "/dev/tty", "/dev/ptmx"):
        result = restore(file)
        assert result.returncode == 10
        assert b"not a regular file" in result.stderr
        assert not (tmp_path / "new").exists()


def test_restore_accepts_a_symbolic_link_to_a_backup(backup, restore, tmp_path):
    (tmp_path / "link").symlink_to(backup[0])
    assert restore(tmp_path / "link").returncode == 0


def test_unusable_restore_target_is_rejected_before_unpacking(stored, tmp_path, monkeypatch):
    create_backup(stored.data_dir, tmp_path / "backup.tar")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "volume"))
    monkeypatch.setattr("sandbox.bootstrap.data_dir_backup._unpack", None)
    for name, reason in (("link", "a symbolic link"), ("volume", "a mount point")):
        with pytest.raises(RestoreTargetUnusableError, match=reason):
            restore_here(tmp_path / "backup.tar", tmp_path / name)


def test_backup_without_hard_links_overwrites_nothing(stored, tmp_path, monkeypatch):
    def raise_error(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", raise_error)
    create_backup(stored.data_dir, tmp_path / "backup.tar")
    content = (tmp_path / "backup.tar").read_bytes()
    with pytest.raises(BackupExistsError):
        create_backup(stored.data_dir, tmp_path / "backup.tar")
    assert (tmp_path / "backup.tar").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir() if "backup" in path.name] == ["backup.tar"]
    assert restore_here(tmp_path / "backup.tar", tmp_path / "new").tasks_count == 5


def test_damaged_files_are_backed_up_and_reported(run_cli, stored, restore, tmp_path):
    (stored.data_dir / "tasks" / "done" / "artifacts" / "notes.txt").write_bytes(b"KEPT\n")
    data = bytearray((stored.data_dir / "tasks" / "packed" / "journal" / "records.gz").read_bytes())
    data[-20] ^= 1
    (stored.data_dir / "tasks" / "packed" / "journal" / "records.gz").write_bytes(data)
    file = tmp_path / "backup.tar"
    result = run_cli("admin", "backup", str(file), "--data-dir", str(stored.data_dir), "-f", "json")
    assert result.returncode == 1
    remarks = json.loads(result.stdout)["remarks"]
    assert [remark.split(":")[0] for remark in remarks] == ["Task done", "Task packed"]
    restored = restore(file, "-f", "json")
    assert restored.returncode == 1
    assert [each["task_id"] for each in json.loads(restored.stdout)["discrepancies"]] == ["packed"]
    assert (tmp_path / "new" / "tasks" / "packed" / "journal" / "records.gz").read_bytes() == data


def test_prune_during_backup_does_not_lose_artifacts(stored, tmp_path, monkeypatch):
    add = backups._add_artifact

    def prune_first(written, layout, artifact):
        prune_data_dir(stored.data_dir, Retention(keep=0), dry_run=False)
        add(written, layout, artifact)

    monkeypatch.setattr(backups, "_add_artifact", prune_first)
    manifest = create_backup(stored.data_dir, tmp_path / "backup.tar")
    assert manifest.remarks == []
    assert restore_here(tmp_path / "backup.tar", tmp_path / "new").discrepancies == []
    assert stored.journals.task_ids() == ["exited", "running", "waiting"]


def test_task_that_cannot_be_finalized_does_not_block_others(stored, tmp_path):
    """A compressed journal is read-only. The journal of this task was compressed too early."""
    stored.add_running_task("early").writer.close()
    records = stored.records("early")
    compressed._write_verified(records.read_bytes().splitlines(keepends=True), records.with_name("records.gz"))
    records.unlink()
    create_backup(stored.data_dir, tmp_path / "backup.tar")
    restored = restore_here(tmp_path / "backup.tar", tmp_path / "new")
    assert (restored.tasks_count, restored.lost) == (6, ["exited", "running"])
    (discrepancy,) = restored.discrepancies
    assert (discrepancy.task_id, discrepancy.kind) == ("early", "journal_damaged")
    command = discrepancy.message.rpartition(": ")[2].split()
    subprocess.run(command, cwd=tmp_path / "new", timeout=10, check=True)
    FileJournals(tmp_path / "new").open("early").close()


def read_members(file):
    with tarfile.open(file) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]


def write_archive(file, members):
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members:
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content))


def entry(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b"evil"


HOSTILE = {
    "parent directory": [entry("../evil")],
    "parent of a task": [entry("tasks/t/artifacts/../../../../evil")],
    "absolute": [entry("/tmp/evil")],
    "task named ..": [entry("tasks/../journal/records")],
    "artifact named ..": [entry("tasks/t/artifacts/..")],
    "unexpected path": [entry("server.lock")],
    "the index": [entry("index.sqlite")],
    "handle": [entry("tasks/t/attempts/aaaaaaaaaaaa/handle.json")],
    "link": [entry("tasks/t/artifacts/a", tarfile.SYMTYPE, "/etc/passwd")],
    "hard link": [entry("tasks/t/artifacts/a", tarfile.LNKTYPE, "tokens.json")],
    "device": [entry("tasks/t/artifacts/a", tarfile.CHRTYPE)],
    "pipe": [entry("tasks/t/artifacts/a", tarfile.FIFOTYPE)],
    "directory": [entry("tasks", tarfile.DIRTYPE)],
    "below a link": [entry("tasks/t/artifacts", tarfile.SYMTYPE, "/tmp"), entry("tasks/t/artifacts/a")],
    "duplicate": [entry("tasks/t/artifacts/a"), entry("tasks/t/artifacts/a")],
    "not in the manifest": [entry("tasks/t/artifacts/a")],
    "too long name": [entry("tasks/t/artifacts/" + "ü" * 200)],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archive_is_rejected_without_leftovers(stored, tmp_path, name):
    create_backup(stored.data_dir, tmp_path / "backup.tar")
    original = read_members(tmp_path / "backup.tar")
    write_archive(tmp_path / "hostile.tar", [*HOSTILE[name], *original])
    before = snapshot(tmp_path)
    with pytest.raises(BackupUnusableError):
        restore_here(tmp_path / "hostile.tar", tmp_path / "new")
    assert snapshot(tmp_path) == before
    write_archive(tmp_path / "good.tar", original)
    assert restore_here(tmp_path / "good.tar", tmp_path / "new").tasks_count == 5


def snapshot(directory):
    return sorted(str(path) for path in directory.rglob("*"))


def test_modified_backup_is_rejected(stored, tmp_path):
    file, new = tmp_path / "backup.tar", tmp_path / "new"
    create_backup(stored.data_dir, file)
    original, data, middle = read_members(file), file.read_bytes(), file.stat().st_size // 2
    manifest = json.loads(original[-1][1])
    variants = {
        "cut": data[:middle],
        "cut at a member": data[: data.index(b"manifest.json")],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "empty": b"",
        "no tar": os.urandom(20_000),
        "without a member": original[1:],
        "extra member": [*original, entry("tasks/t/artifacts/a")],
    }
    for changed in ({**manifest, "version": 99}, {**manifest, "files": {}}, [], {**manifest, "files": 1}):
        variants[str(changed)] = [*original[:-1], (original[-1][0], json.dumps(changed).encode())]
    for content in variants.values():
        if isinstance(content, bytes):
            (tmp_path / "modified.tar").write_bytes(content)
        else:
            write_archive(tmp_path / "modified.tar", content)
        with pytest.raises(BackupUnusableError):
            restore_here(tmp_path / "modified.tar", new)
        assert not new.exists()


def header(kind, size_bytes, content=b"", copies=1):
    """Return the bytes of a member with an invalid header."""
    info = tarfile.TarInfo("tokens.json")
    info.type, info.size = kind, size_bytes
    return (info.tobuf(tarfile.GNU_FORMAT) + content.ljust(-len(content) % 512 + len(content), b"\0")) * copies


@pytest.mark.parametrize(
    "content",
    [
        header(tarfile.GNUTYPE_LONGNAME, 2, b"x\0", copies=3000),
        header(tarfile.XHDTYPE, 14, b"13 comment=ab\n", copies=3000),
        header(tarfile.XHDTYPE, 25, b"99999999999999999999 a=b\n"),
        header(tarfile.REGTYPE, -512),
        header(tarfile.REGTYPE, -1024),
        header(tarfile.REGTYPE, -(2**60)),
        header(tarfile.REGTYPE, 2**80),
    ],
    ids=[
        "many long names",
        "many headers",
        "number with too many digits",
        "next member at the same position",
        "next member before this one",
        "next member far before this one",
        "next member after the end",
    ],
)
def test_invalid_headers_are_rejected(tmp_path, content):
    (tmp_path / "invalid.tar").write_bytes(content)
    with pytest.raises(BackupUnusableError):
        restore_here(tmp_path / "invalid.tar", tmp_path / "new")
    assert snapshot(tmp_path) == [str(tmp_path / "invalid.tar")]


@pytest.mark.parametrize("suffix", [b"[" * 200_000, b'"\xff"}', b'1,"files":{"\xff":"0"}}'])
def test_malformed_manifest_is_rejected(tmp_path, suffix):
    write_archive(tmp_path / "deep.tar", [(tarfile.TarInfo("manifest.json"), b'{"version":1,"x":' + suffix)])
    with pytest.raises(BackupUnusableError, match="is malformed"):
        restore_here(tmp_path / "deep.tar", tmp_path / "new")


def test_oversized_manifest_is_neither_written_nor_restored(stored, tmp_path, monkeypatch):
    create_backup(stored.data_dir, tmp_path / "good.tar")
    size_bytes = len(read_members(tmp_path / "good.tar")[-1][1])
    for module in (backups, backup_restore):
        monkeypatch.setattr(module, "BACKUP_MANIFEST_BYTES_MAX", size_bytes)
    assert restore_here(tmp_path / "good.tar", tmp_path / "new").tasks_count == 5

    for module in (backups, backup_restore):
        monkeypatch.setattr(module, "BACKUP_MANIFEST_BYTES_MAX", size_bytes - 1)
    with pytest.raises(BackupTooLargeError, match="sandbox admin prune"):
        create_backup(stored.data_dir, tmp_path / "large.tar")
    with pytest.raises(BackupUnusableError, match=f"{size_bytes} bytes"):
        restore_here(tmp_path / "good.tar", tmp_path / "newer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "good.tar", "new"]


@pytest.mark.parametrize("target", ["attempt", "artifact", "absolute artifact"])
def test_journal_with_foreign_paths_is_rejected(tmp_path, target):
    """The checksums are valid, because an attacker can compute them too."""
    outside_file = tmp_path / "precious"
    (outside_file / "disk").mkdir(parents=True)
    (outside_file / "key").write_text("top secret")
    artifact = str(outside_file / "key") if target == "absolute artifact" else "../../../../precious/key"
    stored = StoredTasks(tmp_path / "data")
    names = {"attempt_id": "../../../../precious"} if target == "attempt" else {}
    artifacts = () if target == "attempt" else (artifact_event(artifact),)
    recorder = stored.add_running_task("evil", lifecycle={"failure_action": "preserve"}, **names)
    for event in (*artifacts, AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "It failed.")), TaskFinished()):
        recorder.record(event)
    recorder.writer.close()
    task = recorder.task
    stored.add_completed_task("good")
    create_backup(stored.data_dir, tmp_path / "backup.tar")

    restored = restore_here(tmp_path / "backup.tar", tmp_path / "new")
    assert [(each.task_id, each.kind) for each in restored.discrepancies] == [("evil", "journal_damaged")]
    assert restored.tasks_count == 1
    with pytest.raises(JournalDamagedError):
        FileJournals(tmp_path / "new").replay(task.id)


def artifact_event(name):
    return ArtifactCollected(Artifact(name, "key", 10, "text/plain", "sha256:" + "0" * 64))


def test_journal_of_another_task_is_rejected(tmp_path):
    stored = StoredTasks(tmp_path / "data")
    stored.add_running_task("one").writer.close()
    stored.add_completed_task("two")
    (stored.data_dir / "tasks" / "one").rename(stored.data_dir / "tasks" / "three")
    stored.add_running_task("one", attempt_id="b" * 12).writer.close()
    create_backup(stored.data_dir, tmp_path / "backup.tar")
    restored = restore_here(tmp_path / "backup.tar", tmp_path / "new")
    assert (restored.tasks_count, restored.lost) == (2, ["one"])
    assert {each.task_id for each in restored.discrepancies} == {"three"}


def test_huge_header_does_not_fill_memory(restore, tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 7 * 1024**3
    with (tmp_path / "bomb.tar").open("wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(7 * 1024**3)
    result = restore(tmp_path / "bomb.tar")
    assert result.returncode == 10
    assert b"header" in result.stderr


def pax_header(kind, size_bytes):
    """Return an extended header with as many records as possible."""
    records = b"".join(b"10 %04x=1\n" % number for number in range(size_bytes // 10))
    return header(kind, len(records), records)


def member(name):
    return tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)


HEADER_FLOODS = {
    "large headers of many members": b"".join(
        pax_header(tarfile.XHDTYPE, 500_000) + member(f"tasks/t/artifacts/{number}") for number in range(4)
    ),
    "many headers of one member": pax_header(tarfile.XHDTYPE, 500_000) * 4 + member("tokens.json"),
    "many small headers of one member": pax_header(tarfile.XHDTYPE, 40_000) * 50 + member("tokens.json"),
    "global header": pax_header(tarfile.XGLTYPE, 40_000) + member("tokens.json"),
}


@pytest.mark.parametrize("name", HEADER_FLOODS)
def test_accumulated_headers_do_not_fill_memory(tmp_path, name):
    (tmp_path / "flood.tar").write_bytes(HEADER_FLOODS[name])
    tracemalloc.start()
    try:
        with pytest.raises(BackupUnusableError, match="header"):
            restore_here(tmp_path / "flood.tar", tmp_path / "new")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5_000_000


def test_more_files_than_a_manifest_can_list_are_rejected(stored, tmp_path, monkeypatch):
    create_backup(stored.data_dir, tmp_path / "good.tar")
    *files, manifest = read_members(tmp_path / "good.tar")
    monkeypatch.setattr(backup_restore, "BACKUP_MANIFEST_BYTES_MAX", len(manifest[1]))
    many = [(tarfile.TarInfo(f"tasks/t/artifacts/{number}"), b"") for number in range(100)]
    write_archive(tmp_path / "many.tar", [*files, *many, manifest])
    with pytest.raises(BackupUnusableError, match="more files"):
        restore_here(tmp_path / "many.tar", tmp_path / "new")
    assert restore_here(tmp_path / "good.tar", tmp_path / "new").tasks_count == 5


def test_many_artifacts_with_long_names_are_restored(tmp_path):
    tasks = StoredTasks(tmp_path / "data")
    names = [f"{number:03} {'ü' * 98}" for number in range(300)]
    tasks.add_completed_task("named", artifacts=[(name, name.encode()) for name in names])
    create_backup(tasks.data_dir, tmp_path / "backup.tar")
    result = restore_here(tmp_path / "backup.tar", tmp_path / "new")
    assert (result.tasks_count, *result.discrepancies) == (1,)
    restored = TaskLayout(tmp_path / "new", "named").artifacts
    assert {path.name: path.read_text() for path in restored.iterdir()} == dict(zip(names, names, strict=True))


def test_backup_to_standard_output_is_restored(run_cli, restore, stored, tmp_path):
    result = run_cli("admin", "backup", "-", "--data-dir", str(stored.data_dir))
    assert result.returncode == 0
    assert result.stderr.decode() == f"The backup has 5 tasks, {format_size(len(result.stdout))}.\n"
    assert not (tmp_path / "-").exists()
    (tmp_path / "backup.tar").write_bytes(result.stdout)
    restored = restore(tmp_path / "backup.tar", "-f", "json")
    assert restored.returncode == 0
    assert json.loads(restored.stdout)["tasks_count"] == 5


def test_backup_to_a_file_named_dash_needs_its_directory_in_the_path(run_cli, stored, tmp_path):
    result = run_cli("admin", "backup", "./-", "--data-dir", str(stored.data_dir))
    assert (result.returncode, result.stdout) == (0, b"")
    assert tarfile.is_tarfile(tmp_path / "-")


def test_interrupted_backup_to_standard_output_is_refused_by_restore(run_cli, restore, stored, tmp_path):
    content = run_cli("admin", "backup", "-", "--data-dir", str(stored.data_dir)).stdout
    (tmp_path / "backup.tar").write_bytes(content[: len(content) // 2])
    assert restore(tmp_path / "backup.tar").returncode != 0
    assert not (tmp_path / "new").exists()


def test_remarks_do_not_mix_with_a_backup_on_standard_output(run_cli, restore, stored, tmp_path):
    (stored.data_dir / "tasks" / "done" / "artifacts" / "notes.txt").unlink()
    result = run_cli("admin", "backup", "-", "--data-dir", str(stored.data_dir))
    assert result.returncode == 1
    assert b"Task done: artifact 'notes.txt' is missing" in result.stderr
    assert b"1 problem found" in result.stderr
    (tmp_path / "backup.tar").write_bytes(result.stdout)
    assert b"Task done" in restore(tmp_path / "backup.tar").stdout


def test_json_report_needs_a_backup_file(run_cli, stored):
    result = run_cli("admin", "backup", "-", "--data-dir", str(stored.data_dir), "-f", "json")
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"write the backup to a file" in result.stderr


def test_backup_is_not_written_to_a_terminal(start_cli, terminal, stored):
    streams = {"stdout": terminal.child_fd, "stderr": terminal.child_fd}
    process = start_cli("admin", "backup", "-", "--data-dir", str(stored.data_dir), **streams)
    assert b"not written to a terminal" in terminal.read_to_end(process)
    assert process.returncode == 2
