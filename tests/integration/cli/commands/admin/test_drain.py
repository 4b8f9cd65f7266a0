"""`sandbox admin drain --wait`: an interrupted wait does not end the drain."""

import signal
import time

import pytest

from doubles.fake_api import json_response

DRAIN_STATUS = {"draining": True, "since": "2026-01-29T00:00:00.000Z", "running": 1, "waiting": 2}


@pytest.fixture
def draining_api(api):
    api.responses["POST", "/admin/drain"] = [json_response(DRAIN_STATUS)]
    api.responses["GET", "/admin/drain"] = [json_response(DRAIN_STATUS)]
    return api


def test_interrupted_wait_reports_that_the_drain_continues(draining_api, start_cli):
    process = start_cli("admin", "drain", "--wait", stdout=-1, stderr=-1)
    deadline = time.monotonic() + 60
    while not any(request.method == "GET" for request in draining_api.requests):
        assert time.monotonic() < deadline, "the command does not wait"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"The drain continues." in errors
    assert b"sandbox admin drain --undo" in errors


def test_server_output_is_escaped(run_cli, api):
    api.on("POST", "/admin/drain", json_response({**DRAIN_STATUS, "since": "\x1b]0;x\x07"}))
    errors = run_cli("admin", "drain").stderr
    assert rb"since \x1b]0;x\x07: 1 task running" in errors


@pytest.mark.parametrize("options", [("--timeout", "5s"), ("--undo", "--wait"), ("--undo", "--timeout", "5s")])
def test_timeout_without_wait_and_wait_with_undo_are_usage_errors(draining_api, run_cli, options):
    assert run_cli("admin", "drain", *options).returncode == 2
    assert draining_api.requests == []
