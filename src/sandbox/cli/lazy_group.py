"""Click group that imports a command only when it runs, which keeps `--help` fast."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.startup import gc_frozen

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Entries = Mapping[str, tuple[str, str]]
"""Maps the name of a command to its location (`module:attribute`) and its short help."""


class LazyGroup(click.Group):
    """A group that lists its commands without importing them."""

    def __init__(self, *arguments: Any, entries: Entries, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the entries."""
        return list(self._entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        entry = self._entries.get(cmd_name)
        if entry is None:
            return None
        module, attribute = entry[0].split(":")
        with gc_frozen():
            command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve a command. For the name of a subcommand, fail and suggest its full command line."""
        name = args[0]
        if name not in self._entries:
            groups = [each for each in self._entries if name in self._subcommand_names(ctx, each)]
            if groups:
                suggestion = " or ".join(f"{ctx.command_path} {group} {name}" for group in groups)
                ctx.fail(f"No such command {name!r}; did you mean {suggestion}?")
        return super().resolve_command(ctx, args)

    def _subcommand_names(self, ctx: click.Context, group: str) -> list[str]:
        command = self.get_command(ctx, group)
        return command.list_commands(ctx) if isinstance(command, click.Group) else []

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands and options without importing commands."""
        from click.shell_completion import CompletionItem

        names = [name for name in self._entries if name.startswith(incomplete)]
        commands = [CompletionItem(name, help=self._entries[name][1]) for name in names]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Add the list of commands to the help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short_help) for name, (_, short_help) in self._entries.items()])
