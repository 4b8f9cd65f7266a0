"""One server works on a data directory, whoever asks and whatever path leads there."""

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
from doubles.ordinary_user import as_ordinary_user, ordinary_place
from doubles.stored_tasks import KeptTasks
from sandbox.auth.token_file import TokenFile
from sandbox.bootstrap import data_dir_lock, machine
from sandbox.bootstrap.data_dir_lock import DataDirBusyError, lock_data_dir
from sandbox.bootstrap.doctor.examination import _probe_dir
from sandbox.bootstrap.machine import choose_run_dir
from sandbox.bootstrap.private_directory import UnsafeDirectoryError, make_data_dir
from sandbox.bootstrap.settings.schema import ServerSection, ServerSettings
from sandbox.cli.errors import ExitCode
from sandbox.interfaces.auth import Role

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts, and becomes somebody else")
NOBODY = 65534


def serve(data_dir, *, prefix=()):
    """Truly where it is told to begin as somebody else, or elsewhere."""
    words = ["serve", "--port", "0", "--ws-port", "0", "--data-dir", str(data_dir)]
    environment = {"PATH": os.environ["PATH"], "HOME": str(data_dir.parent / "home"), "LANG": "C.UTF-8"}
    if not prefix:
        return run(*words, text=True, env=environment)
    command = [*prefix, sys.executable, "-m", "sandbox", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_a_second_server_says_whose_directory_it_is_and_what_to_do(tmp_path):
    with lock_data_dir(tmp_path):
        refused = serve(tmp_path)
    assert refused.returncode == 4
    assert refused.stderr == (
        f"Error: The server with process id {os.getpid()} works on {tmp_path}; stop it or choose another --data-dir.\n"
    )


def test_a_copy_of_it_is_refused_while_the_original_is_there(tmp_path):
    """It names the same attempts: a server on it would take those that run for its own, and end them."""
    data_dir, copy, moved = tmp_path / "data", tmp_path / "a copy", tmp_path / "moved"
    data_dir.mkdir(mode=0o700)
    with lock_data_dir(data_dir):
        shutil.copytree(data_dir, copy, copy_function=shutil.copy2)
    refused = serve(copy)
    assert refused.returncode == 4
    assert f"{copy} is a copy of {data_dir}, whose tasks it would end." in refused.stderr
    assert f"rm '{copy}/server.lock'" in refused.stderr
    with lock_data_dir(data_dir):
        pass
    data_dir.rename(moved)
    for place in (moved, copy):
        with lock_data_dir(place):
            pass
    shutil.copytree(copy, tmp_path / "on another disk", copy_function=shutil.copy2)
    (copy / "server.lock").unlink()  # all that was in it went there
    with lock_data_dir(tmp_path / "on another disk"):
        pass


def test_another_path_to_it_is_the_same_directory(tmp_path):
    data_dir, link = tmp_path / "real" / "data", tmp_path / "link"
    data_dir.mkdir(parents=True)
    link.symlink_to(data_dir.parent)
    with lock_data_dir(data_dir):
        assert serve(link / "data").returncode == 4
    assert choose_run_dir(link / "data") == choose_run_dir(data_dir)


@needs_root
def test_a_bind_mount_of_it_is_the_same_directory(tmp_path):
    data_dir, mounted = tmp_path / "data", tmp_path / "mounted"
    data_dir.mkdir(mode=0o700)
    mounted.mkdir()
    prefix = ("unshare", "--mount", "sh", "-c", f'mount --bind "{data_dir}" "{mounted}" && exec "$@"', "sh")
    with lock_data_dir(data_dir):
        refused = serve(mounted, prefix=prefix)
    assert refused.returncode == 4
    assert f"process id {os.getpid()}" in refused.stderr


@needs_root
@pytest.mark.parametrize(("owner", "other"), [(0, NOBODY), (NOBODY, 0)])
def test_two_users_never_share_one(owner, other):
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        data_dir = Path(place) / "data"
        data_dir.mkdir(mode=0o700)
        os.chown(data_dir, owner, owner)
        prefix = ("setpriv", f"--reuid={other}", f"--regid={other}", "--clear-groups")
        refused = serve(data_dir, prefix=prefix)
        assert refused.returncode == 2
        assert f"{data_dir} is not this user's own directory" in refused.stderr
        assert not list(data_dir.iterdir())


def command(*words, data_dir):
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LANG": "C.UTF-8"}
    return run(*words, "--data-dir", str(data_dir), text=True, env=environment)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o1777])
@pytest.mark.parametrize(
    "words",
    [("serve", "--port", "0", "--ws-port", "0"), ("token", "create", "--role", "viewer"), ("profile", "build", "x")],
)
def test_a_directory_that_others_use_stays_as_it_is(tmp_path, words, mode):
    place = tmp_path / "shared place"
    place.mkdir()
    (place / "somebodys.txt").touch()
    place.chmod(mode)
    refused = command(*words, data_dir=place)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"{place} is open to other users and is no data directory of Sandbox" in refused.stderr
    assert (f"chmod 0700 '{place}'" in refused.stderr) == (mode != 0o1777)
    assert stat.S_IMODE(place.stat().st_mode) == mode
    assert [path.name for path in place.iterdir()] == ["somebodys.txt"]


@pytest.mark.parametrize(
    "holds", [[], ["lost+found"], ["server.lock", "notes"], ["index.sqlite"], ["tokens.json"], ["profiles"]]
)
def test_what_is_empty_or_a_servers_already_is_made_private(tmp_path, holds):
    place = tmp_path / "data"
    place.mkdir()
    for name in holds:
        (place / name).touch()
    place.chmod(0o755)
    assert make_data_dir(place) == place
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_what_is_private_may_hold_what_it_will(tmp_path):
    place = tmp_path / "data"
    place.mkdir(mode=0o700)
    (place / "notes").touch()
    assert make_data_dir(place) == place


def test_an_empty_place_that_is_everybodys_is_not_taken_from_them(tmp_path):
    place = tmp_path / "tmp"
    place.mkdir()
    place.chmod(0o1777)
    with pytest.raises(UnsafeDirectoryError, match="open to other users"):
        make_data_dir(place)


def test_doctor_looks_and_changes_nothing(tmp_path):
    place, missing = tmp_path / "place", tmp_path / "missing" / "data"
    place.mkdir()
    (place / "somebodys.txt").touch()
    place.chmod(0o755)
    told = command("doctor", data_dir=place)
    assert told.returncode == 1
    assert f"{place} is open to other users" in told.stdout
    assert "makes the sandboxes" in told.stdout
    assert stat.S_IMODE(place.stat().st_mode) == 0o755
    assert [path.name for path in place.iterdir()] == ["somebodys.txt"]
    with _probe_dir(ServerSettings(server=ServerSection(data_dir=missing))) as run_dir:
        assert run_dir.is_dir()
    assert not run_dir.exists()
    assert not missing.parent.exists()


@needs_root
def test_who_is_not_its_user_leaves_nothing_that_would_lock_its_server_out(tmp_path):
    kept = KeptTasks.of_three(tmp_path / "data")
    _, token = TokenFile(kept.data_dir).create(Role.VIEWER)
    for path in (kept.data_dir, *kept.data_dir.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    before = everything(kept.data_dir)
    changes = (
        ("admin", "rebuild"),
        ("admin", "prune", "--offline", "--keep", "1"),
        ("token", "revoke", token.id),
        ("token", "create", "--role", "viewer"),
    )
    for words in changes:
        refused = command(*words, data_dir=kept.data_dir)
        assert (refused.returncode, everything(kept.data_dir)) == (ExitCode.USAGE, before)
        assert "sudo -u nobody" in refused.stderr
    os.chown(kept.data_dir, 0, 0)
    for words in changes:
        done = command(*words, data_dir=kept.data_dir)
        assert done.returncode == 0, done.stderr


def everything(directory):
    return {path: (found.st_uid, found.st_mtime_ns) for path in directory.rglob("*") if (found := path.lstat())}


KILLED_WHILE_IT_STARTS_A_CHILD = """
import os, signal, sys, time
from pathlib import Path
from sandbox.bootstrap.data_dir_lock import lock_data_dir
with lock_data_dir(Path(sys.argv[1])):
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    print("forked", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize(("seconds", "is_let_in"), [(0.2, True), (5, False)])
def test_what_a_killed_server_had_just_forked_is_waited_for(tmp_path, monkeypatch, seconds, is_let_in):
    """A child that has not begun its program yet holds what its server held."""
    monkeypatch.setattr(data_dir_lock, "FORKED_LOCK_WAIT_SECONDS", 2.0 if is_let_in else 0.1)
    command = [sys.executable, "-c", KILLED_WHILE_IT_STARTS_A_CHILD, str(tmp_path), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"forked\n"
        server.wait(20)
        with (
            nullcontext() if is_let_in else pytest.raises(DataDirBusyError, match=str(server.pid)),
            lock_data_dir(tmp_path),
        ):
            pass


def test_removing_the_file_of_the_lock_lets_nobody_in(tmp_path):
    with lock_data_dir(tmp_path):
        (tmp_path / "server.lock").unlink()
        with pytest.raises(DataDirBusyError, match="Another server works on"), lock_data_dir(tmp_path):
            pass
    with lock_data_dir(tmp_path):
        pass


def test_two_directories_have_two_servers_and_two_places_for_sockets(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    with lock_data_dir(one), lock_data_dir(other):
        assert choose_run_dir(one) != choose_run_dir(other)


def test_a_server_of_another_session_finds_the_sockets_of_the_one_before():
    with ordinary_place() as place:
        as_ordinary_user(_restarted_in_other_sessions, place)


async def _restarted_in_other_sessions(place):
    machine._USER_RUNTIME_ROOT = place / "logins"
    data_dir, session, other = place / "data", machine._USER_RUNTIME_ROOT / str(os.geteuid()), place / "other"
    for directory in (data_dir, session, other):
        directory.mkdir(mode=0o700, parents=True)
    os.environ["XDG_RUNTIME_DIR"] = str(session)
    first = choose_run_dir(data_dir)
    assert first.is_relative_to(session)
    for runtime_dir in (str(other), ""):
        os.environ["XDG_RUNTIME_DIR"] = runtime_dir
        assert choose_run_dir(data_dir) == first
    # The session is over, and what was in it is gone.
    shutil.rmtree(session)
    os.environ["XDG_RUNTIME_DIR"] = str(other)
    assert choose_run_dir(data_dir).is_relative_to(other)
    # Somebody else's link in its place is not followed.
    (other / "sandbox").rename(place / "elsewhere")
    (other / "sandbox").symlink_to(place / "elsewhere")
    with pytest.raises(UnsafeDirectoryError):
        choose_run_dir(data_dir)
