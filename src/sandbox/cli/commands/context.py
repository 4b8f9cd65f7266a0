"""The `sandbox context …` commands."""

from __future__ import annotations

import click

from sandbox.cli.click_extensions import SuggestingGroup, help_examples
from sandbox.cli.commands.login import print_overriding_variables
from sandbox.cli.contexts import DEFAULT_CONTEXT, DEFAULT_NAME, ContextFile, default_file
from sandbox.cli.options import complete_context, current_options, output_options
from sandbox.cli.output.console import print_json, print_message, stdout_console

_name_argument = click.argument("name", shell_complete=complete_context)


@click.group(
    cls=SuggestingGroup,
    epilog=help_examples(
        "sandbox context list",
        "sandbox context use prod",
    ),
)
def context() -> None:
    """Choose between the servers that you have logged in to.

    A context is a server and its token, stored by sandbox login. Commands use the server and the token of the
    current context. The options --context, --server and --token override them, and so do the variables SANDBOX_CONTEXT,
    SANDBOX_SERVER and SANDBOX_TOKEN. Options take precedence over variables.
    """


@context.command("list", epilog=help_examples("sandbox context list"))
@output_options("text", "json", "table")
def list_contexts() -> None:
    """List the contexts; the current context is marked with a star."""
    from sandbox.cli.output.table import cell, print_table

    options, contexts = current_options(), ContextFile(default_file()).load()
    stored = {DEFAULT_NAME: DEFAULT_CONTEXT, **contexts.by_name}
    if options.format == "json":
        entries = [
            {"name": name, "server": each.server, "has_token": bool(each.token)} for name, each in stored.items()
        ]
        print_json({"current": contexts.current, "contexts": entries})
    else:
        rows = [
            ("*" if name == contexts.current else "", name, each.server, "stored" if each.token else "none")
            for name, each in stored.items()
        ]
        console, has_border = stdout_console(has_color=options.has_color), options.format == "table"
        columns = ("CURRENT", "NAME", "SERVER", "TOKEN")
        print_table(console, columns, [[*map(cell, row)] for row in rows], has_border=has_border, omittable=("TOKEN",))
    print_overriding_variables()


@context.command(
    epilog=help_examples(
        "sandbox context use prod",
        "sandbox context use default",
    )
)
@_name_argument
def use(name: str) -> None:
    """Select the current context."""
    file = ContextFile(default_file())
    with file.locked():
        contexts = file.load().use(name)
        file.save(contexts)
    print_message(f"The current context is now {name}: {contexts.find(name).server}")
    print_overriding_variables()


@context.command(epilog=help_examples("sandbox context remove prod"))
@_name_argument
def remove(name: str) -> None:
    """Remove a context and its token. The token stays valid on the server."""
    file = ContextFile(default_file())
    with file.locked():
        before = file.load()
        after = before.remove(name)
        file.save(after)
    click.echo(f"Removed the context {name}.", err=True)
    if after.current != before.current:
        print_message(f"The current context is now {DEFAULT_NAME}: {DEFAULT_CONTEXT.server}")
