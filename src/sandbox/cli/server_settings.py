"""The options of the server: from the command line, else the environment, else what suits a first start."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])

PORT = click.IntRange(0, 65535)


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/sandbox`."""
    home = os.environ.get("XDG_DATA_HOME", "")
    # The specification says that a relative path there is to be ignored.
    return (Path(home) if home.startswith("/") else Path.home() / ".local" / "share") / "sandbox"


def settings_options(command: _Decorated) -> _Decorated:
    """Add the options that say where the server listens, keeps its data and makes its sandboxes."""
    for option in reversed(
        (
            _option("--host", default="127.0.0.1", help="The address to listen on."),
            _option("--port", default=8122, type=PORT, help="The port of the API; 0 for any free one."),
            _option("--ws-port", default=8121, type=PORT, help="The port of the WebSocket; 0 for any free one."),
            _option(
                "--data-dir",
                default=default_data_dir,
                type=click.Path(file_okay=False, path_type=Path),
                show_default="$XDG_DATA_HOME/sandbox",
                help="Where tasks are kept.",
            ),
            _option("--runtime", default="auto", help="What makes the sandboxes; auto takes the strongest that works."),
        )
    ):
        command = option(command)
    return command


def _option(name: str, **attributes: Any) -> Callable[[_Decorated], _Decorated]:
    variable = "SANDBOX_" + name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, **{"show_default": True, "envvar": variable, "show_envvar": True, **attributes})
