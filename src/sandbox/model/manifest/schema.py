"""The manifest schema: records of a validated manifest.

`manifest.parser` reads types, bounds and `Format` annotations from these records.
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
    id: Annotated[str, TASK_ID] = ""
    labels: Annotated[
        dict[Annotated[str, Len(1, 256), LABEL_KEY], Annotated[str, MaxLen(1024), VISIBLE]], MaxLen(LABELS_MAX)
    ] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Repository:
    """The repository to clone into the workspace."""

    __pydantic_config__ = _FORBID_EXTRA
    url: Annotated[str, REPOSITORY_URL]
    branch: Annotated[str, BRANCH]
    commit: Annotated[str, COMMIT] | None = None
    subpath: Annotated[str, SUBPATH] | None = None
    patch: Annotated[str, GIT_PATCH] | None = None


@dataclass(frozen=True, kw_only=True)
class McpServer:
    """One MCP server: a command to run inside the sandbox, or a URL to reach."""

    __pydantic_config__ = _FORBID_EXTRA
    type: Literal["stdio", "http", "sse"] | None = None
    command: str | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    url: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class McpConfig:
    """The MCP servers of the agent, by name."""

    __pydantic_config__ = _FORBID_EXTRA
    mcpServers: dict[str, McpServer]  # noqa: N815  (the name that Claude Code's own files use)


@dataclass(frozen=True, kw_only=True)
class Claude:
    """Prompt and settings of Claude Code."""

    __pydantic_config__ = _FORBID_EXTRA
    prompt: Annotated[str, PROMPT]
    headless: bool = True
    skip_permissions: bool = True
    output_format: Literal["stream-json", "json", "text"] = "stream-json"
    model: Annotated[str, Len(1, 256), VISIBLE] = "claude-sonnet-4-5-20250929"
    allowed_tools: Annotated[tuple[Annotated[str, Len(1, 256), VISIBLE], ...], MaxLen(256)] | None = None
    mcp_config: McpConfig | None = None
    max_turns: Annotated[int, Ge(1), Le(1_000_000)] | None = None


@dataclass(frozen=True, kw_only=True)
class Vm:
    """Profile, resources and network access of the sandbox."""

    __pydantic_config__ = _FORBID_EXTRA
    profile: Annotated[str, Len(1, 64), VISIBLE] = "agentic-dev"
    cpus: Annotated[int, Ge(1), Le(4096)] = 4
    memory: Annotated[str, BYTE_SIZE] = "8G"
    disk: Annotated[str, BYTE_SIZE] = "40G"
    network_mode: Literal["isolated", "outbound", "full"] = "isolated"
    allowed_hosts: Annotated[tuple[Annotated[str, ALLOWED_HOST], ...], MaxLen(256)] = ()

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
    source: Literal["env", "file", "vault"]
    key: Annotated[str, Len(1, 1024), VISIBLE]


@dataclass(frozen=True, kw_only=True)
class Lifecycle:
    """Timeouts, budgets, retries, and what to keep."""

    __pydantic_config__ = _FORBID_EXTRA
    timeout: Annotated[str, DURATION] = "24h"
    failure_action: Literal["destroy", "preserve"] = "destroy"
    artifact_patterns: Annotated[tuple[Annotated[str, PATTERN], ...], MaxLen(256)] = ()
    stage_timeout: Annotated[str, DURATION] = "15m"
    provision_timeout: Annotated[str, DURATION] = "10m"
    hang_timeout: Annotated[str, DURATION] = "30m"
    collect_timeout: Annotated[str, DURATION] = "10m"
    budget_usd: Annotated[float, Ge(0), Le(1_000_000)] | None = None
    budget_tokens: Annotated[int, Ge(1), Le(10**15)] | None = None
    retries: Annotated[int, Ge(0), Le(100)] = 0
    resume: bool = False

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
    kind: Literal["Task"]
    metadata: Metadata
    repository: Repository
    claude: Claude
    vm: Vm = field(default_factory=Vm)
    secrets: Annotated[tuple[Secret, ...], MaxLen(64)] = ()
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
