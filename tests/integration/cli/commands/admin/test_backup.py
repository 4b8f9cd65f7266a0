"""`sandbox admin backup` keeps all that counts; `restore` trusts nothing and makes a whole directory of it."""

import io
import json
import os
import subprocess
import tarfile

import pytest

from doubles.stored_tasks import KeptTasks
from sandbox.auth.token_file import TokenFile
from sandbox.bootstrap.administration import prune_data_dir
from sandbox.bootstrap.backup import create as backups
from sandbox.bootstrap.backup import restore as backup_restore
from sandbox.bootstrap.backup.create import BackupExistsError, BackupTooLargeError, create_backup
from sandbox.bootstrap.backup.restore import BackupUnusableError, RestoreTargetUnusableError
from sandbox.bootstrap.backup.restore import restore as restore_here
from sandbox.interfaces.auth import Role
from sandbox.interfaces.journal import JournalDamagedError, replay_task
from sandbox.interfaces.tasks import Retention
from sandbox.journal import compressed
from sandbox.journal.journals import FileJournals
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import AgentExited, Artifact, ArtifactCollected, Output, TaskFinished


@pytest.fixture
def kept(tmp_path):
    """Finished, packed, running and waiting tasks, the running one in the middle of a record; and a token."""
    made = KeptTasks(tmp_path / "data")
    made.finish("done", artifacts=(("notes.txt", b"kept\n"), ("größer – λ.bin", os.urandom(3_000_000))))
    made.finish("packed", lines=40, line_bytes=8000)  # more than one piece
    made.journals.compress("packed")
    made.running = made.run("running")
    made.waiting = made.begin("waiting")
    made.leaving = made.run("leaving")
    made.leaving.record(AgentExited(0, {"is_error": False}))
    made.leaving.record(made.keep("leaving", "metadata.json", b"{}"))
    made.index()
    with made.records("running").open("ab") as records:
        records.write(b'01234567 {"seq":')
    TokenFile(made.data_dir).create(Role.VIEWER, "wall", None)
    yield made
    for recorder in (made.running, made.waiting, made.leaving):
        recorder.writer.close()


@pytest.fixture
def backup(sandbox, kept, tmp_path):
    """A backup, and how it went."""
    file = tmp_path / "backup.tar"
    done = sandbox("admin", "backup", str(file), "--data-dir", str(kept.data_dir), "-f", "json")
    assert done.returncode == 0, done.stderr
    return file, json.loads(done.stdout)


@pytest.fixture
def restore(sandbox, tmp_path):
    return lambda file, *options: sandbox("admin", "restore", str(file), "--data-dir", str(tmp_path / "new"), *options)


def test_what_was_backed_up_beside_runners_comes_back(sandbox, backup, restore, kept, tmp_path):
    file, told = backup
    assert told == {"file": str(file), "tasks": 5, "size_bytes": file.stat().st_size, "remarks": []}
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if "backup" in path.name] == ["backup.tar"]
    kept.running.record(Output.from_bytes("stdout", b"after the backup\n"))

    done = restore(file, "-f", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "tasks_count": 5, "lost": ["leaving", "running"], "remarks": [], "discrepancies": [],
    }  # fmt: skip
    new = tmp_path / "new"
    assert new.stat().st_mode & 0o777 == 0o700
    assert sandbox("admin", "check", "--deep", "--data-dir", str(new)).returncode == 0
    journals = FileJournals(new)
    tasks = {task_id: replay_task(journals, task_id).task for task_id in journals.task_ids()}
    assert {task_id: task.state for task_id, task in tasks.items()} == {
        "done": "completed", "packed": "completed", "leaving": "completed", "running": "failed", "waiting": "pending",
    }  # fmt: skip
    assert tasks["running"].failure.code == "host_lost"
    assert [artifact.name for artifact in tasks["running"].artifacts] == ["notes.txt"]
    assert tasks["done"] == replay_task(kept.journals, "done").task
    assert [token.name for token in TokenFile(new).list()] == ["wall"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in new.rglob("*"))


def test_nothing_is_overwritten(sandbox, backup, restore, kept, tmp_path):
    file, _ = backup
    content = file.read_bytes()
    again = sandbox("admin", "backup", str(file), "--data-dir", str(kept.data_dir))
    assert (again.returncode, file.read_bytes()) == (4, content)
    assert b"is there already" in again.stderr
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    refused = restore(file)
    assert refused.returncode == 4
    assert b"is not empty" in refused.stderr
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine"]
    (tmp_path / "new" / "mine").unlink()
    done = restore(file)
    assert done.returncode == 0
    assert done.stderr.decode().splitlines()[-1] == f"  sandbox serve --data-dir {tmp_path}/new"


def test_a_backup_into_a_directory_that_is_not_there_tells_which(sandbox, kept, tmp_path):
    place = tmp_path / "missing"
    refused = sandbox("admin", "backup", str(place / "backup.tar"), "--data-dir", str(kept.data_dir))
    assert refused.returncode == 10
    assert refused.stderr.decode() == f"Error: {place}: There is no such directory; make it first\n"


def test_a_backup_into_a_place_that_cannot_be_written_names_what_was_asked_for(kept, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"/file/backup\.tar'$"):
        create_backup(kept.data_dir, tmp_path / "file" / "backup.tar")


def test_what_is_no_regular_file_is_refused_and_not_waited_for(restore, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", "/dev/zero", "/dev/tty", "/dev/ptmx"):
        refused = restore(place)
        assert refused.returncode == 10
        assert b"no regular file" in refused.stderr
        assert not (tmp_path / "new").exists()


def test_a_link_to_a_backup_is_one(backup, restore, tmp_path):
    (tmp_path / "link").symlink_to(backup[0])
    assert restore(tmp_path / "link").returncode == 0


def test_a_place_that_cannot_become_the_directory_is_refused_before_anything_is_unpacked(kept, tmp_path, monkeypatch):
    create_backup(kept.data_dir, tmp_path / "backup.tar")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "volume"))
    monkeypatch.setattr("sandbox.bootstrap.backup.restore._unpack", None)
    for place, reason in (("link", "a symbolic link"), ("volume", "a file system of its own")):
        with pytest.raises(RestoreTargetUnusableError, match=reason):
            restore_here(tmp_path / "backup.tar", tmp_path / place)


def test_a_disk_without_hard_links_takes_backups_and_overwrites_none(kept, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    create_backup(kept.data_dir, tmp_path / "backup.tar")
    content = (tmp_path / "backup.tar").read_bytes()
    with pytest.raises(BackupExistsError):
        create_backup(kept.data_dir, tmp_path / "backup.tar")
    assert (tmp_path / "backup.tar").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir() if "backup" in path.name] == ["backup.tar"]
    assert restore_here(tmp_path / "backup.tar", tmp_path / "new").tasks_count == 5


def test_what_was_damaged_before_is_kept_and_told(sandbox, kept, restore, tmp_path):
    (kept.data_dir / "tasks" / "done" / "artifacts" / "notes.txt").write_bytes(b"KEPT\n")
    data = bytearray((kept.data_dir / "tasks" / "packed" / "journal" / "records.gz").read_bytes())
    data[-20] ^= 1
    (kept.data_dir / "tasks" / "packed" / "journal" / "records.gz").write_bytes(data)
    file = tmp_path / "backup.tar"
    done = sandbox("admin", "backup", str(file), "--data-dir", str(kept.data_dir), "-f", "json")
    assert done.returncode == 1
    remarks = json.loads(done.stdout)["remarks"]
    assert [remark.split(":")[0] for remark in remarks] == ["Task done", "Task packed"]
    restored = restore(file, "-f", "json")
    assert restored.returncode == 1
    assert [each["task_id"] for each in json.loads(restored.stdout)["discrepancies"]] == ["packed"]
    assert (tmp_path / "new" / "tasks" / "packed" / "journal" / "records.gz").read_bytes() == data


def test_a_task_is_not_pruned_before_its_artifacts_are_copied(kept, tmp_path, monkeypatch):
    add = backups._add_artifact

    def prune_first(written, layout, artifact):
        prune_data_dir(kept.data_dir, Retention(keep=0), dry_run=False)
        add(written, layout, artifact)

    monkeypatch.setattr(backups, "_add_artifact", prune_first)
    manifest = create_backup(kept.data_dir, tmp_path / "backup.tar")
    assert manifest.remarks == []
    assert restore_here(tmp_path / "backup.tar", tmp_path / "new").discrepancies == []
    assert kept.journals.task_ids() == ["leaving", "running", "waiting"]


def test_a_task_whose_books_cannot_be_ended_is_told_and_keeps_no_other_from_its_end(kept, tmp_path):
    """A packed journal is written no more, and this one was packed too early."""
    kept.run("early").writer.close()
    records = kept.records("early")
    compressed._write_verified(records.read_bytes().splitlines(keepends=True), records.with_name("records.gz"))
    records.unlink()
    create_backup(kept.data_dir, tmp_path / "backup.tar")
    restored = restore_here(tmp_path / "backup.tar", tmp_path / "new")
    assert (restored.tasks_count, restored.lost) == (6, ["leaving", "running"])
    (told,) = restored.discrepancies
    assert (told.task_id, told.kind) == ("early", "journal_damaged")
    command = told.message.rpartition(": ")[2].split()
    subprocess.run(command, cwd=tmp_path / "new", timeout=10, check=True)
    FileJournals(tmp_path / "new").open("early").close()


def members(file):
    with tarfile.open(file) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]


def write(file, changed):
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in changed:
            info.size = len(content) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(content))


def entry(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b"evil"


HOSTILE = {
    "up": [entry("../evil")],
    "up from a task": [entry("tasks/t/artifacts/../../../../evil")],
    "absolute": [entry("/tmp/evil")],
    "a task called ..": [entry("tasks/../journal/records")],
    "an artifact called ..": [entry("tasks/t/artifacts/..")],
    "somewhere else": [entry("server.lock")],
    "the index": [entry("index.sqlite")],
    "a handle": [entry("tasks/t/attempts/aaaaaaaaaaaa/handle.json")],
    "a link": [entry("tasks/t/artifacts/a", tarfile.SYMTYPE, "/etc/passwd")],
    "a hard link": [entry("tasks/t/artifacts/a", tarfile.LNKTYPE, "tokens.json")],
    "a device": [entry("tasks/t/artifacts/a", tarfile.CHRTYPE)],
    "a pipe": [entry("tasks/t/artifacts/a", tarfile.FIFOTYPE)],
    "a directory": [entry("tasks", tarfile.DIRTYPE)],
    "through a link": [entry("tasks/t/artifacts", tarfile.SYMTYPE, "/tmp"), entry("tasks/t/artifacts/a")],
    "twice": [entry("tasks/t/artifacts/a"), entry("tasks/t/artifacts/a")],
    "more than the manifest says": [entry("tasks/t/artifacts/a")],
    "a name that no disk takes": [entry("tasks/t/artifacts/" + "ü" * 200)],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_leaves_nothing_anywhere(kept, tmp_path, name):
    create_backup(kept.data_dir, tmp_path / "backup.tar")
    whole = members(tmp_path / "backup.tar")
    write(tmp_path / "hostile.tar", [*HOSTILE[name], *whole])
    before = everything(tmp_path)
    with pytest.raises(BackupUnusableError):
        restore_here(tmp_path / "hostile.tar", tmp_path / "new")
    assert everything(tmp_path) == before
    write(tmp_path / "good.tar", whole)
    assert restore_here(tmp_path / "good.tar", tmp_path / "new").tasks_count == 5


def everything(directory):
    return sorted(str(path) for path in directory.rglob("*"))


def test_a_backup_that_is_not_as_it_was_written_is_refused(kept, tmp_path):
    file, new = tmp_path / "backup.tar", tmp_path / "new"
    create_backup(kept.data_dir, file)
    whole, data, middle = members(file), file.read_bytes(), file.stat().st_size // 2
    manifest = json.loads(whole[-1][1])
    harmed = {
        "cut": data[:middle],
        "cut at a member": data[: data.index(b"manifest.json")],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "empty": b"",
        "no tar": os.urandom(20_000),
        "without a member": whole[1:],
        "goes on": [*whole, entry("tasks/t/artifacts/a")],
    }
    for changed in ({**manifest, "version": 99}, {**manifest, "files": {}}, [], {**manifest, "files": 1}):
        harmed[str(changed)] = [*whole[:-1], (whole[-1][0], json.dumps(changed).encode())]
    for content in harmed.values():
        if isinstance(content, bytes):
            (tmp_path / "harmed.tar").write_bytes(content)
        else:
            write(tmp_path / "harmed.tar", content)
        with pytest.raises(BackupUnusableError):
            restore_here(tmp_path / "harmed.tar", new)
        assert not new.exists()


def header(kind, size_bytes, content=b"", copies=1):
    """The bytes of a member that says of itself what no honest archive says."""
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
    ids=["names of names", "headers of headers", "a long word", "again", "before", "far before", "behind all"],
)
def test_headers_that_lead_astray_are_refused_by_a_sentence(tmp_path, content):
    (tmp_path / "astray.tar").write_bytes(content)
    with pytest.raises(BackupUnusableError):
        restore_here(tmp_path / "astray.tar", tmp_path / "new")
    assert everything(tmp_path) == [str(tmp_path / "astray.tar")]


@pytest.mark.parametrize("more", [b"[" * 200_000, b'"\xff"}', b'1,"files":{"\xff":"0"}}'])
def test_a_manifest_without_sense_is_refused_by_a_sentence(tmp_path, more):
    write(tmp_path / "deep.tar", [(tarfile.TarInfo("manifest.json"), b'{"version":1,"x":' + more)])
    with pytest.raises(BackupUnusableError, match="cannot be understood"):
        restore_here(tmp_path / "deep.tar", tmp_path / "new")


def test_a_manifest_that_restoring_would_not_read_is_not_written(kept, tmp_path, monkeypatch):
    create_backup(kept.data_dir, tmp_path / "good.tar")
    size_bytes = len(members(tmp_path / "good.tar")[-1][1])
    for module in (backups, backup_restore):
        monkeypatch.setattr(module, "BACKUP_MANIFEST_BYTES_MAX", size_bytes)
    assert restore_here(tmp_path / "good.tar", tmp_path / "new").tasks_count == 5

    for module in (backups, backup_restore):
        monkeypatch.setattr(module, "BACKUP_MANIFEST_BYTES_MAX", size_bytes - 1)
    with pytest.raises(BackupTooLargeError, match="sandbox admin prune"):
        create_backup(kept.data_dir, tmp_path / "large.tar")
    with pytest.raises(BackupUnusableError, match=f"{size_bytes} bytes"):
        restore_here(tmp_path / "good.tar", tmp_path / "newer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "good.tar", "new"]


@pytest.mark.parametrize("lie", ["attempt", "artifact", "absolute artifact"])
def test_a_journal_that_names_places_elsewhere_leads_nobody_there(tmp_path, lie):
    """Its checksums are right, since whoever makes an archive makes them, too."""
    precious = tmp_path / "precious"
    (precious / "disk").mkdir(parents=True)
    (precious / "key").write_text("top secret")
    artifact = str(precious / "key") if lie == "absolute artifact" else "../../../../precious/key"
    kept = KeptTasks(tmp_path / "data")
    names = {"attempt_id": "../../../../precious"} if lie == "attempt" else {}
    told = () if lie == "attempt" else (tell(artifact),)
    recorder = kept.run("evil", lifecycle={"failure_action": "preserve"}, **names)
    for event in (*told, AgentExited(1, None, Failure(FailureCode.AGENT_FAILED, "It failed.")), TaskFinished()):
        recorder.record(event)
    recorder.writer.close()
    task = recorder.task
    kept.finish("good")
    create_backup(kept.data_dir, tmp_path / "backup.tar")

    restored = restore_here(tmp_path / "backup.tar", tmp_path / "new")
    assert [(each.task_id, each.kind) for each in restored.discrepancies] == [("evil", "journal_damaged")]
    assert restored.tasks_count == 1
    with pytest.raises(JournalDamagedError):
        replay_task(FileJournals(tmp_path / "new"), task.id)


def tell(name):
    return ArtifactCollected(Artifact(name, "key", 10, "text/plain", "sha256:" + "0" * 64))


def test_a_journal_in_the_place_of_another_tasks_is_refused(tmp_path):
    kept = KeptTasks(tmp_path / "data")
    kept.run("one").writer.close()
    kept.finish("two")
    (kept.data_dir / "tasks" / "one").rename(kept.data_dir / "tasks" / "three")
    kept.run("one", attempt_id="b" * 12).writer.close()
    create_backup(kept.data_dir, tmp_path / "backup.tar")
    restored = restore_here(tmp_path / "backup.tar", tmp_path / "new")
    assert (restored.tasks_count, restored.lost) == (2, ["one"])
    assert {each.task_id for each in restored.discrepancies} == {"three"}


def test_a_header_that_says_it_is_long_fills_no_memory(restore, tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 7 * 1024**3
    with (tmp_path / "bomb.tar").open("wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(7 * 1024**3)
    refused = restore(tmp_path / "bomb.tar")
    assert refused.returncode == 10
    assert b"header" in refused.stderr
