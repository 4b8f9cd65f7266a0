"""`sandbox serve` and `sandbox doctor` on a fresh installation."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from doubles.forked_commands import ForkedCommand, run
from sandbox.api.http.server import bind, is_externally_reachable

SANDBOX = [sys.executable, "-m", "sandbox"]


SERVE_ENVIRONMENT = {"PATH": os.environ["PATH"], "SANDBOX_RUNTIME": "bubblewrap"}
"""With a fixed runtime, the slow runtime detection is skipped."""


@pytest.fixture
def environment(tmp_path):
    """The environment of a new user: no key, no settings, and only git on PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "git").symlink_to("/usr/bin/git")
    return {"PATH": str(programs), "HOME": str(tmp_path), "LANG": "C.UTF-8"}


def test_doctor_reports_gaps_and_creates_nothing(environment, tmp_path):
    missing = tmp_path / "missing" / "data"
    result = run("doctor", "-f", "json", "--data-dir", str(missing), env=environment)
    findings = {}
    for finding in json.loads(result.stdout)["findings"]:
        findings.setdefault(finding["name"], []).append(finding)
    assert findings["sandbox"][0]["ok"], findings
    assert any("kernel is shared" in gap["message"] for gap in findings["gap"])
    assert findings["disks"]
    assert not any(gap["ok"] or gap["is_needed"] for gap in findings["gap"])
    assert f"{missing}, created at the first start" in findings["data directory"][0]["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize("key", ["", "sk-ant-something"])
def test_serve_warns_about_a_missing_model_key(environment, tmp_path, key):
    server = ForkedCommand(
        ["serve", "--port", "0", "--ws-port", "0", "--format", "json"],
        env={**environment, **SERVE_ENVIRONMENT, "ANTHROPIC_API_KEY": key, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        url = json.loads(server.stdout.readline())["http"]
        ready = httpx2.get(f"{url}/api/v1/health/ready", trust_env=False)
    finally:
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=20)
    assert ready.status_code == (200 if key else 503)
    assert ("set ANTHROPIC_API_KEY" in errors.decode()) is (not key)


def test_server_starts_although_its_log_file_is_on_a_full_disk(environment, tmp_path):
    with Path("/dev/full").open("wb") as full:
        server = ForkedCommand(
            ["serve", "--port", "0", "--ws-port", "0"],
            env={**environment, **SERVE_ENVIRONMENT, "TMPDIR": str(tmp_path)},
            stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE,
        )  # fmt: skip
    try:
        lines = iter(server.stderr.readline, b"")
        log = list(itertools.takewhile(lambda line: b"server is listening" not in line, lines))
    finally:
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=20)
    assert server.returncode == 0, errors
    assert any(b"could not be printed: No space left on device" in line for line in log)


def test_same_port_for_http_and_websocket_is_a_usage_error(environment):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    for command in ("serve", "doctor"):
        result = run(command, "--port", port, "--ws-port", port, env={**environment, **SERVE_ENVIRONMENT})
        assert result.returncode == 2
        assert b"server.ws_port (--ws-port) must differ from server.port (--port)" in result.stderr


@pytest.mark.parametrize("option", ["--port", "--ws-port"])
def test_port_in_use_error_names_the_option(environment, option):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ports = {"--port": "0", "--ws-port": "0", option: str(listener.getsockname()[1])}
        result = run(
            "serve", *(word for pair in ports.items() for word in pair), env={**environment, **SERVE_ENVIRONMENT}
        )
    assert result.returncode == 10
    assert f"Choose another port with {option} (".encode() in result.stderr


def test_stopped_server_logs_a_message(environment, tmp_path):
    server = subprocess.Popen(
        [*SANDBOX, "serve", "--port", "0", "--ws-port", "0"],
        env={**environment, **SERVE_ENVIRONMENT, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert b"Sandbox is listening at" in server.stdout.readline()
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=20)
    assert server.returncode == 0
    assert errors.decode().splitlines()[-1].endswith(" INFO    Stopped. There are no unfinished tasks.")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_public_host_without_tokens_is_rejected(environment, host):
    result = run("serve", "--host", host, "--port", "0", "--ws-port", "0", env={**environment, **SERVE_ENVIRONMENT})
    assert result.returncode == 10
    assert result.stdout == b""
    assert b"is reachable from other machines" in result.stderr
    assert b"Traceback" not in result.stderr


def test_server_on_a_loopback_address_rejects_a_foreign_host_or_origin(environment):
    server = ForkedCommand(
        ["serve", "--host", "127.0.0.2", "--port", "0", "--ws-port", "0", "--format", "json"],
        env={**environment, **SERVE_ENVIRONMENT},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        url = json.loads(server.stdout.readline())["http"]
        status_codes = [
            httpx2.get(f"{url}/api/v1/tasks", headers=headers, trust_env=False).status_code
            for headers in ({}, {"Host": "elsewhere.example"}, {"Origin": "http://elsewhere.example"})
        ]
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=20)
    assert url.startswith("http://127.0.0.2:")
    assert status_codes == [200, 403, 403]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_loopback_address_is_not_externally_reachable(host):
    sockets = bind(host, 0)
    try:
        assert not is_externally_reachable(sockets)
    finally:
        for listener in sockets:
            listener.close()
