"""A task's manifest as its user may have written it, to hand it in again."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from sandbox.model.manifest import Manifest
from sandbox.model.manifest_writing import write_yaml


def write_manifest(manifest: Manifest, *, with_id: bool = False, with_sources: bool = True) -> str:
    """YAML without what the defaults say anyway, and without the id, which a second task cannot have.

    with_sources: tell where secrets come from, which is for operators; else they are told by name only.
    """
    data = _spoken(manifest)
    if not with_sources and manifest.secrets:
        data["secrets"] = [{"name": secret.name} for secret in manifest.secrets]
    if not with_id:
        data["metadata"].pop("id", None)
    return write_yaml(data)


def _spoken(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        told = [(field, getattr(value, field.name)) for field in fields(value)]
        return {field.name: _spoken(each) for field, each in told if each != _default(field)}
    if isinstance(value, dict):
        return {key: _spoken(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_spoken(each) for each in value]
    return value


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
