"""Options for commands that run on the server's machine: command line, environment and `sandbox.toml`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sandbox.bootstrap.settings.keys import SettingKey, setting_keys
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.console import escape_text

if TYPE_CHECKING:
    from sandbox.bootstrap.settings.load import Configuration

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])

_DATA_DIR = "server.data_dir"


def settings_options(command: _Decorated) -> _Decorated:
    """Add all options of a server."""
    return _with_options(command, [key for key in setting_keys() if key.option])


def data_dir_options(command: _Decorated) -> _Decorated:
    """Add the options that locate the server's data directory."""
    return _with_options(command, [key for key in setting_keys() if key.path == _DATA_DIR])


def load_configuration(options: Mapping[str, Any]) -> Configuration:
    """Load the configuration from options, environment and file. Exits with an error if it is invalid."""
    from sandbox.bootstrap.settings.load import ConfigurationError, load

    try:
        return load(options, os.environ)
    except ConfigurationError as error:
        lines = [escape_text(line) for line in error.message.splitlines()]
        fail("Error: " + "\n".join(lines), ExitCode.USAGE)


def _with_options(command: _Decorated, selected: list[SettingKey]) -> _Decorated:
    for key in reversed(selected):
        command = _option(key)(command)
    help_text = "The file sandbox.toml.  [env var: SANDBOX_CONFIG; default: $XDG_CONFIG_HOME/sandbox/sandbox.toml]"
    return click.option("--config", metavar="FILE", help=help_text)(command)


def _option(key: SettingKey) -> Callable[[_Decorated], _Decorated]:
    # The option has no type and no default: `load` converts the values from all sources and adds defaults in one place.
    help_text = f"{key.description}  [env var: {key.variable}; default: {key.default_text}]"
    return click.option(str(key.option), key.name, metavar=_METAVARS.get(key.value_type, "TEXT"), help=help_text)


_METAVARS: dict[Any, str] = {int: "INTEGER", float: "NUMBER"}
