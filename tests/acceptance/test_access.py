"""Tokens: who may do what, on the real server, by HTTP, WebSocket and command line."""

import json
import os
import subprocess
import sys

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from doubles.blocked_internet import SERVER_ADDRESS, ClosedInternet
from doubles.live_server import World, bash, make_repository, says, until
from doubles.network_namespace import NamespaceTransport
from sandbox.auth.token_file import TokenFile
from sandbox.interfaces.auth import Role

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


def make_token(world, role: Role, name: str = "") -> tuple[str, str]:
    """Its id and the token itself, as `sandbox token create` makes it."""
    shown, record = TokenFile(world.data_dir).create(role, name)
    return record.id, shown


@pytest.fixture
def sandbox(empty_world):
    return command_line(empty_world)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A machine whose server has an operator's token before it starts; make_token makes others."""
    machine = World(tmp_path_factory.mktemp("guarded"))
    try:
        make_repository(machine.repositories / "repo.git", {"README.md": "# A repository\n"})
        machine.start_git()
        machine.start_model(bash("echo new > new.txt"), says())
        machine.data_dir.mkdir(mode=0o700)
        machine.bearer = make_token(machine, Role.OPERATOR, "tests")[1]
        configuration = machine.home / ".config" / "sandbox" / "sandbox.toml"
        configuration.parent.mkdir(parents=True)
        configuration.write_text(CONFIGURATION)
        machine.start_server()
        yield machine
    finally:
        machine.close()


def ask(machine, token: str | None, method: str = "GET", path: str = "/api/v1/tasks", **options) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(headers=headers, trust_env=False, timeout=30, verify=False) as client:  # nothing is encrypted
        return client.request(method, machine.server.said["http"] + path, **options)


def test_an_operator_works_a_viewer_looks_on_and_nobody_else_gets_in(guarded):
    machine = guarded
    _, viewer = make_token(machine, Role.VIEWER)  # made while the server runs
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
    sandbox = command_line(guarded)
    _, viewer = make_token(guarded, Role.VIEWER)
    server = ("--server", guarded.server.said["http"])
    assert sandbox("task", "list", *server, SANDBOX_TOKEN=viewer).returncode == 0
    for arguments in ((), ("--token", "wrong")):
        refused = sandbox("task", "list", *server, *arguments)
        assert refused.returncode == 5
        assert "SANDBOX_TOKEN" in refused.stderr
    guarded.submit("looked-on", repository={"branch": "none"})
    assert sandbox("task", "cancel", "looked-on", "--yes", *server, "--token", viewer).returncode == 5
    assert guarded.wait("looked-on")["state"] == "failed"


def test_a_token_that_is_revoked_is_out_at_once(guarded):
    machine, sandbox = guarded, command_line(guarded)
    made = sandbox("token", "create", "--role", "viewer", "--name", "for a while", "--format", "json")
    assert made.returncode == 0, made.stderr
    identity, viewer = (json.loads(made.stdout)[key] for key in ("id", "token"))
    opened = ask(machine, viewer, "POST", "/api/v1/session")
    cookie = {"Cookie": f"sandbox_session={opened.cookies['sandbox_session']}"}
    assert ask(machine, viewer).status_code == 200
    assert ask(machine, None, headers=cookie).status_code == 200
    assert "for a while" in sandbox("token", "list").stdout
    assert sandbox("token", "revoke", identity).returncode == 0
    assert ask(machine, viewer).status_code == 401
    assert ask(machine, None, headers=cookie).status_code == 401
    assert ask(machine, machine.bearer).status_code == 200
    assert sandbox("token", "revoke", identity).returncode == 3


def test_a_running_server_asks_for_tokens_from_the_first_one_on(world):
    machine = world(says())
    assert ask(machine, None).status_code == 200
    identity, operator = make_token(machine, Role.OPERATOR)
    assert ask(machine, None).status_code == 401
    assert ask(machine, operator).status_code == 200
    last = command_line(machine)("token", "revoke", identity)
    assert "tokens.json" in last.stderr
    assert ask(machine, None).status_code == 401
    for name in ("tokens.json", "tokens.lock"):
        (machine.data_dir / name).unlink()
    until(lambda: ask(machine, None).status_code == 200)


def test_with_tokens_only_named_hosts_are_cloned_from(guarded):
    machine = guarded
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


def test_with_a_token_other_machines_may_ask(empty_world):
    empty_world.data_dir.mkdir(mode=0o700)
    bearer = make_token(empty_world, Role.OPERATOR)[1]
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
    machine = guarded
    opened = ask(machine, machine.bearer, "POST", "/api/v1/session")
    assert "HttpOnly" in opened.headers["set-cookie"]
    cookie = {"Cookie": f"sandbox_session={opened.cookies['sandbox_session']}"}
    path = "/api/v1/tasks/none"
    for origin, status in (("https://evil.example", 403), (machine.server.said["http"], 404)):
        answer = ask(machine, None, "DELETE", path, headers={**cookie, "Origin": origin})
        assert answer.status_code == status
