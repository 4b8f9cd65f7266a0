"""The real Claude Code is held to the tools and MCP servers that a user asked for, and says so before it begins."""

import asyncio
import json
from pathlib import Path

import pytest

from doubles import mcp_token_server
from doubles.claude_outside import SESSION_ID, Outside, manifest
from sandbox.agent.claude_code import ClaudeCode
from sandbox.agent.conversation import ClaudeConversation
from sandbox.contracts.agent import AgentBegan
from sandbox.contracts.runtime import Exit
from sandbox.demo.model_script import Fault, Script, Text, ToolUse, Turn
from sandbox.demo.scripted_model import ScriptedModel
from sandbox.model.errors import FailureCode
from sandbox.model.manifest import McpConfig, McpServer

DONE = Turn((Text("All done."),))
TOKEN_SERVER = McpServer(
    command="python3",
    args=("-I", str(Path(mcp_token_server.__file__)), "--key=${GITHUB_TOKEN}", "${ABSENT:-default}"),
    env={"TOKEN": "${GITHUB_TOKEN}"},
)
SECRETS = {"GITHUB_TOKEN": "sesame-open"}


def call(tool, **arguments):
    return Turn((ToolUse(tool, arguments),))


def bash(command):
    return call("Bash", command=command, description="work")


def write(path):
    return call("Write", file_path=path, content="made\n")


class Play:
    """A script played to its end: what the run left, and what is thought of its beginning."""

    def __init__(self, directory, *turns, secrets=None, **claude):
        self.workspace = directory / "workspace"
        self.ran, self.model = asyncio.run(self._run(directory, turns, secrets, claude))
        self._conversation = ClaudeConversation(SESSION_ID)
        events = [event for line in self.ran.lines for event in self._conversation.feed(line)]
        (self.began,) = [event for event in events if isinstance(event, AgentBegan)]
        self.wanted = manifest(**claude)
        self.failure = self.judge(**claude)

    async def _run(self, directory, turns, secrets, claude):
        outside = Outside(directory)
        async with ScriptedModel(Script((*turns, DONE))) as model:
            return await outside.run(model.url, secrets=secrets, **claude), model

    def judge(self, **claude):
        """What is thought of this beginning if that is what was asked for."""
        return ClaudeCode(Path("/none")).judge_start(manifest(**claude), self.began, str)

    @property
    def outcome(self):
        return self._conversation.outcome(Exit(self.ran.exit_code), self.ran.stderr)

    @property
    def offered(self):
        """The tools that the model was told of."""
        return {tool["name"] for tool in self.model.messages[0].get("tools", [])}

    @property
    def answers(self):
        """What each tool call got, in order."""
        messages = [message["content"] for message in self.model.messages[-1]["messages"]]
        blocks = [block for content in messages if isinstance(content, list) for block in content]
        return [json.dumps(block["content"]) for block in blocks if block["type"] == "tool_result"]

    @property
    def denied(self):
        return [denial["tool_name"] for denial in self.outcome.result["permission_denials"]]

    def has(self, name):
        return (self.workspace / name).exists()


def servers(**named):
    return McpConfig(mcpServers=named)


def test_a_task_without_options_has_every_tool(tmp_path):
    play = Play(tmp_path, write("a"), bash("touch b"))
    assert (play.failure, play.outcome.failure) == (None, None)
    assert {"Bash", "Edit", "Read", "Task", "Write"} <= play.began.tools
    assert play.has("a")
    assert play.has("b")


def test_names_alone_leave_no_other_tool_and_run_freely(tmp_path):
    play = Play(tmp_path, bash("touch a"), write("b"), allowed_tools=("Read", "Bash", "Grep"))
    assert (play.failure, play.outcome.failure) == (None, None)
    assert play.began.tools == {"Bash", "Grep", "Read"}
    assert play.offered == {"Bash", "Grep", "Read"}
    assert play.has("a")
    assert not play.has("b")
    assert "No such tool available: Write" in play.answers[1]


def test_an_empty_list_allows_nothing(tmp_path):
    play = Play(tmp_path, bash("touch a"), write("b"), allowed_tools=())
    assert (play.failure, play.outcome.failure) == (None, None)
    assert play.began.tools == play.offered == set()
    assert not play.has("a")
    assert not play.has("b")


def test_a_rule_allows_what_it_says_and_the_run_goes_on_after_a_denial(tmp_path):
    tools = ("Bash(git *)", "Bash(touch a, b)", "Read")
    turns = (bash("git init -q made"), bash("touch a, b"), bash("touch c"), bash("git status; touch d"), write("e"))
    play = Play(tmp_path, *turns, allowed_tools=tools)
    assert (play.failure, play.outcome.failure) == (None, None)
    assert play.began.tools == {"Bash", "Read"}
    assert [play.has(name) for name in ("made/.git", "a,", "b", "c", "d", "e")] == [True] * 3 + [False] * 3
    assert play.denied == ["Bash", "Bash"]
    assert play.outcome.result["result"] == "All done."


def test_where_permissions_are_checked_git_works_but_its_directory_is_left_alone(tmp_path):
    turns = (bash("git init -q . && git tag -l"), write(".git/hooks/pre-commit"), bash("echo x > .git/hooks/x"))
    play = Play(tmp_path, *turns, allowed_tools=("Bash", "Write"), skip_permissions=False)
    assert (play.failure, play.outcome.failure) == (None, None)
    assert play.denied == ["Write", "Bash"]
    assert play.has(".git/HEAD")
    assert not play.has(".git/hooks/pre-commit")


def test_a_rule_about_paths_holds_for_writing(tmp_path):
    play = Play(tmp_path, write("src/(a)/b"), write("c"), allowed_tools=("Write(src/(a)/**)",))
    assert (play.failure, play.outcome.failure) == (None, None)
    assert play.has("src/(a)/b")
    assert not play.has("c")
    assert play.denied == ["Write"]


@pytest.mark.parametrize("name", ["Agent", "Task"])
def test_subagents_are_known_by_both_names(tmp_path, name):
    play = Play(tmp_path, allowed_tools=(name, "Read"))
    assert play.failure is None
    assert play.offered == {"Agent", "Read"}


UNKNOWN = ("bash", "TodoWrite", "Raed(src/**)", "mcp__nobody", "mcp__nobody__tell")


@pytest.mark.parametrize("entries", [("Read", *UNKNOWN), UNKNOWN, ("Bash(git *)", *UNKNOWN), UNKNOWN[:1]])
def test_tools_that_claude_code_does_not_know_are_told(tmp_path, entries):
    failure = Play(tmp_path, allowed_tools=entries).failure
    unknown = ", ".join(entry for entry in entries if entry in UNKNOWN)
    assert failure.code is FailureCode.TOOL_UNKNOWN
    assert f"has no such tool: {unknown}; correct claude.allowed_tools" in failure.message


def test_without_skipping_permissions_only_harmless_work_is_done(tmp_path):
    play = Play(tmp_path, bash("touch a"), write("b"), bash("ls"), skip_permissions=False)
    assert (play.failure, play.outcome.failure) == (None, None)
    assert not play.has("a")
    assert not play.has("b")
    assert play.denied == ["Bash", "Write"]


def test_without_skipping_permissions_listed_tools_run(tmp_path):
    play = Play(tmp_path, bash("touch a"), write("b"), skip_permissions=False, allowed_tools=("Bash",))
    assert (play.failure, play.outcome.failure) == (None, None)
    assert play.began.tools == {"Bash"}
    assert play.has("a")
    assert not play.has("b")


def test_an_mcp_server_gets_its_secret_and_is_used(tmp_path):
    config = servers(github=TOKEN_SERVER)
    play = Play(tmp_path, call("mcp__github__tell"), bash("echo $GITHUB_TOKEN"), mcp_config=config, secrets=SECRETS)
    assert (play.failure, play.outcome.failure) == (None, None)
    assert play.began.mcp_servers == {"github": "connected"}
    assert "TOKEN=sesame-open WORDS=--key=sesame-open default" in play.answers[0]
    assert "sesame-open" in play.answers[1]


@pytest.mark.parametrize("kind", ["http", None])
def test_an_mcp_server_with_a_url_gets_its_secret_in_path_and_header(tmp_path, kind):
    with mcp_token_server.served_over_http() as url:
        headers = {"Authorization": "Bearer ${GITHUB_TOKEN}"}
        there = McpServer(url=f"{url}/${{GITHUB_TOKEN}}/mcp", headers=headers, type=kind)
        play = Play(tmp_path, call("mcp__there__tell"), mcp_config=servers(there=there), secrets=SECRETS)
    assert (play.failure, play.outcome.failure) == (None, None)
    assert "PATH=/sesame-open/mcp AUTHORIZATION=Bearer sesame-open" in play.answers[0]


def test_no_secret_is_in_an_argument_or_a_file(tmp_path):
    command = "tr '\\0' ' ' < /proc/$PPID/cmdline; cat $HOME/.sandbox/mcp.json"
    play = Play(tmp_path, bash(command), mcp_config=servers(github=TOKEN_SERVER), secrets=SECRETS)
    assert "--mcp-config" in play.answers[0]
    assert "${GITHUB_TOKEN}" in play.answers[0]
    assert "sesame-open" not in play.answers[0]


@pytest.mark.parametrize(
    ("tools", "used"),
    [
        (("mcp__github",), {"tell", "other"}),
        (("mcp__github__*",), {"tell", "other"}),
        (("mcp__github__tell",), {"tell"}),
        (("Read",), set()),
        ((), set()),
    ],
)
def test_mcp_tools_are_restricted_like_the_others(tmp_path, tools, used):
    calls = (call("mcp__github__tell"), call("mcp__github__other"), bash("touch a"))
    play = Play(tmp_path, *calls, mcp_config=servers(github=TOKEN_SERVER), secrets=SECRETS, allowed_tools=tools)
    assert (play.failure, play.outcome.failure) == (None, None)
    assert {name for name, told in zip(("tell", "other"), play.answers, strict=False) if "TOKEN=" in told} == used
    assert not play.has("a")


def test_a_configuration_larger_than_an_argument_may_be_is_taken(tmp_path):
    large = {f"large{number}": McpServer(command="false", env={"X": "x" * 50_000}) for number in range(3)}
    play = Play(tmp_path, mcp_config=servers(github=TOKEN_SERVER, **large), secrets=SECRETS)
    assert play.began.mcp_servers == {"github": "connected", **dict.fromkeys(large, "failed")}


BROKEN = {
    "missing": (McpServer(command="/no/such/program"), "check its command"),
    "ends": (McpServer(command="false"), "check its command"),
    "http": (McpServer(url="http://127.0.0.1:9/"), "vm.allowed_hosts"),
    "sse": (McpServer(url="http://127.0.0.1:9/", type="sse"), "vm.allowed_hosts"),
}


def test_a_server_that_does_not_connect_is_told_by_name(tmp_path):
    wanted = {name: server for name, (server, _) in BROKEN.items()}
    play = Play(tmp_path, mcp_config=servers(fine=TOKEN_SERVER, **wanted), secrets=SECRETS)
    assert play.began.mcp_servers == {"fine": "connected", **dict.fromkeys(BROKEN, "failed")}
    assert play.failure.code is FailureCode.MCP_FAILED
    for name, (server, advice) in BROKEN.items():
        failure = play.judge(mcp_config=servers(fine=TOKEN_SERVER, **{name: server}))
        assert failure.code is FailureCode.MCP_FAILED
        assert f"The MCP server {name} is not connected (status: failed)" in failure.message
        assert advice in failure.message


def test_a_name_that_claude_code_keeps_for_itself_is_told(tmp_path):
    play = Play(tmp_path, mcp_config=servers(workspace=TOKEN_SERVER), secrets=SECRETS)
    assert play.failure.code is FailureCode.MCP_FAILED
    assert "workspace is not connected (status: not started)" in play.failure.message


def test_the_beginning_is_told_while_the_first_model_request_waits(tmp_path):
    """So the gateway can hold that request until the beginning was judged."""
    begun = []

    async def run():
        outside = Outside(tmp_path)
        async with ScriptedModel(Script((Turn(DONE.content, faults=(Fault("hang"),)),))) as model:

            def on_line(line, process):
                if b'"subtype":"init"' in line:
                    begun.append(line)
                    process.kill()

            return await outside.run(model.url, on_line=on_line, mcp_config=servers(broken=McpServer(command="false")))

    assert asyncio.run(run()).exit_code == 137
    (event,) = ClaudeConversation(SESSION_ID).feed(begun[0])
    assert event.mcp_servers == {"broken": "failed"}


def test_a_run_is_rendered_in_the_format_that_was_asked_for(tmp_path):
    """It is the same run, whichever that is."""
    play = Play(tmp_path)
    rendered = {}
    for output_format in ("text", "json", "stream-json"):
        wanted = manifest(output_format=output_format)
        assert _command(wanted) == _command(play.wanted)
        rendered[output_format] = ClaudeCode(Path("/none")).render(wanted, play.outcome.result)
    assert rendered["text"] == b"All done.\n"
    assert json.loads(rendered["json"]) == json.loads(play.ran.lines[-1])
    assert rendered["json"].count(b"\n") == 1
    assert rendered["stream-json"] == b""


def _command(wanted):
    return ClaudeCode(Path("/none")).prepare(wanted, session_id=SESSION_ID, task_key="key", secrets={}).command
