"""Claude Code as an agent: its command line, environment, files and session files.

The home directory, which contains the session files, is untrusted.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from sandbox.agents.claude_code.allowed_tools import needs_ready_check, tool_options
from sandbox.agents.claude_code.manifest_section import DISPLAY_NAME, Claude, McpConfig, McpServer, claude_section
from sandbox.agents.claude_code.output_parser import ClaudeOutputParser, determine_interactive_failure
from sandbox.interfaces.agent import AgentLaunchSpec
from sandbox.interfaces.gateway import MODEL_PORT, PROXY_PORT
from sandbox.interfaces.runtime import (
    NODE_DIRECTORY,
    SANDBOX_HOME,
    SANDBOX_USER,
    SANDBOX_WORKSPACE,
    Command,
    ExitStatus,
)
from sandbox.model.failure import Failure
from sandbox.model.manifest.schema import Manifest
from sandbox.primitives.files import open_granting_access

PROJECTS_SCANNED_MAX = 1000
"""Maximum number of project directories to search. Claude Code creates one per start directory; agents may add more."""

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def session_file(directory: str, session_id: str) -> str:
    """Return the path of a session's file under the home directory. directory: where Claude Code starts."""
    return f".claude/projects/{re.sub('[^A-Za-z0-9]', '-', directory)}/{session_id}.jsonl"


def has_session_file(home: Path, session_id: str) -> bool:
    """Return whether the session's file exists and is regular. Opens only directories, and does not follow links."""
    try:
        with _open_projects(home) as projects:
            return any(_has_file(projects, name, f"{session_id}.jsonl") for name in _project_names(projects))
    except OSError:
        return False


def read_session_file(home: Path, session_id: str, bytes_max: int) -> bytes | None:
    """Return the content of the session's file; None if it is missing, empty or larger than `bytes_max`.

    Does not follow links. The file may be any regular file that the agent put there.
    """
    try:
        with _open_projects(home) as projects:
            for name in sorted(_project_names(projects)):
                if _has_file(projects, name, f"{session_id}.jsonl"):
                    return _read_bounded(projects, name, f"{session_id}.jsonl", bytes_max)
    except OSError:
        pass
    return None


def _read_bounded(projects: int, project: str, name: str, bytes_max: int) -> bytes | None:
    with _open_directory(project, projects) as directory:
        descriptor = open_granting_access(name, _FILE_FLAGS, directory)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            content = file.read(bytes_max + 1)
    return content if 0 < len(content) <= bytes_max else None


@contextmanager
def _open_projects(home: Path) -> Iterator[int]:
    with (
        _open_directory(str(home)) as top,
        _open_directory(".claude", top) as settings,
        _open_directory("projects", settings) as projects,
    ):
        yield projects


def _project_names(projects: int) -> list[str]:
    with os.scandir(projects) as entries:
        return [entry.name for entry in islice(entries, PROJECTS_SCANNED_MAX)]


def _has_file(projects: int, project: str, name: str) -> bool:
    try:
        with _open_directory(project, projects) as directory:
            return stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except OSError:
        return False


@contextmanager
def _open_directory(name: str, parent: int | None = None) -> Iterator[int]:
    directory = open_granting_access(name, _DIRECTORY_FLAGS, parent)
    try:
        yield directory
    finally:
        os.close(directory)


PLAIN_TEXT_PREFIX = "Task:\n"
"""Prefix for a prompt that would otherwise be interpreted as a command."""

_LEADING_WHITE_SPACE = re.compile(r"[\s\ufeff]*")
"""The characters that JavaScript trims. They include the byte order mark, which is not white space in Python."""


def escape_commands(prompt: str, command_prefixes: tuple[str, ...]) -> str:
    """Prepend PLAIN_TEXT_PREFIX to a prompt that starts with a command prefix. Leading white space is ignored."""
    begin = _LEADING_WHITE_SPACE.match(prompt)
    return PLAIN_TEXT_PREFIX + prompt if begin and prompt.startswith(command_prefixes, begin.end()) else prompt


PROMPT_FILE = ".sandbox/prompt.md"

_ARGUMENT_BYTES_MAX = 100 * 1024
"""Maximum size of a prompt that is passed as an argument, not in a file. The kernel's limit is 128 KiB."""

_KEY_SUFFIX_LENGTH = 20
_PERMISSION_MODES = {"dontAsk": "default"}
_COMMAND_PREFIXES = ("/", "!", "#", "@")


def interactive_arguments(options: tuple[str, ...], prompt: str) -> tuple[str, ...]:
    """Return the arguments of an interactive session.

    options: the options of a headless run. `dontAsk` is replaced, because Claude Code can ask the user in a terminal.
    """
    return (*(_PERMISSION_MODES.get(option, option) for option in options), "--", _initial_prompt(prompt))


def interactive_files(prompt: str, gateway_key: str, directory: str) -> Mapping[str, bytes]:
    """Return files in the home directory that suppress Claude Code's first-run questions (setup, API key, trust)."""
    settings = {
        "hasCompletedOnboarding": True,
        "theme": "dark",
        "customApiKeyResponses": {"approved": [gateway_key[-_KEY_SUFFIX_LENGTH:]], "rejected": []},
        "bypassPermissionsModeAccepted": True,
        "projects": {directory: {"hasTrustDialogAccepted": True}},
    }
    files = {".claude.json": msgspec.json.encode(settings)}
    if _exceeds_argument_limit(prompt):
        files[PROMPT_FILE] = prompt.encode(errors="replace")
    return files


def interactive_variables() -> Mapping[str, str]:
    """Return the additional environment variables for interactive sessions."""
    return {
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
        "CLAUDE_CODE_DISABLE_OFFICIAL_MARKETPLACE_AUTOINSTALL": "1",
    }


def _initial_prompt(prompt: str) -> str:
    """Return the prompt in a form that Claude Code does not interpret as a command."""
    if _exceeds_argument_limit(prompt):
        return f"Your task is in the file {SANDBOX_HOME}/{PROMPT_FILE}. Read the whole file and carry out the task."
    return escape_commands(prompt.replace("\0", "\ufffd"), _COMMAND_PREFIXES)


def _exceeds_argument_limit(prompt: str) -> bool:
    return len(prompt.encode(errors="replace")) > _ARGUMENT_BYTES_MAX


MCP_CONNECT_TIMEOUT_SECONDS = 60
"""How long Claude Code waits for MCP servers to connect.

On a busy machine, a first `npx` run takes longer than the default of 30 s.
"""


def encode_mcp_config(config: McpConfig) -> bytes:
    """Encode the file for `--mcp-config`. Claude Code expands `${NAME}` in this file from environment variables."""
    servers = {name: _server_entry(server) for name, server in config.mcpServers.items()}
    return msgspec.json.encode({"mcpServers": servers})


def _server_entry(server: McpServer) -> dict[str, Any]:
    if server.url is not None:
        # Claude Code silently ignores an MCP server that has a URL but no type.
        return {"type": server.type or "http", "url": server.url, "headers": server.headers}
    return {"type": "stdio", "command": server.command, "args": server.args, "env": server.env}


def render_result(output_format: str, result: Mapping[str, Any] | None) -> bytes:
    """Render the result as one line of JSON (`json`) or as plain text (`text`); return "" for any other format."""
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
    """Return Claude Code's final text. If Claude Code was stopped, the reason is in `errors`."""
    errors = result.get("errors")
    texts = [result.get("result"), *(errors if isinstance(errors, list) else ())]
    words = next((text for text in texts if isinstance(text, str)), None)
    return b"" if words is None else words.encode(errors="replace") + b"\n"


PROGRAM = "/run/sandbox/bin/claude"
MODEL_URL = f"http://127.0.0.1:{MODEL_PORT}"
PROXY_URL = f"http://127.0.0.1:{PROXY_PORT}"

_PATH_DIRECTORIES = (
    str(PurePosixPath(PROGRAM).parent),
    f"{SANDBOX_HOME}/.local/bin",
    f"{NODE_DIRECTORY}/bin",
    *("/usr/local/bin", "/usr/bin", "/bin", "/usr/local/sbin", "/usr/sbin", "/sbin"),
)
_MCP_FILE = ".sandbox/mcp.json"

RESUME_PROMPT = (
    b"You were interrupted: the machine lost your sandbox, and every process in it ended. The files of the workspace "
    b"have not changed since then, but your last action may be incomplete. Check the current state, and continue."
)
"""Prompt for an agent that resumes its session."""

_SETTINGS = '{"skipWebFetchPreflight":true,"skipDangerousModePermissionPrompt":true}'
"""Claude Code's settings for a sandbox.

The gateway decides which hosts are allowed, so WebFetch does not query an Anthropic service about each host. The
manifest decides whether permission checks are skipped, so Claude Code does not ask for confirmation.
"""


class ClaudeCodeDriver:
    """Prepares Claude Code's command and files for a sandbox, and reads what a run left behind.

    binary: the program's path on the host; see `install_binary`.
    """

    gateway_key_prefix = "sk-ant-sandbox-"

    def __init__(self, binary: Path) -> None:
        self._binary = binary

    def prepare(
        self,
        manifest: Manifest,
        *,
        session_id: str,
        gateway_key: str,
        secrets: Mapping[str, str],
        resumes: bool = False,
        session: bytes | None = None,
    ) -> AgentLaunchSpec:
        """Build the agent's command, environment and files.

        secrets: environment variables for the agent and for all programs that it starts.

        The repository is not read: the agent reads CLAUDE.md itself, inside the sandbox. resumes, session: see
        `AgentDriver.prepare`.
        """
        claude = claude_section(manifest)
        directory = _working_directory(manifest.repository.subpath)
        has_session = resumes or session is not None
        options = _common_options(
            claude, directory, session=("--resume" if has_session else "--session-id", session_id)
        )
        environment = {**secrets, **_environment(gateway_key)}
        # Pass the MCP configuration in a file: the configuration may exceed the size limit of an argument, and every
        # user of the host can read the arguments of a process.
        files = {_MCP_FILE: encode_mcp_config(claude.mcp_config)} if claude.mcp_config is not None else {}
        if session is not None:
            files[session_file(directory, session_id)] = session
        if claude.headless:
            argv = (PROGRAM, "-p", *_headless_options(claude), *options)
            command = Command(argv, environment, directory, RESUME_PROMPT if resumes else encode_prompt(claude.prompt))
        else:
            argv = (PROGRAM, *interactive_arguments(options, claude.prompt))
            command = Command(argv, {**environment, **interactive_variables()}, directory)
            files |= interactive_files(claude.prompt, gateway_key, directory)
        return AgentLaunchSpec(
            command,
            session_id,
            programs={self._binary: PROGRAM},
            git_author=f"{DISPLAY_NAME} (Sandbox)",
            home_files=files,
            hold_model_requests=claude.headless and needs_ready_check(claude),
            model_variables=frozenset({"ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY"}),
        )

    def has_session(self, home: Path, session_id: str) -> bool:
        """Return whether the session's file exists. The home directory is untrusted."""
        return has_session_file(home, session_id)

    def read_session(self, home: Path, session_id: str, bytes_max: int) -> bytes | None:
        """Return the content of the session's file. The home directory is untrusted."""
        return read_session_file(home, session_id, bytes_max)

    def create_parser(self, session_id: str) -> ClaudeOutputParser:
        """Return an output parser for one run."""
        return ClaudeOutputParser(session_id)

    def check_interactive_exit(self, exit_status: ExitStatus) -> Failure | None:
        """Return why a terminal session failed, based only on its exit status; None if it succeeded."""
        return determine_interactive_failure(exit_status)

    def render_output(self, manifest: Manifest, result: Mapping[str, Any] | None) -> bytes:
        """Return the task's stdout, rendered from the last result; empty if `output_format` is `stream-json`."""
        return render_result(manifest.agent.output_format, result)


def encode_prompt(prompt: str) -> bytes:
    """Encode the prompt for stdin so that Claude Code does not interpret it as a command.

    Claude Code executes `/clear`, `/init` and other commands at the start of a prompt. PLAIN_TEXT_PREFIX
    consists of letters, because Claude Code might trim leading white space. Leading `-`, `!` and `#` have no special
    meaning on stdin.
    """
    return escape_commands(prompt, ("/",)).encode(errors="replace")


def _working_directory(subpath: str | None) -> str:
    return str(PurePosixPath(SANDBOX_WORKSPACE, subpath or "."))


def _instruction_directories(directory: str) -> Iterator[str]:
    """Yield the directories whose CLAUDE.md files apply, from the workspace down to the start directory."""
    inside = PurePosixPath(directory).relative_to(SANDBOX_WORKSPACE).parts
    for depth in range(len(inside) + 1):
        yield str(PurePosixPath(SANDBOX_WORKSPACE, *inside[:depth]))


def _headless_options(claude: Claude) -> tuple[str, ...]:
    """Return the additional options for headless runs."""
    turns = () if claude.max_turns is None else ("--max-turns", str(claude.max_turns))
    return ("--output-format", "stream-json", "--verbose", *turns)


def _common_options(claude: Claude, directory: str, session: tuple[str, str]) -> tuple[str, ...]:
    # `--strict-mcp-config` and an empty `--setting-sources` disable the settings, hooks, skills and MCP servers of the
    # repository and of the home directory. Otherwise, any program in the sandbox could write such settings to redirect
    # the agent to another model. `--add-dir`, together with CLAUDE_CODE_ADDITIONAL_DIRECTORIES_CLAUDE_MD, enables
    # CLAUDE.md files and rules.
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


def _environment(gateway_key: str) -> dict[str, str]:
    proxies = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"), PROXY_URL)
    direct = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost,::1")
    return {
        "PATH": ":".join(_PATH_DIRECTORIES),
        "HOME": SANDBOX_HOME,
        "USER": SANDBOX_USER,
        "LOGNAME": SANDBOX_USER,
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "TMPDIR": "/tmp",  # noqa: S108  (inside the sandbox, which has a separate /tmp)
        "NODE_USE_SYSTEM_CA": "1",
        "ANTHROPIC_BASE_URL": MODEL_URL,
        "ANTHROPIC_API_KEY": gateway_key,
        "MCP_TIMEOUT": str(MCP_CONNECT_TIMEOUT_SECONDS * 1000),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_ADDITIONAL_DIRECTORIES_CLAUDE_MD": "1",
        **proxies,
        **direct,
    }
