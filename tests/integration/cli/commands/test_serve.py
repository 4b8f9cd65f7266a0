"""What somebody is told who has just installed Sandbox and begins."""

import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from doubles.forked_commands import ForkedCommand, run
from sandbox.api.http.server import bind, is_externally_reachable

SANDBOX = [sys.executable, "-m", "sandbox"]


SERVING = {"PATH": os.environ["PATH"], "SANDBOX_RUNTIME": "bubblewrap"}
"""Of a server whose choice of a runtime, which takes its time, is no matter here."""


@pytest.fixture
def environment(tmp_path):
    """A fresh user's: no key, no settings. On their PATH is git, and nothing else."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "git").symlink_to("/usr/bin/git")
    return {"PATH": str(programs), "HOME": str(tmp_path), "LANG": "C.UTF-8"}


def test_doctor_hides_no_gap_of_the_sandbox_and_makes_nothing(environment, tmp_path):
    missing = tmp_path / "missing" / "data"
    ran = run("doctor", "-f", "json", "--data-dir", str(missing), env=environment)
    found = {}
    for finding in json.loads(ran.stdout)["findings"]:
        found.setdefault(finding["name"], []).append(finding)
    assert found["sandbox"][0]["ok"], found
    assert any("kernel is shared" in gap["message"] for gap in found["gap"])
    assert found["disks"]
    assert not any(gap["ok"] or gap["is_needed"] for gap in found["gap"])
    assert f"{missing}, which the first start makes" in found["data directory"][0]["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize("key", ["", "sk-ant-something"])
def test_a_server_without_a_key_for_the_model_says_so_at_once(environment, tmp_path, key):
    server = ForkedCommand(
        ["serve", "--port", "0", "--ws-port", "0", "--format", "json"],
        env={**environment, **SERVING, "ANTHROPIC_API_KEY": key, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        address = json.loads(server.stdout.readline())["http"]
        ready = httpx.get(f"{address}/api/v1/health/ready", trust_env=False)
    finally:
        server.send_signal(signal.SIGTERM)
        _, talk = server.communicate(timeout=20)
    assert ready.status_code == (200 if key else 503)
    assert ("set ANTHROPIC_API_KEY" in talk.decode()) is (not key)


def test_one_number_for_both_ports_is_a_mistake(environment):
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = str(found.getsockname()[1])
    for command in ("serve", "doctor"):
        ran = run(command, "--port", port, "--ws-port", port, env={**environment, **SERVING})
        assert ran.returncode == 2
        assert b"server.ws_port (--ws-port) must differ from server.port (--port)" in ran.stderr


@pytest.mark.parametrize("option", ["--port", "--ws-port"])
def test_a_port_that_is_taken_is_told_with_the_options_that_choose_others(environment, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"--port": "0", "--ws-port": "0", option: str(taken.getsockname()[1])}
        ran = run("serve", *(word for pair in ports.items() for word in pair), env={**environment, **SERVING})
    assert ran.returncode == 10
    assert f"Choose another port with {option} (".encode() in ran.stderr


def test_a_server_that_is_stopped_says_so(environment, tmp_path):
    server = subprocess.Popen(
        [*SANDBOX, "serve", "--port", "0", "--ws-port", "0"],
        env={**environment, **SERVING, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert b"Sandbox answers at" in server.stdout.readline()
    finally:
        server.send_signal(signal.SIGINT)
        _, talk = server.communicate(timeout=20)
    assert server.returncode == 0
    assert talk.decode().splitlines()[-1].endswith(" INFO    Stopped. No task is unfinished.")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_tokens_the_server_listens_for_this_machine_only(environment, host):
    ran = run("serve", "--host", host, "--port", "0", "--ws-port", "0", env={**environment, **SERVING})
    assert ran.returncode == 10
    assert ran.stdout == b""
    assert b"can be reached from other machines" in ran.stderr
    assert b"Traceback" not in ran.stderr


def test_another_loopback_address_answers_where_it_is_announced_and_to_no_other_name(environment):
    server = ForkedCommand(
        ["serve", "--host", "127.0.0.2", "--port", "0", "--ws-port", "0", "--format", "json"],
        env={**environment, **SERVING},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        address = json.loads(server.stdout.readline())["http"]
        answers = [
            httpx.get(f"{address}/api/v1/tasks", headers=headers, trust_env=False).status_code
            for headers in ({}, {"Host": "elsewhere.example"}, {"Origin": "http://elsewhere.example"})
        ]
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=20)
    assert address.startswith("http://127.0.0.2:")
    assert answers == [200, 403, 403]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_a_loopback_address_is_this_machines_only(host):
    sockets = bind(host, 0)
    try:
        assert not is_externally_reachable(sockets)
    finally:
        for bound in sockets:
            bound.close()
