"""Tasks in memory: a test records a task's events, and the API serves them."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from doubles.manifests import parse_manifest
from sandbox.interfaces.cluster_engine import JobStatus
from sandbox.interfaces.placement import HostNotFoundError, HostState, HostStatus
from sandbox.interfaces.runner import OpenTerminal, TerminalConnection, TerminalRefusedError
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.interfaces.server_services import (
    ArtifactNotFoundError,
    Cancellation,
    DerivedTaskPlan,
    DrainStatus,
    Health,
    HostWithTasks,
    IdempotencyKeyReusedError,
    Inheritance,
    LoadSample,
    PrunedTask,
    PruneResult,
    Retention,
    SandboxNotPreservedError,
    StateChange,
    StoredArtifact,
    Submission,
    TaskEndedError,
    TaskNotContinuableError,
    TaskNotEndedError,
    TaskNotFoundError,
    TaskServices,
)
from sandbox.interfaces.store import ChangePosition, Cursor, DuplicateTaskError, TaskPage, TaskQuery, TaskTotals
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact
from sandbox.model.display_text import format_timestamp
from sandbox.model.manifest.schema import Manifest
from sandbox.model.state_machine import advance
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.model.wire.event_conversion import WireEvent, current_state_event, end_event, to_wire_event
from sandbox.server.task_services import STOPPING_MESSAGE

START_TIME = datetime(2026, 1, 29, 10, 10, 15, tzinfo=UTC)

TO_RUNNING: tuple[e.Event, ...] = (
    e.AttemptStarted("abcdefghijkl", "bubblewrap", "here"),
    e.WorkspacePrepared("0" * 40),
    e.SandboxCreated("sandbox-abcdefghijkl", "namespaces", "host"),
    e.AgentStarted("00000000-0000-0000-0000-000000000000", agent="Claude Code"),
)
TO_COMPLETED: tuple[e.Event, ...] = (e.AgentExited(0, {"is_error": False}), e.TaskFinished())


def manifest(task_id: str = "", **metadata: Any) -> Manifest:
    """Return the minimal manifest."""
    text = f"""
        {{"version": "1", "kind": "Task", "metadata": {{"name": "My Task", "id": "{task_id}"}},
          "repository": {{"url": "https://github.com/org/repo.git", "branch": "main"}},
          "claude": {{"prompt": "Your instructions here"}}}}"""
    parsed = parse_manifest(text.encode(), is_json=True)
    return parsed.replace(metadata=replace(parsed.metadata, **metadata))


@dataclass
class _Entry:
    task: Task
    events: list[WireEvent]
    artifacts: list[StoredArtifact] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class FakeTasks:
    """Implements every service of the server. `failure`, when set, is raised by every call to `submit` and `cancel`.

    event_interval: the time between two events of a task.
    """

    def __init__(self) -> None:
        self.entries: dict[str, _Entry] = {}
        self.changes: list[str] = []
        self.state_changed = asyncio.Event()
        self.subscribers: list[asyncio.Queue[WireEvent]] = []
        self.failure: Exception | None = None
        self.event_interval = timedelta(milliseconds=1)
        self.queries: list[TaskQuery] = []
        self.open_followers = 0
        self.inheritances: dict[str, Inheritance] = {}
        self.keys: dict[str, e.Idempotency] = {}
        self.preserved: set[str] = set()
        self.cancels: list[tuple[str, str, bool]] = []
        probe = RuntimeProbe(
            "bubblewrap", is_available=True, tier="namespaces", strength=10, enforced_limits=frozenset({"memory"})
        )
        self.current_drain = DrainStatus(None, 1, 2)
        self.samples: list[LoadSample] = []
        self.jobs: dict[str, JobStatus] = {}
        machine = HostStatus("build-1", HostState.READY, cpus=8, memory_bytes=32 * 1024**3, version="0.1.0")
        self.hosts, self.has_cluster = [HostWithTasks(machine, [])], False
        self.health_report = Health("0.1.0", 12.5, {TaskState.RUNNING: 1}, [probe], True, 10**9, 10**10, is_ready=True)

    @property
    def services(self) -> TaskServices:
        """The server's services, all implemented by this object."""
        return TaskServices(*[self] * len(fields(TaskServices)))

    def add(self, task_id: str = "task-001", *events: e.Event, **metadata: Any) -> Task:
        """Add a task with these events."""
        self._apply(task_id, e.TaskSubmitted(task_id, manifest(task_id, **metadata)))
        return self.record(task_id, *events)

    def record(self, task_id: str, *events: e.Event) -> Task:
        """Record more events."""
        for event in events:
            self._apply(task_id, event)
        return self.entries[task_id].task

    def add_artifact(self, task_id: str, artifact: Artifact, file: Path) -> None:
        """Store an artifact of the task."""
        self.entries[task_id].artifacts.append(StoredArtifact(artifact, file, START_TIME))

    def _apply(self, task_id: str, event: e.Event) -> None:
        entry = self.entries.get(task_id)
        seq = entry.task.last_seq + 1 if entry else 1
        at = START_TIME + timedelta(milliseconds=123) + seq * self.event_interval
        result = advance(entry.task if entry else None, event, seq=seq, at=at)
        wire_event = to_wire_event(task_id, e.Record(seq, 1, at, event, result.transition))
        if entry is None:
            entry = self.entries[task_id] = _Entry(result.task, [])
        entry.task = result.task
        if result.transition is not None:
            self.changes.append(task_id)
            self.state_changed.set()
            self.state_changed = asyncio.Event()
        if wire_event is not None:
            entry.events.append(wire_event)
            for subscriber in self.subscribers:
                subscriber.put_nowait(wire_event)
        entry.changed.set()
        entry.changed = asyncio.Event()

    def _entry(self, task_id: str) -> _Entry:
        if task_id not in self.entries:
            raise TaskNotFoundError(task_id)
        return self.entries[task_id]

    async def find_submission(self, idempotency: e.Idempotency) -> Submission | None:
        previous = self.keys.get(idempotency.key)
        if previous is None:
            return None
        if previous.body_sha256 != idempotency.body_sha256:
            raise IdempotencyKeyReusedError
        task = next(one.task for one in self.entries.values() if one.task.idempotency == previous)
        return Submission(task, is_replayed=True)

    async def plan_rerun(self, task_id: str) -> DerivedTaskPlan:
        return DerivedTaskPlan(self._entry(task_id).task.manifest, self.inheritances.get(task_id))

    async def plan_continuation(self, task_id: str) -> DerivedTaskPlan:
        task = self._entry(task_id).task
        if not task.state.is_final:
            raise TaskNotEndedError(task, "continue")
        if task_id not in self.inheritances:
            raise TaskNotContinuableError(task_id, "it ended without a patch")
        return DerivedTaskPlan(task.manifest, self.inheritances[task_id])

    async def continuation_refusal(self, task: Task) -> str | None:
        return (
            None if task.id in self.inheritances else f"Task {task.id} cannot be continued: it ended without a patch."
        )

    async def submit(
        self,
        manifest: Manifest,
        idempotency: e.Idempotency | None = None,
        inheritance: Inheritance | None = None,
        rerun_of: str | None = None,
    ) -> Submission:
        if self.failure is not None:
            raise self.failure
        if idempotency is not None and (before := await self.find_submission(idempotency)):
            return before
        task_id = manifest.metadata.id or str(uuid.uuid4())
        if task_id in self.entries:
            raise DuplicateTaskError(self.entries[task_id].task)
        parent = inheritance and inheritance.parent
        self._apply(task_id, e.TaskSubmitted(task_id, manifest, idempotency, parent, rerun_of))
        if idempotency is not None:
            self.keys[idempotency.key] = idempotency
        return Submission(self.entries[task_id].task)

    async def check_acceptance(self, manifest: Manifest) -> None:
        if self.failure is not None:
            raise self.failure
        if (entry := self.entries.get(manifest.metadata.id)) is not None:
            raise DuplicateTaskError(entry.task)

    async def status(self, task_id: str) -> Task:
        return self._entry(task_id).task

    async def prompt_beginnings(self, task_ids: Sequence[str], length: int) -> Mapping[str, str]:
        return {task_id: self.entries[task_id].task.manifest.agent.prompt[:length] for task_id in task_ids}

    async def chain(self, task: Task) -> Sequence[Task]:
        tasks = [entry.task for entry in self.entries.values()]
        earlier = [one for one in tasks if task.parent is not None and one.id == task.parent.task_id]
        return [*earlier, task, *(one for one in tasks if one.parent is not None and one.parent.task_id == task.id)]

    async def query(self, query: TaskQuery) -> TaskPage:
        self.queries.append(query)
        found = [entry.task for entry in self.entries.values()]
        found = [task for task in found if not query.states or task.state in query.states]
        found = [task for task in found if query.labels.items() <= task.manifest.metadata.labels.items()]
        if query.parent:
            found = [task for task in found if task.parent is not None and task.parent.task_id == query.parent]
        found = [task for task in found if not query.rerun_of or task.rerun_of == query.rerun_of]
        start = query.offset
        if query.cursor is not None:
            start += [task.id for task in found].index(query.cursor.task_id) + 1
        page = found[start : start + query.limit]
        is_last = start + query.limit >= len(found)
        after = None if is_last else Cursor(format_timestamp(page[-1].created_at), page[-1].id)
        cost_usd = round(sum(task.progress.cost_usd for task in found), 9)
        return TaskPage(page, len(found), after, totals=TaskTotals(len(found), cost_usd) if query.with_totals else None)

    async def cancel(self, task_id: str, *, reason: str, force: bool) -> Cancellation:
        task = self._entry(task_id).task
        if task.state.is_final:
            raise TaskEndedError(task)
        if self.failure is not None:
            raise self.failure
        self.cancels.append((task_id, reason, force))
        after = self.record(task_id, e.CancelRequested(reason, force))
        return Cancellation(task, after.state, after.cancel_requested_at or START_TIME, STOPPING_MESSAGE)

    async def prune(self, retention: Retention | None, *, dry_run: bool) -> PruneResult:
        self.pruned_by = (retention, dry_run)
        pruned = PrunedTask("old", "Fix bug #42", TaskState.COMPLETED, datetime(2026, 1, 29, tzinfo=UTC), 4096)
        return PruneResult([pruned], {"broken": "Input/output error; check the disk"} if dry_run else {})

    async def release(self, task_id: str) -> None:
        task = self._entry(task_id).task
        if task_id not in self.preserved:
            raise SandboxNotPreservedError(task)
        self.preserved.remove(task_id)

    async def delete(self, task_id: str) -> str:
        task = self._entry(task_id).task
        if not task.state.is_final:
            raise TaskNotEndedError(task, "delete")
        del self.entries[task_id]
        return f"Task {task_id} was deleted."

    def job_status(self, task_id: str) -> JobStatus | None:
        return self.jobs.get(task_id)

    async def wait(self, task_id: str, timeout_seconds: float) -> Task:
        entry = self._entry(task_id)
        try:
            async with asyncio.timeout(timeout_seconds):
                while not entry.task.state.is_final:
                    await entry.changed.wait()
        except TimeoutError:
            pass
        return entry.task

    async def recorded_events(self, task_id: str, *, after: int = 0) -> AsyncIterator[WireEvent]:
        entry = self._entry(task_id)
        await asyncio.sleep(0)  # yield to other tasks, like the real implementation
        for wire_event in list(entry.events):
            if wire_event["seq"] > after:
                yield wire_event
        if entry.task.state.is_final:
            yield end_event(entry.task)

    async def follow(self, task_id: str, *, after: int | None = None) -> AsyncIterator[WireEvent]:
        entry = self._entry(task_id)
        self.open_followers += 1
        try:
            if after is None:
                after = entry.task.last_seq
                yield current_state_event(entry.task)
            while True:
                changed, is_over = entry.changed, entry.task.state.is_final
                for wire_event in [wire_event for wire_event in entry.events if wire_event["seq"] > after]:
                    yield wire_event
                    after = wire_event["seq"]
                if is_over:
                    yield end_event(entry.task)
                    return
                if changed is entry.changed:
                    await changed.wait()
        finally:
            self.open_followers -= 1

    async def follow_states(
        self, after: ChangePosition | None, *, is_live: bool = True
    ) -> AsyncIterator[StateChange | ChangePosition]:
        is_known = after is not None and after.index_id == "fade"
        number = len(self.changes) if after is None else after.number if is_known else 0
        yield ChangePosition("fade", number)
        self.open_followers += 1
        try:
            while True:
                state_changed, end = self.state_changed, len(self.changes)
                latest = {task_id: change for change, task_id in enumerate(self.changes, 1)}
                for task_id, change in sorted(latest.items(), key=lambda item: item[1]):
                    if change > number and task_id in self.entries:
                        task = self.entries[task_id].task
                        final_events = (end_event(task),) if task.state.is_final else ()
                        yield StateChange(ChangePosition("fade", change), (current_state_event(task), *final_events))
                number = end
                if number == len(self.changes) and not is_live:
                    return
                if number == len(self.changes):
                    await state_changed.wait()
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

    async def list_artifacts(self, task_id: str) -> Sequence[StoredArtifact]:
        return self._entry(task_id).artifacts

    async def find_artifact(self, task_id: str, name: str) -> StoredArtifact:
        artifacts = self._entry(task_id).artifacts
        for stored in artifacts:
            if stored.artifact.name == name:
                return stored
        for stored in artifacts:
            if stored.artifact.path == name:
                return stored
        raise ArtifactNotFoundError(task_id, name)

    async def preserved_sandboxes(self, tasks: Sequence[Task]) -> set[str]:
        return {task.id for task in tasks if await self.has_preserved_sandbox(task)}

    async def has_preserved_sandbox(self, task: Task) -> bool:
        return task.state is TaskState.FAILED_PRESERVED and task.id in self.preserved

    async def open_terminal(self, task_id: str, request: OpenTerminal) -> TerminalConnection:
        self._entry(task_id)
        raise TerminalRefusedError("No terminals are available.")

    async def drain(self) -> DrainStatus:
        self.current_drain = DrainStatus(START_TIME, 1, 2)
        return self.current_drain

    async def undo_drain(self) -> DrainStatus:
        self.current_drain = DrainStatus(None, 1, 2)
        self.samples: list[LoadSample] = []
        return self.current_drain

    async def drain_status(self) -> DrainStatus:
        return self.current_drain

    async def health(self) -> Health:
        return self.health_report

    def load_samples(self) -> Sequence[LoadSample]:
        return self.samples

    def list_hosts(self) -> Sequence[HostWithTasks]:
        return self.hosts

    async def drain_host(self, name: str) -> HostWithTasks:
        return self._set_drain(name, START_TIME)

    async def undo_host_drain(self, name: str) -> HostWithTasks:
        return self._set_drain(name, None)

    def _set_drain(self, name: str, since: datetime | None) -> HostWithTasks:
        for index, host in enumerate(self.hosts):
            if host.status.name == name:
                status = msgspec.structs.replace(host.status, draining_since=since)
                self.hosts[index] = HostWithTasks(status, host.task_ids)
                return self.hosts[index]
        raise HostNotFoundError(f"The cluster has no host {name!r}.")
