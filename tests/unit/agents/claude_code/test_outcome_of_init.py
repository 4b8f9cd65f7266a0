"""What the agent says of itself before its first model request, held against the manifest."""

import json
from pathlib import Path

import pytest

from doubles.claude_on_host import manifest
from sandbox.agents.claude_code.driver import ClaudeCodeDriver
from sandbox.agents.claude_code.output_parser import ClaudeOutputParser
from sandbox.interfaces.agent import AgentReady
from sandbox.model.errors import FailureCode
from sandbox.model.manifest.schema import McpConfig, McpServer

LOCAL = McpServer(command="npx")
REMOTE = McpServer(url="https://mcp.example/")


def init(session_id="the-session", **fields):
    return json.dumps({"type": "system", "subtype": "init", "session_id": session_id, **fields}).encode() + b"\n"


def judge(began, redact=str, **claude):
    return ClaudeCodeDriver(Path("/none")).check_ready(manifest(**claude), began, redact)


def test_tools_and_servers_are_heard():
    server = {"name": "github", "status": "connected", "source": "dynamic"}
    (began,) = ClaudeOutputParser("the-session").parse_line(init(tools=["Bash", "Read"], mcp_servers=[server]))
    assert began == AgentReady(frozenset({"Bash", "Read"}), {"github": "connected"})


def test_only_the_first_beginning_of_the_right_session_counts():
    conversation = ClaudeOutputParser("the-session")
    assert conversation.parse_line(init("another", tools=["Forged"])) == ()
    assert len(conversation.parse_line(init(tools=["Bash"]))) == 1
    assert conversation.parse_line(init(tools=["Other"])) == ()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": None},
        {"tools": "Bash"},
        {"tools": [1]},
        {"tools": ["Bash"], "mcp_servers": {"github": "connected"}},
    ],
)
def test_a_beginning_of_another_shape_has_nothing_that_was_asked_for(fields):
    (began,) = ClaudeOutputParser("the-session").parse_line(init(**fields))
    assert began == AgentReady(frozenset(), {})
    assert judge(began, allowed_tools=("Bash",)).code is FailureCode.TOOL_UNKNOWN
    assert judge(began, mcp_config=McpConfig(mcpServers={"github": LOCAL})).code is FailureCode.MCP_FAILED
    assert judge(began) is None


@pytest.mark.parametrize("status", ["failed", "pending", "needs-auth", "disabled", "Connected", ""])
@pytest.mark.parametrize(("server", "advice"), [(LOCAL, "check its command"), (REMOTE, "check its url")])
def test_every_server_must_be_connected(status, server, advice):
    config = McpConfig(mcpServers={"fine": LOCAL, "github": server})
    failure = judge(AgentReady(frozenset(), {"fine": "connected", "github": status}), mcp_config=config)
    assert failure.code is FailureCode.MCP_FAILED
    assert f"The MCP server github is not connected (status: {status})" in failure.message
    assert advice in failure.message
    assert judge(AgentReady(frozenset(), {"fine": "connected", "github": "connected"}), mcp_config=config) is None


def test_names_that_a_secret_stands_in_are_known_again():
    """A secret's value may be an ordinary word, and what the agent says is redacted before it is heard."""

    def redact(text):
        return text.replace("postgres", "[REDACTED:DB_USER]").replace("connected", "[REDACTED:WORD]")

    config = McpConfig(mcpServers={"postgres": LOCAL})
    began = AgentReady(frozenset({redact("mcp__postgres__query")}), {redact("postgres"): redact("connected")})
    for ending in ("gres", "gres__*", "gres__query", "gres__q*", "*"):
        assert judge(began, redact, mcp_config=config, allowed_tools=(f"mcp__post{ending}",)) is None
    unknown = judge(began, redact, mcp_config=config, allowed_tools=("mcp__postgres__drop",))
    assert unknown.code is FailureCode.TOOL_UNKNOWN


def test_many_unknown_tools_are_told_in_a_sentence():
    unknown = tuple(f"Tool{number}" for number in range(200))
    failure = judge(AgentReady(frozenset({"Read"}), {}), allowed_tools=("Read", *unknown))
    assert "has no tool named Tool0, Tool1," in failure.message
    assert "and 190 others; correct claude.allowed_tools" in failure.message
    assert len(failure.message) < 400


def test_an_unknown_mcp_tool_comes_with_the_servers_that_there_are():
    began = AgentReady(frozenset({"mcp__github__x"}), {"github": "connected"})
    with_server = McpConfig(mcpServers={"github": LOCAL})
    assert "are: github." in judge(began, allowed_tools=("mcp__gitlab",), mcp_config=with_server).message
    assert "are: none." in judge(AgentReady(frozenset(), {}), allowed_tools=("mcp__gitlab",)).message


def test_what_a_sandbox_says_stays_on_one_line():
    config = McpConfig(mcpServers={"two\nlines": LOCAL})
    failure = judge(AgentReady(frozenset(), {"two lines": "red \x1b[31m"}), mcp_config=config)
    assert failure.message.isprintable()
