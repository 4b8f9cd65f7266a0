"""Checks before the first model request that Claude Code has the tools and MCP servers of the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from sandbox.agents.claude_code.allowed_tools import unknown_entries
from sandbox.agents.claude_code.manifest_section import Claude, McpServer, claude_section
from sandbox.agents.claude_code.stream_json import sanitize
from sandbox.interfaces.agent import AgentReady
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import Manifest

_NAMES_SHOWN_MAX = 10


class ClaudeReady(AgentReady, frozen=True):
    """Claude Code reported its tools and its MCP servers. mcp_servers: the status of each server, keyed by name."""

    tools: frozenset[str]
    mcp_servers: Mapping[str, str]

    def find_failure(self, manifest: Manifest, redact: Callable[[str], str]) -> Failure | None:
        """Return the failure; None if every MCP server is connected and every entry of `allowed_tools` matches a tool.

        redact: the redaction that was applied to the names that the agent reported.
        """
        return _find_missing(claude_section(manifest), self, redact)


def needs_ready_check(claude: Claude) -> bool:
    """Return whether `ClaudeReady` has tools or MCP servers to check before the first model request."""
    return claude.allowed_tools is not None or claude.mcp_config is not None


def _find_missing(claude: Claude, ready: ClaudeReady, redact: Callable[[str], str]) -> Failure | None:
    servers = claude.mcp_config.mcpServers if claude.mcp_config is not None else {}
    for name, server in servers.items():
        status = ready.mcp_servers.get(sanitize(redact(name)), "not started")
        if status not in {"connected", redact("connected")}:
            return Failure(FailureCode.MCP_FAILED, _mcp_failure_message(name, status, server))
    unknown = unknown_entries(claude.allowed_tools or (), ready.tools, servers, redact)
    if unknown:
        return Failure(FailureCode.TOOL_UNKNOWN, _unknown_tools_message(unknown, servers))
    return None


def _mcp_failure_message(name: str, status: str, server: McpServer) -> str:
    if server.command is None:
        todo = "check its url, its headers and vm.allowed_hosts"
    else:
        todo = "check its command, args and env, and that the program exists in the sandbox and can reach its hosts"
    return f"The MCP server {sanitize(name)} is not connected (status: {sanitize(status)}); {todo}."


def _unknown_tools_message(unknown: list[str], servers: Mapping[str, McpServer]) -> str:
    more = f" and {len(unknown) - _NAMES_SHOWN_MAX} more" if len(unknown) > _NAMES_SHOWN_MAX else ""
    return (
        f"Claude Code has no tool named {_join_names(unknown[:_NAMES_SHOWN_MAX])}{more}; "
        "correct claude.allowed_tools. Names are exact, such as Bash, Edit, Glob, Grep, Read, WebFetch and Write"
        f"{_mcp_servers_hint(unknown, servers)}."
    )


def _mcp_servers_hint(unknown: list[str], servers: Mapping[str, McpServer]) -> str:
    if not any(entry.startswith("mcp__") for entry in unknown):
        return ""
    return f"; the MCP servers of this task are: {_join_names(servers) or 'none'}"


def _join_names(names: Iterable[str]) -> str:
    return ", ".join(map(sanitize, names))
