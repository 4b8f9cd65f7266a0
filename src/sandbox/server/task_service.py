"""The server's tasks: taken, told, cancelled, answered for."""

import asyncio
import contextlib
import dataclasses
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.journal import Journals
from sandbox.interfaces.placement import CancelOrder, RunnerControl, RunnerUnreachableError, TerminalOrder
from sandbox.interfaces.store import DuplicateTaskError, Store, StoreError, TaskPage, TaskQuery
from sandbox.interfaces.tasks import (
    Cancellation,
    Draining,
    Health,
    InsufficientResourcesError,
    PrunedTask,
    Retention,
    StoredArtifact,
    Submission,
    TaskNotFoundError,
    TaskTerminalError,
    UnavailableError,
)
from sandbox.interfaces.terminals import TerminalLine, TerminalRefusedError
from sandbox.model.errors import reason_of
from sandbox.model.events import Idempotency, Record
from sandbox.model.limits import LAUNCH_END_SECONDS, MEMORY_AVAILABLE_BYTES_MIN, RETRY_SECONDS, ROOM_CHECK_SECONDS
from sandbox.model.manifest.schema import Manifest
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.model.wire.events import Frame
from sandbox.server.artifact_store import Shelf
from sandbox.server.cancellation import Cancelling
from sandbox.server.drain import REASON, Drain
from sandbox.server.event_stream import Telling
from sandbox.server.health import HealthReport
from sandbox.server.journal_tailer import Follower
from sandbox.server.launcher import Launcher
from sandbox.server.maintenance.disk_monitor import SpaceKeeper
from sandbox.server.maintenance.pruning import Pruning
from sandbox.server.preserved_sandboxes import Preservation, Visits
from sandbox.server.runtime_prober import RuntimeProber
from sandbox.server.scheduler import Capacity, WaitingRoom
from sandbox.server.submissions import Register
from sandbox.server.tracked_task import Feed, Locks
from sandbox.server.watchdog import Watch
from sandbox.system.log_context import work_on

_log = logging.getLogger(__name__)
_SHUTS_DOWN = "The server is shutting down; submit to it again when it is back."
_STARTING = frozenset({TaskState.PENDING, TaskState.STAGING, TaskState.PROVISIONING, TaskState.READY})


@dataclass(frozen=True, slots=True)
class Equipment:
    """What the service is handed by its wiring.

    retention: how long finished tasks are kept unless somebody asks otherwise.
    read_memory_available_bytes: what the machine could give to new processes now, None where it does not tell.
    """

    journals: Journals
    store: Store
    register: Register
    clock: Clock
    runners: RunnerControl
    room: WaitingRoom
    follower: Follower
    prober: RuntimeProber
    launcher: Launcher
    telling: Telling
    shelf: Shelf
    health: HealthReport
    space: SpaceKeeper
    drain: Drain
    preservation: Preservation
    visits: Visits
    pruning: Pruning
    retention: Retention
    read_memory_available_bytes: Callable[[], int | None]


class TaskService:
    """Implements `contracts.tasks.Tasks`."""

    def __init__(self, equipment: Equipment) -> None:
        self.equipment = equipment
        self._launches: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self._keys = Locks()
        self._next_look: asyncio.TimerHandle | None = None
        self._cancelling = Cancelling(equipment.journals, equipment.runners, equipment.launcher, equipment.clock)
        equipment.follower.on_finished = self._finished
        equipment.follower.on_lost = self._lost
        equipment.follower.on_held = Watch(equipment.runners, equipment.journals, equipment.clock).look
        equipment.space.on_more = self._admit

    def take_in(self, *feeds: Feed, submission: Record | None = None) -> None:
        """Follow tasks that are in journal and store; those that have not begun wait for room."""
        for feed in feeds:
            self._follow(feed, submission)
        self._admit()

    def _follow(self, feed: Feed, submission: Record | None) -> None:
        need = Capacity.asked_by(feed.task.manifest.vm)
        self.equipment.room.leave(feed.task.id)  # who had this id before was pruned, perhaps a moment ago
        if feed.recorder is not None:
            self.equipment.room.enter(feed.task.id, need)
        else:
            self.equipment.room.claim(feed.task.id, need)
        self.equipment.follower.follow(feed, submission)

    async def close(self) -> None:
        """Take nothing more, let launches that have begun end, stop following. The tasks go on."""
        self._closing.set()
        if self._next_look is not None:
            self._next_look.cancel()
        await self._end_launches()
        await self.equipment.follower.close()
        for feed in self.equipment.follower.feeds.values():
            if feed.recorder is not None:
                with contextlib.suppress(OSError):
                    feed.recorder.writer.close()
        await asyncio.to_thread(self.equipment.store.close)

    async def _end_launches(self) -> None:
        """Those that write or start something come to their end; the others have left no trace of themselves yet."""
        if self._launches:
            await asyncio.wait(self._launches, timeout=LAUNCH_END_SECONDS)
        self.equipment.launcher.break_off_questions()
        await asyncio.gather(*self._launches, return_exceptions=True)

    async def find_submission(self, idempotency: Idempotency) -> Submission | None:
        """See `Tasks.find_submission`."""
        if self._closing.is_set():
            raise UnavailableError(_SHUTS_DOWN)
        living = [feed.task for feed in self.equipment.follower.feeds.values()]
        try:
            before = await asyncio.to_thread(self.equipment.register.find, idempotency, living)
        except StoreError as error:
            raise UnavailableError(error.message) from error
        return None if before is None else Submission(before, is_replayed=True)

    async def submit(self, manifest: Manifest, idempotency: Idempotency | None = None) -> Submission:
        """See `Tasks.submit`."""
        if idempotency is None:
            return Submission(await self._take(manifest, None))
        async with self._keys.of(idempotency.key):
            before = await self.find_submission(idempotency)
            return before or Submission(await self._take(manifest, idempotency))

    async def check(self, manifest: Manifest) -> None:
        """See `Tasks.check`."""
        self._refuse_what_cannot_run(manifest)
        if manifest.metadata.id:
            with contextlib.suppress(TaskNotFoundError):
                raise DuplicateTaskError(await self.status(manifest.metadata.id))

    async def _take(self, manifest: Manifest, idempotency: Idempotency | None) -> Task:
        self._refuse_what_cannot_run(manifest)
        task_id = manifest.metadata.id or str(uuid.uuid4())
        metadata = dataclasses.replace(manifest.metadata, id=task_id)
        named = dataclasses.replace(manifest, metadata=metadata)
        try:
            feed, submission = await asyncio.to_thread(self.equipment.register.add, named, idempotency)
        except (OSError, StoreError) as error:
            raise UnavailableError(f"The task could not be written down: {error}; submit it again.") from error
        submitted = feed.task
        _log.info("Task %s was accepted", submitted.id, extra={"task_id": submitted.id, "state": submitted.state})
        self.take_in(feed, submission=submission)
        return submitted

    async def status(self, task_id: str) -> Task:
        """See `Tasks.status`."""
        feed = self.equipment.follower.feeds.get(task_id)
        return feed.shown if feed is not None else await self._load(task_id)

    async def query(self, query: TaskQuery) -> TaskPage:
        """See `Tasks.query`."""
        page = await asyncio.to_thread(self.equipment.store.query, query)
        return dataclasses.replace(page, tasks=[self._with_note(task) for task in page.tasks])

    def _with_note(self, task: Task) -> Task:
        """What a task waits for is told by its feed, which the index does not know."""
        feed = self.equipment.follower.feeds.get(task.id)
        return feed.with_note(task) if feed is not None else task

    async def release(self, task_id: str) -> None:
        """See `Tasks.release`."""
        await self.equipment.preservation.release(await self.status(task_id))

    async def prune(self, retention: Retention | None, *, dry_run: bool) -> Sequence[PrunedTask]:
        """See `Tasks.prune`."""
        try:
            return await self.equipment.pruning.prune(retention or self.equipment.retention, dry_run=dry_run)
        except (OSError, TimeoutError) as error:
            reason = reason_of(error)
            raise UnavailableError(f"Finished tasks could not be removed: {reason}; try again.") from error

    async def keeps_sandbox(self, task: Task) -> bool:
        """See `Tasks.keeps_sandbox`."""
        if task.state is not TaskState.FAILED_PRESERVED:
            return False
        try:
            return await asyncio.to_thread(self.equipment.preservation.is_kept, task)
        except OSError:
            return True

    async def open_terminal(self, task_id: str, order: TerminalOrder) -> TerminalLine:
        """See `Tasks.open_terminal`."""
        task = await self.status(task_id)
        if task.state is TaskState.FAILED_PRESERVED:
            return await self.equipment.visits.open_terminal(task, order)
        if task.state.is_terminal or task.attempt is None:
            raise TerminalRefusedError(f"Task {task_id} is {task.state}; only a sandbox that runs has terminals.")
        try:
            return await self.equipment.runners.open_terminal(task.attempt.id, order)
        except RunnerUnreachableError as error:
            raise UnavailableError(f"The runner of task {task_id} does not answer; try again.") from error

    async def wait(self, task_id: str, timeout_seconds: float) -> Task:
        """See `Tasks.wait`."""
        deadline = self.equipment.clock.monotonic() + timeout_seconds
        feed = self.equipment.follower.feeds.get(task_id)
        if feed is None:
            return await self._load(task_id)
        while not feed.task.state.is_terminal and (left := deadline - self.equipment.clock.monotonic()) > 0:
            await feed.changed(left)
        return feed.shown

    async def cancel(self, task_id: str, *, reason: str, force: bool) -> Cancellation:
        """See `Tasks.cancel`."""
        feed = self.equipment.follower.feeds.get(task_id)
        before = feed.task if feed is not None else await self._load(task_id)
        if before.state.is_terminal:
            raise TaskTerminalError(before)
        feed = feed or self.equipment.follower.feeds.get(task_id)
        if feed is None:
            raise UnavailableError(f"Task {task_id} is being accepted at this moment; try again.")
        message = await self._cancelling.cancel(feed, CancelOrder(reason, force))
        return Cancellation(before, self.equipment.clock.now(), message)

    def frames(self, task_id: str, *, after: int = 0) -> AsyncIterator[Frame]:
        """See `Tasks.frames`."""
        return self.equipment.telling.frames(task_id, after=after)

    def follow(self, task_id: str, *, after: int | None = None) -> AsyncIterator[Frame]:
        """See `Tasks.follow`."""
        return self.equipment.telling.follow(task_id, after=after)

    def follow_all(self) -> AsyncIterator[Frame]:
        """See `Tasks.follow_all`."""
        return self.equipment.telling.follow_all()

    async def artifacts(self, task_id: str) -> Sequence[StoredArtifact]:
        """See `Tasks.artifacts`."""
        return await asyncio.to_thread(self.equipment.shelf.artifacts, await self.status(task_id))

    async def artifact(self, task_id: str, name: str) -> StoredArtifact:
        """See `Tasks.artifact`."""
        return await asyncio.to_thread(self.equipment.shelf.artifact, await self.status(task_id), name)

    async def drain(self) -> Draining:
        """See `Tasks.drain`."""
        await asyncio.to_thread(self.equipment.drain.begin, self.equipment.clock.now())
        self._admit()
        return await self.draining()

    async def undo_drain(self) -> Draining:
        """See `Tasks.undo_drain`."""
        await asyncio.to_thread(self.equipment.drain.end)
        self._admit()
        return await self.draining()

    async def draining(self) -> Draining:
        """See `Tasks.draining`."""
        waiting = self.equipment.room.waiting_count
        unfinished = sum(not feed.task.state.is_terminal for feed in self.equipment.follower.feeds.values())
        return Draining(self.equipment.drain.since, max(unfinished - waiting, 0), waiting)

    async def health(self) -> Health:
        """See `Tasks.health`."""
        health = await asyncio.to_thread(self.equipment.health.make)
        return dataclasses.replace(health, occupancy=self.equipment.room.occupancy)

    async def _load(self, task_id: str) -> Task:
        indexed = await asyncio.to_thread(self.equipment.store.load, task_id)
        if indexed is None:
            raise TaskNotFoundError(task_id)
        return indexed.task

    def _refuse_what_cannot_run(self, manifest: Manifest) -> None:
        if self._closing.is_set():
            raise UnavailableError(_SHUTS_DOWN)
        if blockers := self.equipment.health.blockers:
            seconds = self.equipment.prober.retry_after_seconds
            raise UnavailableError(" ".join(blockers), retry_after_seconds=seconds)
        if self.equipment.drain.since is not None:
            raise UnavailableError(REASON)
        need, total = Capacity.asked_by(manifest.vm), self.equipment.room.total
        if not need.fits_in(total):
            raise InsufficientResourcesError(
                need.lacking_in(total, "in all"),
                requested_cpus=need.cpus,
                available_cpus=total.cpus,
                requested_memory_bytes=need.memory_bytes,
                available_memory_bytes=total.memory_bytes,
            )

    def _finished(self, feed: Feed) -> None:
        self.equipment.room.leave(feed.task.id)
        self._admit()

    def _admit(self) -> None:
        """Let in whom there is room for; look again later while somebody waits, for memory comes back unasked."""
        if self._next_look is not None:
            self._next_look.cancel()
        if self._closing.is_set() or self.equipment.room.is_empty:
            return
        # First of all: whatever breaks below, who waits is looked at again; not on behalf of who asked now.
        self._next_look = asyncio.get_running_loop().call_later(ROOM_CHECK_SECONDS, self._admit, context=Context())
        if (obstacle := self._obstacle()) is None:
            complaints = self._let_in()
        else:
            complaints = self.equipment.room.held_back(obstacle)
        for task_id, complaint in complaints.items():
            self.equipment.follower.feeds[task_id].note = complaint

    def _obstacle(self) -> str | None:
        """What keeps all waiting tasks from beginning, however much room was promised to them."""
        if self.equipment.drain.since is not None:
            return REASON
        return self.equipment.prober.obstacle or self.equipment.space.look()

    async def _lost(self, feed: Feed) -> None:
        """Nobody holds the journal. A pending task's could not be taken when the server started: now it waits, too."""
        if not feed.task.waits_to_begin:
            await self.equipment.launcher.finish(feed)
        elif await self.equipment.launcher.take_back(feed):
            self.equipment.room.leave(feed.task.id)
            self.equipment.room.enter(feed.task.id, Capacity.asked_by(feed.task.manifest.vm))
            self._admit()

    def _let_in(self) -> Mapping[str, str]:
        """Gives what those wait for that there is no room for."""
        available_bytes = self._memory_available_bytes()
        while (task_id := self.equipment.room.admit(available_bytes)) is not None:
            feed = self.equipment.follower.feeds[task_id]
            feed.note = ""
            launch = asyncio.create_task(self._launch(feed), name=f"launch {task_id}")
            self._launches.add(launch)
            launch.add_done_callback(self._launches.discard)
            if available_bytes is not None:
                available_bytes -= MEMORY_AVAILABLE_BYTES_MIN
        return self.equipment.room.complaints(available_bytes)

    def _memory_available_bytes(self) -> int | None:
        """Without what those will soon use that are just starting."""
        available_bytes = self.equipment.read_memory_available_bytes()
        if available_bytes is None:
            return None
        feeds = self.equipment.follower.feeds.values()
        starting = [feed for feed in feeds if feed.task.state in _STARTING and self.equipment.room.holds(feed.task.id)]
        return available_bytes - len(starting) * MEMORY_AVAILABLE_BYTES_MIN

    async def _launch(self, feed: Feed) -> None:
        """Until it has worked, or is kept from beginning, or the server ends; the next one goes on then."""
        work_on(feed.task.id)
        while not self._closing.is_set():
            if feed.recorder is not None and feed.recorder.task.waits_to_begin and self._obstacle() is not None:
                self.equipment.room.put_back(feed.task.id)
                self._admit()
                return
            try:
                await self.equipment.launcher.launch(feed)
                return
            except Exception as error:
                feed.complain(error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), RETRY_SECONDS)
