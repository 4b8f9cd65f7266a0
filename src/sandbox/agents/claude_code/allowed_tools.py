"""Tools and MCP servers of the manifest: the options that allow them, and the check that Claude Code has them.

The check runs before the first model request.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from sandbox.agents.claude_code.manifest_section import Claude, McpServer, claude_section
from sandbox.agents.claude_code.stream_json import sanitize
from sandbox.interfaces.agent import AgentReady
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.manifest.schema import Manifest

_MCP = "mcp__"
_INIT_NAMES = {"Agent": "Task"}
"""Maps names in requests and permission rules to names in the `init` event."""

_EDIT_TOOLS = frozenset({"Write", "NotebookEdit"})
_WILDCARDS = frozenset("*?[")


def tool_options(claude: Claude) -> tuple[str, ...]:
    """Return the options for a manifest's allowed tools.

    Only `--tools` restricts the tools reliably, but it accepts plain names only. MCP tools and rules are restricted by
    permissions, so the permission checks are skipped only if the manifest has neither. If the list is empty,
    `--allowedTools` is omitted.
    """
    entries = claude.allowed_tools
    if entries is None:
        return _skip_permissions_options() if claude.skip_permissions else _deny_permissions_options()
    names = list(dict.fromkeys(_tool_name(entry) for entry in entries if not entry.startswith(_MCP)))
    restricted = ("--tools", ",".join(names))
    if claude.skip_permissions and names == list(dict.fromkeys(entries)) and not _has_mcp_servers(claude):
        return (*restricted, *_skip_permissions_options())
    allowed = ("--allowedTools", *map(_permission_rule, entries)) if entries else ()
    return (*restricted, *allowed, *_deny_permissions_options())


def unknown_entries(
    entries: Sequence[str], tools: frozenset[str], servers: Collection[str], redact: Callable[[str], str]
) -> list[str]:
    """Return the entries that match none of the agent's tools. redact: the redaction that was applied to tool names."""
    return [entry for entry in entries if not _matches_any_tool(entry, tools, servers, redact)]


def _matches_any_tool(
    entry: str, tools: frozenset[str], servers: Collection[str], redact: Callable[[str], str]
) -> bool:
    if not entry.startswith(_MCP):
        name = _tool_name(entry)
        return not {redact(name), redact(_INIT_NAMES.get(name, name))}.isdisjoint(tools)
    if entry.removesuffix("__*") in {_MCP + _server_name_in_tools(server) for server in servers}:
        return True
    if not tools.isdisjoint({entry, redact(entry)}):
        return True
    if _WILDCARDS.isdisjoint(entry):
        return False
    patterns = {entry, redact(entry).replace("[", "[[]")}
    return any(_may_match_redacted(tool, entry) or any(fnmatchcase(tool, each) for each in patterns) for tool in tools)


def _may_match_redacted(tool: str, pattern: str) -> bool:
    """Return whether a tool with a partly redacted name may match the pattern.

    Compares only the text before the redaction with the text before the pattern's `*`.
    """
    visible_prefix, mark, _ = tool.partition("[REDACTED:")
    pattern_prefix, star, _ = pattern.partition("*")
    return bool(mark and star) and (
        visible_prefix.startswith(pattern_prefix) or pattern_prefix.startswith(visible_prefix)
    )


def _server_name_in_tools(server: str) -> str:
    """Return the server's name as it appears in the names of its tools."""
    return "".join(_replace_special_characters(server))


def _replace_special_characters(server: str) -> Iterator[str]:
    for letter in server:
        yield letter if letter.isascii() and (letter.isalnum() or letter in "_-") else "_"


def _tool_name(entry: str) -> str:
    return entry.partition("(")[0]


def _permission_rule(entry: str) -> str:
    """Return the entry as a permission rule. A rule that restricts a tool to writable paths becomes an `Edit` rule."""
    name, bracket, rest = entry.partition("(")
    return f"Edit({rest}" if bracket and name in _EDIT_TOOLS else entry


def _has_mcp_servers(claude: Claude) -> bool:
    return claude.mcp_config is not None and bool(claude.mcp_config.mcpServers)


def _skip_permissions_options() -> tuple[str, ...]:
    return ("--dangerously-skip-permissions",)


def _deny_permissions_options() -> tuple[str, ...]:
    """Return the options that deny actions that need permission. The run continues after a denial."""
    return ("--permission-mode", "dontAsk")


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
        "correct claude.allowed_tools. Tool names must match exactly; examples are Bash, Edit, Glob, Grep, Read, "
        "WebFetch and Write"
        f"{_mcp_servers_hint(unknown, servers)}."
    )


def _mcp_servers_hint(unknown: list[str], servers: Mapping[str, McpServer]) -> str:
    if not any(entry.startswith("mcp__") for entry in unknown):
        return ""
    return f"; the MCP servers of this task are: {_join_names(servers) or 'none'}"


def _join_names(names: Iterable[str]) -> str:
    return ", ".join(map(sanitize, names))
