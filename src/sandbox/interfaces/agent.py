"""The coding agent: how it is started, what its output means, how it ended."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from sandbox.interfaces.runtime import Command, ExitStatus
from sandbox.model.errors import Failure
from sandbox.model.manifest.schema import Manifest


class AgentLaunchSpec(msgspec.Struct, frozen=True):
    """Everything a sandbox needs to run the agent.

    programs: as in SandboxSpec. home_files: path relative to the home directory to content, written before the start.
    """

    command: Command
    session_id: str
    programs: Mapping[Path, str]
    home_files: Mapping[str, bytes] = {}


class ToolStarted(msgspec.Struct, frozen=True):
    """The agent called a tool."""

    tool_use_id: str
    tool: str


class ToolFinished(msgspec.Struct, frozen=True):
    """A tool answered."""

    tool_use_id: str
    tool: str
    is_error: bool


class TurnStarted(msgspec.Struct, frozen=True):
    """The model answered once more in the main conversation."""


class AgentReady(msgspec.Struct, frozen=True):
    """The agent is set up, before its first model request: its tools, and its MCP servers with how they are."""

    tools: frozenset[str]
    mcp_servers: Mapping[str, str]


class ApiRetry(msgspec.Struct, frozen=True):
    """The agent says that it tries a model request again."""

    message: str


AgentEvent = AgentReady | ToolStarted | ToolFinished | TurnStarted | ApiRetry


class AgentOutcome(msgspec.Struct, frozen=True):
    """How the agent's work ended; `failure` is None only for success. `result` is its last result event."""

    result: dict[str, Any] | None
    failure: Failure | None


class OutputParser(Protocol):
    """Reads the agent's stdout. Never raises on what comes out of a sandbox."""

    def parse_line(self, line: bytes) -> Sequence[AgentEvent]:
        """What one whole line of stdout tells."""
        ...

    def outcome(self, exit_: ExitStatus, stderr_tail: bytes) -> AgentOutcome:
        """Judge the end: success only for exit 0 and a last result with `is_error: false`."""
        ...


class AgentDriver(Protocol):
    """Claude Code."""

    def prepare(
        self,
        manifest: Manifest,
        *,
        session_id: str,
        task_key: str,
        secrets: Mapping[str, str],
        resumes: bool = False,
    ) -> AgentLaunchSpec:
        """Command, environment and files. `secrets` (name to value) become environment variables of the agent.

        resumes: it goes on in the session of this id, which its home keeps.
        """
        ...

    def has_session(self, home: Path, session_id: str) -> bool:
        """Whether a home (a host path, as an agent left it) keeps a session to go on in."""
        ...

    def create_parser(self, session_id: str) -> OutputParser:
        """A reader for one run."""
        ...

    def check_ready(self, manifest: Manifest, began: AgentReady, redact: Callable[[str], str]) -> Failure | None:
        """Whether the agent has the tools and MCP servers that were asked for; why not, if not.

        redact: what has been done to the names in `began`.
        """
        ...

    def check_session_exit(self, exit_: ExitStatus) -> Failure | None:
        """Whether a session on a terminal ended well, which its process alone tells; why not, if not."""
        ...

    def render_output(self, manifest: Manifest, result: Mapping[str, Any] | None) -> bytes:
        """What the task's stdout is, made from the last result, where `output_format` is not `stream-json`."""
        ...
