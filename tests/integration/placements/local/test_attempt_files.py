"""The cleanup of an attempt removes the sockets of its killed runner and no other files."""

import asyncio
import socket

import pytest

from sandbox.interfaces.file_layout import AttemptLayout, probe_directory
from sandbox.placements.local.attempt_files import SocketLeftovers


@pytest.fixture
def bind_socket(tmp_path):
    """Bind a socket to this file name, as a runner or another program does; return the socket's path."""
    opened = []

    def bind(name):
        path = tmp_path / name
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        opened.append(listener)
        return path

    yield bind
    for listener in opened:
        listener.close()


def clean_up(run_dir, attempt_id):
    asyncio.run(SocketLeftovers(run_dir).clean_up(attempt_id, AttemptLayout(run_dir / attempt_id)))


def test_only_sockets_of_the_dead_attempt_are_removed(bind_socket, tmp_path):
    dead = [bind_socket("aaaaaaaaaaaa.sock"), bind_socket("aaaaaaaaaaaa.files")]
    live_socket = bind_socket("bbbbbbbbbbbb.sock")
    assert SocketLeftovers(tmp_path).attempt_ids() == {"aaaaaaaaaaaa", "bbbbbbbbbbbb"}
    clean_up(tmp_path, "aaaaaaaaaaaa")
    clean_up(tmp_path, "aaaaaaaaaaaa")
    assert [path.exists() for path in (*dead, live_socket)] == [False, False, True]


def test_files_that_are_not_attempt_sockets_are_kept(bind_socket, tmp_path):
    others = [bind_socket("something-else.sock"), tmp_path / "cccccccccccc.sock", tmp_path / "dddddddddddd.sock"]
    others[1].write_text("a file")
    others[2].symlink_to(others[1])
    assert not SocketLeftovers(tmp_path).attempt_ids()
    clean_up(tmp_path, "cccccccccccc")
    assert all(path.exists() for path in others)


def test_probe_sockets_are_not_listed(bind_socket, tmp_path):
    probe_directory(tmp_path, "aaaaaaaaaaaa").mkdir()
    bind_socket("aaaaaaaaaaaa.files")
    assert not SocketLeftovers(tmp_path).attempt_ids()


def test_missing_run_directory_has_no_leftovers(tmp_path):
    assert not SocketLeftovers(tmp_path / "none").attempt_ids()
    clean_up(tmp_path / "none", "aaaaaaaaaaaa")
