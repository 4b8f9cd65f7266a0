"""The tailer keeps the index current for a restarted server, but does not update it for each artifact."""

import asyncio
import contextlib
from unittest.mock import AsyncMock, Mock

import pytest

from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.store import IndexedTask
from sandbox.journal.journals import FileJournals
from sandbox.journal.writer import JournalRecorder
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact
from sandbox.server.event_streams import Broadcast
from sandbox.server.index_writer import IndexWriter
from sandbox.server.journal_tailer import JournalTailer
from sandbox.server.tracked_task import NoKnownOwner, TrackedTask

TO_AGENT_EXIT = (
    e.AttemptStarted("abcdefghijkl", "bubblewrap", "here"),
    e.WorkspacePrepared("c" * 40),
    e.SandboxCreated("vm", "bubblewrap", "host"),
    e.AgentStarted("s"),
    e.AgentExited(0, {"is_error": False}),
)
ARTIFACTS = [
    e.ArtifactCollected(Artifact(f"a{number}", f"out/a{number}", 0, "text/plain", "sha256:" + "0" * 64))
    for number in range(40)
]


class CountingStore(MemoryStore):
    """A store that counts its saves."""

    def __init__(self):
        super().__init__()
        self.saves = 0

    def save_all(self, indexed):
        self.saves += 1
        super().save_all(indexed)


class TailedTask:
    """A task whose records the test writes while a tailer reads them."""

    def __init__(self, data_dir):
        self.journals, self.store = FileJournals(data_dir), CountingStore()
        self.recorder = JournalRecorder(self.journals.create("task-1"), None, SystemClock().now)
        for event in (e.TaskSubmitted("task-1", manifest()), *TO_AGENT_EXIT):
            self.recorder.record(event)
        reading = self.journals.replay("task-1")
        self.tailer = JournalTailer(
            {}, self.journals, IndexWriter(self.store), SystemClock(), Broadcast(), Mock(), AsyncMock()
        )
        self.tracked = TrackedTask(IndexedTask(reading.task, reading.offset), NoKnownOwner())

    @property
    def indexed_artifacts(self):
        indexed = self.store.load("task-1")
        return 0 if indexed is None else len(indexed.task.artifacts)

    async def write_events(self, events, is_indexed=lambda: True):
        """Write each event after the tailer has read the previous event; then wait until `is_indexed`."""
        self.tailer.start(self.tracked)
        for event in events:
            self.recorder.record(event)
            self.tracked.wake()
            async with asyncio.timeout(20):
                while self.tracked.task.last_seq < self.recorder.task.last_seq:
                    await asyncio.sleep(0.001)
        async with asyncio.timeout(20):
            while not is_indexed():
                await asyncio.sleep(0.001)
        await self.tailer.close()


@pytest.fixture
def tailed_task(tmp_path):
    task = TailedTask(tmp_path)
    yield task
    task.recorder.writer.close()


async def test_many_artifacts_are_indexed_together(tailed_task, monkeypatch):
    monkeypatch.setattr("sandbox.server.index_writer.INDEX_INTERVAL_SECONDS", 600.0)
    await tailed_task.write_events(ARTIFACTS)
    assert tailed_task.store.saves == 0


async def test_all_artifacts_are_indexed_together_when_the_task_ends(tailed_task, monkeypatch):
    monkeypatch.setattr("sandbox.server.index_writer.INDEX_INTERVAL_SECONDS", 600.0)
    await tailed_task.write_events([*ARTIFACTS, e.TaskFinished()])
    assert tailed_task.store.saves == 1
    assert len(tailed_task.store.load("task-1").task.artifacts) == len(ARTIFACTS)


async def test_artifacts_are_indexed_after_the_interval(tailed_task, monkeypatch):
    monkeypatch.setattr("sandbox.server.index_writer.INDEX_INTERVAL_SECONDS", 0.0)
    await tailed_task.write_events(ARTIFACTS[:3], is_indexed=lambda: tailed_task.indexed_artifacts == 3)


@pytest.mark.parametrize("is_watched", [True, False])
async def test_records_of_a_runner_are_read_soon(tailed_task, monkeypatch, is_watched):
    """Writes wake the tailer. If writes cannot be reported, the journal is polled."""
    if not is_watched:
        monkeypatch.setattr(tailed_task.journals, "watch", lambda *_: contextlib.nullcontext(False))
    monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 600.0)
    tailed_task.tailer.start(tailed_task.tracked)
    for event in (*ARTIFACTS[:3], e.TaskFinished()):
        tailed_task.recorder.record(event)
        async with asyncio.timeout(20):
            while tailed_task.tracked.task.last_seq < tailed_task.recorder.task.last_seq:
                await asyncio.sleep(0.001)
    async with asyncio.timeout(20):  # a finished task is forgotten at once
        while tailed_task.tailer._tracked_tasks:
            await asyncio.sleep(0.001)
    await tailed_task.tailer.close()


async def test_busy_journal_is_not_read_for_each_record(tailed_task, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.FOLLOW_POLL_INTERVAL_SECONDS", 0.2)
    reads = []
    read = tailed_task.journals.read
    monkeypatch.setattr(tailed_task.journals, "read", lambda *arguments: reads.append(1) or read(*arguments))
    tailed_task.tailer.start(tailed_task.tracked)
    for event in ARTIFACTS:
        tailed_task.recorder.record(event)
        await asyncio.sleep(0.01)
    async with asyncio.timeout(20):
        while tailed_task.tracked.task.last_seq < tailed_task.recorder.task.last_seq:
            await asyncio.sleep(0.001)
    await tailed_task.tailer.close()
    assert len(reads) < len(ARTIFACTS)


async def test_long_journal_of_an_ended_runner_is_read_without_pauses(tailed_task, monkeypatch):
    """A batch ends before a long journal does, and no further write wakes the tailer."""
    monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 600.0)
    read = tailed_task.journals.read
    monkeypatch.setattr(tailed_task.journals, "read", lambda *arguments: read(*arguments, bytes_max=1))
    for event in (*ARTIFACTS, e.TaskFinished()):
        tailed_task.recorder.record(event)
    tailed_task.tailer.start(tailed_task.tracked)
    async with asyncio.timeout(20):
        while tailed_task.tailer._tracked_tasks:
            await asyncio.sleep(0.001)
    await tailed_task.tailer.close()
    assert tailed_task.tracked.task.state.is_final


async def test_silent_journal_is_not_read_until_it_is_written(tailed_task, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 600.0)
    offsets = []
    read = tailed_task.journals.read
    monkeypatch.setattr(
        tailed_task.journals, "read", lambda task_id, offset: offsets.append(offset) or read(task_id, offset)
    )
    await tailed_task.write_events(ARTIFACTS[:3])
    assert max(map(offsets.count, offsets)) <= 3
