"""The `claude` section of a manifest: its fields, the rules that span several fields, and the manifest templates."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from annotated_types import Ge, Le, Len, MaxLen

from sandbox.interfaces.agent import ManifestTemplate
from sandbox.model.errors import FieldPath, RuleViolation
from sandbox.model.manifest.field_formats import NO_CONTROL_CHARACTERS, PROMPT
from sandbox.model.manifest.parsed_document import as_list, as_mapping, as_text
from sandbox.model.manifest.schema import FORBID_EXTRA, Manifest

KIND = "claude"
DISPLAY_NAME = "Claude Code"


@dataclass(frozen=True, kw_only=True)
class McpServer:
    """One MCP server: a command to run inside the sandbox, or a URL to reach."""

    __pydantic_config__ = FORBID_EXTRA
    type: Literal["stdio", "http", "sse"] | None = None
    """The transport: `stdio` with a command, `http` (the default) or `sse` with a URL."""
    command: str | None = None
    """Program inside the sandbox."""
    args: tuple[str, ...] = ()
    """Arguments to the program. `${NAME}` is replaced by the secret of that name."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables for the program."""
    url: str | None = None
    """URL of the server."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers for requests to the URL."""


@dataclass(frozen=True, kw_only=True)
class McpConfig:
    """The agent's MCP servers, keyed by name."""

    __pydantic_config__ = FORBID_EXTRA
    mcpServers: dict[str, McpServer]  # noqa: N815  (the name that Claude Code's own files use)
    """Servers, keyed by name."""


@dataclass(frozen=True, kw_only=True)
class Claude:
    """Prompt and settings for Claude Code."""

    __pydantic_config__ = FORBID_EXTRA
    prompt: Annotated[str, PROMPT]
    """The task for the agent."""
    headless: bool = True
    """Whether the agent runs without a terminal; false for an interactive session."""
    skip_permissions: bool = True
    """Whether the agent may do everything; if false, every action that needs permission is denied."""
    output_format: Literal["stream-json", "json", "text"] = "stream-json"
    """Content of stdout: all events, the last result as JSON, or the text of the last result."""
    model: Annotated[str, Len(1, 256), NO_CONTROL_CHARACTERS] = "claude-sonnet-4-5-20250929"
    """Model that the server's API supports."""
    allowed_tools: Annotated[tuple[Annotated[str, Len(1, 256), NO_CONTROL_CHARACTERS], ...], MaxLen(256)] | None = None
    """Tools and rules that the agent may use. Absent: all. Empty: none."""
    mcp_config: McpConfig | None = None
    """The agent's MCP servers."""
    max_turns: Annotated[int, Ge(1), Le(1_000_000)] | None = None
    """Maximum number of model turns."""


def claude_section(manifest: Manifest) -> Claude:
    """Return the section of a manifest whose agent is Claude Code, with defaults for absent fields."""
    return msgspec.convert(manifest.agent.settings, Claude)


_PLACEHOLDER = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_TOOL = re.compile(r"(?!mcp__)[A-Za-z][A-Za-z0-9_]*(\(.+\))?|mcp__[A-Za-z0-9_-]+(__\*)?", re.ASCII)
_SECOND_TOOL = re.compile(r"\)[\s,]+[A-Za-z0-9_]+\(")
_RESERVED_NAMES = frozenset({"CLAUDECODE", "NODE_OPTIONS", "NODE_USE_SYSTEM_CA", "MCP_TIMEOUT", "MCP_TOOL_TIMEOUT"})
_RESERVED_PREFIXES = ("ANTHROPIC_", "CLAUDE_", "BUN_")


def is_reserved_variable(name: str) -> bool:
    """Return whether an environment variable with this name would redirect Claude Code or load code into it."""
    return name in _RESERVED_NAMES or name.startswith(_RESERVED_PREFIXES)


def find_violations(section: dict[str, Any], secret_names: Collection[str]) -> Iterator[RuleViolation]:
    """Yield the violations of rules that span several fields. Paths are relative to the section. See `AgentSchema`."""
    yield from _invalid_tools(section)
    yield from _invalid_mcp_servers(section, secret_names)


def _invalid_tools(section: dict[str, Any]) -> Iterator[RuleViolation]:
    """Check that each entry is one tool. Claude Code splits entries at commas and silently ignores unparsable parts."""
    for index, entry in enumerate(as_list(section.get("allowed_tools"))):
        text = as_text(entry)
        if text and (not _TOOL.fullmatch(text) or _SECOND_TOOL.search(text)):
            message = "must be one tool, such as Read, Bash(git *), mcp__server or mcp__server__tool"
            yield RuleViolation(("allowed_tools", index), "format", message)


def _invalid_mcp_servers(section: dict[str, Any], secret_names: Collection[str]) -> Iterator[RuleViolation]:
    config = as_mapping(section.get("mcp_config"))
    for name, server in as_mapping(config.get("mcpServers")).items():
        path = ("mcp_config", "mcpServers", name)
        if not isinstance(server, dict):
            continue
        if ("command" in server) == ("url" in server):
            yield RuleViolation(path, "format", "must have either a command or a url")
        elif server.get("type") in (("http", "sse") if "command" in server else ("stdio",)):
            yield RuleViolation((*path, "type"), "format", "must be stdio with a command, or http or sse with a url")
        for subpath, text in _expanded_texts(server):
            missing = sorted(set(_PLACEHOLDER.findall(text)) - set(secret_names))
            if missing:
                message = f"refers to the secret {missing[0][:100]}, which is not in secrets"
                yield RuleViolation((*path, *subpath), "format", message)


def _expanded_texts(server: dict[str, Any]) -> Iterator[tuple[FieldPath, str]]:
    """Yield each string in which Claude Code expands `${NAME}`, with its path."""
    yield ("url",), as_text(server.get("url"))
    for index, argument in enumerate(as_list(server.get("args"))):
        yield ("args", index), as_text(argument)
    for name in ("env", "headers"):
        for key, value in as_mapping(server.get(name)).items():
            yield (name, key), as_text(value)


_MINIMAL = """\
version: "1"
kind: Task
metadata:
  name: "My task"
repository:
  url: "https://github.com/org/repo.git"
  branch: "main"
claude:
  prompt: "Describe the work here"
"""

_BUG_FIX = """\
version: "1"
kind: Task
metadata:
  name: "Fix bug #42"
repository:
  url: "https://github.com/org/app.git"
  branch: "main"
claude:
  prompt: "Fix the bug in GitHub issue #42"
  mcp_config:
    mcpServers:
      github:
        command: "npx"
        args: ["-y", "@modelcontextprotocol/server-github"]
        env:
          GITHUB_TOKEN: "${GITHUB_TOKEN}"
vm:
  network_mode: "outbound"
  allowed_hosts: ["api.github.com"]
secrets:
  - name: "GITHUB_TOKEN"
    source: "env"
    key: "GITHUB_TOKEN"
"""

_AUDIT = """\
version: "1"
kind: Task
metadata:
  name: "Security audit"
repository:
  url: "https://github.com/org/app.git"
  branch: "main"
claude:
  prompt: |
    Audit this repository for security:
    1. Run a static analysis
    2. Check the dependencies
    3. Write security-report.md
  allowed_tools: ["Read", "Bash", "Grep", "Write"]
vm:
  network_mode: "isolated"
lifecycle:
  timeout: "8h"
  artifact_patterns: ["security-report.md"]
"""

_LARGE = """\
version: "1"
kind: Task
metadata:
  name: "Heavy processing"
repository:
  url: "https://github.com/org/app.git"
  branch: "main"
claude:
  prompt: "Process the large data set"
vm:
  profile: "agentic-dev"
  cpus: 16
  memory: "32G"
  disk: "100G"
lifecycle:
  timeout: "24h"
"""

_BUDGET = """\
version: "1"
kind: Task
metadata:
  name: "Try it within a budget"
repository:
  url: "https://github.com/org/app.git"
  branch: "main"
claude:
  prompt: "Describe the work here"
  max_turns: 30
lifecycle:
  budget_usd: 2.50
  timeout: "1h"
  failure_action: "preserve"
"""

MANIFEST_TEMPLATES = (
    ManifestTemplate("Minimal", "The required fields only: removes all other settings.", _MINIMAL),
    ManifestTemplate(
        "Bug fix with GitHub",
        "Adds GitHub's MCP server and the secret GITHUB_TOKEN; allows api.github.com only.",
        _BUG_FIX,
    ),
    ManifestTemplate("Security audit", "No network access, 8 hours, four tools; keeps security-report.md.", _AUDIT),
    ManifestTemplate(
        "Large machine", "16 CPUs, 32 GiB of memory, 100 GiB of disk, 24 hours, the profile agentic-dev.", _LARGE
    ),
    ManifestTemplate(
        "Within a budget", "Ends at $2.50, after 30 turns or after 1 hour; a failure preserves the sandbox.", _BUDGET
    ),
)
