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
from sandbox.api.routes.logs import LogView, _line, _start_of_tail
from sandbox.bootstrap.machine import SystemClock
from sandbox.interfaces.journal import Recorder, read_records, read_task
from sandbox.interfaces.store import Indexed
from sandbox.journal.journals import FileJournals
from sandbox.model import events as e
from sandbox.model.wire.events import Frame, frame
from sandbox.server.broadcast import Broadcast
from sandbox.server.event_stream import Telling
from sandbox.server.journal_tailer import Follower
from sandbox.store.memory import MemoryStore

ROUNDS = 15
LEFT = 100
TEXT = "a line of output as agents print it, with some words and a number: %d\n"
VIEW = LogView("all", "", _line, follows=False)

Read = Callable[[], Awaitable[int]]


class Story:
    """A journal, and the room that tells of it."""

    def __init__(self, data_dir: Path, records: int) -> None:
        self.journals = FileJournals(data_dir)
        recorder = Recorder(self.journals.create("task-1"), None, SystemClock().now)
        recorder.record(e.TaskSubmitted("task-1", manifest()))
        for number in range(records - 1):
            recorder.record(e.Output.of("stdout", (TEXT % number).encode()))
        recorder.writer.close()
        store = MemoryStore()
        reading = read_task(self.journals, "task-1")
        self.task = reading.task
        store.save(Indexed(reading.task, reading.offset))
        follower = Follower(self.journals, store, SystemClock(), Broadcast())
        self.telling = Telling(self.journals, store, follower, Broadcast())

    def frames(self, task_id: str, *, after: int = 0) -> AsyncIterator[Frame]:
        """As `Tasks.frames`."""
        return self.telling.frames(task_id, after=after)

    async def resume(self) -> int:
        """The frames that are left."""
        return len([shown async for shown in self.frames("task-1", after=self.task.last_seq - LEFT)])

    async def resume_from_beginning(self) -> int:
        """The baseline."""
        after = self.task.last_seq - LEFT
        records = (record for record in read_records(self.journals, "task-1") if record.seq > after)
        return len([shown for record in records if (shown := frame("task-1", record)) is not None])

    async def tail(self) -> int:
        """Where the last ten lines begin."""
        return await _start_of_tail(self, self.task, 0, 10, VIEW)

    async def tail_from_beginning(self) -> int:
        """The baseline."""
        shown = [told["seq"] async for told in self.frames("task-1") if VIEW.wants(told)]
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
