"""MCP servers: Claude Code's own file for those of a manifest."""

from __future__ import annotations

from typing import Any

import msgspec

from sandbox.model.manifest import McpConfig, McpServer

MCP_CONNECT_SECONDS = 60
"""How long Claude Code waits for its MCP servers; a cold `npx` on a busy machine needs more than its own 30 s."""


def mcp_file(config: McpConfig) -> bytes:
    """The file for `--mcp-config`. `${NAME}` stays as it is: Claude Code expands it from its environment, inside."""
    servers = {name: _entry(server) for name, server in config.mcpServers.items()}
    return msgspec.json.encode({"mcpServers": servers})


def _entry(server: McpServer) -> dict[str, Any]:
    if server.url is not None:
        # Claude Code leaves out, without a word, a server that has a url and no type.
        return {"type": server.type or "http", "url": server.url, "headers": server.headers}
    return {"type": "stdio", "command": server.command, "args": server.args, "env": server.env}
