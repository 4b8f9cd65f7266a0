"""Many clients follow one ended task that has many artifacts."""

import tracemalloc
from pathlib import Path

import msgspec
import pytest

from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from sandbox.agents.claude_code.output_parser import convert_recorded_line
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.store import IndexedTask
from sandbox.journal.journals import FileJournals
from sandbox.journal.writer import JournalRecorder
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact
from sandbox.server.event_streams import Broadcast, EventStream
from sandbox.store.sqlite import SqliteStore

ARTIFACTS = 5000
STREAMS = 20
RUNNING = (
    e.AttemptStarted("abcdefghijkl", "bubblewrap", "here"),
    e.WorkspacePrepared("c" * 40),
    e.SandboxCreated("vm", "bubblewrap", "host"),
    e.AgentStarted("s"),
)


async def test_open_streams_do_not_keep_the_artifacts_of_their_task(tmp_path: Path, request: pytest.FixtureRequest):
    journals, store = FileJournals(tmp_path), SqliteStore(tmp_path / "index.sqlite")
    request.addfinalizer(store.close)
    recorder = JournalRecorder(journals.create("task-1"), None, SystemClock().now)
    for event in (e.TaskSubmitted("task-1", manifest("task-1")), *RUNNING, *TO_COMPLETED):
        recorder.record(event)
    artifacts = tuple(
        Artifact(f"file-{number}", "f" * 300, 1, "text/plain", "sha256:" + "0" * 64) for number in range(ARTIFACTS)
    )
    task = msgspec.structs.replace(recorder.task, artifacts=artifacts)
    recorder.writer.close()
    store.save(IndexedTask(task, journals.replay("task-1").offset))
    service = EventStream({}, journals, store, Broadcast(), convert_recorded_line)
    streams = [service.follow("task-1", after=0) for _ in range(STREAMS)]
    await anext(streams[0])
    tracemalloc.start()
    try:
        for stream in streams[1:]:
            await anext(stream)
        per_stream_bytes = tracemalloc.get_traced_memory()[0] / (STREAMS - 1)
    finally:
        tracemalloc.stop()
    events = [event["type"] async for event in streams[-1]]
    assert events[-1] == "end"
    assert per_stream_bytes < 50_000
    for stream in streams:
        await stream.aclose()
