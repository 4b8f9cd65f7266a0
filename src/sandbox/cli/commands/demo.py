"""The `sandbox demo` command."""

from __future__ import annotations

from importlib import import_module

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import ExitCode, exit_code_for_error, fail
from sandbox.cli.output.console import escape_text

_PORT = click.IntRange(0, 65535)


@command(epilog=help_examples("sandbox demo", "sandbox demo --keep", "sandbox demo --stop"))
@click.option("--keep", "keeps_servers", is_flag=True, help="Keep the servers running in the background.")
@click.option(
    "--stop", "stops_servers", is_flag=True, help="Stop the servers of --keep, and remove their tasks and files."
)
@click.option("--port", type=_PORT, metavar="PORT", help="With --keep: the server's port [default: 8122].")
@click.option("--ws-port", type=_PORT, metavar="PORT", help="With --keep: the port for WebSockets [default: 8121].")
@click.option("--git-port", type=_PORT, metavar="PORT", help="With --keep: the git server's port [default: 8130].")
def demo(keeps_servers: bool, stops_servers: bool, **ports: int | None) -> None:
    """Run an example task from manifest to patch.

    Starts a separate server on free ports and stops it at the end. Without a model API key, a scripted model replaces
    the model API.

    With --keep, the server and a git server with the example's repository keep running until you run sandbox demo
    --stop. They use the default ports, unless you set other ports. Port 0 selects any free port.
    """
    from sandbox.client import ClientError
    from sandbox.model.errors import SandboxError

    chosen = {name: number for name, number in ports.items() if number is not None}
    if stops_servers and (keeps_servers or chosen):
        raise click.UsageError("--stop cannot be combined with other options.")
    if chosen and not keeps_servers:
        raise click.UsageError("Ports can only be chosen with --keep.")
    # Import by name: the demo package is in a layer above the CLI, so the CLI must not import it statically.
    if stops_servers:
        if not import_module("sandbox.demo.background_servers").stop_background_servers():
            fail("Error: No servers of a demo are running.", ExitCode.NOT_FOUND)
        click.echo("The demo's servers have stopped, and their tasks and files are removed.", err=True)
        return
    try:
        if keeps_servers:
            background = import_module("sandbox.demo.background_servers")
            code = background.run_and_keep_servers({**background.PORTS, **chosen})
        else:
            code = import_module("sandbox.demo.walkthrough").run()
    except SandboxError as error:
        if isinstance(error, ClientError):
            raise
        # The message may end with lines from a log.
        lines = map(escape_text, f"Error: {error.message}".split("\n"))
        fail("\n".join(lines), exit_code_for_error(error.code))
    raise click.exceptions.Exit(code or 0)
