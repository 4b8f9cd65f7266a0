"""Claude Code as the agent: its command line, its environment, its files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sandbox.agent.conversation import ClaudeConversation
from sandbox.contracts.agent import AgentStart
from sandbox.contracts.inside import HOME, MODEL_PORT, NODE, PROXY_PORT, USER, WORKSPACE
from sandbox.contracts.runtime import Command
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
_TEXT_MARK = "Task:\n"


class ClaudeCode:
    """Starts the binary at `binary` (a host path, see `install_binary`) and reads what it says."""

    def __init__(self, binary: Path) -> None:
        self._binary = binary

    def prepare(self, manifest: Manifest, *, session_id: str, task_key: str, workspace: Path) -> AgentStart:
        """Command and environment. Nothing is read from `workspace`: the agent itself reads CLAUDE.md, inside."""
        directory = _directory(manifest.repository.subpath)
        command = Command(
            argv=_arguments(manifest.claude, session_id, directory),
            environment=_environment(task_key),
            directory=directory,
            stdin=prompt_bytes(manifest.claude.prompt),
        )
        return AgentStart(command, session_id, programs={self._binary: PROGRAM})

    def conversation(self, session_id: str) -> ClaudeConversation:
        """A reader for one run."""
        return ClaudeConversation(session_id)


def prompt_bytes(prompt: str) -> bytes:
    """The prompt for stdin, such that Claude Code takes it as text.

    It obeys `/clear`, `/init` and others when they come first. Words in front are safe where white space is safe
    only as long as nobody trims it. Leading `-`, `!` and `#` mean nothing on stdin.
    """
    framed = _TEXT_MARK + prompt if prompt.lstrip().startswith("/") else prompt
    return framed.encode(errors="replace")


def _directory(subpath: str | None) -> str:
    return str(PurePosixPath(WORKSPACE, subpath or "."))


def _instruction_directories(directory: str) -> Iterator[str]:
    """The workspace and each directory down to where the agent starts: every CLAUDE.md on the way counts."""
    inside = PurePosixPath(directory).relative_to(WORKSPACE).parts
    for depth in range(len(inside) + 1):
        yield str(PurePosixPath(WORKSPACE, *inside[:depth]))


def _arguments(claude: Claude, session_id: str, directory: str) -> tuple[str, ...]:
    # No setting source and `--strict-mcp-config` keep the repository's settings, hooks, skills and MCP servers out, and
    # the home's too: they are obeyed as soon as they are written, so any program inside could send the agent to a
    # model of its own. `--add-dir` (with its variable in the environment) brings CLAUDE.md files and rules back.
    turns = () if claude.max_turns is None else ("--max-turns", str(claude.max_turns))
    return (
        PROGRAM,
        "-p",
        *("--output-format", "stream-json", "--verbose"),
        "--dangerously-skip-permissions",
        *("--setting-sources", ""),
        "--strict-mcp-config",
        *("--add-dir", *_instruction_directories(directory)),
        f"--model={claude.model}",
        *turns,
        *("--session-id", session_id),
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
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_ADDITIONAL_DIRECTORIES_CLAUDE_MD": "1",
        **proxies,
        **direct,
    }
