"""How far a journal reaches: its last record, found by a look at every line in bounded memory."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from sandbox.contracts.journal import JournalDamagedError
from sandbox.journal import line
from sandbox.model.event import Record

_BUFFER_BYTES = 1024 * 1024


class Extent(msgspec.Struct, frozen=True):
    """The last record (None for none) and the byte offset after it. What lies behind is a torn tail."""

    last: Record | None
    end: int


def measure(records: Path) -> Extent:
    """Check every line of a journal.

    Raises JournalDamagedError when anything before the last record is not right, FileNotFoundError.
    """
    seq, end, last_line = 0, 0, b""
    for offset, text in lines(records):
        if not line.is_whole(text):
            refuse_damage(records, offset)
            break
        if not line.has_seq(text, seq + 1):
            raise JournalDamagedError(f"The record at byte {offset} is not number {seq + 1}; restore {records}.")
        seq, end, last_line = seq + 1, offset + len(text), text
    return Extent(line.decode(last_line) if last_line else None, end)


def refuse_damage(records: Path, offset: int) -> None:
    """Tell a torn tail at `offset`, which a crash leaves, from damage, which has whole records after it.

    Returns as well when the line has become whole since it was looked at. Raises JournalDamagedError for damage.
    """
    for begin, text in lines(records, offset):
        whole = line.is_whole(text)
        if whole and begin == offset:
            return
        if whole or line.hides_record(text):
            raise JournalDamagedError(f"The record at byte {offset} does not match its checksum; restore {records}.")


def lines(records: Path, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line with its newline; the last may lack its own.

    What is longer than any record comes in pieces, so that no damage can fill the memory.
    """
    with records.open("rb", buffering=_BUFFER_BYTES) as file:
        file.seek(offset)
        while text := file.readline(line.LINE_BYTES_MAX):
            yield offset, text
            offset += len(text)
