"""A runner that is killed leaves its socket behind; the next server removes it, and no other."""

import os
import socket
import time

import pytest

from sandbox.placement.control import UnixRunnerControl


@pytest.fixture
def bound(tmp_path):
    """Bind a runner's socket; gives its path. seconds_ago: when."""
    opened = []

    def bind(attempt_id, *, listens=False, lives=False, seconds_ago=60):
        path = tmp_path / f"{attempt_id}.sock"
        runner = socket.socket(socket.AF_UNIX)
        runner.bind(str(path))
        if listens:
            runner.listen(1)
        opened.append(runner)
        if not lives:
            runner.close()
        at = time.time() - seconds_ago
        os.utime(path, (at, at))
        return path

    yield bind
    for runner in opened:
        runner.close()


def test_the_socket_of_a_dead_runner_goes(bound, tmp_path):
    dead = [bound("aaaaaaaaaaaa"), bound("bbbbbbbbbbbb", listens=True)]
    UnixRunnerControl(tmp_path).forget_dead()
    assert not any(path.exists() for path in dead)


def test_that_of_a_living_one_stays_also_of_one_that_does_not_listen_yet(bound, tmp_path):
    living = bound("aaaaaaaaaaaa", listens=True, lives=True)
    beginning = bound("bbbbbbbbbbbb", lives=True, seconds_ago=0)
    for _ in range(5):  # more than it has room for
        UnixRunnerControl(tmp_path).forget_dead()
    assert living.exists()
    assert beginning.exists()


def test_what_is_no_runners_socket_is_let_alone(bound, tmp_path):
    others = [bound("something-else"), tmp_path / "cccccccccccc.sock", tmp_path / "dddddddddddd.sock"]
    others[1].write_text("a file")
    others[2].symlink_to(others[1])
    UnixRunnerControl(tmp_path).forget_dead()
    assert all(path.exists() for path in others)


def test_a_run_directory_that_is_not_there_yet_has_none(tmp_path):
    UnixRunnerControl(tmp_path / "none").forget_dead()
