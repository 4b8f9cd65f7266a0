"""`sandbox admin drain --wait` only looks on: who stops looking is told that the drain goes on."""

import signal
import time

import pytest

from doubles.recorded_api import of_json

DRAINED = {"draining": True, "since": "2026-01-29T00:00:00.000Z", "running": 1, "waiting": 2}


@pytest.fixture
def drained(api):
    api.answers["POST", "/admin/drain"] = [of_json(DRAINED)]
    api.answers["GET", "/admin/drain"] = [of_json(DRAINED)]
    return api


def test_an_interrupted_wait_says_that_the_drain_goes_on_and_how_to_end_it(drained, sandbox_process):
    process = sandbox_process("admin", "drain", "--wait", stdout=-1, stderr=-1)
    deadline = time.monotonic() + 60
    while not any(asked.method == "GET" for asked in drained.asked):
        assert time.monotonic() < deadline, "it has not begun to wait"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"The drain goes on." in told
    assert b"sandbox admin drain --undo" in told


def test_what_a_server_tells_does_not_steer_the_terminal(sandbox, api):
    api.on("POST", "/admin/drain", of_json({**DRAINED, "since": "\x1b]0;x\x07"}))
    told = sandbox("admin", "drain").stderr
    assert rb"since \x1b]0;x\x07: running" in told


@pytest.mark.parametrize("options", [("--timeout", "5s"), ("--undo", "--wait"), ("--undo", "--timeout", "5s")])
def test_what_waits_for_nothing_is_a_usage_error(drained, sandbox, options):
    assert sandbox("admin", "drain", *options).returncode == 2
    assert drained.asked == []
