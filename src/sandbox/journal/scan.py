"""A look at a whole journal, in bounded memory: where its records end and what the last one is."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts.journal import JournalDamagedError
from sandbox.journal import line
from sandbox.model.event import Record

_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Extent:
    """The last record (None for none) and the byte offset after it. What lies behind is a torn tail."""

    last: Record | None
    end: int


def measure(records_fd: int) -> Extent:
    """Check every line of a journal. Raises JournalDamagedError when something before the last record is not right."""
    seq, end, last_line = 0, 0, b""
    for offset, text in lines(records_fd):
        if not line.is_whole(text):
            refuse_records_after(records_fd, offset)
            break
        if not line.has_seq(text, seq + 1):
            raise JournalDamagedError(f"The record at byte {offset} is not number {seq + 1}; restore the journal.")
        seq, end, last_line = seq + 1, offset + len(text), text
    return Extent(line.decode(last_line) if last_line else None, end)


def refuse_records_after(records_fd: int, offset: int) -> None:
    """Tell a torn tail, which a crash leaves, from damage: a line that is not whole, with whole ones after it.

    Raises JournalDamagedError for the latter.
    """
    damaged = False
    for _, text in lines(records_fd, offset):
        if not line.is_whole(text):
            damaged = True
        elif damaged:
            raise JournalDamagedError(f"The record at byte {offset} does not match its checksum; restore the journal.")
        else:
            return


def lines(records_fd: int, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Lines with their newlines, and where they begin; the last may lack its newline.

    What is longer than any record comes in pieces, so that no damage can fill the memory.
    """
    pieces: list[bytes] = []
    start = position = offset
    while chunk := os.pread(records_fd, _CHUNK_BYTES, position):
        position += len(chunk)
        for piece in chunk.splitlines(keepends=True) if b"\r" not in chunk else _split(chunk):
            pieces.append(piece)
            if piece.endswith(b"\n") or sum(map(len, pieces)) > line.LINE_BYTES_MAX:
                text = b"".join(pieces)
                yield start, text
                start += len(text)
                pieces.clear()
    if pieces:
        yield start, b"".join(pieces)


def _split(chunk: bytes) -> list[bytes]:
    """`bytes.splitlines` breaks at carriage returns too, which only a damaged journal has."""
    *whole, rest = chunk.split(b"\n")
    return [text + b"\n" for text in whole] + ([rest] if rest else [])
