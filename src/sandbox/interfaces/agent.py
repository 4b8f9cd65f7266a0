"""The coding agent: how to start it, how to parse its output and how to interpret its exit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from sandbox.interfaces.gateway import ModelDialect, ModelUpstream
from sandbox.interfaces.runtime import Command, ExitStatus
from sandbox.model.events import ConversationEvent
from sandbox.model.failure import Failure
from sandbox.model.manifest.schema import AgentSchema, Manifest


class AgentLaunchSpec(msgspec.Struct, frozen=True):
    """Everything that a sandbox needs to run the agent.

    programs: as in SandboxSpec.
    git_author: the author name of git commits in the sandbox.
    home_files: contents, keyed by path relative to the home directory; written before the agent starts.
    hold_model_requests: model requests wait until `AgentReady.find_failure` has found no failure.
    model_variables: names of the environment variables that give access to the model; users' shells do not get them.
    """

    command: Command
    session_id: str
    programs: Mapping[Path, str]
    git_author: str
    home_files: Mapping[str, bytes] = {}
    hold_model_requests: bool = False
    model_variables: frozenset[str] = frozenset()


class ParsedToolCallEnd(msgspec.Struct, frozen=True):
    """The end of a tool call, as the agent reports it. The runner records it as `ToolCallEnded`, with the duration."""

    tool_use_id: str
    tool: str
    is_error: bool


class TurnStarted(msgspec.Struct, frozen=True):
    """The model started another response in the main conversation."""


class AgentReady(msgspec.Struct, frozen=True):
    """The agent is initialized and has sent no model request yet. A subclass contains what the agent reported."""

    def find_failure(self, manifest: Manifest, redact: Callable[[str], str]) -> Failure | None:
        """Return the failure if the agent lacks something that the manifest requests, such as a tool; otherwise None.

        redact: the redaction that was already applied to the agent's output.
        """
        return None


class ApiRetry(msgspec.Struct, frozen=True):
    """The agent reported that it is retrying a model request."""

    message: str


AgentEvent = AgentReady | ParsedToolCallEnd | TurnStarted | ApiRetry | ConversationEvent


class AgentOutcome(msgspec.Struct, frozen=True):
    """How the agent's work ended. `failure` is None only for success; `result` is the agent's last result event."""

    result: dict[str, Any] | None
    failure: Failure | None


class OutputParser(Protocol):
    """Parses the agent's stdout. Never raises on sandbox output, which is untrusted."""

    def parse_line(self, line: bytes) -> Sequence[AgentEvent] | None:
        """Return the events in one whole line of stdout; None if the line does not belong to the agent's event stream.

        Texts are bounded by CONVERSATION_TEXT_CHARACTERS_MAX; names and ids are short and printable.
        """
        ...

    def outcome(self, exit_status: ExitStatus, stderr_tail: bytes) -> AgentOutcome:
        """Interpret the exit. Success requires exit code 0 and a last result with `is_error: false`."""
        ...


ConvertLine = Callable[[Manifest, bytes], Sequence[ConversationEvent] | None]
"""Converts a line of the agent's stdout that an earlier version recorded without conversation events.

Returns None if the line does not belong to the agent's event stream, or if other programs may have written it.
"""


class AgentDriver(Protocol):
    """Starts one kind of agent in a runner, and interprets its output and exit."""

    @property
    def gateway_key_prefix(self) -> str:
        """The prefix of the keys that runners create for agents. A gateway accepts only its agent's key."""
        ...

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
        """Return how to start the agent. `secrets` (values keyed by name) become the agent's environment variables.

        resumes: the agent continues the session with this id; the session is in its home directory.
        session: the content of the session with this id, from `read_session`; the agent continues it with the prompt.
        """
        ...

    def has_session(self, home: Path, session_id: str) -> bool:
        """Return whether a home directory (a host path, written by an agent) contains a session that can be resumed."""
        ...

    def read_session(self, home: Path, session_id: str, bytes_max: int) -> bytes | None:
        """Return the session in a home directory (a host path, written by an agent) for another task.

        Returns None if there is no session, if it is larger than `bytes_max`, or if this agent cannot continue a
        session in another sandbox.
        """
        ...

    def create_parser(self, session_id: str) -> OutputParser:
        """Create a parser for the output of one agent run."""
        ...

    def check_interactive_exit(self, exit_status: ExitStatus) -> Failure | None:
        """Return why a terminal session failed, based only on its exit status; None if it succeeded."""
        ...

    def render_output(self, manifest: Manifest, result: Mapping[str, Any] | None) -> bytes:
        """Return the task's stdout, rendered from the last result; empty if the task's stdout is the agent's own."""
        ...


class ManifestTemplate(msgspec.Struct, frozen=True):
    """A complete manifest to start from, as YAML. summary: what it sets.

    The submit form keeps the user's prompt, name, labels and repository, and shows the template's prompt as an example.
    """

    name: str
    summary: str
    text: str


class Agent(AgentSchema, Protocol):
    """One kind of agent: everything that the server, the runner and the command line need to support it.

    An instance holds no resources. Attributes and methods import only what they need.
    """

    @property
    def display_name(self) -> str:
        """The agent's name, for messages."""
        ...

    @property
    def field_summary(self) -> str:
        """The fields of the section that users set most often, separated by commas; for the MCP tools' descriptions."""
        ...

    @property
    def manifest_templates(self) -> Sequence[ManifestTemplate]:
        """Templates of manifests with this agent. The first template has only the required fields."""
        ...

    @property
    def priced_models(self) -> Sequence[str]:
        """Names of models whose prices are known, for suggestions. Other names of these models have a price too."""
        ...

    @property
    def api_key_variable(self) -> str:
        """The server's environment variable that contains the key of the model API, for messages."""
        ...

    @property
    def server_variable_prefix(self) -> str:
        """The prefix of the server's variables for the model API, in upper case. No task can read such variables."""
        ...

    def find_version(self) -> str:
        """Return the version of the agent's program on this host. Raises SandboxError if the program is missing."""
        ...

    def install(self, data_dir: Path) -> Path:
        """Install the agent's program under `data_dir` if needed; return the program's host path. Blocks.

        Raises SandboxError, OSError.
        """
        ...

    def upstream_from_environment(self, environment: Mapping[str, str]) -> ModelUpstream | None:
        """Return the address and key of the model API from the server's environment; None without a key."""
        ...

    def convert_recorded_line(self, manifest: Manifest, line: bytes) -> Sequence[ConversationEvent] | None:
        """Convert a line of output that an earlier version recorded; see `ConvertLine`."""
        ...

    def create_dialect(self) -> ModelDialect:
        """Create the dialect of the agent's model API."""
        ...

    def create_driver(self, program: Path) -> AgentDriver:
        """Create the driver of a runner. program: the path that `install` returned on this host."""
        ...
