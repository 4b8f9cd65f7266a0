"""A task's manifest as its user may have written it, to hand it in again."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import yaml

from sandbox.model.manifest import Manifest

_WIDTH = 100


class _Dumper(yaml.SafeDumper):
    """Indents lists below their key, and writes texts of several lines as blocks."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _block(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _block)


def write_manifest(manifest: Manifest, *, with_id: bool = False) -> str:
    """YAML without what the defaults say anyway, and without the id, which a second task cannot have."""
    data = _spoken(manifest)
    if not with_id:
        data["metadata"].pop("id", None)
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)


def _spoken(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: spoken
            for field in fields(value)
            if not _is_default(value, field.name) and (spoken := _spoken(getattr(value, field.name))) not in ({}, [])
        }
    if isinstance(value, dict):
        return {key: _spoken(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_spoken(each) for each in value]
    return value


def _is_default(record: Any, name: str) -> bool:
    field = next(field for field in fields(record) if field.name == name)
    return bool(field.default == getattr(record, name))
