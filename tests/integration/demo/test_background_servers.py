"""The servers of `sandbox demo --keep`: at most one set runs, and each server is stopped, even after a crash."""

import fcntl
import io
import json
import os
import signal
import socket
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console

from doubles.deployment import git, wait_until
from doubles.fake_api import FakeApi
from sandbox.client import ClientError
from sandbox.demo import background_servers, walkthrough
from sandbox.demo.background_servers import PORTS, demo_directory, start_background_servers, stop_background_servers
from sandbox.model.errors import SandboxError

ANY_PORTS = dict.fromkeys(PORTS, 0)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A separate directory, and no key for the real model.

    Servers that a test starts are stopped when the test ends.
    """
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("SANDBOX_RUNTIME", "bubblewrap")
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield
    stop_background_servers()
    for pid in processes_with(tmp_path):
        os.kill(pid, signal.SIGKILL)


def processes_with(directory: Path) -> list[int]:
    """Return the processes whose arguments or environment contain the directory, except this one."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if str(directory).encode() in text and int(entry.name) != os.getpid():
            pids.append(int(entry.name))
    return pids


def test_tutorial_shows_the_end_of_the_output():
    server, repository = (f"http://127.0.0.1:{PORTS[name]}" for name in ("port", "git_port"))
    text = background_servers.closing_text({"server": server, "repository": f"{repository}/example.git"})
    assert f"```\n{text}\n```\n" in Path("docs/tutorial.md").read_text()


@pytest.mark.usefixtures("environment")
def test_servers_run_until_they_are_stopped(tmp_path):
    addresses = start_background_servers(ANY_PORTS)
    with urllib.request.urlopen(f"{addresses['server']}/api/v1/health/live", timeout=10) as response:
        assert json.load(response)["status"] == "ok"
    git("clone", "-q", addresses["repository"], str(tmp_path / "clone"), cwd=tmp_path)
    assert demo_directory().stat().st_mode & 0o777 == 0o700
    with pytest.raises(SandboxError, match="sandbox demo --stop"):
        start_background_servers(ANY_PORTS)
    with urllib.request.urlopen(f"{addresses['server']}/api/v1/health/live", timeout=10) as response:
        assert response.status == 200
    assert stop_background_servers()
    assert not demo_directory().exists()
    wait_until(lambda: not processes_with(tmp_path), description="the end of all processes")
    assert not stop_background_servers()


@pytest.mark.usefixtures("environment")
def test_port_in_use_is_reported_and_nothing_is_left_behind(tmp_path):
    addresses = start_background_servers(ANY_PORTS)
    taken = int(addresses["server"].rpartition(":")[2])
    stop_background_servers()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", taken))
        listener.listen()
        with pytest.raises(SandboxError, match=f"{taken}"):
            start_background_servers({**ANY_PORTS, "port": taken})
    assert not demo_directory().exists()
    wait_until(lambda: not processes_with(tmp_path), description="the end of all processes")


@pytest.mark.usefixtures("environment")
def test_files_left_by_a_crash_are_removed_without_signaling_a_process():
    """The process id in an unlocked file may have been reused. Here, it is the id of the test's own process."""
    directory = demo_directory()
    (directory / "data").mkdir(parents=True)
    (directory / "lock").write_text(str(os.getpid()))
    assert not stop_background_servers()
    assert not directory.exists()


@pytest.mark.usefixtures("environment")
def test_lock_file_without_a_process_id_does_not_stop_a_process():
    directory = demo_directory()
    directory.mkdir(parents=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not stop_background_servers()
        assert directory.exists()


def test_token_of_another_server_is_not_sent_to_the_demo(monkeypatch):
    monkeypatch.setenv("SANDBOX_TOKEN", "token-of-another-server")
    with FakeApi().running() as api:
        background_servers._cancel_tasks(api.url)
        with pytest.raises(ClientError):
            walkthrough.run_task(api.url, "http://127.0.0.1:9/app.git", Console(file=io.StringIO()))
    assert {request.method for request in api.requests} == {"GET", "POST"}
    assert [request.headers["authorization"] for request in api.requests if "authorization" in request.headers] == []


@pytest.mark.parametrize(
    ("server", "option"), [("http://127.0.0.1:8122", ""), ("http://127.0.0.1:9", " --server http://127.0.0.1:9")]
)
def test_demo_ends_with_the_commands_that_run_a_task_in_a_clone(monkeypatch, capsys, server, option):
    addresses = {"server": server, "repository": "http://127.0.0.1:7/example.git"}
    monkeypatch.setattr(background_servers, "start_background_servers", lambda _: addresses)
    monkeypatch.setattr(background_servers, "run_task", lambda *_: True)
    assert background_servers.run_and_keep_servers(ANY_PORTS) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("Run a task in a clone of the repository:")
    assert lines[at + 2 : at + 4] == [
        "  git clone http://127.0.0.1:7/example.git && cd example",
        f'  sandbox{option} run "Fix the failing test."',
    ]
