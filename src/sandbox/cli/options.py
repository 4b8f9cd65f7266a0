"""The options that every command takes, before or after its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from sandbox.cli.lasting import lasting
from sandbox.model.address import DEFAULT_SERVER

if TYPE_CHECKING:
    from sandbox.client import Client

Format = Literal["text", "json", "table"]
_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


@dataclass(frozen=True)
class Chosen:
    """What the common options and the environment say."""

    server: str
    token: str | None
    format: Format
    has_color: bool

    def connect(self) -> Client:
        """The client for the chosen server."""
        with lasting():
            from sandbox.client import Client

            return Client(self.server, self.token)


def chosen(ctx: click.Context | None = None) -> Chosen:
    """The common options of the running command; the one closest to the end of the command line wins."""
    meta = (ctx or click.get_current_context()).meta
    return Chosen(
        server=meta.get(_key("server")) or os.environ.get("SANDBOX_SERVER") or DEFAULT_SERVER,
        token=meta.get(_key("token")) or os.environ.get("SANDBOX_TOKEN") or None,
        format=meta.get(_key("format")) or "text",
        has_color=not (meta.get(_key("no_color")) or os.environ.get("NO_COLOR")),
    )


def server_options(command: _Decorated) -> _Decorated:
    """Add `--server` and `--token`."""
    token = _kept("--token", metavar="TOKEN", help="Token for the server (SANDBOX_TOKEN).")
    server = _kept("--server", metavar="URL", help=f"The server's address (SANDBOX_SERVER) [default: {DEFAULT_SERVER}]")
    return server(token(command))


def output_options(*formats: Format, short: bool = True) -> Callable[[_Decorated], _Decorated]:
    """Add `--no-color` and `--format` with the given choices; `short`: also as `-f`."""

    def add(command: _Decorated) -> _Decorated:
        color = _kept("--no-color", is_flag=True, default=None, help="No colours (NO_COLOR).")
        names = ["--format", "-f"] if short else ["--format"]
        return _kept(*names, type=click.Choice(formats), help="How the answer is printed [default: text]")(
            color(command)
        )

    return add


def common_options(command: _Decorated) -> _Decorated:
    """Add all of them."""
    return server_options(output_options("text", "json", "table")(command))


def _key(name: str) -> str:
    return f"sandbox.{name}"


def _kept(*names: str, **attributes: Any) -> Callable[[_Decorated], _Decorated]:
    def keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value is not None:
            ctx.meta[_key(str(parameter.name))] = value

    return click.option(*names, expose_value=False, callback=keep, **attributes)
