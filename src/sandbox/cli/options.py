"""Options shared by several commands. The common options are accepted before or after the command's name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from sandbox.cli.click_extensions import GlobalOption, gc_frozen
from sandbox.cli.output.console import escape_text, is_color_enabled
from sandbox.model.default_server_address import DEFAULT_SERVER

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from sandbox.cli.contexts import Context, ServerSelection
    from sandbox.client import Client

OutputFormat = Literal["text", "json", "table"]
_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


@dataclass(frozen=True)
class CliOptions:
    """Values of the common options and their environment variables.

    server, token: from the selected context; if the token is empty, none is sent. Reading either one can raise
    ContextError or OSError.
    """

    format: OutputFormat
    has_color: bool
    selection: ServerSelection

    @property
    def server(self) -> str:
        """The server's URL."""
        return self._context.server

    @property
    def token(self) -> str:
        """The token; empty if there is none."""
        return self._context.token

    @cached_property
    def _context(self) -> Context:
        from sandbox.cli.contexts import ContextFile, ServerSelection, default_file, select_context

        names = ("SANDBOX_SERVER", "SANDBOX_TOKEN", "SANDBOX_CONTEXT")
        variables = ServerSelection(*(os.environ.get(name) for name in names))
        return select_context(self.selection, variables, ContextFile(default_file()))

    def connect(self) -> Client:
        """Create a client for the selected server."""
        with gc_frozen():
            from sandbox.client import Client

            return Client(self.server, self.token)


def current_options(ctx: click.Context | None = None) -> CliOptions:
    """Return the common options of the running command. If an option is repeated, its last value applies."""
    from sandbox.cli.contexts import ServerSelection

    meta = (ctx or click.get_current_context()).meta
    return CliOptions(
        format=meta.get(_meta_key("format")) or "text",
        has_color=is_color_enabled(),
        selection=ServerSelection(*(meta.get(_meta_key(name)) for name in ("server", "token", "context"))),
    )


def server_options(command: _Decorated) -> _Decorated:
    """Add `--server`, `--token` and `--context`."""
    context = _stored_option(
        "--context",
        metavar="NAME",
        shell_complete=complete_context,
        help="A server and its token that sandbox login stored (SANDBOX_CONTEXT).",
    )
    return server_option(token_option()(context(command)))


def server_option(command: _Decorated) -> _Decorated:
    """Add `--server`."""
    help_text = f"The server's URL (SANDBOX_SERVER) [default: {DEFAULT_SERVER}]"
    return _stored_option("--server", metavar="URL", help=help_text)(command)


def token_option(*, hidden: bool = False) -> Callable[[_Decorated], _Decorated]:
    """Add `--token`. hidden: omit it from the help."""
    return _stored_option("--token", metavar="TOKEN", help="Token for the server (SANDBOX_TOKEN).", hidden=hidden)


def output_options(*formats: OutputFormat, short: bool = True) -> Callable[[_Decorated], _Decorated]:
    """Add `--no-color` and `--format` with the given choices. short: also add `-f`."""

    def add(command: _Decorated) -> _Decorated:
        color = _stored_option("--no-color", is_flag=True, default=None, help="Disable colors (NO_COLOR).")
        names = ["--format", "-f"] if short else ["--format"]
        return _stored_option(*names, type=click.Choice(formats), help="Output format [default: text]")(color(command))

    return add


def common_options(command: _Decorated) -> _Decorated:
    """Add all common options."""
    return server_options(output_options("text", "json", "table")(command))


def _meta_key(name: str) -> str:
    return f"sandbox.{name}"


def _stored_option(*names: str, **attributes: Any) -> Callable[[_Decorated], _Decorated]:
    def keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value is not None:
            ctx.meta[_meta_key(str(parameter.name))] = value

    return click.option(*names, cls=GlobalOption, expose_value=False, callback=keep, **attributes)


def complete_context(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a context."""
    from click.shell_completion import CompletionItem

    from sandbox.cli.contexts import DEFAULT_CONTEXT, DEFAULT_NAME, ContextError, ContextFile, default_file

    try:
        known = {DEFAULT_NAME: DEFAULT_CONTEXT, **ContextFile(default_file()).load().by_name}
    except (ContextError, OSError):
        return []  # a shell completion cannot report errors
    return [
        CompletionItem(name, help=escape_text(context.server))
        for name, context in known.items()
        if name.startswith(incomplete)
    ]


UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration_option(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Parse a duration such as `90s`, `15m`, `2h` or `1d`; return it in seconds."""
    seconds = _parse_duration(value or "")
    if value is not None and seconds is None:
        raise click.BadParameter(f"{value!r} is not a duration; use a whole number and a unit, such as 90s, 15m or 2h")
    return seconds


def parse_past_time_option(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Convert a time (RFC 3339), or a duration before now, to RFC 3339 in UTC."""
    if value is None:
        return None
    seconds = _parse_duration(value)
    try:
        now = datetime.now(UTC)
        at = datetime.fromisoformat(value).astimezone(UTC) if seconds is None else now - timedelta(seconds=seconds)
    except (ValueError, OverflowError):
        message = "use RFC 3339, such as 2026-01-29T10:10:15Z, or a duration before now, such as 10m"
        raise click.BadParameter(f"{value!r} is not a time; {message}") from None
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _parse_duration(value: str) -> int | None:
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", value, re.ASCII)
    return int(match[1]) * UNIT_SECONDS[match[2]] if match else None


def allow_secrets_option(command: _Decorated) -> _Decorated:
    """Add `--allow-secrets`."""
    help_text = "Also download artifacts that contain one of the task's secrets; by default, they are skipped."
    return click.option("--allow-secrets", "allows_secrets", is_flag=True, help=help_text)(command)
