"""The manifest argument of a command (a file, or `-` for stdin), and the errors in it."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, Self

from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.manifest_overrides import OverriddenManifest
from sandbox.cli.output.formatting import pluralize
from sandbox.cli.output.terminal_text import escape_text
from sandbox.model.manifest.overrides import Override

if TYPE_CHECKING:
    from sandbox.model.input_errors import FieldError
    from sandbox.model.manifest.schema import Manifest


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
