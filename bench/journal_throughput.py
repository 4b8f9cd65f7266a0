"""Compares appends per second of 200-byte output lines with plain writes; then measures opening and reading 100 MB.

Run: python bench/journal_throughput.py [DIRECTORY]    (the directory selects the disk)
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from sandbox.journal.journals import FileJournals
from sandbox.journal.writer import FileJournalWriter
from sandbox.model.events import Output

APPENDS = 20_000
JOURNAL_BYTES = 100 * 1024 * 1024
DATA = b"x" * 199 + b"\n"


def seconds(action: Callable[[], None]) -> float:
    """Return the duration of `action`."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def append(writer: FileJournalWriter) -> None:
    """Append the lines to a journal."""
    for _ in range(APPENDS):
        writer.append(Output.from_bytes("stdout", DATA), at=datetime.now(UTC))


def write(bare_fd: int, lines: list[bytes]) -> None:
    """Write the lines without a journal."""
    for line in lines:
        os.write(bare_fd, line)


def compare_with_bare_writes(directory: Path) -> None:
    """Write the same bytes through the journal and with `os.write`; print the best of three rounds."""
    journal_seconds, bare_seconds = [], []
    for number in range(3):
        writer = FileJournals(directory).create(f"round-{number}")
        journal_seconds.append(seconds(partial(append, writer)))
        writer.close()
        lines = (directory / "tasks" / f"round-{number}" / "journal" / "records").read_bytes().splitlines(keepends=True)
        bare_fd = os.open(directory / f"bare-{number}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        bare_seconds.append(seconds(partial(write, bare_fd, lines)))
        os.close(bare_fd)
    journal, bare = min(journal_seconds), min(bare_seconds)
    print(f"append      {APPENDS / journal:10,.0f}/s")
    print(f"bare write  {APPENDS / bare:10,.0f}/s   ratio {journal / bare:.2f}")


def measure_long_journal(directory: Path) -> None:
    """Measure opening, which checks every line, and reading, which decodes every record."""
    journals = FileJournals(directory)
    writer = journals.create("long")
    records = directory / "tasks" / "long" / "journal" / "records"
    while records.stat().st_size < JOURNAL_BYTES:
        for _ in range(1000):
            writer.append(Output.from_bytes("stdout", DATA), at=datetime.now(UTC))
    writer.close()

    def read_all() -> None:
        offset = 0
        while (batch := journals.read("long", offset)).records:
            offset = batch.next_offset

    print(f"open 100 MB {seconds(lambda: journals.open('long').close()):10.2f} s")
    print(f"read 100 MB {seconds(read_all):10.2f} s")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        compare_with_bare_writes(Path(name))
        measure_long_journal(Path(name))
