"""The place of a record in its journal, found by halving: the numbers in the lines are all the index there is.

Nothing is remembered, so nothing can be out of date after a torn tail, a restart or another journal in the same place.
"""

from pathlib import Path
from typing import BinaryIO

from sandbox.journal import line
from sandbox.journal.extent import lines, refuse_damage

SCANNED_BYTES_MAX = 64 * 1024
"""A stretch that is read line by line; a longer one is halved first."""


def find_record(records: Path, seq: int) -> int:
    """The offset of record `seq`, or after the last record; the contract's `Journals.find` for one file."""
    offset = _approach(records, seq)
    for begin, text in lines(records, offset):
        if not line.is_whole(text):
            refuse_damage(records, begin)
            return begin
        if line.seq_of(text) >= seq:
            return begin
        offset = begin + len(text)
    return offset


def _approach(records: Path, seq: int) -> int:
    """The offset of some record up to `seq`, or 0."""
    with records.open("rb") as file:
        low, high = 0, file.seek(0, 2)
        while high - low > SCANNED_BYTES_MAX:
            middle = (low + high) // 2
            begin = _next_line(file, middle)
            if begin < high and _is_up_to(records, begin, file.readline(line.LINE_BYTES_MAX), seq):
                low = begin
            else:
                high = middle
    return low


def _next_line(file: BinaryIO, offset: int) -> int:
    """Where the first line begins after the one that has this byte."""
    file.seek(offset)
    return offset + len(file.readline(line.LINE_BYTES_MAX))


def _is_up_to(records: Path, begin: int, text: bytes, seq: int) -> bool:
    if line.is_whole(text):
        return line.seq_of(text) <= seq
    refuse_damage(records, begin)
    return False
