"""Tokens: who may do what, on the real server, by HTTP, WebSocket and command line."""

import functools
import json
import os
import subprocess
import sys

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from doubles.closed_internet import SERVER_ADDRESS, ClosedInternet
from doubles.live import World, bash, make_repository, says, until
from doubles.network_namespace import NamespaceTransport

CONFIGURATION = '[git]\nallowed_hosts = ["github.com"]\n'


def command_line(world):
    """Runs the command line on the world's machine."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sandbox", *arguments],
            env={
                "PATH": os.environ["PATH"], "HOME": str(world.home), "LANG": "C.UTF-8",
                "SANDBOX_DATA_DIR": str(world.data_dir), **environment,
            },
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return run


def make_token(sandbox, role: str, *arguments: str) -> tuple[str, str]:
    """Its id and the token itself."""
    made = sandbox("token", "create", "--role", role, "--format", "json", *arguments)
    assert made.returncode == 0, made.stderr
    shown = json.loads(made.stdout)
    return shown["id"], shown["token"]


@pytest.fixture
def sandbox(empty_world):
    return command_line(empty_world)


@pytest.fixture
def token(sandbox):
    return functools.partial(make_token, sandbox)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A machine whose server has an operator's token before it starts; its command line, and how to make others."""
    machine = World(tmp_path_factory.mktemp("guarded"))
    try:
        make_repository(machine.repositories / "repo.git", {"README.md": "# A repository\n"})
        machine.start_git()
        machine.start_model(bash("echo new > new.txt"), says())
        sandbox = command_line(machine)
        machine.bearer = make_token(sandbox, "operator", "--name", "tests")[1]
        configuration = machine.home / ".config" / "sandbox" / "sandbox.toml"
        configuration.parent.mkdir(parents=True)
        configuration.write_text(CONFIGURATION)
        machine.start_server()
        yield machine, sandbox, functools.partial(make_token, sandbox)
    finally:
        machine.close()


def ask(machine, token: str | None, method: str = "GET", path: str = "/api/v1/tasks", **options) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.request(
        method, machine.server.said["http"] + path, headers=headers, trust_env=False, timeout=30, **options
    )


def test_an_operator_works_a_viewer_looks_on_and_nobody_else_gets_in(guarded):
    machine, _, token = guarded
    _, viewer = token("viewer")  # made while the server runs
    machine.submit()
    status = machine.wait()
    assert status["state"] == "completed", machine.tell()

    assert ask(machine, viewer, path="/api/v1/tasks/task-1").json()["state"] == "completed"
    assert ask(machine, viewer, path="/api/v1/tasks/task-1/artifacts/task-1.patch").status_code == 200
    for method, path in (("POST", "/api/v1/tasks"), ("DELETE", "/api/v1/tasks/task-1")):
        assert ask(machine, viewer, method, path).status_code == 403
    for wrong in (None, "sbx_aaaaaaaa_" + "0" * 64, viewer[:-1], "x"):
        answer = ask(machine, wrong)
        assert (answer.status_code, answer.json()["error"]) == (401, "unauthorized")
        assert answer.headers["www-authenticate"].startswith("Bearer")
    assert ask(machine, None, path="/api/health").status_code == 200
    assert ask(machine, None, path="/metrics").status_code == 401

    stream = f"{machine.server.said['ws']}/api/v1/tasks/stream?task_id=task-1&after=0"
    with connect(stream, max_queue=None, additional_headers={"Authorization": f"Bearer {viewer}"}) as frames:
        assert json.loads(frames.recv(timeout=10))["task_id"] == "task-1"
    with connect(stream, max_queue=None, subprotocols=["sandbox.v1", f"sandbox.bearer.{viewer}"]) as frames:
        assert frames.subprotocol == "sandbox.v1"
    with pytest.raises(InvalidStatus), connect(stream):
        pass


def test_the_command_line_shows_its_token_and_says_when_it_is_refused(guarded):
    machine, sandbox, token = guarded
    _, viewer = token("viewer")
    server = ("--server", machine.server.said["http"])
    assert sandbox("task", "list", *server, "--token", viewer).returncode == 0
    assert sandbox("task", "list", *server, SANDBOX_TOKEN=viewer).returncode == 0
    for arguments, environment in (((), {}), (("--token", "wrong"), {}), ((), {"SANDBOX_TOKEN": "wrong"})):
        refused = sandbox("task", "list", *server, *arguments, **environment)
        assert refused.returncode == 5
        assert "SANDBOX_TOKEN" in refused.stderr
    machine.submit("looked-on")
    assert sandbox("task", "cancel", "looked-on", "--yes", *server, "--token", viewer).returncode == 5
    assert machine.wait("looked-on")["state"] == "completed"


def test_a_token_that_is_revoked_is_out_at_once(guarded):
    machine, sandbox, token = guarded
    identity, viewer = token("viewer", "--name", "for a while")
    opened = ask(machine, viewer, "POST", "/api/v1/session")
    cookie = {"sandbox_session": opened.cookies["sandbox_session"]}
    assert ask(machine, viewer).status_code == 200
    assert ask(machine, None, cookies=cookie).status_code == 200
    assert "for a while" in sandbox("token", "list").stdout
    assert sandbox("token", "revoke", identity).returncode == 0
    assert ask(machine, viewer).status_code == 401
    assert ask(machine, None, cookies=cookie).status_code == 401
    assert ask(machine, machine.bearer).status_code == 200
    assert sandbox("token", "revoke", identity).returncode == 3


def test_a_running_server_asks_for_tokens_from_the_first_one_on(world, sandbox, token):
    machine = world(says())
    assert ask(machine, None).status_code == 200
    identity, operator = token("operator")
    machine.bearer = operator
    assert ask(machine, None).status_code == 401
    assert ask(machine, operator).status_code == 200
    last = sandbox("token", "revoke", identity)
    assert "tokens.json" in last.stderr
    assert ask(machine, None).status_code == 401
    (machine.data_dir / "tokens.json").unlink()
    until(lambda: ask(machine, None).status_code == 200)


def test_with_tokens_only_named_hosts_are_cloned_from(guarded):
    machine, _, _ = guarded
    manifest = {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "A task"},
        "repository": {"url": "https://git.example.net/org/repo.git", "branch": "main"},
        "claude": {"prompt": "Do it."},
    }
    answer = ask(machine, machine.bearer, "POST", "/api/v1/tasks", json=manifest)
    assert answer.status_code == 400
    assert [(mistake["field"], mistake["rule"]) for mistake in answer.json()["details"]] == [
        ("repository.url", "not_offered")
    ]
    assert "github.com" in answer.text


def test_a_network_address_needs_a_token_first(sandbox):
    serving = ("serve", "--host", "0.0.0.0", "--port", "0", "--ws-port", "0")
    refused = sandbox(*serving)
    assert refused.returncode == 10
    assert refused.stdout == ""
    assert "sandbox token create --role operator" in refused.stderr


def test_with_a_token_other_machines_may_ask(empty_world, token):
    bearer = token("operator")[1]
    with ClosedInternet() as internet:
        empty_world.prefix, empty_world.model_url = internet.server_prefix, "http://127.0.0.1:9"
        port = empty_world.start_server(SANDBOX_HOST="0.0.0.0")["http"].rpartition(":")[2]
        url = f"http://{SERVER_ADDRESS}:{port}/api/v1/tasks"
        with httpx.Client(transport=NamespaceTransport(internet.server_namespace), timeout=30) as elsewhere:
            assert elsewhere.get(url).status_code == 401
            assert elsewhere.get(url, headers={"Authorization": f"Bearer {bearer}"}).status_code == 200
            (empty_world.data_dir / "tokens.json").unlink()
            assert elsewhere.get(url).status_code == 401
        empty_world.server.stop()


def test_sessions_of_browsers_are_refused_to_pages_of_other_sites(guarded):
    machine, _, _ = guarded
    opened = ask(machine, machine.bearer, "POST", "/api/v1/session")
    assert "HttpOnly" in opened.headers["set-cookie"]
    cookie = {"Cookie": f"sandbox_session={opened.cookies['sandbox_session']}"}
    url = machine.server.said["http"] + "/api/v1/tasks/none"
    for origin, status in (("https://evil.example", 403), (machine.server.said["http"], 404)):
        answer = httpx.delete(url, headers={**cookie, "Origin": origin}, trust_env=False)
        assert answer.status_code == status
