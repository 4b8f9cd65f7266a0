"""Checks the records that an untrusted host sends: a runner may write only some events, and only consistent ones."""

import contextlib
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from sandbox.interfaces.journal import JournalDamagedError
from sandbox.journal import record_format
from sandbox.model import events as e
from sandbox.model.events import AttemptStarted, TaskSubmitted, Transition
from sandbox.model.fixed_limits import (
    WORKER_ARTIFACT_RECORDS_BYTES_MAX,
    WORKER_ARTIFACTS_MAX,
    WORKER_RECORD_BYTES_MAX,
    WORKER_RECORD_VALUES_MAX,
    WORKER_SMALL_RECORD_BYTES_MAX,
)
from sandbox.model.state_machine import IllegalEventError, advance, with_recorded_message
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState


class VerifiedCopy(NamedTuple):
    """A task computed from the records of a copy up to a byte offset, and the epoch of the last record.

    artifact_records_bytes: the size of all records of artifacts, as `WORKER_ARTIFACT_RECORDS_BYTES_MAX` counts them.
    """

    task: Task | None = None
    offset: int = 0
    epoch: int = 0
    artifact_records_bytes: int = 0


_SERVER_EVENTS = (TaskSubmitted, AttemptStarted)
_LARGE_EVENTS = (e.Output, e.AgentMessage, e.ToolCallStarted, e.ToolResult, e.AgentResult, e.AgentExited)
_ARTIFACT_RECORD_BYTES_MIN = 1024
_LONG_LINE_BYTES = 256 * 1024
_NESTING_MAX = 32
_INTEGER_BITS_MAX = 53
_long_line_lock = threading.Lock()
"""This lock is held while a long line is decoded.

Until the values of a line are counted, the line may need thirty times its size in memory.
"""


def artifact_record_bytes(line: bytes) -> int:
    """Return the bytes that the record of an artifact counts toward `WORKER_ARTIFACT_RECORDS_BYTES_MAX`."""
    return max(len(line), _ARTIFACT_RECORD_BYTES_MIN)


def split_lines(data: bytes) -> Iterator[bytes]:
    """Yield each line with its newline. A list of all lines could need a hundred times as much memory as the data."""
    begin = 0
    while begin < len(data):
        end = data.find(b"\n", begin) + 1 or len(data)
        yield data[begin:end]
        begin = end


def _decode_untrusted(line: bytes) -> e.Record:
    """Decode a record. Raises JournalDamagedError if its size or its values exceed what a runner writes."""
    if len(line) > WORKER_RECORD_BYTES_MAX:
        raise JournalDamagedError(f"A record has more than {WORKER_RECORD_BYTES_MAX} bytes.")
    if not record_format.is_valid(line):
        raise JournalDamagedError("A record does not match its checksum.")
    with _long_line_lock if len(line) > _LONG_LINE_BYTES else contextlib.nullcontext():
        record = record_format.decode(line)
        if not isinstance(record.event, _LARGE_EVENTS) and len(line) > WORKER_SMALL_RECORD_BYTES_MAX:
            raise JournalDamagedError(f"Record {record.seq} has more than {WORKER_SMALL_RECORD_BYTES_MAX} bytes.")
        if isinstance(record.event, _SERVER_EVENTS):
            raise JournalDamagedError(f"Record {record.seq} has a type that only a server may write.")
        if not isinstance(record.event, e.Output):
            _check_values(record)
        if isinstance(record.event, e.Usage | e.Progress):
            _check_counts(record.seq, record.event)
    return record


def _check_values(record: e.Record) -> None:
    """Check the number, the nesting and the size of an event's values. Raises JournalDamagedError."""
    values: Sequence[Any] = (record.event,)
    values_left = WORKER_RECORD_VALUES_MAX
    for _ in range(_NESTING_MAX):
        items = [_items(value) for value in values if isinstance(value, dict | list | tuple | msgspec.Struct)]
        values_left -= sum(map(len, items))
        if values_left < 0 or any(isinstance(one, int) and one.bit_length() > _INTEGER_BITS_MAX for one in values):
            break
        values = [item for each in items for item in each]
        if not values:
            return
    raise JournalDamagedError(
        f"Record {record.seq} has a number that is too large, too many values, or values that are nested too deeply."
    )


def _check_counts(seq: int, event: e.Usage | e.Progress) -> None:
    """Check that the event does not lower a total and that its cost is possible. Raises JournalDamagedError."""
    is_negative = any(isinstance(value, int) and value < 0 for value in msgspec.structs.astuple(event))
    if is_negative or not 0 <= (event.cost_usd or 0.0) <= e.COST_USD_MAX:
        raise JournalDamagedError(f"Record {seq} has a negative count or an impossible cost.")


def _items(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return value.values()
    return msgspec.structs.astuple(value) if isinstance(value, msgspec.Struct) else value


def verify_records(verified: VerifiedCopy, data: bytes) -> VerifiedCopy:
    """Return the state after the records. Raises JournalDamagedError if a runner must not write one of them."""
    task, epoch, artifact_records_bytes = verified.task, verified.epoch, verified.artifact_records_bytes
    for line in split_lines(data):
        record = _decode_untrusted(line)
        if task is None:
            raise JournalDamagedError("The server has no record of the task.")
        if not epoch <= record.epoch <= epoch + 1:
            raise JournalDamagedError(
                f"Record {record.seq} has the epoch {record.epoch}, but the previous epoch is {epoch}."
            )
        try:
            result = advance(task, record.event, seq=record.seq, at=record.at)
        except IllegalEventError as error:
            raise JournalDamagedError(f"Record {record.seq} is not allowed: {error.message}") from error
        if _states(result.transition) != _states(record.transition):
            raise JournalDamagedError(f"Record {record.seq} contains an incorrect state change.")
        task, epoch = with_recorded_message(result.task, record), record.epoch
        if len(task.artifacts) > WORKER_ARTIFACTS_MAX:
            raise JournalDamagedError(f"The task has more than {WORKER_ARTIFACTS_MAX} artifacts.")
        if isinstance(record.event, e.ArtifactCollected):
            artifact_records_bytes += artifact_record_bytes(line)
            if artifact_records_bytes > WORKER_ARTIFACT_RECORDS_BYTES_MAX:
                raise JournalDamagedError("The records of the task's artifacts are too large.")
    return VerifiedCopy(task, verified.offset + len(data), epoch, artifact_records_bytes)


def _states(transition: Transition | None) -> tuple[TaskState | None, TaskState] | None:
    return None if transition is None else (transition.previous_state, transition.new_state)
