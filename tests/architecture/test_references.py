"""The reference pages of REST, WebSocket and command line tell what the code does, and nothing else."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec
import pytest

from architecture.generated_reference import COMMON, commands, generated
from doubles.manifests import manifest
from sandbox.api.streaming.websocket import EVENT_TYPES
from sandbox.cli.errors import ExitCode
from sandbox.model import events as e
from sandbox.model.task import StateHistoryEntry, Task
from sandbox.model.task_state import TaskState
from sandbox.model.wire.events import current_state_event, end_event, to_wire_event

NOW = datetime(2026, 1, 29, tzinfo=UTC)
EVERY_FRAME = {"type", "task_id", "seq", "timestamp"}


@pytest.mark.parametrize("name", ["openapi.json", "docs/rest.md", "docs/cli.md"])
def test_what_is_made_from_the_code_is_current(root: Path, name: str):
    assert (root / name).read_text() == generated()[name], "run script/reference"


def rows(document: Path) -> dict[str, list[str]]:
    """The rows of all tables by their first cell."""
    lines = [line for line in document.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0].split()[0].strip("`,"): row for row in cells}


def told_fields() -> Iterator[tuple[str, set[str]]]:
    """What a frame of each type has beside what every frame has."""
    history = (StateHistoryEntry(TaskState.PENDING, NOW),)
    task = Task("task-1", manifest(), TaskState.PENDING, "Waiting", history, last_seq=1)
    for told in (current_state_event(task), end_event(task)):
        yield told["type"], told.keys() - EVERY_FRAME
    for event in (
        e.AttemptStarted("abcdefgh2345", "bubblewrap", "here", number=2),
        e.Output("stdout", "x\n"),
        e.Progress(),
        e.Metrics(),
        e.ToolCall("Bash", "id", 1),
        e.Usage("model", 1, 1),
        e.EgressDenied("host", 1, "reason"),
        e.ErrorReported("code", "message"),
        e.Gap(1, 2, "reason"),
    ):
        told = to_wire_event("task-1", e.Record(seq=1, epoch=1, at=NOW, event=event))
        assert told is not None
        yield told["type"], told.keys() - EVERY_FRAME


def test_every_type_of_event_is_listed_with_its_fields(root: Path):
    listed = rows(root / "docs" / "websocket.md")
    fields = {name: set(re.findall(r"`(\w+)`", row[1])) for name, row in listed.items()}
    assert fields == dict(told_fields())
    assert set(fields) >= EVENT_TYPES
    prose = (root / "docs" / "websocket.md").read_text()
    assert [name for name in msgspec.structs.asdict(e.Metrics()) if f"`{name}`" not in prose] == []


def test_every_exit_code_is_listed(root: Path):
    listed = {name for name in rows(root / "docs" / "cli.md") if name.isdigit()}
    assert listed == {str(code.value) for code in ExitCode}


def test_the_common_options_are_listed_and_every_command_that_asks_the_server_has_them(root: Path):
    listed = {name for name in rows(root / "docs" / "cli.md") if name in COMMON}
    assert listed == set(COMMON) - {"--help", "--version"}
    for name, command in commands():
        options = {one.opts[0] for one in command.params if isinstance(one, click.Option)}
        assert ("--server" in options) == ("--token" in options), name
