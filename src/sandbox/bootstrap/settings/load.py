"""Loads the server's settings. Precedence: options, environment, `sandbox.toml`, defaults."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from sandbox.bootstrap.settings.keys import SettingKey, sections, setting_keys
from sandbox.bootstrap.settings.schema import ServerSection, ServerSettings, default_config_file
from sandbox.model.display_text import replace_unprintable, replacement_character
from sandbox.model.errors import SandboxError

FILE_VARIABLE = "SANDBOX_CONFIG"
FILE_BYTES_MAX = 1024 * 1024
"""Maximum size of a configuration file; a larger one is rejected."""

DEFAULT_ORIGIN = "default"


class ConfigurationError(SandboxError):
    """The configuration is invalid; the message lists every error and its origin."""

    code = "invalid_configuration"


@dataclass(frozen=True)
class Configuration:
    """The settings. origins: where each value comes from, keyed by dotted path. file: None if no file was read."""

    settings: ServerSettings
    origins: Mapping[str, str]
    file: Path | None

    def value(self, key: SettingKey) -> Any:
        """Return the value of the key."""
        value: Any = self.settings
        for name in (*key.section, key.name):
            value = getattr(value, name)
        return value


def find_config_file(option: str | None, environment: Mapping[str, str]) -> tuple[Path, bool]:
    """Return the file to read, and whether it must exist because it was requested. Raises ConfigurationError."""
    if option == "":
        raise ConfigurationError("--config must not be empty.")
    requested = option or environment.get(FILE_VARIABLE)
    return (Path(requested).absolute(), True) if requested else (default_config_file(), False)


def load(options: Mapping[str, Any], environment: Mapping[str, str]) -> Configuration:
    """Load the settings from all sources. Raises a ConfigurationError that lists every error.

    options: the command-line value of each key; None if the option was not given. The `config` key is the path of the
    configuration file.
    """
    file, is_explicit = find_config_file(options.get("config"), environment)
    has_file = is_explicit or file.exists()
    data = _read(file) if has_file else {}
    origins = dict.fromkeys(_dotted_paths(data, ()), str(file))
    for key in setting_keys():
        for origin, text in _overriding_values(key, options, environment):
            if _set_value(data, key, key.parse(text)):
                origins[key.path] = origin
    settings, errors = validate(data, origins)
    if settings is None:
        raise ConfigurationError(_error_message(errors))
    all_origins = {key.path: origins.get(key.path, DEFAULT_ORIGIN) for key in setting_keys()}
    return Configuration(settings, all_origins, file if has_file else None)


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            content = opened.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigurationError(f"Cannot read {file}: {error.strerror}.") from None
    if len(content) > FILE_BYTES_MAX:
        raise ConfigurationError(f"{file} is larger than {FILE_BYTES_MAX // 1024} KiB, too large for a configuration.")
    try:
        data = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{file} is not TOML: {error}.") from None
    return _resolve_paths(data, file)


def _resolve_paths(data: dict[str, Any], file: Path) -> dict[str, Any]:
    """Resolve paths relative to the file's directory; `~` is this user's home."""
    for key in setting_keys():
        section = _section(data, key)
        value = section.get(key.name) if section is not None else None
        if section is not None and key.value_type is Path and isinstance(value, str) and value:
            section[key.name] = str(file.parent / _expand_user(key, value, file))
    return data


def _expand_user(key: SettingKey, value: str, file: Path) -> Path:
    try:
        return Path(value).expanduser()
    except RuntimeError:
        message = f"{key.path} ({file}) starts with the home directory of an unknown user"
        raise ConfigurationError(_error_message([message])) from None


def _dotted_paths(data: Mapping[str, Any], section: tuple[str, ...]) -> list[str]:
    """Return the dotted paths of all values and sections."""
    paths = []
    for name, value in data.items():
        path = (*section, name)
        paths.append(".".join(path))
        if isinstance(value, dict):
            paths += _dotted_paths(value, path)
    return paths


def _overriding_values(
    key: SettingKey, options: Mapping[str, Any], environment: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Return (origin, value) pairs that override the file, lowest precedence first.

    An empty variable counts as unset.
    """
    overrides = []
    if environment.get(key.variable):
        overrides.append((key.variable, environment[key.variable]))
    if key.option and options.get(key.name) is not None:
        overrides.append((key.option, str(options[key.name])))
    return overrides


def _set_value(data: dict[str, Any], key: SettingKey, value: Any) -> bool:
    """Set a value. Return False if a parent section is not a table; `validate` reports that error."""
    section = data
    for name in key.section:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            return False
    section[key.name] = value
    return True


def _section(data: Any, key: SettingKey) -> dict[str, Any] | None:
    for name in key.section:
        data = data.get(name) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else None


def _error_message(errors: list[str]) -> str:
    if len(errors) == 1:
        return f"The configuration has an error: {errors[0]}{'' if errors[0].endswith('?') else '.'}"
    return "\n  ".join([f"The configuration has {len(errors)} errors:", *errors])


_NAME_LENGTH_SHOWN_MAX = 64
_SECRET_NAME = re.compile(r"token|passw|secret|credential|api_?key", re.IGNORECASE)
_ERROR_MESSAGES = (
    (r"string_type|path_type", "must be a string"),
    (r"int_type|int_parsing|int_from_float", "must be a whole number"),
    (r"float_type|float_parsing|finite_number", "must be a number"),
    (r"tuple_type|list_type", "must be a list of strings"),
    (r"dataclass_type|dict_type", "must be a section"),
    (r"greater_than_equal", "must be at least {ge:.15g}"),
    (r"less_than_equal", "must be at most {le:.15g}"),
    (r"string_too_short|too_short", "must not be empty"),
    (r"string_too_long", "must have at most {max_length} characters"),
    (r"too_long", "must have at most {max_length} entries"),
    (r"format|range", "{complaint}"),
)


def validate(data: dict[str, Any], origins: Mapping[str, str]) -> tuple[ServerSettings | None, list[str]]:
    """Validate the data. Return the settings, or None and all errors.

    origins: where each value comes from, keyed by dotted path.
    """
    # Dates are the only TOML type that JSON lacks. No key accepts a date, so encode it as another value that no key
    # accepts.
    text = json.dumps(data, default=lambda value: {"date": str(value)})
    conflicts = _find_conflicts(data, origins)
    try:
        settings = _adapter().validate_json(text, strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        return None, [*(_format_error(detail, origins) for detail in details), *conflicts]
    return (None, conflicts) if conflicts else (settings, [])


@cache
def _adapter() -> TypeAdapter[ServerSettings]:
    return TypeAdapter(ServerSettings)


def _find_conflicts(data: dict[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Return conflicts between values: two listeners that use the same port."""
    section = data.get("server", {})
    if not isinstance(section, dict):
        return []
    port, ws_port = section.get("port", ServerSection.port), section.get("ws_port", ServerSection.ws_port)
    if not isinstance(port, int) or port == 0 or port != ws_port:
        return []
    origins_by_name = {name: _describe_origin(f"server.{name}", origins) for name in ("port", "ws_port")}
    return [f"server.ws_port{origins_by_name['ws_port']} must differ from server.port{origins_by_name['port']}"]


def _format_error(error: ErrorDetails, origins: Mapping[str, str]) -> str:
    path = [str(part)[:_NAME_LENGTH_SHOWN_MAX] for part in error["loc"]]
    names = [part for part in path if not part.isdecimal()]
    dotted_path = replace_unprintable(".".join(path), replacement_character)
    return f"{dotted_path}{_describe_origin('.'.join(names), origins)} {_describe_error(error, names)}"


def _describe_origin(path: str, origins: Mapping[str, str]) -> str:
    origin = origins.get(path)
    return f" ({origin})" if origin else ""


def _describe_error(error: ErrorDetails, path: list[str]) -> str:
    if error["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
        return _describe_unknown_key(path)
    for pattern, message in _ERROR_MESSAGES:
        if re.fullmatch(pattern, error["type"]):
            return message.format(**error.get("ctx", {}))
    return "is not valid"


def _describe_unknown_key(path: list[str]) -> str:
    *section, name = path
    if path == ["secrets", "vault", "token"]:
        return "must not be set in a file; set VAULT_TOKEN in the server's environment"
    known = sections().get(tuple(section), [])
    close_matches = get_close_matches(name, known, n=1)
    message = f"is unknown (known: {', '.join(known)})" if known else "is unknown"
    if close_matches:
        return f"{message}; did you mean '{close_matches[0]}'?"
    return f"{message}; secrets must not be set here" if _SECRET_NAME.search(name) else message
