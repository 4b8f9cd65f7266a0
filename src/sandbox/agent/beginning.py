"""Whether the agent, once it is set up, has what its manifest asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from sandbox.agent.stream import clean
from sandbox.agent.tools import unknown_entries
from sandbox.contracts.agent import AgentBegan
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.manifest import Claude, McpServer

_NAMES_TOLD_MAX = 10


def judge_beginning(claude: Claude, began: AgentBegan, redact: Callable[[str], str]) -> Failure | None:
    """None when every MCP server is connected and every entry of `allowed_tools` stands for a tool.

    redact: what has been done to the names that the agent told.
    """
    servers = claude.mcp_config.mcpServers if claude.mcp_config is not None else {}
    for name, server in servers.items():
        status = began.mcp_servers.get(clean(redact(name)), "not started")
        if status not in {"connected", redact("connected")}:
            return Failure(FailureCode.MCP_FAILED, _server_sentence(name, status, server))
    unknown = unknown_entries(claude.allowed_tools or (), began.tools, servers, redact)
    if unknown:
        return Failure(FailureCode.TOOL_UNKNOWN, _tools_sentence(unknown, servers))
    return None


def _server_sentence(name: str, status: str, server: McpServer) -> str:
    if server.command is None:
        todo = "check its url, its headers and vm.allowed_hosts"
    else:
        todo = "check its command, args and env, and that the sandbox has the program and reaches what it needs"
    return f"The MCP server {clean(name)} is not connected (status: {clean(status)}); {todo}."


def _tools_sentence(unknown: list[str], servers: Mapping[str, McpServer]) -> str:
    more = f" and {len(unknown) - _NAMES_TOLD_MAX} others" if len(unknown) > _NAMES_TOLD_MAX else ""
    return (
        f"Claude Code has no such tool: {_listed(unknown[:_NAMES_TOLD_MAX])}{more}; correct claude.allowed_tools. "
        f"Names are exact, such as Bash, Edit, Glob, Grep, Read, WebFetch and Write{_hint(unknown, servers)}."
    )


def _hint(unknown: list[str], servers: Mapping[str, McpServer]) -> str:
    if not any(entry.startswith("mcp__") for entry in unknown):
        return ""
    return f"; the MCP servers of this task are: {_listed(servers) or 'none'}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(clean, names))
