"""The `sandbox mcp` command."""

from __future__ import annotations

import sys

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import current_options, server_options

_ADVICE = """\
Error: This command speaks the Model Context Protocol on stdin and stdout, and is started by an MCP client.
  Claude Code: claude mcp add sandbox -- sandbox mcp"""


@command(
    epilog=help_examples(
        "claude mcp add sandbox -- sandbox mcp",
        "claude mcp add sandbox -- sandbox mcp --context prod",
    )
)
@server_options
def mcp() -> None:
    """Serve Sandbox as MCP tools over stdio.

    Tools: submit, continue_task, list, status, logs, diff, artifacts, cancel. The tools use the server that you select
    with --server and --token, or with --context.
    """
    if sys.stdin.isatty():
        fail(_ADVICE, ExitCode.USAGE)
    from sandbox.cli.commands.mcp.tools import serve_tools

    options = current_options()
    serve_tools(options.server, options.token)
