"""Reads a journal, possibly while it is being written."""

import os
from collections.abc import Iterable
from pathlib import Path

from sandbox.interfaces.journal import JournalDamagedError, JournalOffsetError, RecordBatch
from sandbox.journal import record_format
from sandbox.journal.compressed import CompressedJournal
from sandbox.journal.extent import raise_if_damaged
from sandbox.model.events import Record


def read_batch(records: Path, offset: int, bytes_max: int) -> RecordBatch:
    """Read whole records from `offset`; `Journals.read` for one file."""
    return _decode_batch(records, offset, _read_lines(records, offset, bytes_max))


def read_compressed_batch(compressed: CompressedJournal, records: Path, offset: int, bytes_max: int) -> RecordBatch:
    """Like `read_batch` for a compressed journal; returns at most the records of one member."""
    return _decode_batch(records, offset, compressed.lines(offset, bytes_max))


def _decode_batch(records: Path, offset: int, texts: Iterable[bytes]) -> RecordBatch:
    found: list[Record] = []
    at = offset
    for text in texts:
        if not record_format.is_complete(text):
            raise_if_damaged(records, at)
            break
        record = record_format.decode(text)
        if found and record.seq != found[-1].seq + 1:
            raise JournalDamagedError(f"Record {record.seq} follows {found[-1].seq}; restore {records}.")
        found.append(record)
        at += len(text)
    return RecordBatch(found, at)


def has_first_record(records: Path) -> bool:
    """Whether record 1 exists, which means that the task was accepted.

    A damaged record 1 counts if its line is complete or whole records follow it. An unreadable file counts too; the
    error is reported when it is read.
    """
    try:
        with records.open("rb") as file:
            if file.readline(record_format.LINE_BYTES_MAX).endswith(b"\n"):
                return True
        raise_if_damaged(records, 0)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (JournalDamagedError, OSError):
        return True
    return False


def _read_lines(records: Path, offset: int, bytes_max: int) -> list[bytes]:
    """Return the complete lines that end within `bytes_max`, or the first one if it is longer.

    Raises JournalOffsetError if no line ends at `offset`: the journal has become shorter since the offset was read
    (after a power loss, records that were not flushed are gone).
    """
    with records.open("rb", buffering=0) as file:
        if offset and os.pread(file.fileno(), 1, offset - 1) != b"\n":
            raise JournalOffsetError(f"No record ends at byte {offset} of {records}; read the journal from its start.")
        data = os.pread(file.fileno(), bytes_max, offset)
        while b"\n" not in data and len(data) < record_format.LINE_BYTES_MAX:
            more = os.pread(file.fileno(), max(bytes_max, len(data)), offset + len(data))
            if not more:
                return []
            data += more
    return [text + b"\n" for text in data.split(b"\n")[:-1]] or [data]
