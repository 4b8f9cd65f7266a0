"""The real Claude Code is held to the tools and MCP servers that a user asked for, and says so before it begins.

Each start of it costs much, so that one run answers what can be asked with the same options.
"""

import asyncio
import json
from pathlib import Path

import pytest

from doubles import mcp_token_server
from doubles.claude_on_host import SESSION_ID, Outside, manifest
from sandbox.agents.claude_code.driver import ClaudeCodeDriver
from sandbox.agents.claude_code.output_parser import ClaudeOutputParser
from sandbox.demo.model_script import Fault, Script, Text, ToolUse, Turn
from sandbox.demo.scripted_model import ScriptedModel
from sandbox.interfaces.agent import AgentReady
from sandbox.interfaces.runtime import ExitStatus
from sandbox.model.errors import FailureCode
from sandbox.model.manifest.schema import McpConfig, McpServer

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
        self._conversation = ClaudeOutputParser(SESSION_ID)
        events = [event for line in self.ran.lines for event in self._conversation.parse_line(line)]
        (self.began,) = [event for event in events if isinstance(event, AgentReady)]
        self.wanted = manifest(**claude)
        self.failure = self.judge(**claude)

    async def _run(self, directory, turns, secrets, claude):
        outside = Outside(directory)
        async with ScriptedModel(Script((*turns, DONE))) as model:
            return await outside.run(model.url, secrets=secrets, **claude), model

    def judge(self, **claude):
        """What is thought of this beginning if that is what was asked for."""
        return ClaudeCodeDriver(Path("/none")).check_ready(manifest(**claude), self.began, str)

    @property
    def outcome(self):
        return self._conversation.outcome(ExitStatus(self.ran.exit_code), self.ran.stderr)

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
    def prompt(self):
        """What the model was told to do."""
        content = self.model.messages[0]["messages"][0]["content"]
        return content if isinstance(content, str) else content[-1]["text"]

    @property
    def denied(self):
        return [denial["tool_name"] for denial in self.outcome.result["permission_denials"]]

    def has(self, name):
        return (self.workspace / name).exists()


def servers(**named):
    return McpConfig(mcpServers=named)


GITHUB = servers(github=TOKEN_SERVER)
MCP_CALLS = (call("mcp__github__tell"), call("mcp__github__other"))


def test_a_task_without_options_has_every_tool(tmp_path):
    play = Play(tmp_path, write("a"), bash("touch b"))
    assert (play.failure, play.outcome.failure) == (None, None)
    assert {"Bash", "Edit", "Read", "Task", "Write"} <= play.began.tools
    assert play.has("a")
    assert play.has("b")
    # It is the same run, whatever format was asked for.
    rendered = {}
    for output_format in ("text", "json", "stream-json"):
        wanted = manifest(output_format=output_format)
        assert _command(wanted) == _command(play.wanted)
        rendered[output_format] = ClaudeCodeDriver(Path("/none")).render_output(wanted, play.outcome.result)
    assert rendered["text"] == b"All done.\n"
    assert json.loads(rendered["json"]) == json.loads(play.ran.lines[-1])
    assert rendered["json"].count(b"\n") == 1
    assert rendered["stream-json"] == b""


def _command(wanted):
    return ClaudeCodeDriver(Path("/none")).prepare(wanted, session_id=SESSION_ID, task_key="key", secrets={}).command


def test_names_alone_leave_no_other_tool_and_run_freely(tmp_path):
    play = Play(tmp_path, bash("touch a"), write("b"), allowed_tools=("Read", "Bash", "Agent"), prompt="--help")
    assert (play.failure, play.outcome.failure) == (None, None)
    assert play.began.tools == {"Bash", "Read", "Task"}
    assert play.offered == {"Agent", "Bash", "Read"}
    assert play.has("a")
    assert not play.has("b")
    assert "No such tool available: Write" in play.answers[1]
    assert play.prompt == "--help"


def test_an_empty_list_allows_nothing(tmp_path):
    turns = (*MCP_CALLS, bash("touch a"), write("b"))
    play = Play(tmp_path, *turns, mcp_config=GITHUB, secrets=SECRETS, allowed_tools=())
    assert (play.failure, play.outcome.failure) == (None, None)
    assert not {one for one in play.offered | play.began.tools if not one.startswith("mcp__")}
    assert len(play.answers) == 4
    assert not [answer for answer in play.answers if "TOKEN=" in answer]
    assert not play.has("a")
    assert not play.has("b")


UNKNOWN = ("bash", "TodoWrite", "Raed(src/**)", "mcp__nobody", "mcp__nobody__tell")


def is_told_of(failure, unknown):
    assert failure.code is FailureCode.TOOL_UNKNOWN
    assert f"has no such tool: {', '.join(unknown)}; correct claude.allowed_tools" in failure.message


def test_a_rule_allows_what_it_says_and_the_run_goes_on_after_a_denial(tmp_path):
    rules = ("Bash(git *)", "Bash(touch a, b)", "Read", "Task", "Write(src/(a)/**)")
    commands = ("git init -q made", "touch a, b", "touch c", "git status; touch d")
    written = (write("src/(a)/b"), write("e"), call("Edit", file_path="f", old_string="", new_string="made"))
    play = Play(tmp_path, *map(bash, commands), *written, allowed_tools=(*rules, *UNKNOWN), prompt="@nobody.txt")
    assert (play.judge(allowed_tools=rules), play.outcome.failure) == (None, None)
    is_told_of(play.failure, UNKNOWN)
    assert play.began.tools == {"Bash", "Read", "Task", "Write"}
    assert play.offered == {"Agent", "Bash", "Read", "Write"}
    made = {name for name in ("made/.git", "a,", "b", "c", "d", "src/(a)/b", "e", "f") if play.has(name)}
    assert made == {"made/.git", "a,", "b", "src/(a)/b"}
    assert play.denied == ["Bash", "Bash", "Write"]
    assert "No such tool available: Edit" in play.answers[-1]
    assert play.outcome.result["result"] == "All done."
    assert play.prompt == "@nobody.txt"


def test_tools_that_claude_code_does_not_know_are_told(tmp_path):
    play = Play(tmp_path, allowed_tools=UNKNOWN)
    is_told_of(play.failure, UNKNOWN)
    is_told_of(play.judge(allowed_tools=UNKNOWN[:1]), UNKNOWN[:1])


def test_without_skipping_permissions_only_harmless_work_is_done(tmp_path):
    turns = (bash("touch a"), write("b"), bash("ls"))
    play = Play(tmp_path, *turns, skip_permissions=False, prompt="!ls")
    assert (play.failure, play.outcome.failure) == (None, None)
    assert not play.has("a")
    assert not play.has("b")
    assert play.denied == ["Bash", "Write"]
    assert play.prompt == "!ls"


def test_without_skipping_permissions_listed_tools_run_but_the_directory_of_git_is_left_alone(tmp_path):
    used = {
        "named": ("mcp__named", {"tell", "other"}),
        "starred": ("mcp__starred__*", {"tell", "other"}),
        "one": ("mcp__one__tell", {"tell"}),
        "none": ("Bash", set()),
    }
    tools = [(server, tool) for server in used for tool in ("tell", "other")]
    turns = (
        *(call(f"mcp__{server}__{tool}") for server, tool in tools),
        bash("git init -q . && git tag -l; touch a"),
        write(".git/hooks/pre-commit"),
        bash("echo x > .git/hooks/x"),
        call("Edit", file_path="b", old_string="", new_string="made"),
    )
    allowed = (*(entry for entry, _ in used.values()), "Write")
    config = servers(**dict.fromkeys(used, TOKEN_SERVER))
    options = {"allowed_tools": allowed, "mcp_config": config, "skip_permissions": False, "prompt": "#note"}
    play = Play(tmp_path, *turns, secrets=SECRETS, **options)
    # The same run as where they are skipped: which MCP tools there are is a matter of permissions.
    assert _command(play.wanted) == _command(manifest(**{**options, "skip_permissions": True}))
    assert (play.failure, play.outcome.failure) == (None, None)
    assert {tool for tool in play.began.tools if not tool.startswith("mcp__")} == {"Bash", "Write"}
    answered = {each for each, told in zip(tools, play.answers, strict=False) if "TOKEN=" in told}
    assert answered == {(server, tool) for server, (_, wanted) in used.items() for tool in wanted}
    assert [name for name in play.denied if not name.startswith("mcp__")] == ["Write", "Bash"]
    made = {name for name in ("a", ".git/HEAD", ".git/hooks/pre-commit", ".git/hooks/x", "b") if play.has(name)}
    assert made == {"a", ".git/HEAD"}
    assert play.prompt == "#note"


BROKEN = {
    "missing": (McpServer(command="/no/such/program"), "check its command"),
    "ends": (McpServer(command="false"), "check its command"),
    "http": (McpServer(url="http://127.0.0.1:9/"), "vm.allowed_hosts"),
    "sse": (McpServer(url="http://127.0.0.1:9/", type="sse"), "vm.allowed_hosts"),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A run with MCP servers of every kind; gives it, and those that are meant to work.

    All together they are more than an argument may be.
    """
    calls = (call("mcp__github__tell"), call("mcp__typed__tell"), call("mcp__untyped__tell"))
    look = bash("echo =$GITHUB_TOKEN=; tr '\\0' ' ' < /proc/$PPID/cmdline; cat $HOME/.sandbox/mcp.json | head -c 2000")
    with mcp_token_server.served_over_http() as url:
        there = {
            name: McpServer(
                url=f"{url}/${{GITHUB_TOKEN}}/mcp", headers={"Authorization": "Bearer ${GITHUB_TOKEN}"}, type=kind
            )
            for name, kind in (("typed", "http"), ("untyped", None))
        }
        fine = {"github": TOKEN_SERVER, **there}
        broken = {name: server for name, (server, _) in BROKEN.items()}
        large = {f"large{number}": McpServer(command="false", env={"X": "x" * 50_000}) for number in range(3)}
        config = servers(**fine, **broken, **large, workspace=TOKEN_SERVER)
        yield Play(tmp_path_factory.mktemp("served"), *calls, look, mcp_config=config, secrets=SECRETS), fine


def test_an_mcp_server_gets_its_secret_and_is_used(served):
    play, fine = served
    assert (play.judge(mcp_config=servers(**fine)), play.outcome.failure) == (None, None)
    assert "TOKEN=sesame-open WORDS=--key=sesame-open default" in play.answers[0]


def test_an_mcp_server_with_a_url_gets_its_secret_in_path_and_header(served):
    play, _ = served
    for answer in play.answers[1:3]:
        assert "PATH=/sesame-open/mcp AUTHORIZATION=Bearer sesame-open" in answer


def test_no_secret_is_in_an_argument_or_a_file(served):
    variable, _, looked = served[0].answers[3].partition("=")[2].partition("=")
    assert variable == "sesame-open"
    assert "--mcp-config" in looked
    assert "${GITHUB_TOKEN}" in looked
    assert "sesame-open" not in looked


def test_a_server_that_does_not_connect_is_told_by_name(served):
    play, fine = served
    failed = {*BROKEN, "large0", "large1", "large2"}
    assert play.began.mcp_servers == {**dict.fromkeys(fine, "connected"), **dict.fromkeys(failed, "failed")}
    assert play.failure.code is FailureCode.MCP_FAILED
    for name, (server, advice) in BROKEN.items():
        failure = play.judge(mcp_config=servers(**fine, **{name: server}))
        assert failure.code is FailureCode.MCP_FAILED
        assert f"The MCP server {name} is not connected (status: failed)" in failure.message
        assert advice in failure.message


def test_a_name_that_claude_code_keeps_for_itself_is_told(served):
    failure = served[0].judge(mcp_config=servers(workspace=TOKEN_SERVER))
    assert failure.code is FailureCode.MCP_FAILED
    assert "workspace is not connected (status: not started)" in failure.message


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
    (event,) = ClaudeOutputParser(SESSION_ID).parse_line(begun[0])
    assert event.mcp_servers == {"broken": "failed"}
