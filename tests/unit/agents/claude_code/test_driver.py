"""The command line, environment and prompt of Claude Code."""

import json
from pathlib import Path

import pytest

from doubles.claude_on_host import manifest
from sandbox.agents.claude_code.driver import ClaudeCodeDriver, encode_prompt
from sandbox.agents.claude_code.manifest_section import McpConfig, McpServer

COMMANDS = ["/clear", "/compact", "/init now", "/nope", " /clear", " /compact"]
COMMANDS_AFTER_BLANKS = [
    f"{blank}/clear" for blank in ("\ufeff", "\n\ufeff ", "\u00a0", "\u2028\ufeff\u3000", "\u2028 \ufeff\u00a0")
]
"""Slash commands that follow blank characters. Claude Code trims these characters."""

BINARY = Path("/data/agent/claude-1")


def prepare(secrets=None, **sections):
    return ClaudeCodeDriver(BINARY).prepare(
        manifest(**sections), session_id="the-session", gateway_key="the-task-key", secrets=secrets or {}
    )


def value_of(argv, option):
    return argv[argv.index(option) + 1]


def test_command_has_the_session_id_and_model_and_max_turns():
    argv = prepare(model="claude-x", max_turns=7).command.argv
    assert value_of(argv, "--session-id") == "the-session"
    assert value_of(argv, "--max-turns") == "7"
    assert "--model=claude-x" in argv
    assert "--max-turns" not in prepare().command.argv


def test_model_name_that_looks_like_an_option_is_passed_as_a_value():
    assert "--model=--settings=evil" in prepare(model="--settings=evil").command.argv
    assert "--settings=evil" not in prepare(model="--settings=evil").command.argv


def test_settings_and_mcp_servers_of_repository_and_home_are_ignored():
    argv = prepare().command.argv
    assert value_of(argv, "--setting-sources") == ""
    settings = {"skipWebFetchPreflight": True, "skipDangerousModePermissionPrompt": True}
    assert json.loads(value_of(argv, "--settings")) == settings
    assert "--strict-mcp-config" in argv


def test_sandbox_runs_the_server_copy_of_claude_code():
    start = prepare()
    assert start.programs == {BINARY: start.command.argv[0]}


def test_agent_starts_in_subpath_and_loads_each_parent_claude_md():
    start = prepare(subpath="packages/web")
    assert start.command.directory == "/workspace/packages/web"
    at = start.command.argv.index("--add-dir")
    assert start.command.argv[at + 1 : at + 4] == ("/workspace", "/workspace/packages", "/workspace/packages/web")
    assert prepare().command.directory == "/workspace"


def test_agent_environment_is_independent_of_the_server_environment(monkeypatch):
    before = prepare().command.environment
    monkeypatch.setenv("ANTHROPIC_API_KEY", "the-servers-own-key")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "https://elsewhere.example")
    monkeypatch.setenv("NODE_OPTIONS", "--require=/evil.js")
    assert prepare().command.environment == before
    assert before["ANTHROPIC_API_KEY"] == "the-task-key"
    assert before["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:8123"
    assert "127.0.0.1" in before["NO_PROXY"].split(",")


def test_task_key_is_not_in_arguments():
    assert not [argument for argument in prepare().command.argv if "the-task-key" in argument]


def test_secrets_do_not_override_agent_variables():
    secrets = {"GITHUB_TOKEN": "sesame", "HOME": "/evil", "ANTHROPIC_BASE_URL": "http://evil", "PATH": "/evil"}
    command = prepare(secrets).command
    assert command.environment == {**prepare().command.environment, "GITHUB_TOKEN": "sesame"}
    assert not [argument for argument in command.argv if "sesame" in argument]


def test_mcp_config_file_keeps_placeholders():
    github = McpServer(command="npx", args=("-y", "x"), env={"TOKEN": "${TOKEN}"})
    remote = McpServer(url="https://mcp.example/${TOKEN}", headers={"Authorization": "Bearer ${TOKEN}"})
    events = McpServer(url="https://mcp.example/", type="sse")
    config = McpConfig(mcpServers={"github": github, "there": remote, "events": events})
    start = prepare({"TOKEN": "sesame"}, mcp_config=config)
    ((name, content),) = start.home_files.items()
    assert value_of(start.command.argv, "--mcp-config") == f"/home/agent/{name}"
    assert json.loads(content)["mcpServers"] == {
        "github": {"type": "stdio", "command": "npx", "args": ["-y", "x"], "env": {"TOKEN": "${TOKEN}"}},
        "there": {
            "type": "http",
            "url": "https://mcp.example/${TOKEN}",
            "headers": {"Authorization": "Bearer ${TOKEN}"},
        },
        "events": {"type": "sse", "url": "https://mcp.example/", "headers": {}},
    }


def test_no_mcp_config_file_is_written_without_mcp_servers():
    assert prepare().home_files == {}
    assert "--mcp-config" not in prepare().command.argv


@pytest.mark.parametrize(
    "prompt", [*COMMANDS, *COMMANDS_AFTER_BLANKS, "\n\t/clear", "\n/compact", "/tmp/x is broken", "/"]
)
def test_prompt_that_looks_like_a_command_is_prefixed(prompt):
    assert encode_prompt(prompt) == f"Task:\n{prompt}".encode()


@pytest.mark.parametrize(
    "prompt", ["Fix it.", "-p", "--help", "!ls", "#note", "a\n/clear", " spaces ", "né — ✓", "\ufeffFix it."]
)
def test_other_prompts_are_unchanged(prompt):
    assert encode_prompt(prompt) == prompt.encode()


def test_invalid_unicode_in_prompt_is_replaced():
    assert encode_prompt("half \ud800 a pair") == b"half ? a pair"
