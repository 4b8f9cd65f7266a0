"""Claude Code as the agent: its command line, its environment, its files."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from sandbox.agents.claude_code.outcome import check_init, determine_session_failure
from sandbox.agents.claude_code.output_parser import ClaudeOutputParser
from sandbox.agents.claude_code.tools import tool_options
from sandbox.interfaces.agent import AgentLaunchSpec, AgentReady
from sandbox.interfaces.layout import (
    MODEL_PORT,
    NODE_DIRECTORY,
    PROXY_PORT,
    SANDBOX_HOME,
    SANDBOX_USER,
    SANDBOX_WORKSPACE,
)
from sandbox.interfaces.runtime import Command, ExitStatus
from sandbox.model.errors import Failure
from sandbox.model.manifest.schema import Claude, Manifest, McpConfig, McpServer
from sandbox.system.files import open_restricted

PLAIN_TEXT_PREFIX = "Task:\n"
"""Before a prompt that would be taken for a command."""

_LEADING_WHITE_SPACE = re.compile(r"[\s\ufeff]*")
"""What JavaScript trims: a byte order mark, too, which is no white space to Python."""


def escape_commands(prompt: str, command_prefixes: tuple[str, ...]) -> str:
    """The prompt, with words in front where one of the marks comes first, or would as soon as somebody trims it."""
    begin = _LEADING_WHITE_SPACE.match(prompt)
    return PLAIN_TEXT_PREFIX + prompt if begin and prompt.startswith(command_prefixes, begin.end()) else prompt


PROMPT_FILE = ".sandbox/prompt.md"

_ARGUMENT_BYTES_MAX = 100 * 1024
"""A prompt over it goes through a file: the kernel takes no argument of more than 128 KiB."""

_KEY_SUFFIX_CHARACTERS = 20
_PERMISSION_MODES = {"dontAsk": "default"}
_COMMAND_PREFIXES = ("/", "!", "#", "@")


def interactive_arguments(options: tuple[str, ...], prompt: str) -> tuple[str, ...]:
    """What follows the program's name. `options`: those of a run without a person, where nobody could be asked."""
    return (*(_PERMISSION_MODES.get(option, option) for option in options), "--", _initial_prompt(prompt))


def interactive_files(prompt: str, task_key: str, directory: str) -> Mapping[str, bytes]:
    """Files of the home: the answers to what Claude Code asks when it meets a home, a key or a folder first."""
    answers = {
        "hasCompletedOnboarding": True,
        "theme": "dark",
        "customApiKeyResponses": {"approved": [task_key[-_KEY_SUFFIX_CHARACTERS:]], "rejected": []},
        "bypassPermissionsModeAccepted": True,
        "projects": {directory: {"hasTrustDialogAccepted": True}},
    }
    files = {".claude.json": msgspec.json.encode(answers)}
    if _exceeds_argument_limit(prompt):
        files[PROMPT_FILE] = prompt.encode(errors="replace")
    return files


def interactive_variables() -> Mapping[str, str]:
    """Beside those of every agent."""
    return {
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
        "CLAUDE_CODE_DISABLE_OFFICIAL_MARKETPLACE_AUTOINSTALL": "1",
    }


def _initial_prompt(prompt: str) -> str:
    """The prompt as text: what begins with a mark would be a command to Claude Code."""
    if _exceeds_argument_limit(prompt):
        return f"Your task is in the file {SANDBOX_HOME}/{PROMPT_FILE}. Read it whole and carry it out."
    return escape_commands(prompt.replace("\0", "\ufffd"), _COMMAND_PREFIXES)


def _exceeds_argument_limit(prompt: str) -> bool:
    return len(prompt.encode(errors="replace")) > _ARGUMENT_BYTES_MAX


MCP_CONNECT_SECONDS = 60
"""How long Claude Code waits for its MCP servers; a cold `npx` on a busy machine needs more than its own 30 s."""


def encode_mcp_config(config: McpConfig) -> bytes:
    """The file for `--mcp-config`. `${NAME}` stays as it is: Claude Code expands it from its environment, inside."""
    servers = {name: _server_entry(server) for name, server in config.mcpServers.items()}
    return msgspec.json.encode({"mcpServers": servers})


def _server_entry(server: McpServer) -> dict[str, Any]:
    if server.url is not None:
        # Claude Code leaves out, without a word, a server that has a url and no type.
        return {"type": server.type or "http", "url": server.url, "headers": server.headers}
    return {"type": "stdio", "command": server.command, "args": server.args, "env": server.env}


PROJECTS_SCANNED_MAX = 1000
"""Claude Code keeps a directory for each place that it was started in; an agent can make any number of them."""

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def has_transcript(home: Path, session_id: str) -> bool:
    """Whether its transcript is there as a regular file: names are looked at, nothing is read and no link followed."""
    try:
        with (
            _open_directory(str(home)) as top,
            _open_directory(".claude", top) as settings,
            _open_directory("projects", settings) as projects,
        ):
            with os.scandir(projects) as entries:
                names = [entry.name for entry in islice(entries, PROJECTS_SCANNED_MAX)]
            return any(_has_file(projects, name, f"{session_id}.jsonl") for name in names)
    except OSError:
        return False


def _has_file(projects: int, project: str, name: str) -> bool:
    try:
        with _open_directory(project, projects) as directory:
            return stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except OSError:
        return False


@contextmanager
def _open_directory(name: str, parent: int | None = None) -> Iterator[int]:
    directory = open_restricted(name, _DIRECTORY_FLAGS, parent)
    try:
        yield directory
    finally:
        os.close(directory)


def render_result(output_format: str, result: Mapping[str, Any] | None) -> bytes:
    """`json`: the result on one line; `text`: its words and a newline; else, and without a result, nothing."""
    if result is None:
        return b""
    match output_format:
        case "json":
            return msgspec.json.encode(result) + b"\n"
        case "text":
            return _result_text(result)
        case _:
            return b""


def _result_text(result: Mapping[str, Any]) -> bytes:
    """What Claude Code says at the end; where it was stopped, the reason stands in `errors`."""
    errors = result.get("errors")
    texts = [result.get("result"), *(errors if isinstance(errors, list) else ())]
    words = next((text for text in texts if isinstance(text, str)), None)
    return b"" if words is None else words.encode(errors="replace") + b"\n"


PROGRAM = "/run/sandbox/bin/claude"
MODEL_URL = f"http://127.0.0.1:{MODEL_PORT}"
PROXY_URL = f"http://127.0.0.1:{PROXY_PORT}"

_PROGRAM_PATH = (
    str(PurePosixPath(PROGRAM).parent),
    f"{SANDBOX_HOME}/.local/bin",
    f"{NODE_DIRECTORY}/bin",
    *("/usr/local/bin", "/usr/bin", "/bin", "/usr/local/sbin", "/usr/sbin", "/sbin"),
)
_MCP_FILE = ".sandbox/mcp.json"

RESUME_PROMPT = (
    b"You were interrupted: the machine lost your sandbox, and every process in it ended. The files of the workspace "
    b"are as they were then; whatever you did last may be half done. Look at where you are, and go on with the task."
)
"""What an agent is told that goes on in its session."""

_SETTINGS = '{"skipWebFetchPreflight":true,"skipDangerousModePermissionPrompt":true}'
"""WebFetch would ask Anthropic's own host about every other one first; here the gateway says what is reached. And
nobody is asked whether skipping permissions is meant: the manifest says so."""


class ClaudeCodeDriver:
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
    ) -> AgentLaunchSpec:
        """Command, environment and files. `secrets` become variables of the agent, and of all that it starts.

        The repository is not looked at: the agent itself reads CLAUDE.md, inside. resumes: see `Agent.prepare`.
        """
        claude = manifest.claude
        directory = _working_directory(manifest.repository.subpath)
        options = _common_options(claude, directory, session=("--resume" if resumes else "--session-id", session_id))
        environment = {**secrets, **_environment(task_key)}
        # A file: the configuration may be larger than an argument, and arguments are read by everybody on the host.
        files = {_MCP_FILE: encode_mcp_config(claude.mcp_config)} if claude.mcp_config is not None else {}
        if claude.headless:
            argv = (PROGRAM, "-p", *_headless_options(claude), *options)
            command = Command(argv, environment, directory, RESUME_PROMPT if resumes else encode_prompt(claude.prompt))
        else:
            argv = (PROGRAM, *interactive_arguments(options, claude.prompt))
            command = Command(argv, {**environment, **interactive_variables()}, directory)
            files |= interactive_files(claude.prompt, task_key, directory)
        return AgentLaunchSpec(command, session_id, programs={self._binary: PROGRAM}, home_files=files)

    def has_session(self, home: Path, session_id: str) -> bool:
        """Whether Claude Code's own transcript is there. The home is not trusted."""
        return has_transcript(home, session_id)

    def create_parser(self, session_id: str) -> ClaudeOutputParser:
        """A reader for one run."""
        return ClaudeOutputParser(session_id)

    def check_ready(self, manifest: Manifest, began: AgentReady, redact: Callable[[str], str]) -> Failure | None:
        """Whether the agent has the tools and MCP servers that were asked for; why not, if not."""
        return check_init(manifest.claude, began, redact)

    def check_session_exit(self, exit_: ExitStatus) -> Failure | None:
        """Whether a session on a terminal ended well, which its process alone tells; why not, if not."""
        return determine_session_failure(exit_)

    def render_output(self, manifest: Manifest, result: Mapping[str, Any] | None) -> bytes:
        """What the task's stdout is, made from the last result, where `output_format` is not `stream-json`."""
        return render_result(manifest.claude.output_format, result)


def encode_prompt(prompt: str) -> bytes:
    """The prompt for stdin, such that Claude Code takes it as text.

    It obeys `/clear`, `/init` and others when they come first. Words in front are safe where white space is safe
    only as long as nobody trims it. Leading `-`, `!` and `#` mean nothing on stdin.
    """
    return escape_commands(prompt, ("/",)).encode(errors="replace")


def _working_directory(subpath: str | None) -> str:
    return str(PurePosixPath(SANDBOX_WORKSPACE, subpath or "."))


def _instruction_directories(directory: str) -> Iterator[str]:
    """The workspace and each directory down to where the agent starts: every CLAUDE.md on the way counts."""
    inside = PurePosixPath(directory).relative_to(SANDBOX_WORKSPACE).parts
    for depth in range(len(inside) + 1):
        yield str(PurePosixPath(SANDBOX_WORKSPACE, *inside[:depth]))


def _headless_options(claude: Claude) -> tuple[str, ...]:
    """What only a run without a person understands."""
    turns = () if claude.max_turns is None else ("--max-turns", str(claude.max_turns))
    return ("--output-format", "stream-json", "--verbose", *turns)


def _common_options(claude: Claude, directory: str, session: tuple[str, str]) -> tuple[str, ...]:
    # No setting source and `--strict-mcp-config` keep the repository's settings, hooks, skills and MCP servers out, and
    # the home's too: they are obeyed as soon as they are written, so any program inside could send the agent to a
    # model of its own. `--add-dir` (with its variable in the environment) brings CLAUDE.md files and rules back.
    servers = () if claude.mcp_config is None else ("--mcp-config", f"{SANDBOX_HOME}/{_MCP_FILE}")
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
        "HOME": SANDBOX_HOME,
        "USER": SANDBOX_USER,
        "LOGNAME": SANDBOX_USER,
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
