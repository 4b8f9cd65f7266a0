"""The `sandbox config …` commands."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.click_extensions import SuggestingGroup, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import current_options, output_options
from sandbox.cli.output.console import escape_text, print_json
from sandbox.cli.settings_options import load_configuration, settings_options

if TYPE_CHECKING:
    from sandbox.bootstrap.settings.keys import SettingKey
    from sandbox.bootstrap.settings.load import Configuration


@click.group(cls=SuggestingGroup, epilog=help_examples("sandbox config show --origin"))
def config() -> None:
    """Show the server's settings and the origin of each setting.

    Precedence, highest first: options, environment variables, sandbox.toml, defaults.
    """


@config.command(
    epilog=help_examples(
        "sandbox config show",
        "sandbox config show --origin",
    )
)
@click.option("--origin", "shows_origin", is_flag=True, help="Show the origin of each value.")
@settings_options
@output_options("text", "json")
def show(*, shows_origin: bool, **options: Any) -> None:
    """Print the configuration that `sandbox serve` would use, in the format of sandbox.toml.

    With --format json, print a JSON document. With --format json and --origin, each value is an object with the fields
    value and origin.
    """
    configuration = load_configuration(options)
    from sandbox.bootstrap.settings.keys import setting_keys

    if current_options().format == "json":
        print_json(_document(configuration, setting_keys(), shows_origin=shows_origin))
    else:
        _print_toml(configuration, setting_keys(), shows_origin=shows_origin)


@config.command(epilog=help_examples("sandbox config path"))
@click.option("--config", "file", metavar="FILE", help="The file sandbox.toml.  [env var: SANDBOX_CONFIG]")
def path(file: str | None) -> None:
    """Print the path of sandbox.toml."""
    from sandbox.bootstrap.settings.load import ConfigurationError, find_config_file

    try:
        config_path, _ = find_config_file(file, os.environ)
    except ConfigurationError as error:
        fail(f"Error: {error.message}", ExitCode.USAGE)
    click.echo(escape_text(str(config_path)))
    if not config_path.exists():
        click.echo("This file does not exist; the defaults apply.", err=True)


def _document(configuration: Configuration, selected: Iterable[SettingKey], *, shows_origin: bool) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key in selected:
        section = document
        for name in key.section:
            section = section.setdefault(name, {})
        value = _to_json_value(configuration.value(key))
        section[key.name] = {"value": value, "origin": configuration.origins[key.path]} if shows_origin else value
    return document


def _print_toml(configuration: Configuration, selected: Iterable[SettingKey], *, shows_origin: bool) -> None:
    section = None
    for key in selected:
        if key.section != section:
            click.echo(f"{'' if section is None else chr(10)}[{'.'.join(key.section)}]")
            section = key.section
        value = _to_json_value(configuration.value(key))
        # TOML has no null, so omit the key.
        line = f"# {key.name} is not set" if value is None else f"{key.name} = {_toml_value(value)}"
        click.echo(escape_text(f"{line}  # {configuration.origins[key.path]}" if shows_origin else line))


def _to_json_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _toml_value(value: Any) -> str:
    """Return the value as TOML. For strings, numbers and lists of strings, the syntax is the same as in JSON."""
    return json.dumps(value, ensure_ascii=False)
