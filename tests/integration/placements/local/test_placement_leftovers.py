"""A runner that is killed leaves its socket behind; who knows that it is dead has it removed, and no other."""

import asyncio
import socket

import pytest

from sandbox.interfaces.layout import AttemptLayout, probe_directory
from sandbox.placements.local.placement import SocketLeftovers


@pytest.fixture
def bound(tmp_path):
    """Bind a runner's socket, or another one; gives its path."""
    opened = []

    def bind(name):
        path = tmp_path / name
        runner = socket.socket(socket.AF_UNIX)
        runner.bind(str(path))
        opened.append(runner)
        return path

    yield bind
    for runner in opened:
        runner.close()


def end(run_dir, attempt_id):
    asyncio.run(SocketLeftovers(run_dir).clean_up(attempt_id, AttemptLayout(run_dir / attempt_id)))


def test_that_of_the_attempt_that_is_over_goes_and_every_other_stays(bound, tmp_path):
    dead = [bound("aaaaaaaaaaaa.sock"), bound("aaaaaaaaaaaa.files")]
    living = bound("bbbbbbbbbbbb.sock")
    assert SocketLeftovers(tmp_path).attempt_ids() == {"aaaaaaaaaaaa", "bbbbbbbbbbbb"}
    end(tmp_path, "aaaaaaaaaaaa")
    end(tmp_path, "aaaaaaaaaaaa")
    assert [path.exists() for path in (*dead, living)] == [False, False, True]


def test_what_is_no_attempts_socket_is_let_alone(bound, tmp_path):
    others = [bound("something-else.sock"), tmp_path / "cccccccccccc.sock", tmp_path / "dddddddddddd.sock"]
    others[1].write_text("a file")
    others[2].symlink_to(others[1])
    assert not SocketLeftovers(tmp_path).attempt_ids()
    end(tmp_path, "cccccccccccc")
    assert all(path.exists() for path in others)


def test_that_of_a_probe_is_no_attempts(bound, tmp_path):
    probe_directory(tmp_path, "aaaaaaaaaaaa").mkdir()
    bound("aaaaaaaaaaaa.files")
    assert not SocketLeftovers(tmp_path).attempt_ids()


def test_a_run_directory_that_is_not_there_yet_has_none(tmp_path):
    assert not SocketLeftovers(tmp_path / "none").attempt_ids()
    end(tmp_path / "none", "aaaaaaaaaaaa")
