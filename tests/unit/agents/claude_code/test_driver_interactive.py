"""Interactive sessions: command line, dialogs answered in advance, and outcome."""

import json
import uuid
from pathlib import Path

import pytest

from doubles.claude_on_host import manifest
from sandbox.agents.claude_code.driver import ClaudeCodeDriver
from sandbox.interfaces.agent import AgentLaunchSpec
from sandbox.interfaces.runtime import ExitStatus

KEY = "sk-ant-sandbox-0123456789-abcdefghij"


def prepare(**claude: object) -> AgentLaunchSpec:
    task_manifest = manifest(**{"prompt": "Do it.", "headless": False, **claude})
    agent = ClaudeCodeDriver(Path("/opt/claude"))
    return agent.prepare(task_manifest, session_id=str(uuid.uuid4()), gateway_key=KEY, secrets={})


def test_interactive_command_has_no_print_options():
    start = prepare(max_turns=3)
    assert not {"-p", "--output-format", "--verbose", "--max-turns"} & set(start.command.argv)
    assert start.command.stdin == b""
    assert start.command.environment["TERM"] == "xterm-256color"


def test_repository_settings_are_ignored():
    argv = prepare().command.argv
    assert argv[argv.index("--setting-sources") + 1] == ""
    assert "--strict-mcp-config" in argv


@pytest.mark.parametrize(
    ("prompt", "argument"),
    [
        ("Do it.", "Do it."),
        ("--help", "--help"),
        ("/clear", "Task:\n/clear"),
        (" !ls", "Task:\n !ls"),
        ("#remember", "Task:\n#remember"),
        ("\ufeff/clear", "Task:\n\ufeff/clear"),
        ("\ufeffDo it.", "\ufeffDo it."),
    ],
)
def test_prompt_is_the_last_argument_as_plain_text(prompt: str, argument: str):
    argv = prepare(prompt=prompt).command.argv
    assert argv[-2:] == ("--", argument)


def test_long_prompt_is_passed_in_a_file():
    prompt = "ü" * 200_000
    start = prepare(prompt=prompt)
    assert start.home_files[".sandbox/prompt.md"] == prompt.encode()
    assert "/home/agent/.sandbox/prompt.md" in start.command.argv[-1]
    assert max(len(word.encode()) for word in start.command.argv) < 128 * 1024


def test_onboarding_and_trust_dialogs_are_preset():
    config = json.loads(prepare().home_files[".claude.json"])
    assert config["hasCompletedOnboarding"]
    assert config["customApiKeyResponses"]["approved"] == [KEY[-20:]]
    assert config["projects"] == {"/workspace": {"hasTrustDialogAccepted": True}}


def test_permission_prompts_are_enabled_if_skip_permissions_is_false():
    argv = prepare(skip_permissions=False).command.argv
    assert argv[argv.index("--permission-mode") + 1] == "default"


@pytest.mark.parametrize(
    ("exit_status", "code"),
    [
        (ExitStatus(0), None),
        (ExitStatus(1), "agent_failed"),
        (ExitStatus(129), "agent_failed"),
        (ExitStatus(None), "sandbox_lost"),
        (ExitStatus(137, was_oom_killed=True), "out_of_memory"),
    ],
)
def test_exit_status_maps_to_failure_code(exit_status: ExitStatus, code: str | None):
    failure = ClaudeCodeDriver(Path("/opt/claude")).check_interactive_exit(exit_status)
    assert (failure and failure.code) == code
