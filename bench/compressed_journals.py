"""Measures the cost and the space savings of compressed journals: 100 MB of agent output, plain and compressed.

Run: python bench/compressed_journals.py [DIRECTORY]    (the directory selects the disk)
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from sandbox.journal.journals import FileJournals
from sandbox.model.events import Output, TaskFinished, ToolCallEnded

JOURNAL_BYTES = 100 * 1024 * 1024
SYLLABLES = ("ba", "de", "fi", "go", "lu", "mar", "ten", "sol")
WORDS = [one + other for one in SYLLABLES for other in SYLLABLES]
RNG = random.Random(1)


def line(number: int) -> bytes:
    """Create a line similar to Claude Code's output: the same keys, an id and text."""
    text = " ".join(RNG.choices(WORDS, k=60))
    message = {"type": "assistant", "uuid": RNG.randbytes(16).hex(), "message": {"text": text, "turn": number}}
    return json.dumps(message).encode() + b"\n"


def write(journals: FileJournals) -> int:
    """Write a journal; return the number of records."""
    writer = journals.create("long")
    while journals.size_bytes("long") < JOURNAL_BYTES:
        for number in range(500):
            writer.append(Output.from_bytes("stdout", line(number)), at=datetime.now(UTC))
            writer.append(ToolCallEnded("Bash", RNG.randbytes(8).hex(), number), at=datetime.now(UTC))
    writer.append(TaskFinished(), at=datetime.now(UTC), durable=True)
    writer.close()
    return writer.last_seq


def seconds(action: Callable[[], object]) -> float:
    """Return the duration of `action`."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def measure(name: str, journals: FileJournals, records: int) -> None:
    """Read all records in order, then 200 random ones."""

    def read_all() -> None:
        offset = 0
        while (batch := journals.read("long", offset)).records:
            offset = batch.next_offset

    def read_one() -> None:
        journals.read("long", journals.find_offset("long", RNG.randrange(1, records)), bytes_max=1)

    scanned = records / seconds(read_all)
    print(f"{name:12}{scanned:12,.0f} records/s {median(seconds(read_one) for _ in range(200)) * 1000:10.2f} ms each")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as directory:
        journals = FileJournals(Path(directory))
        records = write(journals)
        size_bytes = journals.size_bytes("long")
        measure("plain", journals, records)
        duration = seconds(lambda: journals.compress("long"))
        compressed_bytes = (Path(directory) / "tasks" / "long" / "journal" / "records.gz").stat().st_size
        rate, ratio = size_bytes / duration / 1024**2, size_bytes / compressed_bytes
        print(f"compressing {rate:12,.0f} MiB/s    {ratio:10.1f} times smaller")
        measure("compressed", journals, records)
