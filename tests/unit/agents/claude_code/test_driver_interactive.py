"""An agent with a person before it: its command line, the answered questions, its outcome."""

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
    asked = manifest(**{"prompt": "Do it.", "headless": False, **claude})
    agent = ClaudeCodeDriver(Path("/opt/claude"))
    return agent.prepare(asked, session_id=str(uuid.uuid4()), task_key=KEY, secrets={})


def test_it_is_not_a_run_that_prints():
    start = prepare(max_turns=3)
    assert not {"-p", "--output-format", "--verbose", "--max-turns"} & set(start.command.argv)
    assert start.command.stdin == b""
    assert start.command.environment["TERM"] == "xterm-256color"


def test_the_repositorys_settings_are_obeyed_no_more_than_without_a_person():
    argv = prepare().command.argv
    assert argv[argv.index("--setting-sources") + 1] == ""
    assert "--strict-mcp-config" in argv


@pytest.mark.parametrize(
    ("prompt", "said"),
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
def test_the_prompt_is_said_as_text(prompt: str, said: str):
    argv = prepare(prompt=prompt).command.argv
    assert argv[-2:] == ("--", said)


def test_a_prompt_that_no_argument_holds_is_in_a_file():
    prompt = "ü" * 200_000
    start = prepare(prompt=prompt)
    assert start.home_files[".sandbox/prompt.md"] == prompt.encode()
    assert "/home/agent/.sandbox/prompt.md" in start.command.argv[-1]
    assert max(len(word.encode()) for word in start.command.argv) < 128 * 1024


def test_what_is_asked_first_is_answered():
    answers = json.loads(prepare().home_files[".claude.json"])
    assert answers["hasCompletedOnboarding"]
    assert answers["customApiKeyResponses"]["approved"] == [KEY[-20:]]
    assert answers["projects"] == {"/workspace": {"hasTrustDialogAccepted": True}}


def test_a_person_is_asked_for_permissions_where_nobody_could_be():
    argv = prepare(skip_permissions=False).command.argv
    assert argv[argv.index("--permission-mode") + 1] == "default"


@pytest.mark.parametrize(
    ("exit_", "code"),
    [
        (ExitStatus(0), None),
        (ExitStatus(1), "agent_failed"),
        (ExitStatus(129), "agent_failed"),
        (ExitStatus(None), "sandbox_lost"),
        (ExitStatus(137, was_oom_killed=True), "out_of_memory"),
    ],
)
def test_its_exit_code_is_its_outcome(exit_: ExitStatus, code: str | None):
    failure = ClaudeCodeDriver(Path("/opt/claude")).check_session_exit(exit_)
    assert (failure and failure.code) == code
