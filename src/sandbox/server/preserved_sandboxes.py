"""Preserved sandboxes of failed tasks, kept until they are released or expire, and the debug sessions in them."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TypeVar

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.images import ImageUnusableError
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.placement import AttemptFiles, AttemptLocation, HostUnreachableError, PreservedDisk
from sandbox.interfaces.runner import (
    OpenTerminal,
    RunDebugSession,
    RunnerUnreachableError,
    TerminalConnection,
    TerminalRefusedError,
)
from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.interfaces.server_services import SandboxNotPreservedError, UnavailableError
from sandbox.interfaces.store import Cursor, Store, TaskQuery
from sandbox.model.errors import error_reason
from sandbox.model.failure import AttemptError
from sandbox.model.fixed_limits import (
    DEBUG_SESSION_END_TIMEOUT_SECONDS,
    DEBUG_SESSION_START_TIMEOUT_SECONDS,
    MEMORY_AVAILABLE_BYTES_MIN,
    SANDBOX_TEARDOWN_SECONDS,
)
from sandbox.model.resources import Resources
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.primitives.concurrency import KeyedLock, run_in_daemon_thread
from sandbox.server.placements import Placements, ProbedHost, attempt_location
from sandbox.server.runner_launcher import TaskSecrets
from sandbox.server.scheduler import describe_memory_shortfall

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

PRESERVED_STATES = frozenset({TaskState.FAILED_PRESERVED})
_POLL_SECONDS = 0.1
_LIST_SECONDS = 5.0
"""Total time for the queries to hosts about one list of tasks."""

_CONCURRENT_RELEASE_MESSAGE = "Another request is still releasing this sandbox; release it again later."
_RELEASE_REFUSALS = {
    LockState.HELD: "This sandbox has an open shell; release it after the shell has ended.",
    LockState.UNKNOWN: "The host of this sandbox is not responding; release it again later.",
}


class SandboxInUseError(UnavailableError):
    """The preserved sandbox has an open shell, or another request is releasing it."""


FindFiles = Callable[[AttemptLocation], AttemptFiles]
"""Returns the files of an attempt's placement. Raises HostUnreachableError."""


async def _run_in_own_thread(function: Callable[..., _Result], *arguments: object) -> _Result:
    """Call a function in a dedicated thread. If a slow host delays the call, no shared thread is blocked."""
    return await run_in_daemon_thread(partial(function, *arguments))


class PreservedFiles:
    """Finds the files of preserved sandboxes. Methods block on the host that has the files, and raise OSError."""

    def __init__(self, find_files: FindFiles) -> None:
        self._find_files = find_files

    def is_preserved(self, task: Task) -> bool:
        """Return whether files of the task's sandbox are still preserved."""
        location = self.find_location(task)
        return location is not None and self._find_files(location).has_disk_or_handle(location)

    def find_preserved(self, tasks: Sequence[Task]) -> Set[str]:
        """Return the ids of the tasks whose files are preserved, or may be preserved because a query failed.

        A host that is not responding is queried only once. After a few seconds of queries in total, all other tasks
        count as preserved.
        """
        found, unreachable = set[str](), set[str]()
        deadline = time.monotonic() + _LIST_SECONDS
        for task in tasks:
            host = task.attempt.host if task.attempt is not None else ""
            try:
                if host in unreachable or time.monotonic() > deadline or self.is_preserved(task):
                    found.add(task.id)
            except OSError as error:
                found.add(task.id)
                unreachable |= {host} if isinstance(error, HostUnreachableError) else set()
        return found

    def find_location(self, task: Task) -> AttemptLocation | None:
        """Return the attempt whose directory contains the files; None if the task does not preserve any.

        This is an earlier attempt if the last one did not take over the disk.
        """
        last = task.attempt
        if task.state is not TaskState.FAILED_PRESERVED or last is None:
            return None
        attempts = (last, *reversed(task.past_attempts)) if last.resumes else ()
        locations = (attempt_location(task, attempt) for attempt in attempts)
        return next(
            (location for location in locations if self._find_files(location).has_disk(location)),
            attempt_location(task, last),
        )

    def has_same_secrets(self, task: Task, secrets: Mapping[str, str]) -> bool:
        """Return whether the agent that wrote the files had exactly these secrets; True if `secrets` is empty."""
        location = self.find_location(task)
        return not secrets or (location is not None and self._find_files(location).has_same_secrets(location, secrets))

    def has_sandbox_handle(self, task: Task) -> bool:
        """Return whether a handle of the task exists. Only a handle identifies the remaining parts of a sandbox."""
        attempts = (*task.past_attempts, *((task.attempt,) if task.attempt is not None else ()))
        locations = {one.placement: one for one in (attempt_location(task, attempt) for attempt in attempts)}
        return any(self._find_files(one).has_sandbox_handle(task.id) for one in locations.values())


class PreservedSandboxes(PreservedFiles):
    """Finds and releases preserved sandboxes."""

    def __init__(self, placements: Placements) -> None:
        super().__init__(placements.files)
        self._placements = placements
        self._locks = KeyedLock()

    async def release(self, task: Task, *, timeout_seconds: float | None = None) -> None:
        """Remove the preserved files, including leftovers of an interrupted release.

        timeout_seconds: how long to wait for the end of a debug session, and for other requests. By default, long
            enough for a session that was just closed.

        Raises SandboxNotPreservedError, UnavailableError; SandboxInUseError if the wait was too short.
        """
        seconds = DEBUG_SESSION_END_TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds
        deadline = asyncio.get_running_loop().time() + seconds
        lock = self._locks.lock_for(task.id)
        try:
            # One deadline covers the whole request. Otherwise the waits of queued requests would add up.
            async with asyncio.timeout_at(deadline):
                await lock.acquire()
        except TimeoutError:
            raise SandboxInUseError(_CONCURRENT_RELEASE_MESSAGE) from None
        try:
            await self._release_locked(task, deadline)
        finally:
            lock.release()

    async def _release_locked(self, task: Task, deadline: float) -> None:
        try:
            async with self._lock_when_idle(task, deadline) as disk:
                async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                    await disk.remove()
        except (AttemptError, OSError, TimeoutError) as error:
            reason = error_reason(error)
            raise UnavailableError(f"The sandbox could not be removed: {reason}; release it again.") from error

    @asynccontextmanager
    async def _lock_when_idle(self, task: Task, deadline: float) -> AsyncIterator[PreservedDisk]:
        """Hold the lock, after waiting for a debug session that was just closed.

        Raises SandboxNotPreservedError, UnavailableError.
        """
        while True:
            async with self.try_lock(task) as (lock_state, disk):
                if lock_state is LockState.FREE:
                    yield disk
                    return
            if asyncio.get_running_loop().time() > deadline:
                refusal = SandboxInUseError if lock_state is LockState.HELD else UnavailableError
                raise refusal(_RELEASE_REFUSALS[lock_state])
            await asyncio.sleep(_POLL_SECONDS)

    @asynccontextmanager
    async def try_lock(self, task: Task) -> AsyncIterator[tuple[LockState, PreservedDisk]]:
        """Hold the lock on the preserved files if the lock is FREE; yield the lock's previous state, and the disk.

        Raises SandboxNotPreservedError, OSError.
        """
        await self._check_preserved(task)
        disk = await self.get_disk(task)
        async with disk.try_lock() as lock_state:
            if lock_state is LockState.FREE:  # the files may have been released in the meantime
                await self._check_preserved(task)
            yield lock_state, disk

    async def _check_preserved(self, task: Task) -> None:
        if not await _run_in_own_thread(self.is_preserved, task):
            raise SandboxNotPreservedError(task)

    async def get_disk(self, task: Task) -> PreservedDisk:
        """Return the disk with the preserved files. Raises SandboxNotPreservedError, OSError."""
        return self._placements.preserved_disk(await self.get_location(task))

    async def get_location(self, task: Task) -> AttemptLocation:
        """Return the attempt that has the preserved files. Raises SandboxNotPreservedError, OSError."""
        location = await _run_in_own_thread(self.find_location, task)
        if location is None:
            raise SandboxNotPreservedError(task)
        return location

    @asynccontextmanager
    async def try_exclusive_use(self, task: Task) -> AsyncIterator[bool]:
        """Yield whether the files are preserved and unused; a release request counts as a use. Does not wait.

        If the result is True, nothing else can use the files for the duration of the context.
        """
        lock = self._locks.lock_for(task.id)
        if lock.locked():
            yield False
            return
        async with lock:
            try:
                async with self.try_lock(task) as (lock_state, _):
                    yield lock_state is LockState.FREE
            except SandboxNotPreservedError:
                yield False


class PreservationExpiry:
    """Releases preserved sandboxes after their time to live, counted from the task's end."""

    def __init__(
        self, store: Store, preserved_sandboxes: PreservedSandboxes, clock: Clock, time_to_live_seconds: float
    ) -> None:
        self._store = store
        self._preserved_sandboxes = preserved_sandboxes
        self._clock = clock
        self._time_to_live = timedelta(seconds=time_to_live_seconds)
        self._swept_until: Cursor | None = None
        """Everything up to this position was released."""
        self._in_use = set[str]()
        """Expired sandboxes that were in use during the last sweep."""

    async def sweep(self) -> None:
        """Release all expired sandboxes."""
        were_in_use, self._in_use = self._in_use, set()
        ended_before, cursor, is_swept = self._clock.now() - self._time_to_live, self._swept_until, True
        while True:
            query = TaskQuery.least_recently_changed_first(PRESERVED_STATES, cursor)
            page = await asyncio.to_thread(self._store.query, query)
            for task in page.tasks:
                if task.state_changed_at > ended_before:
                    return
                is_swept = await self._release(task, was_in_use=task.id in were_in_use) and is_swept
            if page.next_cursor is None:
                return
            cursor = page.next_cursor
            self._swept_until = cursor if is_swept else self._swept_until

    async def _release(self, task: Task, *, was_in_use: bool) -> bool:
        """Release a sandbox unless it is in use. Return whether it is released.

        Does not wait for open shells, because waiting for many shells would delay the expiry of all other sandboxes.
        """
        fields = {"task_id": task.id}
        try:
            await self._preserved_sandboxes.release(task, timeout_seconds=0)
        except SandboxNotPreservedError:
            pass
        except SandboxInUseError:
            self._in_use.add(task.id)
            if not was_in_use:
                _log.info("Task %s: its preserved sandbox has expired, but is in use", task.id, extra=fields)
            return False
        except UnavailableError as error:
            _log.error("Task %s: %s", task.id, error, extra=fields)
            return False
        return True


_DEBUG_SESSION_POLL_SECONDS = 0.05
_HOST_NOT_RESPONDING = "the host of the preserved sandbox is not responding"


class DebugSessions:
    """Debug sessions of preserved sandboxes: the first client starts a runner, and later clients share it.

    The runner inherits a lock on the preserved files, just as other runners inherit a journal's lock. So each disk has
    at most one sandbox, and no disk is released while it is in use.

    Sessions do not count towards the capacity. A session starts only while its host has enough free memory, because
    any number of tasks can be preserved.
    """

    def __init__(
        self,
        preserved_sandboxes: PreservedSandboxes,
        secrets: TaskSecrets,
        placements: Placements,
    ) -> None:
        self._preserved_sandboxes = preserved_sandboxes
        self._secrets = secrets
        self._placements = placements
        self._start_locks = KeyedLock()
        self._starting: dict[str, ProbedHost] = {}
        """The hosts of sessions that are starting, and will soon use memory, keyed by the tasks' ids."""

    async def open_terminal(self, task: Task, request: OpenTerminal) -> TerminalConnection:
        """Open a shell in a preserved sandbox. Raises TerminalRefusedError, UnavailableError."""
        try:
            return await self._open_terminal(task, request)
        except SandboxNotPreservedError as error:
            raise TerminalRefusedError(error.message) from error
        except OSError as error:
            reason = error_reason(error)
            raise UnavailableError(f"No shell can be opened for task {task.id}: {reason}; try again.") from error

    async def _open_terminal(self, task: Task, request: OpenTerminal) -> TerminalConnection:
        """Implement `open_terminal`. Also raises SandboxNotPreservedError and OSError."""
        if not await run_in_daemon_thread(partial(self._preserved_sandboxes.is_preserved, task)):
            raise SandboxNotPreservedError(task)
        if request.is_agent_terminal:
            raise TerminalRefusedError(
                f"The agent of task {task.id} has ended; open a debug shell in its preserved sandbox."
            )
        deadline = asyncio.get_running_loop().time() + DEBUG_SESSION_START_TIMEOUT_SECONDS
        lock = self._start_locks.lock_for(task.id)
        try:
            # For each task, only the client that holds the lock starts the session or polls for its start. The other
            # clients wait for the lock without polling.
            async with asyncio.timeout_at(deadline):
                await lock.acquire()
        except TimeoutError:
            problem = "too many clients are waiting for the debug session; try again."
            raise UnavailableError(f"No shell can be opened for task {task.id}: {problem}") from None
        try:
            return await self._open_when_started(task, request, deadline)
        finally:
            self._starting.pop(task.id, None)
            lock.release()

    async def _open_when_started(self, task: Task, request: OpenTerminal, deadline: float) -> TerminalConnection:
        """Start the session unless it is already running, and open a terminal."""
        has_launched = is_unknown = False
        while asyncio.get_running_loop().time() < deadline:
            with suppress(RunnerUnreachableError):
                disk = await self._preserved_sandboxes.get_disk(task)
                return await disk.open_terminal(request)
            async with self._preserved_sandboxes.try_lock(task) as (lock_state, disk):
                is_unknown = lock_state is LockState.UNKNOWN
                if lock_state is LockState.FREE and has_launched:
                    break
                if lock_state is LockState.FREE:
                    await self._start_debug_session(task, disk)
                    has_launched = True
            await asyncio.sleep(_DEBUG_SESSION_POLL_SECONDS)
        if is_unknown:
            raise UnavailableError(f"No shell can be opened for task {task.id}: {_HOST_NOT_RESPONDING}; try again.")
        problem = f"The preserved sandbox of task {task.id} could not be started"
        raise UnavailableError(f"{problem}; see the runner's log on the server's host.")

    async def _start_debug_session(self, task: Task, disk: PreservedDisk) -> None:
        """Start the session's runner. Raises UnavailableError if a retry may help, otherwise TerminalRefusedError."""
        location = await self._preserved_sandboxes.get_location(task)
        host = self._placements.host_of(location)
        if (blocked_reason := host.blocked_reason) is not None:
            problem = f"No shell can be opened for task {task.id}. {blocked_reason}"
            raise UnavailableError(problem, retry_after_seconds=host.retry_after_seconds)
        if shortfall := self._find_memory_shortfall(task, host):
            problem = f"its sandbox needs {shortfall}; try again later."
            raise UnavailableError(f"No shell can be opened for task {task.id}: {problem}")
        self._starting[task.id] = host
        secrets = await self._resolve_secrets(task)
        try:
            if not await run_in_daemon_thread(partial(self._preserved_sandboxes.has_same_secrets, task, secrets)):
                reason = "the task's secrets have changed since the agent ran, so the old values could not be redacted"
                raise UnavailableError(f"No shell can be opened for task {task.id}: {reason}.")
            image = await run_in_daemon_thread(partial(self._placements.find_image, location, task.manifest.vm.profile))
            await disk.start_debug_session(RunDebugSession(task.id, location.attempt_id, image, secrets))
        except ImageUnusableError as error:
            raise TerminalRefusedError(f"No shell can be opened for task {task.id}: {error.message}") from error
        except OSError as error:
            reason = f"the runner could not be started ({error}); try again"
            raise UnavailableError(f"No shell can be opened for task {task.id}: {reason}.") from error

    def _find_memory_shortfall(self, task: Task, host: ProbedHost) -> str:
        """Return the free memory that another session requires (human-readable); empty if the host has enough."""
        available_bytes = host.memory_available_bytes()
        if available_bytes is None:
            return ""
        starting = sum(other is host for other in self._starting.values())
        requested = Resources.requested_by(task.manifest.vm)
        return "".join(describe_memory_shortfall(requested, available_bytes - starting * MEMORY_AVAILABLE_BYTES_MIN))

    async def _resolve_secrets(self, task: Task) -> dict[str, str]:
        """Resolve secrets for redaction only. Without them, the agent's files must not be shown."""
        try:
            return await self._secrets.resolve(task)
        except SecretUnavailableError as error:
            reason = error.detail  # only operators open terminals
        problem = f"No shell can be opened for task {task.id}. The shell's output could not be redacted: {reason}"
        raise UnavailableError(problem)
