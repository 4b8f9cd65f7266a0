"""Tests a second agent from its manifest section to its patch. Its model API differs from Claude Code's."""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from doubles.deployment import SERVER_KEY, Deployment, make_repository, preinstall_agent, reply_turn, wait_until
from doubles.runner_processes import runner_pid
from doubles.second_agent import all_agents
from doubles.terminal_user import TerminalUser

RESPONSES_KEY = "the-key-of-the-responses-api"
SERVER = Path(__file__).parents[1] / "doubles" / "second_agent" / "server.py"
MANIFEST = """\
version: "1"
kind: Task
metadata: {name: A second agent, id: second}
repository: {url: "https://github.com/org/repo.git", branch: main}
scripted:
  prompt: Write the file.
  effort: high
lifecycle: {budget_usd: 1}
"""
WRITE_FILE_CALL = {
    "type": "function_call",
    "call_id": "call-1",
    "name": "write_file",
    "arguments": json.dumps({"path": "made.txt", "text": "made by the second agent\n"}),
}


class ResponsesModel:
    """A model with the Responses API. It sends a function call and then a message; each response costs 0.005 USD."""

    def __init__(self):
        self.requests = []
        self.always_calls = False
        self.may_continue = threading.Event()
        self.may_continue.set()
        model = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                model.requests.append((self.path, dict(self.headers), body))
                is_first = len(body["input"]) == 1
                assert is_first or model.may_continue.wait(60)
                output = (
                    WRITE_FILE_CALL if is_first or model.always_calls else {"type": "message", "text": "It is written."}
                )
                usage = {"input_tokens": 1000, "output_tokens": 1000}
                content = json.dumps({"model": body["model"], "output": [output], "usage": usage}).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


class TwoAgentDeployment(Deployment):
    """A deployment whose server has Claude Code and the scripted agent."""

    def start_server_with(self, responses_model):
        preinstall_agent(self.data_dir)
        settings = {"host": "127.0.0.1", "port": "0", "ws_port": "0", "data_dir": str(self.data_dir)}
        environment = {
            "SANDBOX_RUNTIME": self.runtime,
            "ANTHROPIC_BASE_URL": self.model_url,
            "ANTHROPIC_API_KEY": SERVER_KEY,
            "RESPONSES_BASE_URL": responses_model.url,
            "RESPONSES_API_KEY": RESPONSES_KEY,
        }
        self.server = self._start("server", [sys.executable, str(SERVER), json.dumps(settings)], environment, ())
        self.http = self._client()

    def sandbox(self, *arguments):
        """Run the command line."""
        environment = {"HOME": str(self.home), "SANDBOX_SERVER": self.server.ready_message["http"]}
        return subprocess.run(
            [sys.executable, "-m", "sandbox", *arguments],
            env=environment, capture_output=True, timeout=90, check=False, text=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    responses_model = ResponsesModel()
    yield responses_model
    responses_model.close()


@contextlib.contextmanager
def deployment_with(directory, responses_model):
    """Yield a deployment with a repository, both models, and the server."""
    deployment = TwoAgentDeployment(directory)
    make_repository(deployment.repositories / "repo.git", {"README.md": "Hello.\n"})
    deployment.start_git()
    deployment.start_model(reply_turn("Claude Code was here."))
    deployment.start_server_with(responses_model)
    try:
        yield deployment
    finally:
        deployment.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, model):
    with deployment_with(tmp_path_factory.mktemp("two-agents"), model) as deployment:
        yield deployment


def test_second_agent_works_in_its_sandbox_with_its_own_model_api(server, model, tmp_path):
    model.requests = []
    file = tmp_path / "task.yaml"
    file.write_text(MANIFEST)
    followed = server.sandbox("task", "submit", str(file), "--follow")
    assert followed.returncode == 0, followed.stderr + server.diagnostics("second")
    assert "running       Scripted Agent is working" in followed.stderr
    assert "completed     Scripted Agent finished its work" in followed.stderr
    assert b"+made by the second agent\n" in server.artifact("second.patch", "second")

    for path, headers, body in model.requests:
        assert path == "/v1/responses"
        assert headers["authorization"] == f"Bearer {RESPONSES_KEY}"
        assert (body["model"], body["reasoning"]) == ("scripted-1", {"effort": "high"})
    assert [len(body["input"]) for _, _, body in model.requests] == [1, 3]

    status = server.status("second")
    section = {"prompt": "Write the file.", "model": "scripted-1", "effort": "high"}
    assert list(status["definition"]) == ["repository", "scripted", "vm", "secrets", "lifecycle"]
    assert status["definition"]["scripted"] == section
    progress = status["progress"]
    assert (progress["turns"], progress["tool_calls"]) == (2, 1)
    assert (progress["input_tokens"], progress["output_tokens"], progress["cost_usd"]) == (2000, 2000, 0.01)
    assert status["result"] == {"is_error": False, "result": "It is written."}
    assert status["final_message"] == "It is written."
    assert json.loads(server.artifact("metadata.json", "second"))["usage"]["model"] == "scripted-1"
    events = [event["type"] for event in server.wire_events("second")]
    assert (events.count("tool_call"), events.count("usage")) == (1, 2)


def test_second_agent_without_sessions_continues_with_the_conversation_as_text(server, model):
    manifest = MANIFEST.replace("id: second", "id: parent")
    server.http.post("/api/v1/tasks", content=manifest, headers={"content-type": "application/yaml"})
    assert server.wait("parent")["state"] == "completed", server.diagnostics("parent")
    model.requests = []
    body = {"prompt": "Write it once more.", "overrides": ["metadata.id=child"]}
    assert server.http.post("/api/v1/tasks/parent/continue", json=body).status_code == 202
    status = server.wait("child")
    assert (status["state"], status["parent"], status["continues"]) == ("completed", "parent", "context")
    sent = json.dumps(model.requests[0][2]["input"])
    assert sent.index("Write the file.") < sent.index("Write it once more.")
    assert server.artifact("child.patch", "child") == b""
    assert b"+made by the second agent\n" in server.artifact("child.chain.patch", "child")


def test_output_and_pages_of_the_second_agent_are_shown(server, model):
    manifest = MANIFEST.replace("id: second", "id: shown")
    server.http.post("/api/v1/tasks", content=manifest, headers={"content-type": "application/yaml"})
    server.wait("shown")
    logs = server.sandbox("task", "logs", "shown", "--stream", "stdout")
    assert logs.returncode == 0, logs.stderr
    assert '{"step": "end", "ok": true, "text": "It is written."}' in logs.stdout
    page = server.http.get("/tasks/shown", headers={"accept": "text/html"}).text
    assert "Write the file." in page
    assert "scripted:" in page
    assert "effort: high" in page
    assert "Describe the work for the scripted agent here" in server.http.get("/submit").text
    schema = server.http.get("/openapi.json").json()["components"]["schemas"]["Manifest"]
    assert schema["oneOf"] == [{"required": [kind]} for kind in all_agents()]


def test_budget_of_the_second_agent_is_enforced(server, model):
    model.always_calls, model.requests = True, []
    manifest = MANIFEST.replace("id: second", "id: costly").replace("budget_usd: 1", "budget_usd: 0.012")
    response = server.http.post("/api/v1/tasks", content=manifest, headers={"content-type": "application/yaml"})
    assert response.status_code == 202, response.text
    status = server.wait("costly")
    model.always_calls = False
    assert (status["state"], status["error"]["code"]) == ("failed", "budget_exceeded"), server.diagnostics("costly")
    assert len(model.requests) == 3


def test_first_agent_completes_its_task(server):
    server.submit("first")
    status = server.wait("first")
    assert status["state"] == "completed", server.diagnostics("first")
    assert status["state_message"] == "Claude Code finished its work"
    assert list(status["definition"]) == ["repository", "claude", "vm", "secrets", "lifecycle"]


@pytest.mark.parametrize(
    ("change", "errors"),
    [
        (
            ("scripted:", "unlike_any:"),
            [("", "must have a section for the agent: claude"), ("unlike_any", "is an unknown field")],
        ),
        (("scripted:", "scriptd:"), [("scriptd", "is an unknown field; did you mean 'scripted'?")]),
        (("scripted:", "claude: {prompt: x}\nscripted:"), [("scripted", "cannot be given with claude")]),
        (("effort: high", "effort: middle"), [("scripted.effort", "must be one of low, high")]),
        (("effort: high", "efort: high"), [("scripted.efort", "is an unknown field; did you mean 'effort'?")]),
        (
            ("effort: high", "model: x"),
            [("lifecycle.budget_usd", "cannot be enforced, because the price of scripted.m")],
        ),
        (
            ("effort: high", "effort: high\n  model: scripted-small"),
            [("lifecycle.budget_usd", "cannot be"), ("scripted.effort", "must be low for this model")],
        ),
    ],
)
def test_errors_in_the_section_of_the_agent_are_reported(server, change, errors):
    response = server.http.post(
        "/api/v1/tasks?dry_run=true",
        content=MANIFEST.replace(*change),
        headers={"content-type": "application/yaml"},
    )
    assert response.status_code == 400
    found = sorted((error["field"], error["message"]) for error in response.json()["details"])
    assert [field for field, _ in found] == [field for field, _ in errors]
    assert all(message.startswith(start) for (_, message), (_, start) in zip(found, errors, strict=True)), found


def test_tasks_cannot_use_model_keys_as_secrets(server):
    for number, variable in enumerate(("RESPONSES_API_KEY", "ANTHROPIC_API_KEY")):
        secret = {"name": "TOKEN", "source": "env", "key": variable}
        task_id = server.submit(f"thief-{number}", secrets=[secret])
        status = server.wait(task_id)
        assert (status["state"], status["error"]["code"]) == ("failed", "secret_unavailable")


def test_server_without_the_agent_fails_pending_tasks_and_shows_ended_tasks(tmp_path, model):
    with deployment_with(tmp_path, model) as server:
        manifest = MANIFEST.replace("id: second", "id: ended")
        server.http.post("/api/v1/tasks", content=manifest, headers={"content-type": "application/yaml"})
        server.wait("ended")
        with server.paused_model():
            capacity = server.http.get("/api/v1/health").json()["occupancy"]
            server.submit("first", vm={"cpus": capacity["cpus"]})
            manifest = MANIFEST.replace("id: second", "id: waiting")
            server.http.post("/api/v1/tasks", content=manifest, headers={"content-type": "application/yaml"})
            server.server.stop()
            server.start_server()
        status = server.wait("waiting")
        assert (status["state"], status["error"]["code"], status["attempts"]) == ("failed", "agent_not_offered", [])
        assert "This server does not have the agent scripted, only claude" in status["error"]["message"]
        assert list(status["definition"]) == ["repository", "scripted", "vm", "secrets", "lifecycle"]
        server.wait("first")
        listed = server.http.get("/api/v1/tasks").json()["tasks"]
        assert {task["id"]: task["state"] for task in listed} == {
            "ended": "completed",
            "first": "completed",
            "waiting": "failed",
        }
        assert "effort: high" in server.http.get("/tasks/ended", headers={"accept": "text/html"}).text
        logs = server.sandbox("task", "logs", "ended")
        assert (logs.returncode, logs.stderr) == (0, "")
        assert "Scripted Agent finished its work" in logs.stdout
        assert "It is written." in server.sandbox("task", "logs", "ended", "--raw").stdout


def test_work_of_a_killed_runner_is_collected_and_its_sandbox_can_be_inspected(tmp_path, model):
    with deployment_with(tmp_path, model) as server:
        model.requests = []
        model.may_continue.clear()
        manifest = MANIFEST.replace("id: second", "id: lost").replace("{budget_usd: 1}", "{failure_action: preserve}")
        server.http.post("/api/v1/tasks", content=manifest, headers={"content-type": "application/yaml"})
        wait_until(lambda: len(model.requests) == 2, description="the request after the tool call")
        server.server.stop()
        os.kill(runner_pid(server, "lost"), signal.SIGKILL)
        model.may_continue.set()
        server.start_server()
        status = server.wait("lost")
        ended_as = (status["state"], status["error"]["code"])
        assert ended_as == ("failed_preserved", "runner_lost"), server.diagnostics("lost")
        assert b"+made by the second agent\n" in server.artifact("lost.patch", "lost")
        terminal = TerminalUser("task", "shell", "lost", server=server.server.ready_message["http"])
        terminal.expect(r"\$ ")
        terminal.type("cat made.txt; exit 3\n")
        terminal.expect("made by the second agent\r\n")
        assert terminal.exit_code() == 3
        terminal.close()
