"""End-to-end tests of the options in the manifest's `claude` section."""

import json
from pathlib import Path

import pytest

from doubles import mcp_token_server
from doubles.deployment import bash_turn, reply_turn
from sandbox.demo.scripted_model import ToolUse, Turn

SECRET = "sesame-open-the-door"
SERVER = {
    "command": "python3",
    "args": ["-I", "/workspace/server.py", "--key=${GITHUB_TOKEN}"],
    "env": {"TOKEN": "${GITHUB_TOKEN}"},
}
SECRETS = [{"name": "GITHUB_TOKEN", "source": "env", "key": "MY_TOKEN"}]


def tool_turn(tool, **arguments):
    return Turn((ToolUse(tool, arguments),))


@pytest.fixture
def deployment(deploy):
    """Starts a deployment with an MCP server in the repository and a secret in the server's environment."""
    files = {"server.py": Path(mcp_token_server.__file__).read_text()}
    return lambda *turns: deploy(*turns, reply_turn(), files=files, environment={"MY_TOKEN": SECRET})


def run(deployment, **sections):
    deployment.submit(**sections)
    return deployment.wait()


def task_output(server):
    """Check that the transcript is complete, as in every output format; return the task's stdout."""
    events = [json.loads(line) for line in server.artifact("transcript.ndjson").splitlines()]
    assert [event["type"] for event in events][-1] == "result"
    assert "assistant" in {event["type"] for event in events}
    return "".join(event["data"] for event in server.wire_events() if event["type"] == "output")


def test_mcp_server_gets_its_secret_and_no_output_contains_it(deployment):
    server = deployment(tool_turn("mcp__github__tell"))
    claude = {"mcp_config": {"mcpServers": {"github": SERVER}}, "output_format": "text"}
    status = run(server, claude=claude, secrets=SECRETS)
    assert (status["state"], status["error"]) == ("completed", None), server.diagnostics()
    assert server.tool_results() == [f"TOKEN={SECRET} WORDS=--key={SECRET}"]
    texts = [server.logs(), json.dumps(status), server.artifact("transcript.ndjson").decode()]
    assert not [text for text in texts if SECRET in text]
    assert "WORDS=--key=" in texts[2]
    assert task_output(server) == "Done.\n"
    assert status["progress"]["tool_calls"] == 1


@pytest.mark.parametrize(
    ("claude", "code", "words"),
    [
        ({"mcp_config": {"mcpServers": {"broken": {"command": "/no/such/program"}}}}, "mcp_failed", "server broken"),
        ({"allowed_tools": ["Read", "TodoWrite", "mcp__github"]}, "tool_unknown", "tool named TodoWrite, mcp__github"),
    ],
)
def test_missing_tool_fails_the_task_before_the_first_model_request(deployment, claude, code, words):
    server = deployment(bash_turn("touch made"))
    status = run(server, claude=claude)
    assert (status["state"], status["error"]["code"]) == ("failed", code), server.diagnostics()
    assert words in status["error"]["message"]
    assert [request for request in server.model_requests() if request["method"] == "POST"] == []


def test_allowed_tools_and_their_rules_are_enforced(deployment):
    write_turn = tool_turn("Write", file_path="written", content="x")
    server = deployment(bash_turn("git tag made"), bash_turn("touch touched"), write_turn)
    ample = {"budget_usd": 1.0, "budget_tokens": 100_000}
    status = run(server, claude={"allowed_tools": ["Bash(git *)"], "output_format": "json"}, lifecycle=ample)
    assert status["state"] == "completed", server.diagnostics()
    assert [denial["tool_name"] for denial in status["result"]["permission_denials"]] == ["Bash"]
    assert "No such tool available: Write" in server.tool_results()[2]
    assert server.artifact("task-1.patch") == b""
    assert json.loads(task_output(server))["result"] == "Done."
