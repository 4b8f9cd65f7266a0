"""Applies the options `--set PATH=VALUE` and `--id`, which set fields of a manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from sandbox.model.manifest import overrides as model
from sandbox.model.manifest.overrides import Override, OverrideError

if TYPE_CHECKING:
    from sandbox.model.manifest.document import Document


class OverriddenManifest:
    """A manifest with overrides applied: the body to send, and the locations of its fields in the original file."""

    content_type = "application/json"

    def __init__(self, document: Document, overrides: Sequence[Override]) -> None:
        from sandbox.model.input_errors import field_name
        from sandbox.model.manifest.json import write_json

        self.body = write_json(document.data)
        self._overridden = {field_name(override.path): override.origin for override in overrides}
        marks = {**document.value_locations, **document.key_locations}
        self._locations = {field_name(path): (location.line, location.column) for path, location in marks.items()}

    def locate_errors(self, field_errors: object) -> list[dict[str, Any]]:
        """Add to each of the API's `details` the line in the file, or the option that set the field."""
        listed: Iterable[Any] = field_errors if isinstance(field_errors, list) else ()
        return [self._locate(dict(field_error)) for field_error in listed if isinstance(field_error, Mapping)]

    def _locate(self, field_error: dict[str, Any]) -> dict[str, Any]:
        field = str(field_error.get("field"))
        if field in self._overridden:
            return {**field_error, "source": self._overridden[field]}
        line, column = self._locations.get(field, (None, None))
        return {**field_error, "line": line, "column": column}


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
