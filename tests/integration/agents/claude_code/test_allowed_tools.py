"""The real Claude Code is limited to the allowed tools and MCP servers, and reports them when it starts.

Each start is expensive, so one run covers all checks with the same options.
"""

import asyncio
import json
from pathlib import Path

import pytest

from doubles import mcp_token_server
from doubles.claude_on_host import SESSION_ID, ClaudeOnHost, manifest
from sandbox.agents.claude_code.driver import ClaudeCodeDriver
from sandbox.agents.claude_code.manifest_section import McpConfig, McpServer
from sandbox.agents.claude_code.output_parser import ClaudeOutputParser
from sandbox.demo.scripted_model import Fault, Script, ScriptedModel, Text, ToolUse, Turn
from sandbox.interfaces.agent import AgentReady
from sandbox.interfaces.runtime import ExitStatus
from sandbox.model.failure import FailureCode

DONE = Turn((Text("All done."),))
TOKEN_SERVER = McpServer(
    command="python3",
    args=("-I", str(Path(mcp_token_server.__file__)), "--key=${GITHUB_TOKEN}", "${ABSENT:-default}"),
    env={"TOKEN": "${GITHUB_TOKEN}"},
)
SECRETS = {"GITHUB_TOKEN": "sesame-open"}


def tool_turn(tool, **arguments):
    return Turn((ToolUse(tool, arguments),))


def bash_turn(command):
    return tool_turn("Bash", command=command, description="work")


def write_turn(path):
    return tool_turn("Write", file_path=path, content="made\n")


class AgentRun:
    """A completed run of Claude Code with a scripted model, including the start check."""

    def __init__(self, directory, *turns, secrets=None, **claude):
        self.workspace = directory / "workspace"
        self.completed, self.model = asyncio.run(self._run(directory, turns, secrets, claude))
        self._parser = ClaudeOutputParser(SESSION_ID)
        events = [event for line in self.completed.lines for event in self._parser.parse_line(line)]
        (self.ready,) = [event for event in events if isinstance(event, AgentReady)]
        self.manifest = manifest(**claude)
        self.failure = self.find_start_failure(**claude)

    async def _run(self, directory, turns, secrets, claude):
        host_run = ClaudeOnHost(directory)
        async with ScriptedModel(Script((*turns, DONE))) as model:
            return await host_run.run(model.url, secrets=secrets, **claude), model

    def find_start_failure(self, **claude):
        """Return why the agent did not start with the given options, or None."""
        return self.ready.find_failure(manifest(**claude), str)

    @property
    def outcome(self):
        return self._parser.outcome(ExitStatus(self.completed.exit_code), self.completed.stderr)

    @property
    def offered_tools(self):
        """The tools that the model received."""
        return {tool["name"] for tool in self.model.messages[0].get("tools", [])}

    @property
    def results(self):
        """The result of each tool call, in order."""
        messages = [message["content"] for message in self.model.messages[-1]["messages"]]
        blocks = [block for content in messages if isinstance(content, list) for block in content]
        return [json.dumps(block["content"]) for block in blocks if block["type"] == "tool_result"]

    @property
    def prompt(self):
        """The prompt in the first request to the model."""
        content = self.model.messages[0]["messages"][0]["content"]
        return content if isinstance(content, str) else content[-1]["text"]

    @property
    def denied(self):
        return [denial["tool_name"] for denial in self.outcome.result["permission_denials"]]

    def has_file(self, name):
        return (self.workspace / name).exists()


def mcp_config(**named):
    return McpConfig(mcpServers=named)


GITHUB = mcp_config(github=TOKEN_SERVER)
MCP_TURNS = (tool_turn("mcp__github__tell"), tool_turn("mcp__github__other"))


def test_agent_without_options_has_all_tools(tmp_path):
    agent_run = AgentRun(tmp_path, write_turn("a"), bash_turn("touch b"))
    assert (agent_run.failure, agent_run.outcome.failure) == (None, None)
    assert {"Bash", "Edit", "Read", "Task", "Write"} <= agent_run.ready.tools
    assert agent_run.has_file("a")
    assert agent_run.has_file("b")
    # The command line does not depend on the output format.
    rendered = {}
    for output_format in ("text", "json", "stream-json"):
        formatted = manifest(output_format=output_format)
        assert _command(formatted) == _command(agent_run.manifest)
        rendered[output_format] = ClaudeCodeDriver(Path("/none")).render_output(formatted, agent_run.outcome.result)
    assert rendered["text"] == b"All done.\n"
    assert json.loads(rendered["json"]) == json.loads(agent_run.completed.lines[-1])
    assert rendered["json"].count(b"\n") == 1
    assert rendered["stream-json"] == b""


def _command(manifest_):
    return (
        ClaudeCodeDriver(Path("/none")).prepare(manifest_, session_id=SESSION_ID, gateway_key="key", secrets={}).command
    )


def test_only_listed_tools_exist_and_they_need_no_permission(tmp_path):
    agent_run = AgentRun(
        tmp_path, bash_turn("touch a"), write_turn("b"), allowed_tools=("Read", "Bash", "Agent"), prompt="--help"
    )
    assert (agent_run.failure, agent_run.outcome.failure) == (None, None)
    assert agent_run.ready.tools == {"Bash", "Read", "Task"}
    assert agent_run.offered_tools == {"Agent", "Bash", "Read"}
    assert agent_run.has_file("a")
    assert not agent_run.has_file("b")
    assert "No such tool available: Write" in agent_run.results[1]
    assert agent_run.prompt == "--help"


def test_empty_list_allows_no_tool(tmp_path):
    turns = (*MCP_TURNS, bash_turn("touch a"), write_turn("b"))
    agent_run = AgentRun(tmp_path, *turns, mcp_config=GITHUB, secrets=SECRETS, allowed_tools=())
    assert (agent_run.failure, agent_run.outcome.failure) == (None, None)
    assert not {tool for tool in agent_run.offered_tools | agent_run.ready.tools if not tool.startswith("mcp__")}
    assert len(agent_run.results) == 4
    assert not [result for result in agent_run.results if "TOKEN=" in result]
    assert not agent_run.has_file("a")
    assert not agent_run.has_file("b")


UNKNOWN_TOOLS = ("bash", "TodoWrite", "Raed(src/**)", "mcp__nobody", "mcp__nobody__tell")


def assert_unknown_tools(failure, tools):
    assert failure.code is FailureCode.TOOL_UNKNOWN
    assert f"has no tool named {', '.join(tools)}; correct claude.allowed_tools" in failure.message


def test_rule_allows_matching_calls_and_a_denial_does_not_end_the_run(tmp_path):
    rules = ("Bash(git *)", "Bash(touch a, b)", "Read", "Task", "Write(src/(a)/**)")
    commands = ("git init -q made", "touch a, b", "touch c", "git status; touch d")
    write_turns = (
        write_turn("src/(a)/b"),
        write_turn("e"),
        tool_turn("Edit", file_path="f", old_string="", new_string="made"),
    )
    agent_run = AgentRun(
        tmp_path, *map(bash_turn, commands), *write_turns, allowed_tools=(*rules, *UNKNOWN_TOOLS), prompt="@missing.txt"
    )
    assert (agent_run.find_start_failure(allowed_tools=rules), agent_run.outcome.failure) == (None, None)
    assert_unknown_tools(agent_run.failure, UNKNOWN_TOOLS)
    assert agent_run.ready.tools == {"Bash", "Read", "Task", "Write"}
    assert agent_run.offered_tools == {"Agent", "Bash", "Read", "Write"}
    created = {name for name in ("made/.git", "a,", "b", "c", "d", "src/(a)/b", "e", "f") if agent_run.has_file(name)}
    assert created == {"made/.git", "a,", "b", "src/(a)/b"}
    assert agent_run.denied == ["Bash", "Bash", "Write"]
    assert "No such tool available: Edit" in agent_run.results[-1]
    assert agent_run.outcome.result["result"] == "All done."
    assert agent_run.prompt == "@missing.txt"


def test_unknown_tools_are_reported(tmp_path):
    agent_run = AgentRun(tmp_path, allowed_tools=UNKNOWN_TOOLS)
    assert_unknown_tools(agent_run.failure, UNKNOWN_TOOLS)
    assert_unknown_tools(agent_run.find_start_failure(allowed_tools=UNKNOWN_TOOLS[:1]), UNKNOWN_TOOLS[:1])


def test_permission_checks_deny_calls_that_write(tmp_path):
    turns = (bash_turn("touch a"), write_turn("b"), bash_turn("ls"))
    agent_run = AgentRun(tmp_path, *turns, skip_permissions=False, prompt="!ls")
    assert (agent_run.failure, agent_run.outcome.failure) == (None, None)
    assert not agent_run.has_file("a")
    assert not agent_run.has_file("b")
    assert agent_run.denied == ["Bash", "Write"]
    assert agent_run.prompt == "!ls"


def test_permission_checks_allow_listed_tools_except_in_the_git_directory(tmp_path):
    tools_by_server = {
        "named": ("mcp__named", {"tell", "other"}),
        "starred": ("mcp__starred__*", {"tell", "other"}),
        "one": ("mcp__one__tell", {"tell"}),
        "none": ("Bash", set()),
    }
    tools = [(server, tool) for server in tools_by_server for tool in ("tell", "other")]
    turns = (
        *(tool_turn(f"mcp__{server}__{tool}") for server, tool in tools),
        bash_turn("git init -q . && git tag -l; touch a"),
        write_turn(".git/hooks/pre-commit"),
        bash_turn("echo x > .git/hooks/x"),
        tool_turn("Edit", file_path="b", old_string="", new_string="made"),
    )
    allowed_tools = (*(entry for entry, _ in tools_by_server.values()), "Write")
    config = mcp_config(**dict.fromkeys(tools_by_server, TOKEN_SERVER))
    options = {"allowed_tools": allowed_tools, "mcp_config": config, "skip_permissions": False, "prompt": "#note"}
    agent_run = AgentRun(tmp_path, *turns, secrets=SECRETS, **options)
    # With MCP servers, `skip_permissions` does not change the command line: only permission rules limit MCP tools.
    assert _command(agent_run.manifest) == _command(manifest(**{**options, "skip_permissions": True}))
    assert (agent_run.failure, agent_run.outcome.failure) == (None, None)
    assert {tool for tool in agent_run.ready.tools if not tool.startswith("mcp__")} == {"Bash", "Write"}
    succeeded = {each for each, result in zip(tools, agent_run.results, strict=False) if "TOKEN=" in result}
    assert succeeded == {(server, tool) for server, (_, expected) in tools_by_server.items() for tool in expected}
    assert [name for name in agent_run.denied if not name.startswith("mcp__")] == ["Write", "Bash"]
    created = {
        name for name in ("a", ".git/HEAD", ".git/hooks/pre-commit", ".git/hooks/x", "b") if agent_run.has_file(name)
    }
    assert created == {"a", ".git/HEAD"}
    assert agent_run.prompt == "#note"


BROKEN = {
    "missing": (McpServer(command="/no/such/program"), "check its command"),
    "ends": (McpServer(command="false"), "check its command"),
    "http": (McpServer(url="http://127.0.0.1:9/"), "vm.allowed_hosts"),
    "sse": (McpServer(url="http://127.0.0.1:9/", type="sse"), "vm.allowed_hosts"),
}


@pytest.fixture(scope="module")
def mcp_run(tmp_path_factory):
    """A run with MCP servers of every kind. Their configuration exceeds the maximum size of a command-line argument.

    Yield the run and the working servers.
    """
    mcp_turns = (tool_turn("mcp__github__tell"), tool_turn("mcp__typed__tell"), tool_turn("mcp__untyped__tell"))
    inspect_turn = bash_turn(
        "echo =$GITHUB_TOKEN=; tr '\\0' ' ' < /proc/$PPID/cmdline; cat $HOME/.sandbox/mcp.json | head -c 2000"
    )
    with mcp_token_server.served_over_http() as url:
        http_servers = {
            name: McpServer(
                url=f"{url}/${{GITHUB_TOKEN}}/mcp", headers={"Authorization": "Bearer ${GITHUB_TOKEN}"}, type=kind
            )
            for name, kind in (("typed", "http"), ("untyped", None))
        }
        working = {"github": TOKEN_SERVER, **http_servers}
        broken = {name: server for name, (server, _) in BROKEN.items()}
        large = {f"large{number}": McpServer(command="false", env={"X": "x" * 50_000}) for number in range(3)}
        config = mcp_config(**working, **broken, **large, workspace=TOKEN_SERVER)
        yield (
            AgentRun(tmp_path_factory.mktemp("served"), *mcp_turns, inspect_turn, mcp_config=config, secrets=SECRETS),
            working,
        )


def test_mcp_server_receives_its_secret(mcp_run):
    agent_run, working = mcp_run
    assert (agent_run.find_start_failure(mcp_config=mcp_config(**working)), agent_run.outcome.failure) == (None, None)
    assert "TOKEN=sesame-open WORDS=--key=sesame-open default" in agent_run.results[0]


def test_http_mcp_server_receives_its_secret_in_path_and_header(mcp_run):
    agent_run, _ = mcp_run
    for result in agent_run.results[1:3]:
        assert "PATH=/sesame-open/mcp AUTHORIZATION=Bearer sesame-open" in result


def test_secrets_are_in_no_argument_or_file(mcp_run):
    variable, _, visible = mcp_run[0].results[3].partition("=")[2].partition("=")
    assert variable == "sesame-open"
    assert "--mcp-config" in visible
    assert "${GITHUB_TOKEN}" in visible
    assert "sesame-open" not in visible


def test_failed_mcp_server_is_reported_by_name(mcp_run):
    agent_run, working = mcp_run
    failed = {*BROKEN, "large0", "large1", "large2"}
    assert agent_run.ready.mcp_servers == {**dict.fromkeys(working, "connected"), **dict.fromkeys(failed, "failed")}
    assert agent_run.failure.code is FailureCode.MCP_FAILED
    for name, (server, advice) in BROKEN.items():
        failure = agent_run.find_start_failure(mcp_config=mcp_config(**working, **{name: server}))
        assert failure.code is FailureCode.MCP_FAILED
        assert f"The MCP server {name} is not connected (status: failed)" in failure.message
        assert advice in failure.message


def test_reserved_mcp_server_name_is_reported(mcp_run):
    failure = mcp_run[0].find_start_failure(mcp_config=mcp_config(workspace=TOKEN_SERVER))
    assert failure.code is FailureCode.MCP_FAILED
    assert "workspace is not connected (status: not started)" in failure.message


async def test_init_event_is_sent_before_the_first_model_response(tmp_path):
    """The gateway depends on this order: it holds the first model request until the agent's start is checked."""
    init_lines = []

    async def run():
        host_run = ClaudeOnHost(tmp_path)
        async with ScriptedModel(Script((Turn(DONE.content, faults=(Fault("hang"),)),))) as model:

            def on_line(line, process):
                if b'"subtype":"init"' in line:
                    init_lines.append(line)
                    process.kill()

            return await host_run.run(
                model.url, on_line=on_line, mcp_config=mcp_config(broken=McpServer(command="false"))
            )

    assert (await run()).exit_code == 137
    event, _ = ClaudeOutputParser(SESSION_ID).parse_line(init_lines[0])
    assert event.mcp_servers == {"broken": "failed"}
