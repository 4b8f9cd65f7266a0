"""Each data directory has its own run directory, which is found again from another login session."""

import os
import shutil

import pytest

from doubles.ordinary_user import ordinary_user_directory, run_as_ordinary_user
from sandbox.bootstrap import private_directories
from sandbox.bootstrap.private_directories import UnsafeDirectoryError, choose_run_dir


def test_run_dir_is_found_from_another_login_session():
    with ordinary_user_directory() as directory:
        run_as_ordinary_user(_restart_in_other_sessions, directory)


async def _restart_in_other_sessions(base):
    private_directories._USER_RUNTIME_ROOT = base / "logins"
    data_dir, session, other = base / "data", private_directories._USER_RUNTIME_ROOT / str(os.geteuid()), base / "other"
    for directory in (data_dir, session, other):
        directory.mkdir(mode=0o700, parents=True)
    os.environ["XDG_RUNTIME_DIR"] = str(session)
    first = choose_run_dir(data_dir)
    assert first.is_relative_to(session)
    for runtime_dir in (str(other), ""):
        os.environ["XDG_RUNTIME_DIR"] = runtime_dir
        assert choose_run_dir(data_dir) == first
    # The login session ended and its directory was removed.
    shutil.rmtree(session)
    os.environ["XDG_RUNTIME_DIR"] = str(other)
    assert choose_run_dir(data_dir).is_relative_to(other)
    # A symbolic link in place of the run directory is not followed.
    (other / "sandbox").rename(base / "elsewhere")
    (other / "sandbox").symlink_to(base / "elsewhere")
    with pytest.raises(UnsafeDirectoryError):
        choose_run_dir(data_dir)


def test_run_dir_is_not_blocked_by_another_user():
    with ordinary_user_directory() as directory:
        shared = directory / "shared"
        shared.mkdir()
        shared.chmod(0o1777)
        planted = shared / f"sandbox-{directory.stat().st_uid}"
        planted.mkdir(0o700)  # as root, which is another user
        run_as_ordinary_user(_start_beside_planted_run_dir, directory)
        planted.rmdir()
        planted.symlink_to(directory)
        run_as_ordinary_user(_start_beside_planted_run_dir, directory)
        planted.unlink()
        run_as_ordinary_user(_start_with_own_run_dir, directory)


async def _start_beside_planted_run_dir(base):
    data_dir, session = _prepare_run_dirs(base)
    with pytest.raises(UnsafeDirectoryError, match="XDG_RUNTIME_DIR"):
        choose_run_dir(data_dir)
    session.mkdir(mode=0o700, parents=True)
    assert choose_run_dir(data_dir).is_relative_to(session)
    shutil.rmtree(session)
    other = base / "other"
    other.mkdir(exist_ok=True)
    os.environ["XDG_RUNTIME_DIR"] = str(other)
    assert choose_run_dir(data_dir).is_relative_to(other)


async def _start_with_own_run_dir(base):
    data_dir, _ = _prepare_run_dirs(base)
    assert choose_run_dir(data_dir).is_relative_to(base / "shared")


def _prepare_run_dirs(base):
    private_directories._USER_RUNTIME_ROOT, private_directories._SHARED_ROOT = base / "logins", base / "shared"
    os.environ["XDG_RUNTIME_DIR"] = ""
    data_dir = base / "data"
    data_dir.mkdir(exist_ok=True)
    return data_dir, private_directories._USER_RUNTIME_ROOT / str(os.geteuid())
