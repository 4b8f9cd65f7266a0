"""The standalone servers serve the demo's repository and model to a separately started server."""

import re
import signal
import socket
import subprocess
import sys

import httpx2
import pytest

from sandbox.demo.example_repository import FILES, git_environment


def start(*arguments):
    command = [sys.executable, "-m", "sandbox.demo.standalone_servers", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def servers():
    process = start("--git-port", "0", "--model-port", "0")
    with process:
        lines = [process.stdout.readline() for _ in range(3)]
        yield process, dict(re.findall(r"^(\w+) +(http://127\.0\.0\.1:\d+\S*)$", "".join(lines), re.MULTILINE))
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_repository_and_model_are_served_until_a_signal(servers, tmp_path, number):
    process, urls = servers
    clone = ["git", "clone", "--quiet", urls["Repository"], str(tmp_path / "clone")]
    subprocess.run(clone, env=git_environment(), check=True, timeout=60)
    assert {path.name for path in (tmp_path / "clone").iterdir()} == {*FILES, ".git"}
    body = {"model": "x", "max_tokens": 9, "messages": [{"role": "user", "content": "Fix it."}]}
    response = httpx2.post(f"{urls['Model']}/v1/messages", json=body, trust_env=False, timeout=60)
    assert response.json()["content"][1]["input"]["command"] == "python3 -m unittest"
    process.send_signal(number)
    assert process.wait(60) == 0


def test_port_in_use_error_suggests_other_ports():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = start("--git-port", "0", "--model-port", str(port))
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error == f"127.0.0.1:{port}: Address already in use; choose other ports with --git-port and --model-port.\n"
