"""At most one server can use a data directory, regardless of the server's user and of the path to the directory."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from doubles.forked_commands import run
from doubles.stored_tasks import StoredTasks
from sandbox.access_tokens.token_file import TokenFile
from sandbox.bootstrap import private_directories
from sandbox.bootstrap.doctor.host_checks import _probe_dir
from sandbox.bootstrap.private_directories import (
    DataDirBusyError,
    UnsafeDirectoryError,
    choose_run_dir,
    lock_data_dir,
    make_data_dir,
)
from sandbox.bootstrap.settings.schema import ServerSection, ServerSettings
from sandbox.cli.errors import ExitCode
from sandbox.interfaces.auth import Role

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount and to change the user")
NOBODY = 65534


def serve(data_dir, *, command_prefix=()):
    """Run `serve` in a fork, or in a new interpreter if a command prefix is given."""
    arguments = ["serve", "--port", "0", "--ws-port", "0", "--data-dir", str(data_dir)]
    environment = {"PATH": os.environ["PATH"], "HOME": str(data_dir.parent / "home"), "LANG": "C.UTF-8"}
    if not command_prefix:
        return run(*arguments, text=True, env=environment)
    command = [*command_prefix, sys.executable, "-m", "sandbox", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_error_of_a_second_server_names_the_owner_and_the_fix(tmp_path):
    with lock_data_dir(tmp_path):
        result = serve(tmp_path)
    assert result.returncode == 4
    assert result.stderr == (
        f"Error: The server with process id {os.getpid()} uses {tmp_path}; stop it or choose another --data-dir.\n"
    )


def test_copied_directory_is_rejected_while_the_original_exists(tmp_path):
    """A server that uses the copy would adopt and end the original's running attempts."""
    data_dir, copy, moved = tmp_path / "data", tmp_path / "a copy", tmp_path / "moved"
    data_dir.mkdir(mode=0o700)
    with lock_data_dir(data_dir):
        shutil.copytree(data_dir, copy, copy_function=shutil.copy2)
    result = serve(copy)
    assert result.returncode == 4
    assert (
        f"{copy} is a copy of {data_dir}; a server that uses it would end the original's running tasks."
        in result.stderr
    )
    assert f"rm '{copy}/server.lock'" in result.stderr
    with lock_data_dir(data_dir):
        pass
    data_dir.rename(moved)
    for directory in (moved, copy):
        with lock_data_dir(directory):
            pass
    shutil.copytree(copy, tmp_path / "on another disk", copy_function=shutil.copy2)
    (copy / "server.lock").unlink()  # as if the directory had been moved to the other disk, not copied
    with lock_data_dir(tmp_path / "on another disk"):
        pass


def test_symbolic_link_to_a_locked_directory_cannot_be_served(tmp_path):
    data_dir, link = tmp_path / "real" / "data", tmp_path / "link"
    data_dir.mkdir(parents=True)
    link.symlink_to(data_dir.parent)
    with lock_data_dir(data_dir):
        assert serve(link / "data").returncode == 4
    assert choose_run_dir(link / "data") == choose_run_dir(data_dir)


@needs_root
def test_bind_mount_of_a_locked_directory_cannot_be_served(tmp_path):
    data_dir, mounted = tmp_path / "data", tmp_path / "mounted"
    data_dir.mkdir(mode=0o700)
    mounted.mkdir()
    command_prefix = ("unshare", "--mount", "sh", "-c", f'mount --bind "{data_dir}" "{mounted}" && exec "$@"', "sh")
    with lock_data_dir(data_dir):
        result = serve(mounted, command_prefix=command_prefix)
    assert result.returncode == 4
    assert f"process id {os.getpid()}" in result.stderr


@needs_root
@pytest.mark.parametrize(("owner", "other"), [(0, NOBODY), (NOBODY, 0)])
def test_directory_of_another_user_is_rejected(owner, other):
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        data_dir = Path(directory) / "data"
        data_dir.mkdir(mode=0o700)
        os.chown(data_dir, owner, owner)
        command_prefix = ("setpriv", f"--reuid={other}", f"--regid={other}", "--clear-groups")
        result = serve(data_dir, command_prefix=command_prefix)
        assert result.returncode == 2
        assert f"{data_dir} is not owned by this user" in result.stderr
        assert not list(data_dir.iterdir())


def command(*arguments, data_dir):
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LANG": "C.UTF-8"}
    return run(*arguments, "--data-dir", str(data_dir), text=True, env=environment)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o1777])
@pytest.mark.parametrize(
    "arguments",
    [("serve", "--port", "0", "--ws-port", "0"), ("token", "create", "--role", "viewer"), ("profile", "build", "x")],
)
def test_directory_accessible_to_other_users_is_rejected_without_changes(tmp_path, arguments, mode):
    directory = tmp_path / "shared place"
    directory.mkdir()
    (directory / "foreign.txt").touch()
    directory.chmod(mode)
    result = command(*arguments, data_dir=directory)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{directory} is accessible to other users and is not a Sandbox data directory" in result.stderr
    assert (f"chmod 0700 '{directory}'" in result.stderr) == (mode != 0o1777)
    assert stat.S_IMODE(directory.stat().st_mode) == mode
    assert [path.name for path in directory.iterdir()] == ["foreign.txt"]


@pytest.mark.parametrize(
    "names", [[], ["lost+found"], ["server.lock", "notes"], ["index.sqlite"], ["tokens.json"], ["profiles"]]
)
def test_empty_or_existing_data_directory_is_made_private(tmp_path, names):
    directory = tmp_path / "data"
    directory.mkdir()
    for name in names:
        (directory / name).touch()
    directory.chmod(0o755)
    assert make_data_dir(directory) == directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_private_directory_can_contain_other_files(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir(mode=0o700)
    (directory / "notes").touch()
    assert make_data_dir(directory) == directory


def test_empty_world_writable_directory_is_rejected(tmp_path):
    directory = tmp_path / "tmp"
    directory.mkdir()
    directory.chmod(0o1777)
    with pytest.raises(UnsafeDirectoryError, match="accessible to other users"):
        make_data_dir(directory)


def test_doctor_changes_nothing(tmp_path):
    directory, missing = tmp_path / "place", tmp_path / "missing" / "data"
    directory.mkdir()
    (directory / "foreign.txt").touch()
    directory.chmod(0o755)
    result = command("doctor", data_dir=directory)
    assert result.returncode == 1
    assert f"{directory} is accessible to other users" in result.stdout
    assert "sandboxes run with" in result.stdout
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755
    assert [path.name for path in directory.iterdir()] == ["foreign.txt"]
    with _probe_dir(ServerSettings(server=ServerSection(data_dir=missing))) as run_dir:
        assert run_dir.is_dir()
    assert not run_dir.exists()
    assert not missing.parent.exists()


@needs_root
def test_commands_of_another_user_are_rejected_without_changes(tmp_path):
    stored = StoredTasks.with_three_tasks(tmp_path / "data")
    _, token = TokenFile(stored.data_dir).create(Role.VIEWER)
    for path in (stored.data_dir, *stored.data_dir.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    before = snapshot(stored.data_dir)
    changes = (
        ("admin", "rebuild"),
        ("admin", "prune", "--yes", "--offline", "--keep", "1"),
        ("token", "revoke", token.id),
        ("token", "create", "--role", "viewer"),
    )
    for arguments in changes:
        result = command(*arguments, data_dir=stored.data_dir)
        assert (result.returncode, snapshot(stored.data_dir)) == (ExitCode.USAGE, before)
        assert "sudo -u nobody" in result.stderr
    os.chown(stored.data_dir, 0, 0)
    for arguments in changes:
        result = command(*arguments, data_dir=stored.data_dir)
        assert result.returncode == 0, result.stderr


def snapshot(directory):
    return {path: (info.st_uid, info.st_mtime_ns) for path in directory.rglob("*") if (info := path.lstat())}


KILLED_AFTER_FORK_PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from sandbox.bootstrap.private_directories import lock_data_dir
with lock_data_dir(Path(sys.argv[1])):
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    print("forked", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize(("seconds", "is_acquired"), [(0.2, True), (5, False)])
def test_lock_waits_for_a_forked_child_of_a_killed_server(tmp_path, monkeypatch, seconds, is_acquired):
    """Until a forked child calls `exec`, the child holds its server's lock."""
    monkeypatch.setattr(private_directories, "FORKED_LOCK_WAIT_SECONDS", 2.0 if is_acquired else 0.1)
    command = [sys.executable, "-c", KILLED_AFTER_FORK_PROGRAM, str(tmp_path), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"forked\n"
        server.wait(20)
        with (
            nullcontext() if is_acquired else pytest.raises(DataDirBusyError, match=str(server.pid)),
            lock_data_dir(tmp_path),
        ):
            pass


def test_removing_the_lock_file_does_not_release_the_lock(tmp_path):
    with lock_data_dir(tmp_path):
        (tmp_path / "server.lock").unlink()
        with pytest.raises(DataDirBusyError, match="Another server uses"), lock_data_dir(tmp_path):
            pass
    with lock_data_dir(tmp_path):
        pass


def test_two_data_directories_have_separate_locks_and_run_dirs(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    with lock_data_dir(one), lock_data_dir(other):
        assert choose_run_dir(one) != choose_run_dir(other)
