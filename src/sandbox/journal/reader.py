"""Reads the records and the offsets of a journal file, and finds the file's end.

The file may be written at the same time. Memory is bounded.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from sandbox.interfaces.journal import JournalDamagedError, JournalOffsetError, RecordBatch
from sandbox.journal import record_format
from sandbox.model.events import Record

_BUFFER_BYTES = 1024 * 1024


class JournalEnd(msgspec.Struct, frozen=True):
    """The last record (None if there is none) and the byte offset after it. Any data after it is a torn tail."""

    last_record: Record | None
    end_offset: int


def find_journal_end(records_path: Path) -> JournalEnd:
    """Check every line of a journal and return its end.

    Raises FileNotFoundError, or JournalDamagedError if anything before the last record is invalid.
    """
    seq, end, last_line = 0, 0, b""
    for offset, text in iter_lines(records_path):
        if not record_format.is_valid(text):
            raise_if_damaged(records_path, offset)
            break
        if not record_format.has_seq(text, seq + 1):
            raise JournalDamagedError(
                f"The record at byte {offset} does not have number {seq + 1}; restore {records_path}."
            )
        seq, end, last_line = seq + 1, offset + len(text), text
    return JournalEnd(record_format.decode(last_line) if last_line else None, end)


def raise_if_damaged(records_path: Path, offset: int) -> None:
    """Raise JournalDamagedError if whole records follow the invalid line at `offset`.

    Returns for a torn tail, which a crash leaves, and for a line that was completed in the meantime.
    """
    for begin, text in iter_lines(records_path, offset):
        whole = record_format.is_valid(text)
        if whole and begin == offset:
            return
        if whole or record_format.has_embedded_record(text):
            raise JournalDamagedError(
                f"The record at byte {offset} does not match its checksum; restore {records_path}."
            )


def iter_lines(records_path: Path, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield each line's offset and the line with its newline; the last line may lack its newline.

    A line longer than any record is split, so damage cannot exhaust memory.
    """
    with records_path.open("rb", buffering=_BUFFER_BYTES) as file:
        file.seek(offset)
        while text := file.readline(record_format.LINE_BYTES_MAX):
            yield offset, text
            offset += len(text)


LINEAR_SCAN_BYTES_MAX = 64 * 1024
"""Maximum size of a range that is scanned line by line; a larger one is bisected first."""


def find_record_offset(records_path: Path, seq: int) -> int:
    """Return the offset of record `seq`, or the end of the last record.

    Implements `Journals.find_offset` for one file.
    """
    offset = _bisect(records_path, seq)
    for begin, text in iter_lines(records_path, offset):
        if not record_format.is_valid(text):
            raise_if_damaged(records_path, begin)
            return begin
        if record_format.seq_of(text) >= seq:
            return begin
        offset = begin + len(text)
    return offset


def _bisect(records_path: Path, seq: int) -> int:
    """Return the offset of a record at or before record `seq`, or 0."""
    with records_path.open("rb") as file:
        low, high = 0, file.seek(0, 2)
        while high - low > LINEAR_SCAN_BYTES_MAX:
            middle = (low + high) // 2
            begin = _next_line_offset(file, middle)
            if begin < high and _is_at_or_before(records_path, begin, file.readline(record_format.LINE_BYTES_MAX), seq):
                low = begin
            else:
                high = middle
    return low


def _next_line_offset(file: BinaryIO, offset: int) -> int:
    """Return the offset of the first line after the one that contains this byte."""
    file.seek(offset)
    return offset + len(file.readline(record_format.LINE_BYTES_MAX))


def _is_at_or_before(records_path: Path, begin: int, text: bytes, seq: int) -> bool:
    if record_format.is_valid(text):
        return record_format.seq_of(text) <= seq
    raise_if_damaged(records_path, begin)
    return False


def read_batch(records_path: Path, offset: int, bytes_max: int) -> RecordBatch:
    """Read whole records from `offset`. Implements `Journals.read` for one file."""
    return decode_batch(records_path, offset, _read_lines(records_path, offset, bytes_max))


def decode_batch(records_path: Path, offset: int, texts: Iterable[bytes]) -> RecordBatch:
    """Decode the lines from `offset` up to the first incomplete one. Error messages contain `records_path`.

    Raises JournalDamagedError.
    """
    found: list[Record] = []
    at = offset
    for text in texts:
        if not record_format.is_valid(text):
            raise_if_damaged(records_path, at)
            break
        record = record_format.decode(text)
        if found and record.seq != found[-1].seq + 1:
            raise JournalDamagedError(f"Record {record.seq} follows record {found[-1].seq}; restore {records_path}.")
        found.append(record)
        at += len(text)
    return RecordBatch(found, at)


def has_first_record(records_path: Path) -> bool:
    """Return whether record 1 exists. If it does, the task was accepted.

    A damaged record 1 counts if its line is complete or whole records follow it. An unreadable file counts too; the
    error is reported when the journal is read.
    """
    try:
        with records_path.open("rb") as file:
            if file.readline(record_format.LINE_BYTES_MAX).endswith(b"\n"):
                return True
        raise_if_damaged(records_path, 0)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (JournalDamagedError, OSError):
        return True
    return False


def _read_lines(records_path: Path, offset: int, bytes_max: int) -> list[bytes]:
    """Return the complete lines that end within `bytes_max`, or the first one if it is longer.

    Raises JournalOffsetError if no line ends at `offset`: the journal has become shorter since the offset was read
    (after a power loss, records that were not flushed are gone).
    """
    with records_path.open("rb", buffering=0) as file:
        if offset and os.pread(file.fileno(), 1, offset - 1) != b"\n":
            raise JournalOffsetError(
                f"No record ends at byte {offset} of {records_path}; read the journal from its start."
            )
        data = os.pread(file.fileno(), bytes_max, offset)
        while b"\n" not in data and len(data) < record_format.LINE_BYTES_MAX:
            more = os.pread(file.fileno(), max(bytes_max, len(data)), offset + len(data))
            if not more:
                return []
            data += more
    return [text + b"\n" for text in data.split(b"\n")[:-1]] or [data]
