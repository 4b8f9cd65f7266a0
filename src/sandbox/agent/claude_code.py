"""Claude Code as the agent: its command line, its environment, its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sandbox.agent.beginning import judge_beginning
from sandbox.agent.conversation import ClaudeConversation
from sandbox.agent.interactive import interactive_arguments, interactive_files, interactive_variables
from sandbox.agent.kept_session import is_kept
from sandbox.agent.mcp import MCP_CONNECT_SECONDS, mcp_file
from sandbox.agent.plain_text import as_text
from sandbox.agent.rendering import render_result
from sandbox.agent.tools import tool_options
from sandbox.agent.verdict import judge_session
from sandbox.contracts.agent import AgentBegan, AgentStart
from sandbox.contracts.inside import HOME, MODEL_PORT, NODE, PROXY_PORT, USER, WORKSPACE
from sandbox.contracts.runtime import Command, Exit
from sandbox.model.errors import Failure
from sandbox.model.manifest import Claude, Manifest

PROGRAM = "/run/sandbox/bin/claude"
MODEL_URL = f"http://127.0.0.1:{MODEL_PORT}"
PROXY_URL = f"http://127.0.0.1:{PROXY_PORT}"

_PROGRAM_PATH = (
    str(PurePosixPath(PROGRAM).parent),
    f"{HOME}/.local/bin",
    f"{NODE}/bin",
    *("/usr/local/bin", "/usr/bin", "/bin", "/usr/local/sbin", "/usr/sbin", "/sbin"),
)
_MCP_FILE = ".sandbox/mcp.json"

RESUMED = (
    b"You were interrupted: the machine lost your sandbox, and every process in it ended. The files of the workspace "
    b"are as they were then; whatever you did last may be half done. Look at where you are, and go on with the task."
)
"""What an agent is told that goes on in its session."""

_SETTINGS = '{"skipWebFetchPreflight":true,"skipDangerousModePermissionPrompt":true}'
"""WebFetch would ask Anthropic's own host about every other one first; here the gateway says what is reached. And
nobody is asked whether skipping permissions is meant: the manifest says so."""


class ClaudeCode:
    """Starts the binary at `binary` (a host path, see `install_binary`) and reads what it says."""

    def __init__(self, binary: Path) -> None:
        self._binary = binary

    def prepare(
        self,
        manifest: Manifest,
        *,
        session_id: str,
        task_key: str,
        secrets: Mapping[str, str],
        resumes: bool = False,
    ) -> AgentStart:
        """Command, environment and files. `secrets` become variables of the agent, and of all that it starts.

        The repository is not looked at: the agent itself reads CLAUDE.md, inside. resumes: see `Agent.prepare`.
        """
        claude = manifest.claude
        directory = _directory(manifest.repository.subpath)
        options = _options(claude, directory, session=("--resume" if resumes else "--session-id", session_id))
        environment = {**secrets, **_environment(task_key)}
        # A file: the configuration may be larger than an argument, and arguments are read by everybody on the host.
        files = {_MCP_FILE: mcp_file(claude.mcp_config)} if claude.mcp_config is not None else {}
        if claude.headless:
            argv = (PROGRAM, "-p", *_printing(claude), *options)
            command = Command(argv, environment, directory, RESUMED if resumes else prompt_bytes(claude.prompt))
        else:
            argv = (PROGRAM, *interactive_arguments(options, claude.prompt))
            command = Command(argv, {**environment, **interactive_variables()}, directory)
            files |= interactive_files(claude.prompt, task_key, directory)
        return AgentStart(command, session_id, programs={self._binary: PROGRAM}, home_files=files)

    def has_session(self, home: Path, session_id: str) -> bool:
        """Whether Claude Code's own transcript is there. The home is not trusted."""
        return is_kept(home, session_id)

    def conversation(self, session_id: str) -> ClaudeConversation:
        """A reader for one run."""
        return ClaudeConversation(session_id)

    def judge_start(self, manifest: Manifest, began: AgentBegan, redact: Callable[[str], str]) -> Failure | None:
        """Whether the agent has the tools and MCP servers that were asked for; why not, if not."""
        return judge_beginning(manifest.claude, began, redact)

    def judge_session(self, exit_: Exit) -> Failure | None:
        """Whether a session on a terminal ended well, which its process alone tells; why not, if not."""
        return judge_session(exit_)

    def render(self, manifest: Manifest, result: Mapping[str, Any] | None) -> bytes:
        """What the task's stdout is, made from the last result, where `output_format` is not `stream-json`."""
        return render_result(manifest.claude.output_format, result)


def prompt_bytes(prompt: str) -> bytes:
    """The prompt for stdin, such that Claude Code takes it as text.

    It obeys `/clear`, `/init` and others when they come first. Words in front are safe where white space is safe
    only as long as nobody trims it. Leading `-`, `!` and `#` mean nothing on stdin.
    """
    return as_text(prompt, ("/",)).encode(errors="replace")


def _directory(subpath: str | None) -> str:
    return str(PurePosixPath(WORKSPACE, subpath or "."))


def _instruction_directories(directory: str) -> Iterator[str]:
    """The workspace and each directory down to where the agent starts: every CLAUDE.md on the way counts."""
    inside = PurePosixPath(directory).relative_to(WORKSPACE).parts
    for depth in range(len(inside) + 1):
        yield str(PurePosixPath(WORKSPACE, *inside[:depth]))


def _printing(claude: Claude) -> tuple[str, ...]:
    """What only a run without a person understands."""
    turns = () if claude.max_turns is None else ("--max-turns", str(claude.max_turns))
    return ("--output-format", "stream-json", "--verbose", *turns)


def _options(claude: Claude, directory: str, session: tuple[str, str]) -> tuple[str, ...]:
    # No setting source and `--strict-mcp-config` keep the repository's settings, hooks, skills and MCP servers out, and
    # the home's too: they are obeyed as soon as they are written, so any program inside could send the agent to a
    # model of its own. `--add-dir` (with its variable in the environment) brings CLAUDE.md files and rules back.
    servers = () if claude.mcp_config is None else ("--mcp-config", f"{HOME}/{_MCP_FILE}")
    return (
        *tool_options(claude),
        *("--setting-sources", ""),
        *("--settings", _SETTINGS),
        "--strict-mcp-config",
        *servers,
        *("--add-dir", *_instruction_directories(directory)),
        f"--model={claude.model}",
        *session,
    )


def _environment(task_key: str) -> dict[str, str]:
    proxies = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"), PROXY_URL)
    direct = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost,::1")
    return {
        "PATH": ":".join(_PROGRAM_PATH),
        "HOME": HOME,
        "USER": USER,
        "LOGNAME": USER,
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "TMPDIR": "/tmp",  # noqa: S108  (inside the sandbox, which has a /tmp of its own)
        "NODE_USE_SYSTEM_CA": "1",
        "ANTHROPIC_BASE_URL": MODEL_URL,
        "ANTHROPIC_API_KEY": task_key,
        "MCP_TIMEOUT": str(MCP_CONNECT_SECONDS * 1000),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_ADDITIONAL_DIRECTORIES_CLAUDE_MD": "1",
        **proxies,
        **direct,
    }
