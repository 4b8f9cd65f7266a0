"""Mistakes of a manifest, one a line, in the form that editors jump to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from sandbox.cli.exit_code import ExitCode
from sandbox.cli.failures import fail
from sandbox.cli.figures import counted
from sandbox.cli.visible import visible

if TYPE_CHECKING:
    from sandbox.model.mistake import Mistake


def mistake_lines(file_name: str, mistakes: object) -> list[str]:
    """`task.yaml:12:3: vm.memory: must be …` for each of the API's `details`."""
    listed: Iterable[Any] = mistakes if isinstance(mistakes, list) else ()
    return [_line(file_name, mistake) for mistake in listed if isinstance(mistake, Mapping)]


def fail_with_mistakes(file_name: str, message: str, mistakes: object) -> NoReturn:
    """Say what is wrong with a manifest that was to be submitted, and end."""
    lines = mistake_lines(file_name, mistakes)
    summary = f"{visible(file_name)} has {counted(len(lines), 'mistake')}." if lines else visible(message)
    fail("\n".join([*lines, f"Error: {summary}"]), ExitCode.INVALID_MANIFEST)


def details(mistakes: Iterable[Mistake]) -> list[dict[str, Any]]:
    """The model's mistakes in the form of the API's `details`."""
    fields = ("field", "rule", "message", "line", "column")
    return [{field: getattr(mistake, field) for field in fields} for mistake in mistakes]


def _line(file_name: str, mistake: Mapping[str, Any]) -> str:
    place = str(mistake.get("source") or file_name)
    if mistake.get("line") is not None:
        place += f":{mistake['line']}:{mistake.get('column') or 1}"
    field = f"{mistake['field']}: " if mistake.get("field") else ""
    return visible(f"{place}: {field}{mistake.get('message', '')}")
