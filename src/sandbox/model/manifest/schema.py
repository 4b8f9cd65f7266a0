"""The manifest schema: records of a validated manifest.

`manifest.parser` reads types, bounds and `Format` annotations from these records. The string below a field describes it
in `openapi.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Le, Len, MaxLen

from sandbox.model.limits import LABELS_MAX
from sandbox.model.manifest.field_formats import (
    ALLOWED_HOST,
    BRANCH,
    BYTE_SIZE,
    COMMIT,
    DURATION,
    ENVIRONMENT_NAME,
    GIT_PATCH,
    LABEL_KEY,
    PATTERN,
    PROMPT,
    REPOSITORY_URL,
    SUBPATH,
    TASK_ID,
    VISIBLE,
    parse_byte_size,
    parse_duration,
)

_FORBID_EXTRA = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Name, id and labels of the task."""

    __pydantic_config__ = _FORBID_EXTRA
    name: Annotated[str, Len(1, 256), VISIBLE]
    """Name, shown in lists."""
    id: Annotated[str, TASK_ID] = ""
    """Id of the task. Empty: the server generates one. `stream` is reserved; `..` is not allowed."""
    labels: Annotated[
        dict[Annotated[str, Len(1, 256), LABEL_KEY], Annotated[str, MaxLen(1024), VISIBLE]], MaxLen(LABELS_MAX)
    ] = field(default_factory=dict)
    """Labels to select tasks by."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """The repository to clone into the workspace."""

    __pydantic_config__ = _FORBID_EXTRA
    url: Annotated[str, REPOSITORY_URL]
    """URL of the git repository, without credentials."""
    branch: Annotated[str, BRANCH]
    """Branch to clone; a valid git branch name."""
    commit: Annotated[str, COMMIT] | None = None
    """Commit in the history of the branch; the branch's newest one if absent."""
    subpath: Annotated[str, SUBPATH] | None = None
    """Directory in which the agent starts, relative to the repository, without `..`."""
    patch: Annotated[str, GIT_PATCH] | None = None
    """Base64 of a patch (`git diff --binary`) that is applied to the commit before the agent starts."""


@dataclass(frozen=True, kw_only=True)
class McpServer:
    """One MCP server: a command to run inside the sandbox, or a URL to reach."""

    __pydantic_config__ = _FORBID_EXTRA
    type: Literal["stdio", "http", "sse"] | None = None
    """`stdio` with a command, `http` (the default) or `sse` with a URL."""
    command: str | None = None
    """Program inside the sandbox."""
    args: tuple[str, ...] = ()
    """Arguments of the program. `${NAME}` is replaced by the secret of that name."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the program."""
    url: str | None = None
    """URL of a server."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of requests to the URL."""


@dataclass(frozen=True, kw_only=True)
class McpConfig:
    """The MCP servers of the agent, by name."""

    __pydantic_config__ = _FORBID_EXTRA
    mcpServers: dict[str, McpServer]  # noqa: N815  (the name that Claude Code's own files use)
    """Servers by name."""


@dataclass(frozen=True, kw_only=True)
class Claude:
    """Prompt and settings of Claude Code."""

    __pydantic_config__ = _FORBID_EXTRA
    prompt: Annotated[str, PROMPT]
    """What the agent has to do."""
    headless: bool = True
    """False: an interactive session."""
    skip_permissions: bool = True
    """False: the agent may not do anything that needs permission."""
    output_format: Literal["stream-json", "json", "text"] = "stream-json"
    """What stdout is: all events, the last result as JSON, or the text of the last result."""
    model: Annotated[str, Len(1, 256), VISIBLE] = "claude-sonnet-4-5-20250929"
    """Model that the server's API supports."""
    allowed_tools: Annotated[tuple[Annotated[str, Len(1, 256), VISIBLE], ...], MaxLen(256)] | None = None
    """Tools and rules that the agent may use. Absent: all. Empty: none."""
    mcp_config: McpConfig | None = None
    """MCP servers of the agent."""
    max_turns: Annotated[int, Ge(1), Le(1_000_000)] | None = None
    """Maximum number of the model's turns."""


@dataclass(frozen=True, kw_only=True)
class Vm:
    """Profile, resources and network access of the sandbox."""

    __pydantic_config__ = _FORBID_EXTRA
    profile: Annotated[str, Len(1, 64), VISIBLE] = "agentic-dev"
    """Profile that the server offers."""
    cpus: Annotated[int, Ge(1), Le(4096)] = 4
    """Number of CPUs."""
    memory: Annotated[str, BYTE_SIZE] = "8G"
    """Memory, such as `8G`."""
    disk: Annotated[str, BYTE_SIZE] = "40G"
    """Disk space of workspace, home and /tmp together, such as `40G`."""
    network_mode: Literal["isolated", "outbound", "full"] = "isolated"
    """`isolated`: the model only. `outbound`: also `allowed_hosts`. `full`: any public name."""
    allowed_hosts: Annotated[tuple[Annotated[str, ALLOWED_HOST], ...], MaxLen(256)] = ()
    """Host names, or `*.` and a domain, with an optional `:port`; only with `outbound`."""

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes."""
        return parse_byte_size(self.memory)

    @property
    def disk_bytes(self) -> int:
        """Disk in bytes."""
        return parse_byte_size(self.disk)


@dataclass(frozen=True, kw_only=True)
class Secret:
    """An environment variable of the agent, and the source of its value."""

    __pydantic_config__ = _FORBID_EXTRA
    name: Annotated[str, ENVIRONMENT_NAME]
    """Name of the environment variable."""
    source: Literal["env", "file", "vault"]
    """Where the server reads the value."""
    key: Annotated[str, Len(1, 1024), VISIBLE]
    """Name of the value in its source."""


@dataclass(frozen=True, kw_only=True)
class Lifecycle:
    """Timeouts, budgets, retries, and what to keep."""

    __pydantic_config__ = _FORBID_EXTRA
    timeout: Annotated[str, DURATION] = "24h"
    """How long the agent may run, in all attempts together, such as `90s`, `15m` or `24h`."""
    failure_action: Literal["destroy", "preserve"] = "destroy"
    """Whether the files of a failed task's sandbox are kept."""
    artifact_patterns: Annotated[tuple[Annotated[str, PATTERN], ...], MaxLen(256)] = ()
    """Globs of files to keep, relative to the workspace."""
    stage_timeout: Annotated[str, DURATION] = "15m"
    """Time limit for cloning."""
    provision_timeout: Annotated[str, DURATION] = "10m"
    """Time limit for creating the sandbox."""
    hang_timeout: Annotated[str, DURATION] = "30m"
    """How long the agent may be silent with no model request in flight."""
    collect_timeout: Annotated[str, DURATION] = "10m"
    """Time limit for collecting artifacts."""
    budget_usd: Annotated[float, Ge(0), Le(1_000_000)] | None = None
    """Maximum cost of all attempts together, in USD; only with a model whose price is known."""
    budget_tokens: Annotated[int, Ge(1), Le(10**15)] | None = None
    """Maximum number of tokens of all attempts together."""
    retries: Annotated[int, Ge(0), Le(100)] = 0
    """How many times a failed agent is run again from a fresh workspace."""
    resume: bool = False
    """Whether an agent that was lost with its machine continues its session."""

    @property
    def timeout_seconds(self) -> int:
        """Time limit for the agent, in seconds."""
        return parse_duration(self.timeout)

    @property
    def stage_timeout_seconds(self) -> int:
        """Time limit for cloning, in seconds."""
        return parse_duration(self.stage_timeout)

    @property
    def provision_timeout_seconds(self) -> int:
        """Time limit for creating the sandbox, in seconds."""
        return parse_duration(self.provision_timeout)

    @property
    def hang_timeout_seconds(self) -> int:
        """How long the agent may be silent with no model request in flight, in seconds."""
        return parse_duration(self.hang_timeout)

    @property
    def collect_timeout_seconds(self) -> int:
        """Time limit for collecting artifacts, in seconds."""
        return parse_duration(self.collect_timeout)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One task as submitted, with the defaults filled in."""

    __pydantic_config__ = _FORBID_EXTRA
    version: Literal["1"]
    """Version of this schema."""
    kind: Literal["Task"]
    """Always `Task`."""
    metadata: Metadata
    """Name, id and labels."""
    repository: Repository
    """The repository to work on."""
    claude: Claude
    """Prompt and settings of Claude Code."""
    vm: Vm = field(default_factory=Vm)
    """Profile, resources and network access of the sandbox."""
    secrets: Annotated[tuple[Secret, ...], MaxLen(64)] = ()
    """Environment variables of the agent with secret values."""
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    """Timeouts, budgets, retries, and what to keep."""
