"""`sandbox admin drain --wait`: an interrupted wait does not end the drain."""

import json
import signal
import time

import pytest

from doubles.fake_api import error_response, json_response

DRAIN_STATUS = {"draining": True, "since": "2026-01-29T00:00:00.000Z", "running": 1, "waiting": 2}

DRAINED_HOST = {
    "name": "node-1",
    "state": "ready",
    "reason": "",
    "cpus": 8,
    "memory_bytes": 2**35,
    "running": 1,
    "task_ids": ["task-1"],
    "last_contact_at": None,
    "version": None,
    "draining_since": "2026-01-29T00:00:00.000Z",
}


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


@pytest.fixture
def host_api(api):
    api.on("POST", "/hosts/node-1/drain", json_response(DRAINED_HOST))
    api.on("DELETE", "/hosts/node-1/drain", json_response({**DRAINED_HOST, "draining_since": None}))
    return api


def test_one_host_is_drained_and_undrained(host_api, run_cli):
    result = run_cli("admin", "drain", "--host", "node-1")
    assert (result.returncode, result.stdout) == (0, b"")
    assert b"The host node-1 has been draining since 2026-01-29T00:00:00.000Z: 1 task running." in result.stderr
    assert b"Tasks start on node-1 again." in run_cli("admin", "drain", "--host", "node-1", "--undo").stderr
    assert [request.method for request in host_api.requests] == ["POST", "DELETE"]
    assert json.loads(run_cli("admin", "drain", "--host", "node-1", "-f", "json").stdout) == DRAINED_HOST


def test_wait_ends_when_no_task_runs_on_the_host(host_api, run_cli):
    """The list of hosts may no longer contain a host without tasks."""
    busy, idle = DRAINED_HOST, {**DRAINED_HOST, "running": 0}
    answers = [json_response({"hosts": hosts}) for hosts in ([busy], [{**idle, "name": "node-2"}, idle])]
    for expected in (2, 1):
        host_api.requests.clear()
        host_api.responses["GET", "/hosts"] = answers[-expected:]
        result = run_cli("admin", "drain", "--host", "node-1", "--wait")
        assert (result.returncode, b"0 tasks running" in result.stderr) == (0, True)
        assert sum(request.method == "GET" for request in host_api.requests) == expected
    host_api.responses["GET", "/hosts"] = [json_response({"hosts": []})]
    assert run_cli("admin", "drain", "--host", "node-1", "--wait").returncode == 0


def test_wait_for_a_host_has_a_timeout(host_api, run_cli):
    host_api.responses["GET", "/hosts"] = [json_response({"hosts": [DRAINED_HOST]})]
    result = run_cli("admin", "drain", "--host", "node-1", "--wait", "--timeout", "1s")
    assert result.returncode == 7
    assert b"1 task still running after 1.0 s; the drain continues." in result.stderr


def test_unknown_host_is_an_error(api, run_cli):
    api.on("POST", "/hosts/node-9/drain", error_response(404, "host_not_found", "The cluster has no host 'node-9'."))
    result = run_cli("admin", "drain", "--host", "node-9")
    assert result.returncode == 3
    assert b"The cluster has no host 'node-9'." in result.stderr
    for name in ("a/b", ""):
        assert run_cli("admin", "drain", "--host", name).returncode in {2, 3}
