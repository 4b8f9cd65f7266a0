"""`claude.allowed_tools` and `claude.skip_permissions` as command-line options."""

import time

import pytest

from sandbox.agents.claude_code.allowed_tools import tool_options, unknown_entries
from sandbox.agents.claude_code.manifest_section import Claude, McpConfig, McpServer

SKIP = ("--dangerously-skip-permissions",)
DENY = ("--permission-mode", "dontAsk")
SERVERS = McpConfig(mcpServers={"github": McpServer(command="npx")})


def options(*entries, **claude):
    return tool_options(Claude(prompt="x", allowed_tools=entries, **claude))


@pytest.mark.parametrize("config", [None, SERVERS, McpConfig(mcpServers={})])
def test_permission_mode_without_allowed_tools_depends_on_skip_permissions(config):
    assert tool_options(Claude(prompt="x", mcp_config=config)) == SKIP
    assert tool_options(Claude(prompt="x", mcp_config=config, skip_permissions=False)) == DENY


def test_permissions_are_skipped_for_plain_tool_names():
    assert options("Read", "Bash", "Read") == ("--tools", "Read,Bash", *SKIP)


@pytest.mark.parametrize(
    ("entries", "tools", "allowed"),
    [
        (("Bash(git *)",), "Bash", ("Bash(git *)",)),
        (("Bash(git *)", "Read", "Bash(ls)"), "Bash,Read", ("Bash(git *)", "Read", "Bash(ls)")),
        (("Read", "mcp__github"), "Read", ("Read", "mcp__github")),
        (("mcp__github__tell",), "", ("mcp__github__tell",)),
        (("Write(src/**)", "NotebookEdit(a.ipynb)"), "Write,NotebookEdit", ("Edit(src/**)", "Edit(a.ipynb)")),
    ],
)
def test_permissions_are_used_for_rules_and_mcp_tools(entries, tools, allowed):
    assert options(*entries) == ("--tools", tools, "--allowedTools", *allowed, *DENY)


def test_plain_tool_names_use_permissions_if_there_are_mcp_servers_or_skip_permissions_is_false():
    expected = ("--tools", "Read", "--allowedTools", "Read", *DENY)
    assert options("Read", skip_permissions=False) == expected
    assert options("Read", mcp_config=SERVERS) == expected
    assert options("Read", mcp_config=McpConfig(mcpServers={})) == ("--tools", "Read", *SKIP)


def test_empty_list_allows_no_tools():
    assert options() == ("--tools", "", *SKIP)
    assert options(skip_permissions=False) == options(mcp_config=SERVERS) == ("--tools", "", *DENY)


TOOLS = frozenset({"Task", "Bash", "Read", "mcp__git_hub__get_issue"})


@pytest.mark.parametrize(
    "entry",
    [
        *("Bash", "Bash(git *)", "Read", "Task", "Agent", "Agent(Explore)"),
        *("mcp__git_hub", "mcp__git_hub__*", "mcp__git_hub__get_issue", "mcp__empty", "mcp__empty__*"),
    ],
)
def test_entry_for_an_available_tool_is_known(entry):
    assert unknown_entries([entry], TOOLS, ["git.hub", "empty"], str) == []


@pytest.mark.parametrize(
    "entry",
    [
        *("bash", "Write", "Write(x)", "Bas", "BashX", "Tas"),
        *("mcp__git", "mcp__other", "mcp__git_hub__get", "mcp__git_hub__get_issues", "mcp__empty__tool", "mcp__"),
    ],
)
def test_entry_for_an_unavailable_tool_is_unknown(entry):
    assert unknown_entries(["Read", entry], TOOLS, ["git.hub", "empty"], str) == [entry]


def test_comparison_of_many_entries_and_tools_is_fast():
    tools = frozenset(f"mcp__many__{number}" for number in range(100_000))
    entries = [f"mcp__many__{number}" for number in range(99_990, 100_010)]
    begin = time.thread_time()
    assert unknown_entries(entries, tools, [], str) == entries[10:]
    assert time.thread_time() - begin < 0.1


def test_entry_matches_a_tool_by_its_redacted_name_or_a_pattern():
    tools = frozenset({"mcp__db__[REDACTED:KEY]", "mcp__db__query_7"})
    entries = ["mcp__db__secret-value", "mcp__db__q*", "mcp__db__query_[0-9]", "mcp__db__write*x", "mcp__db__drop"]
    assert unknown_entries(entries, tools, [], lambda name: name.replace("secret-value", "[REDACTED:KEY]")) == [
        "mcp__db__drop"
    ]
