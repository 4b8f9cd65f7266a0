"""The reference pages of REST, WebSocket and the command line match the code."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec
import pytest

from architecture.generated_reference import COMMON_OPTIONS, commands, generated
from doubles.manifests import manifest
from sandbox.api.streaming.websocket import EVENT_TYPES
from sandbox.cli.errors import ExitCode
from sandbox.model import events as e
from sandbox.model.task import StateHistoryEntry, Task
from sandbox.model.task_state import TaskState
from sandbox.model.wire.events import current_state_event, end_event, to_wire_event

NOW = datetime(2026, 1, 29, tzinfo=UTC)
COMMON_FIELDS = {"type", "task_id", "seq", "timestamp"}


@pytest.mark.parametrize("name", ["openapi.json", "docs/rest.md", "docs/cli.md", "docs/python-client.md"])
def test_generated_references_are_current(root: Path, name: str):
    assert (root / name).read_text() == generated()[name], "run script/reference"


def rows(document: Path) -> dict[str, list[str]]:
    """The rows of all tables by their first cell."""
    lines = [line for line in document.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0].split()[0].strip("`,"): row for row in cells}


def event_fields() -> Iterator[tuple[str, set[str]]]:
    """The fields of each event type besides the common ones."""
    history = (StateHistoryEntry(TaskState.PENDING, NOW),)
    task = Task("task-1", manifest(), TaskState.PENDING, "Waiting", history, last_seq=1)
    for body in (current_state_event(task), end_event(task)):
        yield body["type"], body.keys() - COMMON_FIELDS
    for event in (
        e.AttemptStarted("abcdefgh2345", "bubblewrap", "here", number=2),
        e.Output("stdout", "x\n"),
        e.Progress(),
        e.Metrics(),
        e.AgentMessage("text"),
        e.ToolCallStarted("Bash", "id"),
        e.ToolResult("id"),
        e.AgentResult("text"),
        e.ToolCall("Bash", "id", 1),
        e.Usage("model", 1, 1),
        e.EgressDenied("host", 1, "reason"),
        e.ErrorReported("code", "message"),
        e.Gap(1, 2, "reason"),
    ):
        body = to_wire_event("task-1", e.Record(seq=1, epoch=1, at=NOW, event=event))
        assert body is not None
        yield body["type"], body.keys() - COMMON_FIELDS
    transcript = e.Record(seq=1, epoch=1, at=NOW, event=e.Output("transcript", "x\n"))
    converted = to_wire_event("task-1", transcript, [e.AgentMessage("text")])
    assert converted is not None
    yield converted["type"], converted.keys() - COMMON_FIELDS


def test_each_event_type_is_listed_with_its_fields(root: Path):
    listed = rows(root / "docs" / "websocket.md")
    fields = {name: set(re.findall(r"`(\w+)`", row[1])) for name, row in listed.items()}
    assert fields == dict(event_fields())
    assert set(fields) >= EVENT_TYPES
    prose = (root / "docs" / "websocket.md").read_text()
    assert [name for name in msgspec.structs.asdict(e.Metrics()) if f"`{name}`" not in prose] == []


def test_each_exit_code_is_listed(root: Path):
    listed = {name for name in rows(root / "docs" / "cli.md") if name.isdigit()}
    assert listed == {str(code.value) for code in ExitCode}


def test_common_options_are_listed_and_consistent(root: Path):
    listed = {name for name in rows(root / "docs" / "cli.md") if name in COMMON_OPTIONS}
    assert listed == set(COMMON_OPTIONS) - {"--help", "--version"}
    for name, command in commands():
        options = {parameter.opts[0] for parameter in command.params if isinstance(parameter, click.Option)}
        assert ("--server" in options) == ("--token" in options), name
