"""`--set PATH=VALUE`: sets one field of a manifest on the command line."""

from __future__ import annotations

import click

from sandbox.model.manifest import overrides as model
from sandbox.model.manifest.overrides import Override, OverrideError

__all__ = ["Override", "OverrideError", "id_override", "parse_override", "parse_overrides"]


def parse_overrides(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[Override]:
    """Parse the option's values; called by click."""
    return [parse_override(value) for value in values]


def id_override(task_id: str) -> Override:
    """Return the override that is equivalent to `--id`."""
    quoted = task_id.replace("'", "''")
    return Override(("metadata", "id"), task_id, f"--id {task_id}", f"metadata.id='{quoted}'")


def parse_override(text: str) -> Override:
    """Parse the value of `--set`. Raises click.BadParameter."""
    try:
        return model.parse_override(text, f"--set {text}")
    except OverrideError as error:
        raise click.BadParameter(str(error)) from None
