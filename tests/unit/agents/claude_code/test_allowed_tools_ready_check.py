"""The agent's init message is compared with the manifest."""

import json

import pytest

from doubles.claude_on_host import manifest
from sandbox.agents.claude_code.allowed_tools import ClaudeReady
from sandbox.agents.claude_code.manifest_section import McpConfig, McpServer
from sandbox.agents.claude_code.output_parser import ClaudeOutputParser
from sandbox.model.events import AgentMessage
from sandbox.model.failure import FailureCode

LOCAL = McpServer(command="npx")
REMOTE = McpServer(url="https://mcp.example/")


def init(session_id="the-session", **fields):
    return json.dumps({"type": "system", "subtype": "init", "session_id": session_id, **fields}).encode() + b"\n"


def find_start_failure(ready, redact=str, **claude):
    return ready.find_failure(manifest(**claude), redact)


def test_init_lists_tools_and_mcp_servers():
    server = {"name": "github", "status": "connected", "source": "dynamic"}
    ready, _ = ClaudeOutputParser("the-session").parse_line(init(tools=["Bash", "Read"], mcp_servers=[server]))
    assert ready == ClaudeReady(frozenset({"Bash", "Read"}), {"github": "connected"})


def test_only_the_first_init_message_of_the_session_counts():
    parser = ClaudeOutputParser("the-session")
    assert parser.parse_line(init("another", tools=["Forged"])) is None
    notice = AgentMessage("Claude Code started with its model", "notice")
    assert parser.parse_line(init(tools=["Bash"])) == (ClaudeReady(frozenset({"Bash"}), {}), notice)
    assert parser.parse_line(init(tools=["Other"])) == (notice,)


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
def test_malformed_init_has_no_tools_or_servers(fields):
    ready, _ = ClaudeOutputParser("the-session").parse_line(init(**fields))
    assert ready == ClaudeReady(frozenset(), {})
    assert find_start_failure(ready, allowed_tools=("Bash",)).code is FailureCode.TOOL_UNKNOWN
    assert find_start_failure(ready, mcp_config=McpConfig(mcpServers={"github": LOCAL})).code is FailureCode.MCP_FAILED
    assert find_start_failure(ready) is None


@pytest.mark.parametrize("status", ["failed", "pending", "needs-auth", "disabled", "Connected", ""])
@pytest.mark.parametrize(("server", "advice"), [(LOCAL, "check its command"), (REMOTE, "check its url")])
def test_each_mcp_server_must_be_connected(status, server, advice):
    config = McpConfig(mcpServers={"fine": LOCAL, "github": server})
    failure = find_start_failure(ClaudeReady(frozenset(), {"fine": "connected", "github": status}), mcp_config=config)
    assert failure.code is FailureCode.MCP_FAILED
    assert f"The MCP server github is not connected (status: {status})" in failure.message
    assert advice in failure.message
    assert (
        find_start_failure(ClaudeReady(frozenset(), {"fine": "connected", "github": "connected"}), mcp_config=config)
        is None
    )


def test_redacted_names_match_the_manifest():
    """Output is redacted before it is parsed, and a secret's value may be an ordinary word."""

    def redact(text):
        return text.replace("postgres", "[REDACTED:DB_USER]").replace("connected", "[REDACTED:WORD]")

    config = McpConfig(mcpServers={"postgres": LOCAL})
    ready = ClaudeReady(frozenset({redact("mcp__postgres__query")}), {redact("postgres"): redact("connected")})
    for ending in ("gres", "gres__*", "gres__query", "gres__q*", "*"):
        assert find_start_failure(ready, redact, mcp_config=config, allowed_tools=(f"mcp__post{ending}",)) is None
    unknown = find_start_failure(ready, redact, mcp_config=config, allowed_tools=("mcp__postgres__drop",))
    assert unknown.code is FailureCode.TOOL_UNKNOWN


def test_message_for_many_unknown_tools_is_short():
    unknown = tuple(f"Tool{number}" for number in range(200))
    failure = find_start_failure(ClaudeReady(frozenset({"Read"}), {}), allowed_tools=("Read", *unknown))
    assert "has no tool named Tool0, Tool1," in failure.message
    assert "and 190 more; correct claude.allowed_tools" in failure.message
    assert len(failure.message) < 400


def test_unknown_mcp_tool_message_lists_servers():
    ready = ClaudeReady(frozenset({"mcp__github__x"}), {"github": "connected"})
    with_server = McpConfig(mcpServers={"github": LOCAL})
    assert "are: github." in find_start_failure(ready, allowed_tools=("mcp__gitlab",), mcp_config=with_server).message
    assert "are: none." in find_start_failure(ClaudeReady(frozenset(), {}), allowed_tools=("mcp__gitlab",)).message


def test_failure_message_is_one_printable_line():
    config = McpConfig(mcpServers={"two\nlines": LOCAL})
    failure = find_start_failure(ClaudeReady(frozenset(), {"two lines": "red \x1b[31m"}), mcp_config=config)
    assert failure.message.isprintable()
