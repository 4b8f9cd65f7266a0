"""Writes manifests as plain data or as YAML, without default values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

import msgspec
import yaml

from sandbox.model.manifest.schema import AgentSchema, Manifest
from sandbox.model.manifest.yaml import resolve_scalar
from sandbox.model.printable import replace_invisible

_WIDTH = 100
_LINE_ENDS = re.compile("[\r\x85\u2028\u2029]")
"""Characters that a YAML reader treats as line breaks and normalizes."""


class _Dumper(yaml.SafeDumper):
    """Indents lists below their key and writes multi-line texts as blocks."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    is_quoted = _LINE_ENDS.search(text) or resolve_scalar(text) != text or _escape_invisible(text) != text
    style = '"' if is_quoted else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _escape_invisible(text: str) -> str:
    """Return the text with a YAML escape in place of each invisible character except TAB and LF."""
    return replace_invisible(text, lambda character: f"\\U{ord(character):08X}", allowed="\t\n")


_Dumper.add_representer(str, _represent_text)


def write_yaml(data: dict[str, Any]) -> str:
    """Return the document as YAML, with its fields in their given order and with invisible characters as escapes."""
    document = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return _escape_invisible(document)  # valid, because every text with such a character is double-quoted


def manifest_yaml(
    manifest: Manifest, agents: Mapping[str, AgentSchema], *, with_id: bool = False, with_sources: bool = True
) -> str:
    """Return the YAML text of the data that `manifest_data` returns."""
    return write_yaml(manifest_data(manifest, agents, with_id=with_id, with_sources=with_sources))


def manifest_data(
    manifest: Manifest, agents: Mapping[str, AgentSchema], *, with_id: bool = False, with_sources: bool = True
) -> dict[str, Any]:
    """Return a manifest as plain data, without default values.

    with_id: include the task's id; omit it to submit the manifest again. with_sources: include the sources of secrets,
    which only operators may see; otherwise include only their names.
    """
    data = {
        "version": "1",
        "kind": "Task",
        "metadata": _explicit_fields(manifest.metadata),
        "repository": _explicit_fields(manifest.repository),
        manifest.agent.kind: _explicit_fields(_read_section(manifest, agents)),
    }
    optional = {name: _explicit_fields(getattr(manifest, name)) for name in ("vm", "secrets", "lifecycle")}
    data |= {name: explicit for name, explicit in optional.items() if explicit}
    if not with_sources and manifest.secrets:
        data["secrets"] = [{"name": secret.name} for secret in manifest.secrets]
    if not with_id:
        data["metadata"].pop("id", None)
    return data


def _read_section(manifest: Manifest, agents: Mapping[str, AgentSchema]) -> Any:
    """Return the agent's section. If a newer version wrote it and this version cannot read it, return plain data."""
    agent = agents.get(manifest.agent.kind)
    if agent is not None:
        with suppress(msgspec.ValidationError):
            return msgspec.convert(manifest.agent.settings, agent.section_type)
    return manifest.agent.settings


def _explicit_fields(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        values = [(declared, getattr(value, declared.name)) for declared in fields(value)]
        return {declared.name: _explicit_fields(each) for declared, each in values if each != _field_default(declared)}
    if isinstance(value, dict):
        return {key: _explicit_fields(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_explicit_fields(each) for each in value]
    return value


def _field_default(declared: Field[Any]) -> Any:
    return declared.default if declared.default_factory is MISSING else declared.default_factory()
