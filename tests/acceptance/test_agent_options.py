"""What a user writes below `claude` holds in the whole product."""

import json
from pathlib import Path

import pytest

from doubles import mcp_token_server
from doubles.live_server import bash, says
from sandbox.demo.model_script import ToolUse, Turn

SECRET = "sesame-open-the-door"
SERVER = {
    "command": "python3",
    "args": ["-I", "/workspace/server.py", "--key=${GITHUB_TOKEN}"],
    "env": {"TOKEN": "${GITHUB_TOKEN}"},
}
SECRETS = [{"name": "GITHUB_TOKEN", "source": "env", "key": "MY_TOKEN"}]


def call(tool, **arguments):
    return Turn((ToolUse(tool, arguments),))


@pytest.fixture
def machine(world):
    """Makes a machine with an MCP server in the repository and a secret in the server's environment."""
    files = {"server.py": Path(mcp_token_server.__file__).read_text()}
    return lambda *turns: world(*turns, says(), files=files, environment={"MY_TOKEN": SECRET})


def run(machine, **parts):
    machine.submit(**parts)
    return machine.wait()


def output_of(user):
    """What the task's stdout was; the transcript has all, whatever its format."""
    events = [json.loads(line) for line in user.artifact("transcript.ndjson").splitlines()]
    assert [event["type"] for event in events][-1] == "result"
    assert "assistant" in {event["type"] for event in events}
    return "".join(frame["data"] for frame in user.frames() if frame["type"] == "output")


def test_an_mcp_server_works_with_a_secret_that_nobody_sees(machine):
    user = machine(call("mcp__github__tell"))
    claude = {"mcp_config": {"mcpServers": {"github": SERVER}}, "output_format": "text"}
    status = run(user, claude=claude, secrets=SECRETS)
    assert (status["state"], status["error"]) == ("completed", None), user.tell()
    assert user.tool_results() == [f"TOKEN={SECRET} WORDS=--key={SECRET}"]
    told = [user.logs(), json.dumps(status), user.artifact("transcript.ndjson").decode()]
    assert not [text for text in told if SECRET in text]
    assert "WORDS=--key=" in told[2]
    assert output_of(user) == "Done.\n"
    assert status["progress"]["tool_calls"] == 1


@pytest.mark.parametrize(
    ("claude", "code", "words"),
    [
        ({"mcp_config": {"mcpServers": {"broken": {"command": "/no/such/program"}}}}, "mcp_failed", "server broken"),
        ({"allowed_tools": ["Read", "TodoWrite", "mcp__github"]}, "tool_unknown", "tool: TodoWrite, mcp__github"),
    ],
)
def test_what_the_agent_lacks_fails_the_task_before_the_model_is_asked(machine, claude, code, words):
    user = machine(bash("touch made"))
    status = run(user, claude=claude)
    assert (status["state"], status["error"]["code"]) == ("failed", code), user.tell()
    assert words in status["error"]["message"]
    assert [request for request in user.model_requests() if request["method"] == "POST"] == []


def test_only_the_tools_of_the_list_are_there_and_only_what_rules_allow_is_done(machine):
    write = call("Write", file_path="written", content="x")
    user = machine(bash("git tag made"), bash("touch touched"), write)
    ample = {"budget_usd": 1.0, "budget_tokens": 100_000}
    status = run(user, claude={"allowed_tools": ["Bash(git *)"], "output_format": "json"}, lifecycle=ample)
    assert status["state"] == "completed", user.tell()
    assert [denial["tool_name"] for denial in status["result"]["permission_denials"]] == ["Bash"]
    assert "No such tool available: Write" in user.tool_results()[2]
    assert user.artifact("task-1.patch") == b""
    assert json.loads(output_of(user))["result"] == "Done."
