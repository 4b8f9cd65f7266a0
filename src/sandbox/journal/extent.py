"""Finds the end of a journal and the offsets of records, in bounded memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from sandbox.interfaces.journal import JournalDamagedError
from sandbox.journal import record_format
from sandbox.model.events import Record

_BUFFER_BYTES = 1024 * 1024


class JournalEnd(msgspec.Struct, frozen=True):
    """The last record (None if there is none) and the byte offset after it. Any data after it is a torn tail."""

    last: Record | None
    end: int


def measure_extent(records: Path) -> JournalEnd:
    """Check every line of a journal.

    Raises FileNotFoundError, or JournalDamagedError if anything before the last record is invalid.
    """
    seq, end, last_line = 0, 0, b""
    for offset, text in iter_lines(records):
        if not record_format.is_complete(text):
            raise_if_damaged(records, offset)
            break
        if not record_format.has_seq(text, seq + 1):
            raise JournalDamagedError(f"The record at byte {offset} is not number {seq + 1}; restore {records}.")
        seq, end, last_line = seq + 1, offset + len(text), text
    return JournalEnd(record_format.decode(last_line) if last_line else None, end)


def raise_if_damaged(records: Path, offset: int) -> None:
    """Raise JournalDamagedError if whole records follow the invalid line at `offset`.

    Returns for a torn tail, which a crash leaves, and for a line that was completed in the meantime.
    """
    for begin, text in iter_lines(records, offset):
        whole = record_format.is_complete(text)
        if whole and begin == offset:
            return
        if whole or record_format.has_embedded_record(text):
            raise JournalDamagedError(f"The record at byte {offset} does not match its checksum; restore {records}.")


def iter_lines(records: Path, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield each line's offset and the line with its newline; the last line may lack its newline.

    A line longer than any record is split, so damage cannot exhaust memory.
    """
    with records.open("rb", buffering=_BUFFER_BYTES) as file:
        file.seek(offset)
        while text := file.readline(record_format.LINE_BYTES_MAX):
            yield offset, text
            offset += len(text)


LINEAR_SCAN_BYTES_MAX = 64 * 1024
"""Maximum size of a range that is scanned line by line; a larger one is bisected first."""


def find_record_offset(records: Path, seq: int) -> int:
    """Return the offset of record `seq`, or the end of the last record; `Journals.find_offset` for one file."""
    offset = _bisect(records, seq)
    for begin, text in iter_lines(records, offset):
        if not record_format.is_complete(text):
            raise_if_damaged(records, begin)
            return begin
        if record_format.seq_of(text) >= seq:
            return begin
        offset = begin + len(text)
    return offset


def _bisect(records: Path, seq: int) -> int:
    """Return the offset of some record up to `seq`, or 0."""
    with records.open("rb") as file:
        low, high = 0, file.seek(0, 2)
        while high - low > LINEAR_SCAN_BYTES_MAX:
            middle = (low + high) // 2
            begin = _next_line_offset(file, middle)
            if begin < high and _is_at_or_before(records, begin, file.readline(record_format.LINE_BYTES_MAX), seq):
                low = begin
            else:
                high = middle
    return low


def _next_line_offset(file: BinaryIO, offset: int) -> int:
    """Return the offset of the first line after the one that contains this byte."""
    file.seek(offset)
    return offset + len(file.readline(record_format.LINE_BYTES_MAX))


def _is_at_or_before(records: Path, begin: int, text: bytes, seq: int) -> bool:
    if record_format.is_complete(text):
        return record_format.seq_of(text) <= seq
    raise_if_damaged(records, begin)
    return False
