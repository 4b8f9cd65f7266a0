"""Access tokens and roles on the real server, through HTTP, WebSocket and the command line."""

import json
import os
import subprocess
import sys

import httpx2
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from doubles.deployment import Deployment, bash_turn, make_repository, reply_turn, wait_until
from doubles.fake_internet import SERVER_ADDRESS, FakeInternet
from doubles.network_namespace import NamespaceTransport
from sandbox.access_tokens.token_file import TokenFile
from sandbox.interfaces.auth import Role

CONFIGURATION = '[git]\nallowed_hosts = ["github.com"]\n'


def command_line(deployment):
    """Run the command line on the server's machine."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sandbox", *arguments],
            env={
                "PATH": os.environ["PATH"], "HOME": str(deployment.home), "LANG": "C.UTF-8",
                "SANDBOX_DATA_DIR": str(deployment.data_dir), **environment,
            },
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return run


def make_token(deployment, role: Role, name: str = "") -> tuple[str, str]:
    """Create a token as `sandbox token create` does; return its id and the token."""
    token, record = TokenFile(deployment.data_dir).create(role, name)
    return record.id, token


@pytest.fixture
def run_cli(deployment):
    return command_line(deployment)


@pytest.fixture(scope="module")
def token_deployment(tmp_path_factory):
    """A deployment with an operator's token, created before the server started."""
    deployment = Deployment(tmp_path_factory.mktemp("guarded"))
    try:
        make_repository(deployment.repositories / "repo.git", {"README.md": "# A repository\n"})
        deployment.start_git()
        deployment.start_model(bash_turn("echo new > new.txt"), reply_turn())
        deployment.data_dir.mkdir(mode=0o700)
        deployment.bearer = make_token(deployment, Role.OPERATOR, "tests")[1]
        configuration = deployment.home / ".config" / "sandbox" / "sandbox.toml"
        configuration.parent.mkdir(parents=True)
        configuration.write_text(CONFIGURATION)
        deployment.start_server()
        yield deployment
    finally:
        deployment.close()


def send_request(
    deployment, token: str | None, method: str = "GET", path: str = "/api/v1/tasks", **options
) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx2.Client(headers=headers, trust_env=False, timeout=30, verify=False) as client:  # no TLS
        return client.request(method, deployment.server.ready_message["http"] + path, **options)


def test_roles_limit_access_and_invalid_token_is_rejected(token_deployment):
    deployment = token_deployment
    _, viewer = make_token(deployment, Role.VIEWER)  # while the server is running
    deployment.submit()
    status = deployment.wait()
    assert status["state"] == "completed", deployment.diagnostics()

    assert send_request(deployment, viewer, path="/api/v1/tasks/task-1").json()["state"] == "completed"
    assert send_request(deployment, viewer, path="/api/v1/tasks/task-1/artifacts/task-1.patch").status_code == 200
    for method, path in (("POST", "/api/v1/tasks"), ("DELETE", "/api/v1/tasks/task-1")):
        assert send_request(deployment, viewer, method, path).status_code == 403
    for wrong in (None, "sbx_aaaaaaaa_" + "0" * 64, viewer[:-1], "x"):
        response = send_request(deployment, wrong)
        assert (response.status_code, response.json()["error"]) == (401, "unauthorized")
        assert response.headers["www-authenticate"].startswith("Bearer")
    assert send_request(deployment, None, path="/api/health").status_code == 200
    assert send_request(deployment, None, path="/metrics").status_code == 401

    stream = f"{deployment.server.ready_message['ws']}/api/v1/tasks/stream?task_id=task-1&after=0"
    with connect(stream, max_queue=None, additional_headers={"Authorization": f"Bearer {viewer}"}) as stream_connection:
        assert json.loads(stream_connection.recv(timeout=10))["task_id"] == "task-1"
    with connect(stream, max_queue=None, subprotocols=["sandbox.v1", f"sandbox.bearer.{viewer}"]) as stream_connection:
        assert stream_connection.subprotocol == "sandbox.v1"
    with pytest.raises(InvalidStatus), connect(stream):
        pass


def test_cli_sends_token_and_reports_rejection(token_deployment):
    run_cli = command_line(token_deployment)
    _, viewer = make_token(token_deployment, Role.VIEWER)
    server = ("--server", token_deployment.server.ready_message["http"])
    assert run_cli("task", "list", *server, SANDBOX_TOKEN=viewer).returncode == 0
    for arguments in ((), ("--token", "wrong")):
        refused = run_cli("task", "list", *server, *arguments)
        assert refused.returncode == 5
        assert "SANDBOX_TOKEN" in refused.stderr
    token_deployment.submit("not-cancelled", repository={"branch": "none"})
    assert run_cli("task", "cancel", "not-cancelled", "--yes", *server, "--token", viewer).returncode == 5
    assert token_deployment.wait("not-cancelled")["state"] == "failed"


def test_revoked_token_is_rejected_immediately(token_deployment):
    deployment, run_cli = token_deployment, command_line(token_deployment)
    created = run_cli("token", "create", "--role", "viewer", "--name", "for a while", "--format", "json")
    assert created.returncode == 0, created.stderr
    token_id, viewer = (json.loads(created.stdout)[key] for key in ("id", "token"))
    session = send_request(deployment, viewer, "POST", "/api/v1/session")
    cookie = {"Cookie": f"sandbox_session={session.cookies['sandbox_session']}"}
    assert send_request(deployment, viewer).status_code == 200
    assert send_request(deployment, None, headers=cookie).status_code == 200
    assert "for a while" in run_cli("token", "list").stdout
    assert run_cli("token", "revoke", token_id).returncode == 0
    assert send_request(deployment, viewer).status_code == 401
    assert send_request(deployment, None, headers=cookie).status_code == 401
    assert send_request(deployment, deployment.bearer).status_code == 200
    assert run_cli("token", "revoke", token_id).returncode == 3


def test_running_server_requires_tokens_once_a_token_exists(deploy):
    deployment = deploy(reply_turn())
    assert send_request(deployment, None).status_code == 200
    token_id, operator = make_token(deployment, Role.OPERATOR)
    assert send_request(deployment, None).status_code == 401
    assert send_request(deployment, operator).status_code == 200
    last = command_line(deployment)("token", "revoke", token_id)
    assert "tokens.json" in last.stderr
    assert send_request(deployment, None).status_code == 401
    for name in ("tokens.json", "tokens.lock"):
        (deployment.data_dir / name).unlink()
    wait_until(lambda: send_request(deployment, None).status_code == 200)


def test_repository_on_a_host_that_is_not_allowed_is_rejected(token_deployment):
    deployment = token_deployment
    manifest = {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "A task"},
        "repository": {"url": "https://git.example.net/org/repo.git", "branch": "main"},
        "claude": {"prompt": "Do it."},
    }
    response = send_request(deployment, deployment.bearer, "POST", "/api/v1/tasks", json=manifest)
    assert response.status_code == 400
    assert [(detail["field"], detail["rule"]) for detail in response.json()["details"]] == [
        ("repository.url", "not_offered")
    ]
    assert "github.com" in response.text


def test_non_loopback_address_requires_a_token(run_cli):
    serving = ("serve", "--host", "0.0.0.0", "--port", "0", "--ws-port", "0")
    refused = run_cli(*serving)
    assert refused.returncode == 10
    assert refused.stdout == ""
    assert "sandbox token create --role operator" in refused.stderr


def test_remote_clients_that_have_a_token_are_served(deployment):
    deployment.data_dir.mkdir(mode=0o700)
    bearer = make_token(deployment, Role.OPERATOR)[1]
    with FakeInternet() as network:
        deployment.command_prefix, deployment.model_url = network.server_command_prefix, "http://127.0.0.1:9"
        port = deployment.start_server(SANDBOX_HOST="0.0.0.0")["http"].rpartition(":")[2]
        url = f"http://{SERVER_ADDRESS}:{port}/api/v1/tasks"
        with httpx2.Client(transport=NamespaceTransport(network.server_namespace), timeout=30) as client:
            assert client.get(url).status_code == 401
            assert client.get(url, headers={"Authorization": f"Bearer {bearer}"}).status_code == 200
            (deployment.data_dir / "tokens.json").unlink()
            assert client.get(url).status_code == 401
        deployment.server.stop()


def test_session_cookie_is_rejected_from_foreign_origins(token_deployment):
    deployment = token_deployment
    session = send_request(deployment, deployment.bearer, "POST", "/api/v1/session")
    assert "HttpOnly" in session.headers["set-cookie"]
    cookie = {"Cookie": f"sandbox_session={session.cookies['sandbox_session']}"}
    path = "/api/v1/tasks/none"
    for origin, status in (("https://evil.example", 403), (deployment.server.ready_message["http"], 404)):
        response = send_request(deployment, None, "DELETE", path, headers={**cookie, "Origin": origin})
        assert response.status_code == status


def test_login_stores_a_token_that_the_server_accepts(token_deployment, tmp_path):
    address = token_deployment.server.ready_message["http"]
    token_id, token = make_token(token_deployment, Role.VIEWER)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}

    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sandbox", *arguments]
        return subprocess.run(
            command, env=environment, input=stdin, capture_output=True, text=True, timeout=60, check=False
        )

    assert run("login", address, "--context", "tests", stdin=f"{token[:-1]}\n").returncode == 5
    assert json.loads(run("context", "list", "-f", "json").stdout)["current"] == "default"
    logged_in = run("login", address, "--context", "tests", stdin=f"{token}\n")
    assert logged_in.returncode == 0, logged_in.stderr
    assert run("task", "list").returncode == 0
    assert run("task", "list", "--context", "tests").returncode == 0
    TokenFile(token_deployment.data_dir).revoke(token_id)
    revoked = run("task", "list")
    assert revoked.returncode == 5
    assert "sandbox login" in revoked.stderr
