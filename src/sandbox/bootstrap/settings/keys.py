"""Configuration keys with their environment variables, options and paths in the file, from `settings.schema`."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from sandbox.bootstrap.settings.schema import Description, ServerSettings

_ROOT_SECTION = "server"
"""The section whose keys have command-line options, and environment variables without the section's name."""

_DEFAULT_TEXTS = {"server.data_dir": "$XDG_DATA_HOME/sandbox"}


@dataclass(frozen=True)
class SettingKey:
    """One setting. section: its path in the file; value_type: its type without bounds."""

    section: tuple[str, ...]
    name: str
    value_type: Any
    default: Any
    description: str

    @property
    def path(self) -> str:
        """The dotted path, such as `secrets.vault.address`."""
        return ".".join((*self.section, self.name))

    @property
    def variable(self) -> str:
        """The environment variable."""
        section = () if self.section == (_ROOT_SECTION,) else self.section
        return "_".join(("SANDBOX", *section, self.name)).upper()

    @property
    def option(self) -> str | None:
        """The command-line option, or None. Only the server section has options."""
        is_option = self.section == (_ROOT_SECTION,) and self.value_type is not tuple
        return "--" + self.name.replace("_", "-") if is_option else None

    @property
    def default_text(self) -> str:
        """The default for display."""
        if self.path in _DEFAULT_TEXTS:
            return _DEFAULT_TEXTS[self.path]
        if isinstance(self.default, tuple):
            return json.dumps(self.default)  # the syntax of sandbox.toml
        return "none" if self.default is None else str(self.default)

    def parse(self, text: str) -> Any:
        """Parse the text of a variable or option. Invalid text is returned unchanged; the schema rejects it later."""
        if self.value_type is tuple:
            return [part.strip() for part in text.split(",") if part.strip()]
        if self.value_type in {int, float}:
            try:
                return self.value_type(text)
            except ValueError:
                return text
        return text


@cache
def setting_keys() -> tuple[SettingKey, ...]:
    """Return all keys, in schema order."""
    return tuple(_iterate_keys(ServerSettings, ()))


def sections() -> dict[tuple[str, ...], list[str]]:
    """Return the names that each section may contain."""
    names_by_section: dict[tuple[str, ...], list[str]] = {}
    for key in setting_keys():
        for depth in range(len(key.section) + 1):
            inside = (*key.section, key.name)[depth]
            names = names_by_section.setdefault(key.section[:depth], [])
            if inside not in names:
                names.append(inside)
    return names_by_section


def _iterate_keys(section_class: Any, section: tuple[str, ...]) -> Iterator[SettingKey]:
    hints = get_type_hints(section_class, include_extras=True)
    for field in fields(section_class):
        kind = hints[field.name]
        if is_dataclass(kind):
            yield from _iterate_keys(kind, (*section, field.name))
            continue
        if get_origin(kind) in {Union, types.UnionType}:
            kind = next(member for member in get_args(kind) if member is not type(None))
        bare, *marks = get_args(kind)
        purpose = next(mark.text for mark in marks if isinstance(mark, Description))
        default = field.default if field.default is not MISSING else None
        yield SettingKey(section, field.name, get_origin(bare) or bare, default, purpose)
