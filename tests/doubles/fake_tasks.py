"""Tasks in memory: what a test says has happened to a task is what the doors are told."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sandbox.interfaces.placement import TerminalOrder
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.interfaces.store import Cursor, DuplicateTaskError, TaskPage, TaskQuery
from sandbox.interfaces.tasks import (
    ArtifactNotFoundError,
    Cancellation,
    DrainStatus,
    Health,
    IdempotencyKeyReusedError,
    PrunedTask,
    Retention,
    SandboxNotPreservedError,
    StoredArtifact,
    Submission,
    TaskNotFoundError,
    TaskTerminalError,
)
from sandbox.interfaces.terminals import TerminalConnection, TerminalRefusedError
from sandbox.model import events as e
from sandbox.model.events import Artifact
from sandbox.model.manifest.parser import parse_manifest
from sandbox.model.manifest.schema import Manifest
from sandbox.model.state_machine import advance
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.model.wire.events import WireEvent, current_state_event, end_event, format_timestamp, to_wire_event

BEGINNING = datetime(2026, 1, 29, 10, 10, 15, tzinfo=UTC)

TO_RUNNING: tuple[e.Event, ...] = (
    e.AttemptStarted("abcdefghijkl", "bubblewrap", "here"),
    e.WorkspacePrepared("0" * 40),
    e.SandboxCreated("sandbox-abcdefghijkl", "namespaces", "host"),
    e.AgentStarted("00000000-0000-0000-0000-000000000000"),
)
TO_COMPLETED: tuple[e.Event, ...] = (e.AgentExited(0, {"is_error": False}), e.TaskFinished())


def manifest(task_id: str = "", **metadata: Any) -> Manifest:
    """The minimal manifest."""
    written = f"""
        {{"version": "1", "kind": "Task", "metadata": {{"name": "My Task", "id": "{task_id}"}},
          "repository": {{"url": "https://github.com/org/repo.git", "branch": "main"}},
          "claude": {{"prompt": "Your instructions here"}}}}"""
    parsed = parse_manifest(written.encode(), is_json=True)
    return replace(parsed, metadata=replace(parsed.metadata, **metadata))


@dataclass
class _Story:
    task: Task
    frames: list[WireEvent]
    artifacts: list[StoredArtifact] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class FakeTasks:
    """Implements `Tasks`. `failure`, when set, is raised by every call of `submit` and `cancel`."""

    def __init__(self) -> None:
        self.stories: dict[str, _Story] = {}
        self.subscribers: list[asyncio.Queue[WireEvent]] = []
        self.failure: Exception | None = None
        self.queries: list[TaskQuery] = []
        self.open_followers = 0
        self.keys: dict[str, e.Idempotency] = {}
        self.preserved: set[str] = set()
        self.cancels: list[tuple[str, str, bool]] = []
        probe = RuntimeProbe(
            "bubblewrap", is_available=True, tier="namespaces", strength=10, limits=frozenset({"memory"})
        )
        self.drain_now = DrainStatus(None, 1, 2)
        self.health_now = Health("0.1.0", 12.5, {TaskState.RUNNING: 1}, [probe], True, 10**9, 10**10, is_ready=True)

    def add(self, task_id: str = "task-001", *events: e.Event, **metadata: Any) -> Task:
        """A task to which these events have happened."""
        self._tell(task_id, e.TaskSubmitted(task_id, manifest(task_id, **metadata)))
        return self.tell(task_id, *events)

    def tell(self, task_id: str, *events: e.Event) -> Task:
        """Let more happen to it."""
        for event in events:
            self._tell(task_id, event)
        return self.stories[task_id].task

    def keep(self, task_id: str, artifact: Artifact, file: Path) -> None:
        """Store an artifact of the task."""
        self.stories[task_id].artifacts.append(StoredArtifact(artifact, file, BEGINNING))

    def _tell(self, task_id: str, event: e.Event) -> None:
        story = self.stories.get(task_id)
        seq = story.task.last_seq + 1 if story else 1
        at = BEGINNING + timedelta(milliseconds=123 + seq)
        step = advance(story.task if story else None, event, seq=seq, at=at)
        told = to_wire_event(task_id, e.Record(seq, 1, at, event, step.transition))
        if story is None:
            story = self.stories[task_id] = _Story(step.task, [])
        story.task = step.task
        if told is not None:
            story.frames.append(told)
            for subscriber in self.subscribers:
                subscriber.put_nowait(told)
        story.changed.set()
        story.changed = asyncio.Event()

    def _story(self, task_id: str) -> _Story:
        if task_id not in self.stories:
            raise TaskNotFoundError(task_id)
        return self.stories[task_id]

    async def find_submission(self, idempotency: e.Idempotency) -> Submission | None:
        known = self.keys.get(idempotency.key)
        if known is None:
            return None
        if known.body_sha256 != idempotency.body_sha256:
            raise IdempotencyKeyReusedError
        task = next(one.task for one in self.stories.values() if one.task.idempotency == known)
        return Submission(task, is_replayed=True)

    async def submit(self, manifest: Manifest, idempotency: e.Idempotency | None = None) -> Submission:
        if self.failure is not None:
            raise self.failure
        if idempotency is not None and (before := await self.find_submission(idempotency)):
            return before
        task_id = manifest.metadata.id or str(uuid.uuid4())
        if task_id in self.stories:
            raise DuplicateTaskError(self.stories[task_id].task)
        self._tell(task_id, e.TaskSubmitted(task_id, manifest, idempotency))
        if idempotency is not None:
            self.keys[idempotency.key] = idempotency
        return Submission(self.stories[task_id].task)

    async def check_admission(self, manifest: Manifest) -> None:
        if self.failure is not None:
            raise self.failure
        if (story := self.stories.get(manifest.metadata.id)) is not None:
            raise DuplicateTaskError(story.task)

    async def status(self, task_id: str) -> Task:
        return self._story(task_id).task

    async def query(self, query: TaskQuery) -> TaskPage:
        self.queries.append(query)
        found = [story.task for story in self.stories.values()]
        found = [task for task in found if not query.states or task.state in query.states]
        found = [task for task in found if query.labels.items() <= task.manifest.metadata.labels.items()]
        first = query.offset
        if query.cursor is not None:
            first += [task.id for task in found].index(query.cursor.task_id) + 1
        page = found[first : first + query.limit]
        is_last = first + query.limit >= len(found)
        after = None if is_last else Cursor(format_timestamp(page[-1].created_at), page[-1].id)
        return TaskPage(page, len(found), after)

    async def cancel(self, task_id: str, *, reason: str, force: bool) -> Cancellation:
        task = self._story(task_id).task
        if task.state.is_terminal:
            raise TaskTerminalError(task)
        if self.failure is not None:
            raise self.failure
        self.cancels.append((task_id, reason, force))
        return Cancellation(task, BEGINNING, f"Task {task_id} is being cancelled.")

    async def prune(self, retention: Retention | None, *, dry_run: bool) -> Sequence[PrunedTask]:
        self.pruned_by = (retention, dry_run)
        return [PrunedTask("old", TaskState.COMPLETED, datetime(2026, 1, 29, tzinfo=UTC), 4096)]

    async def release(self, task_id: str) -> None:
        task = self._story(task_id).task
        if task_id not in self.preserved:
            raise SandboxNotPreservedError(task)
        self.preserved.remove(task_id)

    async def wait(self, task_id: str, timeout_seconds: float) -> Task:
        story = self._story(task_id)
        try:
            async with asyncio.timeout(timeout_seconds):
                while not story.task.state.is_terminal:
                    await story.changed.wait()
        except TimeoutError:
            pass
        return story.task

    async def replay(self, task_id: str, *, after: int = 0) -> AsyncIterator[WireEvent]:
        story = self._story(task_id)
        await asyncio.sleep(0)  # as the real ones give everybody else a turn
        for told in list(story.frames):
            if told["seq"] > after:
                yield told
        if story.task.state.is_terminal:
            yield end_event(story.task)

    async def follow(self, task_id: str, *, after: int | None = None) -> AsyncIterator[WireEvent]:
        story = self._story(task_id)
        self.open_followers += 1
        try:
            if after is None:
                after = story.task.last_seq
                yield current_state_event(story.task)
            while True:
                changed, is_over = story.changed, story.task.state.is_terminal
                for told in [told for told in story.frames if told["seq"] > after]:
                    yield told
                    after = told["seq"]
                if is_over:
                    yield end_event(story.task)
                    return
                if changed is story.changed:
                    await changed.wait()
        finally:
            self.open_followers -= 1

    async def follow_all(self) -> AsyncIterator[WireEvent]:
        queue: asyncio.Queue[WireEvent] = asyncio.Queue()
        self.subscribers.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self.subscribers.remove(queue)

    async def artifacts(self, task_id: str) -> Sequence[StoredArtifact]:
        return self._story(task_id).artifacts

    async def artifact(self, task_id: str, name: str) -> StoredArtifact:
        kept = self._story(task_id).artifacts
        for stored in kept:
            if stored.artifact.name == name:
                return stored
        for stored in kept:
            if stored.artifact.path == name:
                return stored
        raise ArtifactNotFoundError(task_id, name)

    async def has_preserved_sandbox(self, task: Task) -> bool:
        return task.state is TaskState.FAILED_PRESERVED and task.id in self.preserved

    async def open_terminal(self, task_id: str, order: TerminalOrder) -> TerminalConnection:
        self._story(task_id)
        raise TerminalRefusedError("There is no terminal here.")

    async def drain(self) -> DrainStatus:
        self.drain_now = DrainStatus(BEGINNING, 1, 2)
        return self.drain_now

    async def undo_drain(self) -> DrainStatus:
        self.drain_now = DrainStatus(None, 1, 2)
        return self.drain_now

    async def drain_status(self) -> DrainStatus:
        return self.drain_now

    async def health(self) -> Health:
        return self.health_now
