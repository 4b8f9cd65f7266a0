"""What it costs to go on reading a long story near its end: `python bench/resuming.py [RECORDS]` (30,000 without).

Two ways in turns over one journal: as the server does, and the baseline, which reads the journal from its beginning and
leaves out what the reader has had. Printed: the median of each, their ratio, and the same for the last ten lines.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from doubles.manifests import manifest
from sandbox.api.routes.logs import LogEncoder, _find_tail_start, _format_ndjson
from sandbox.bootstrap.machine import SystemClock
from sandbox.interfaces.journal import Recorder, read_records, replay_task
from sandbox.interfaces.store import IndexedTask
from sandbox.journal.journals import FileJournals
from sandbox.model import events as e
from sandbox.model.wire.events import WireEvent, to_wire_event
from sandbox.server.broadcast import Broadcast
from sandbox.server.event_stream import EventStream
from sandbox.server.journal_tailer import JournalTailer
from doubles.memory_store import MemoryStore

ROUNDS = 15
LEFT = 100
TEXT = "a line of output as agents print it, with some words and a number: %d\n"
VIEW = LogEncoder("all", "", _format_ndjson, is_following=False)

Read = Callable[[], Awaitable[int]]


class Story:
    """A journal, and the room that tells of it."""

    def __init__(self, data_dir: Path, records: int) -> None:
        self.journals = FileJournals(data_dir)
        recorder = Recorder(self.journals.create("task-1"), None, SystemClock().now)
        recorder.record(e.TaskSubmitted("task-1", manifest()))
        for number in range(records - 1):
            recorder.record(e.Output.from_bytes("stdout", (TEXT % number).encode()))
        recorder.writer.close()
        store = MemoryStore()
        reading = replay_task(self.journals, "task-1")
        self.task = reading.task
        store.save(IndexedTask(reading.task, reading.offset))
        follower = JournalTailer(self.journals, store, SystemClock(), Broadcast())
        self.telling = EventStream(self.journals, store, follower, Broadcast())

    def replay(self, task_id: str, *, after: int = 0) -> AsyncIterator[WireEvent]:
        """As `Tasks.replay`."""
        return self.telling.replay(task_id, after=after)

    async def resume(self) -> int:
        """The frames that are left."""
        return len([shown async for shown in self.replay("task-1", after=self.task.last_seq - LEFT)])

    async def resume_from_beginning(self) -> int:
        """The baseline."""
        after = self.task.last_seq - LEFT
        records = (record for record in read_records(self.journals, "task-1") if record.seq > after)
        return len([shown for record in records if (shown := to_wire_event("task-1", record)) is not None])

    async def tail(self) -> int:
        """Where the last ten lines begin."""
        return await _find_tail_start(self, self.task, 0, 10, VIEW)

    async def tail_from_beginning(self) -> int:
        """The baseline."""
        shown = [told["seq"] async for told in self.replay("task-1") if VIEW.includes(told)]
        return shown[-11]


async def compare(name: str, read: Read, baseline: Read) -> None:
    """Print the medians of both, taken in turns."""
    assert await read() == await baseline()
    seconds: dict[Read, list[float]] = {read: [], baseline: []}
    for _ in range(ROUNDS):
        for way, found in seconds.items():
            begin = time.perf_counter()
            await way()
            found.append(time.perf_counter() - begin)
    ours, theirs = (statistics.median(found) * 1000 for found in seconds.values())
    print(f"{name:20} {ours:8.2f} ms   from the beginning {theirs:8.2f} ms   {theirs / ours:6.0f} times less")


async def main() -> None:
    """Write, measure, print."""
    records = int(sys.argv[1]) if len(sys.argv) > 1 else 30_000
    with tempfile.TemporaryDirectory() as directory:
        story = Story(Path(directory), records)
        print(f"{records:,} records, the last {LEFT} of them not read yet")
        await compare("the rest", story.resume, story.resume_from_beginning)
        await compare("the last ten lines", story.tail, story.tail_from_beginning)


if __name__ == "__main__":
    asyncio.run(main())
