"""The tailer keeps the index current for a restarted server, but does not update it for each artifact."""

import asyncio
from unittest.mock import Mock

import pytest

from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.store import IndexedTask
from sandbox.journal.journals import FileJournals
from sandbox.journal.writer import JournalRecorder
from sandbox.model import events as e
from sandbox.server.event_stream import Broadcast
from sandbox.server.journal_tailer import JournalTailer
from sandbox.server.tracked_task import Orphaned, TrackedTask

TO_AGENT_EXIT = (
    e.AttemptStarted("abcdefghijkl", "bubblewrap", "here"),
    e.WorkspacePrepared("c" * 40),
    e.SandboxCreated("vm", "bubblewrap", "host"),
    e.AgentStarted("s"),
    e.AgentExited(0, {"is_error": False}),
)
ARTIFACTS = [
    e.ArtifactCollected(e.Artifact(f"a{number}", f"out/a{number}", 0, "text/plain", "sha256:" + "0" * 64))
    for number in range(40)
]


class CountingStore(MemoryStore):
    """A store that counts its saves."""

    def __init__(self):
        super().__init__()
        self.saves = 0

    def save(self, indexed):
        self.saves += 1
        super().save(indexed)


class TailedTask:
    """A task whose records the test writes while a tailer reads them."""

    def __init__(self, data_dir):
        self.journals, self.store = FileJournals(data_dir), CountingStore()
        self.recorder = JournalRecorder(self.journals.create("task-1"), None, SystemClock().now)
        for event in (e.TaskSubmitted("task-1", manifest()), *TO_AGENT_EXIT):
            self.recorder.record(event)
        reading = self.journals.replay("task-1")
        self.tailer = JournalTailer({}, self.journals, self.store, SystemClock(), Broadcast(), Mock(), Mock())
        self.tracked = TrackedTask(IndexedTask(reading.task, reading.offset), Orphaned())

    async def write_events(self, events):
        """Write each event after the tailer has read the previous event."""
        self.tailer.start(self.tracked)
        for event in events:
            self.recorder.record(event)
            self.tracked.wake()
            async with asyncio.timeout(20):
                while self.tracked.task.last_seq < self.recorder.task.last_seq:
                    await asyncio.sleep(0.001)
        await self.tailer.close()


@pytest.fixture
def tailed_task(tmp_path):
    task = TailedTask(tmp_path)
    yield task
    task.recorder.writer.close()


async def test_many_artifacts_are_indexed_together(tailed_task, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.INDEX_INTERVAL_SECONDS", 600.0)
    await tailed_task.write_events(ARTIFACTS)
    assert tailed_task.store.saves == 0


async def test_all_artifacts_are_indexed_together_when_the_task_ends(tailed_task, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.INDEX_INTERVAL_SECONDS", 600.0)
    await tailed_task.write_events([*ARTIFACTS, e.TaskFinished()])
    assert tailed_task.store.saves == 1
    assert len(tailed_task.store.load("task-1").task.artifacts) == len(ARTIFACTS)


async def test_artifacts_are_indexed_after_the_interval(tailed_task, monkeypatch):
    monkeypatch.setattr("sandbox.server.journal_tailer.INDEX_INTERVAL_SECONDS", 0.0)
    await tailed_task.write_events(ARTIFACTS[:3])
    assert len(tailed_task.store.load("task-1").task.artifacts) == 3
