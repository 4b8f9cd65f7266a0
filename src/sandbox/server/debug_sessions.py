"""Debug sessions: shells in preserved sandboxes."""

import asyncio
from contextlib import suppress
from functools import partial

from sandbox.interfaces.images import ImageUnusableError
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.placement import PreservedDisk
from sandbox.interfaces.runner import OpenTerminal, RunDebugSession, RunnerUnreachableError
from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.interfaces.server_services import SandboxNotPreservedError, UnavailableError
from sandbox.interfaces.terminal_frames import TerminalConnection, TerminalRefusedError
from sandbox.model.errors import error_reason
from sandbox.model.fixed_limits import DEBUG_SESSION_START_TIMEOUT_SECONDS, MEMORY_AVAILABLE_BYTES_MIN
from sandbox.model.resources import Resources
from sandbox.model.task import Task
from sandbox.primitives.concurrency import KeyedLock, run_in_daemon_thread
from sandbox.server.placement_routing import Placements
from sandbox.server.preserved_sandboxes import PreservedSandboxes
from sandbox.server.runtime_probing import ProbedHost
from sandbox.server.scheduler import describe_memory_shortfall
from sandbox.server.task_secrets import TaskSecrets

_POLL_SECONDS = 0.05
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
            problem = "too many clients wait for the debug session; try again."
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
            await asyncio.sleep(_POLL_SECONDS)
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
            raise UnavailableError(f"No runner could be started: {error}; try again.") from error

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
