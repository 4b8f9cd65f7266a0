"""Measures how fast an event stream resumes near the end of a long journal.

Run: python bench/stream_resumption.py [RECORDS]    (default: 30000)

Compares the server's implementation with a baseline, which reads the journal from the start and skips the events that
the reader already has. Prints the median of each, their ratio, and the same for the last ten lines.
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
from doubles.memory_store import MemoryStore
from sandbox.api.routes.logs import LogEncoder, _find_tail_start, _format_ndjson
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.store import IndexedTask
from sandbox.journal.journals import FileJournals
from sandbox.journal.writer import JournalRecorder
from sandbox.model import events as e
from sandbox.model.wire.event_conversion import WireEvent, to_wire_event
from sandbox.runner.attempt_context import read_records
from sandbox.server.event_streams import Broadcast, EventStream

ROUNDS = 15
REMAINING_RECORDS = 100
TEXT = "a line of output as agents print it, with some words and a number: %d\n"
ENCODER = LogEncoder("all", "", _format_ndjson, is_following=False)

Read = Callable[[], Awaitable[int]]


class LongTask:
    """A task with a long journal, and its event stream."""

    def __init__(self, data_dir: Path, records: int) -> None:
        self.journals = FileJournals(data_dir)
        recorder = JournalRecorder(self.journals.create("task-1"), None, SystemClock().now)
        recorder.record(e.TaskSubmitted("task-1", manifest()))
        for number in range(records - 1):
            recorder.record(e.Output.from_bytes("stdout", (TEXT % number).encode()))
        recorder.writer.close()
        store = MemoryStore()
        replay_state = self.journals.replay("task-1")
        self.task = replay_state.task
        store.save(IndexedTask(replay_state.task, replay_state.offset))
        self.stream = EventStream({}, self.journals, store, Broadcast(), lambda _manifest, _line: None)

    def recorded_events(self, task_id: str, *, after: int = 0) -> AsyncIterator[WireEvent]:
        """Implements `TaskEvents.recorded_events`."""
        return self.stream.recorded_events(task_id, after=after)

    async def resume(self) -> int:
        """Return the number of remaining events."""
        return len(
            [event async for event in self.recorded_events("task-1", after=self.task.last_seq - REMAINING_RECORDS)]
        )

    async def resume_from_start(self) -> int:
        """Return the number of remaining events; reads the journal from the start."""
        after = self.task.last_seq - REMAINING_RECORDS
        records = (record for record in read_records(self.journals, "task-1") if record.seq > after)
        return len([event for record in records if (event := to_wire_event("task-1", record)) is not None])

    async def tail(self) -> int:
        """Return the position of the last ten lines."""
        return await _find_tail_start(self, self.task, 0, 10, ENCODER)

    async def tail_from_start(self) -> int:
        """Return the position of the last ten lines; reads the journal from the start."""
        seqs = [event["seq"] async for event in self.recorded_events("task-1") if ENCODER.includes(event)]
        return seqs[-11]


async def compare(name: str, read: Read, baseline: Read) -> None:
    """Run the implementation and the baseline alternately; print their medians."""
    assert await read() == await baseline()
    seconds: dict[Read, list[float]] = {read: [], baseline: []}
    for _ in range(ROUNDS):
        for function, durations in seconds.items():
            begin = time.perf_counter()
            await function()
            durations.append(time.perf_counter() - begin)
    ours, theirs = (statistics.median(durations) * 1000 for durations in seconds.values())
    print(f"{name:20} {ours:8.2f} ms   from the start {theirs:8.2f} ms   {theirs / ours:6.0f} times faster")


async def main() -> None:
    """Write a journal, measure, and print the results."""
    records = int(sys.argv[1]) if len(sys.argv) > 1 else 30_000
    with tempfile.TemporaryDirectory() as directory:
        task = LongTask(Path(directory), records)
        print(f"{records:,} records; the last {REMAINING_RECORDS} of them are unread")
        await compare("the unread records", task.resume, task.resume_from_start)
        await compare("the last ten lines", task.tail, task.tail_from_start)


if __name__ == "__main__":
    asyncio.run(main())
