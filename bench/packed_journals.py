"""What it costs to read a compressed journal, and what it saves: 100 MB of what an agent says, plain and then packed.

Run: python bench/packed_journals.py [DIRECTORY]    (the directory decides which disk is measured)
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
from sandbox.model.events import Output, TaskFinished, ToolCall

JOURNAL_BYTES = 100 * 1024 * 1024
SYLLABLES = ("ba", "de", "fi", "go", "lu", "mar", "ten", "sol")
WORDS = [one + other for one in SYLLABLES for other in SYLLABLES]
CHANCE = random.Random(1)


def line(number: int) -> bytes:
    """Like a line of Claude Code's: the same keys again and again, an id, and words."""
    text = " ".join(CHANCE.choices(WORDS, k=60))
    message = {"type": "assistant", "uuid": CHANCE.randbytes(16).hex(), "message": {"text": text, "turn": number}}
    return json.dumps(message).encode() + b"\n"


def write(journals: FileJournals) -> int:
    """Gives the number of records."""
    writer = journals.create("long")
    while journals.size_bytes("long") < JOURNAL_BYTES:
        for number in range(500):
            writer.append(Output.from_bytes("stdout", line(number)), at=datetime.now(UTC))
            writer.append(ToolCall("Bash", CHANCE.randbytes(8).hex(), number), at=datetime.now(UTC))
    writer.append(TaskFinished(), at=datetime.now(UTC), durable=True)
    writer.close()
    return writer.last_seq


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def measure(name: str, journals: FileJournals, records: int) -> None:
    """All of it in order, and 200 records somewhere."""

    def read_all() -> None:
        offset = 0
        while (batch := journals.read("long", offset)).records:
            offset = batch.next_offset

    def read_one() -> None:
        journals.read("long", journals.find_offset("long", CHANCE.randrange(1, records)), bytes_max=1)

    scanned = records / seconds(read_all)
    print(
        f"{name:8}{scanned:12,.0f} records/s {median(seconds(read_one) for _ in range(200)) * 1000:10.2f} ms a record"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as place:
        journals = FileJournals(Path(place))
        records = write(journals)
        size_bytes = journals.size_bytes("long")
        measure("plain", journals, records)
        took = seconds(lambda: journals.compress("long"))
        packed_bytes = (Path(place) / "tasks" / "long" / "journal" / "records.gz").stat().st_size
        print(f"packing {size_bytes / took / 1024**2:12,.0f} MiB/s    {size_bytes / packed_bytes:10.1f} times smaller")
        measure("packed", journals, records)
