"""The manifest that a command receives: a file or stdin, the options that override its fields, and its errors."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, Self

import click

from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.console import escape_text
from sandbox.cli.output.formatting import pluralize
from sandbox.model.manifest import overrides as model
from sandbox.model.manifest.overrides import Override, OverrideError

if TYPE_CHECKING:
    from sandbox.model.input_errors import FieldError
    from sandbox.model.manifest.document import Document
    from sandbox.model.manifest.schema import Manifest


class OverriddenManifest:
    """A manifest with overrides applied: the body to send, and the locations of its fields in the original file."""

    content_type = "application/json"

    def __init__(self, document: Document, overrides: Sequence[Override]) -> None:
        from sandbox.model.input_errors import field_name
        from sandbox.model.manifest.document import write_json

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


class ManifestFile:
    """A manifest's bytes and format. name: for error messages."""

    def __init__(self, name: str, body: bytes) -> None:
        self.name = name
        self.body = body
        self.is_json = self.name.endswith(".json") or _is_json(self.body)

    @classmethod
    def read(cls, file: BinaryIO) -> Self:
        """Read the file argument of a command."""
        from sandbox.model.fixed_limits import BODY_BYTES_MAX

        is_stdin = file.name in {"<stdin>", "-", 0}  # 0: stdin was closed
        name = "<stdin>" if is_stdin else str(file.name)
        # read one byte beyond the limit to detect a manifest that is too large
        return cls(name, file.read(BODY_BYTES_MAX + 1))

    @property
    def content_type(self) -> str:
        """The media type of the manifest."""
        return "application/json" if self.is_json else "application/yaml"

    def parse(self) -> Manifest:
        """Parse and validate the manifest as the server does, except for the server's profiles.

        Raises the model's InvalidManifestError.
        """
        from sandbox.agents import registered_agents
        from sandbox.model.manifest.parser import parse_manifest

        return parse_manifest(self.body, agents=registered_agents(), is_json=self.is_json, profile_problems=None)

    def with_overrides(self, overrides: Sequence[Override]) -> OverriddenManifest:
        """Apply overrides. Raises the model's InvalidManifestError if the manifest cannot be parsed."""
        from sandbox.agents import registered_agents
        from sandbox.model.input_errors import InvalidManifestError
        from sandbox.model.manifest.parser import read_document

        document = read_document(self.body, agents=registered_agents(), is_json=self.is_json)
        if document.errors:
            raise InvalidManifestError(document.errors)
        for override in overrides:
            override.apply(document.data)
        return OverriddenManifest(document, overrides)


def _is_json(body: bytes) -> bool:
    if not body.removeprefix(BOM_UTF8).lstrip().startswith(b"{"):
        return False
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def field_error_lines(file_name: str, field_errors: object) -> list[str]:
    """Format each of the API's `details`: `task.yaml:12:3: vm.memory: must be …`."""
    listed: Iterable[Any] = field_errors if isinstance(field_errors, list) else ()
    return [_field_error_line(file_name, field_error) for field_error in listed if isinstance(field_error, Mapping)]


def fail_with_field_errors(file_name: str, message: str, field_errors: object) -> NoReturn:
    """Print the errors of a manifest and exit. A single error of an option is one line."""
    lines = field_error_lines(file_name, field_errors)
    if len(lines) == 1 and lines[0].startswith(_OPTION_PREFIX):
        fail(f"Error: {lines[0]}", ExitCode.INVALID_MANIFEST)
    summary = f"{escape_text(file_name)} has {pluralize(len(lines), 'error')}." if lines else escape_text(message)
    fail("\n".join([*lines, f"Error: {summary}"]), ExitCode.INVALID_MANIFEST)


def field_error_details(field_errors: Iterable[FieldError]) -> list[dict[str, Any]]:
    """Convert the model's errors to the form of the API's `details`."""
    import msgspec

    return [msgspec.to_builtins(field_error) for field_error in field_errors]


_OPTION_PREFIX = "--set "


def _field_error_line(file_name: str, field_error: Mapping[str, Any]) -> str:
    source = str(field_error.get("source") or file_name)
    if source.startswith(f"{_OPTION_PREFIX}{field_error.get('field')}="):
        message = str(field_error.get("message", "")).removeprefix("is an ")  # the option contains the field
        return escape_text(f"{source}: {message}")
    if field_error.get("line") is not None:
        source += f":{field_error['line']}:{field_error.get('column') or 1}"
    field = f"{field_error['field']}: " if field_error.get("field") else ""
    return escape_text(f"{source}: {field}{field_error.get('message', '')}")
