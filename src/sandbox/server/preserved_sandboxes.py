"""Preserved sandboxes of failed tasks, kept until they are released or expire."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from sandbox.interfaces.disks import RemovePaths
from sandbox.interfaces.file_layout import AttemptLayout, TaskLayout
from sandbox.interfaces.images import FindImage, ImageUnusableError
from sandbox.interfaces.journal import Liveness
from sandbox.interfaces.placement import DebugSession, Placement, PreservedDisk, RunnerUnreachableError, TerminalOrder
from sandbox.interfaces.secrets import SecretUnavailableError
from sandbox.interfaces.tasks import SandboxNotPreservedError, UnavailableError
from sandbox.interfaces.terminals import TerminalConnection, TerminalRefusedError
from sandbox.model.errors import error_reason
from sandbox.model.limits import DEBUG_SESSION_END_SECONDS, DEBUG_SESSION_START_SECONDS, SANDBOX_TEARDOWN_SECONDS
from sandbox.model.task import Task
from sandbox.model.task_state import TaskState
from sandbox.server.runtime_prober import RuntimeProber
from sandbox.server.task_secrets import TaskSecrets
from sandbox.server.tracked_task import KeyedLock
from sandbox.system.fingerprint import matches_fingerprint

_POLL_SECONDS = 0.1
_UNKNOWN_DISK = "the host of its preserved sandbox does not respond"
_RELEASE_REFUSALS = {
    Liveness.HELD: "This sandbox has an open shell; release it after the shell has ended.",
    Liveness.UNKNOWN: "The host of this sandbox does not respond; release it again later.",
}


def _has_disk(layout: AttemptLayout) -> bool:
    return layout.disk.exists() or layout.disk_image.exists()


class PreservedFiles:
    """Finds the files of preserved sandboxes."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def is_preserved(self, task: Task) -> bool:
        """Whether files of the task's sandbox are still preserved."""
        files = self.layout(task)
        return files is not None and (files.handle.exists() or _has_disk(files))

    def disk_attempt_id(self, task: Task) -> str | None:
        """Return the id of the attempt whose directory contains the files.

        This is an earlier attempt if the last one did not take over the disk.
        """
        last = task.attempt
        if task.state is not TaskState.FAILED_PRESERVED or last is None:
            return None
        attempts = (last, *reversed(task.past_attempts)) if last.resumes else (last,)
        layout = TaskLayout(self._data_dir, task.id)
        return next((attempt.id for attempt in attempts if _has_disk(layout.attempt(attempt.id))), last.id)

    def has_same_secrets(self, task: Task, secrets: Mapping[str, str]) -> bool:
        """Whether the agent that wrote the preserved files had exactly these secret values. True without secrets."""
        files = self.layout(task)
        return not secrets or (files is not None and matches_fingerprint(files.secret_fingerprint, secrets))

    def layout(self, task: Task) -> AttemptLayout | None:
        """Return the directory with the files; None if the task does not preserve any."""
        attempt_id = self.disk_attempt_id(task)
        return None if attempt_id is None else TaskLayout(self._data_dir, task.id).attempt(attempt_id)


class PreservedSandboxes(PreservedFiles):
    """Finds and releases preserved sandboxes."""

    def __init__(self, data_dir: Path, placement: Placement, remove: RemovePaths) -> None:
        super().__init__(data_dir)
        self._placement = placement
        self._remove = remove
        self._locks = KeyedLock()

    async def release(self, task: Task) -> None:
        """Remove the files, including the remains of an interrupted release.

        Raises SandboxNotPreservedError, UnavailableError.
        """
        deadline = asyncio.get_running_loop().time() + DEBUG_SESSION_END_SECONDS
        lock = self._locks.lock_for(task.id)
        try:
            # Each request has one deadline, so waiting requests do not add up and delay expiry and garbage collection.
            async with asyncio.timeout_at(deadline):
                await lock.acquire()
        except TimeoutError:
            raise UnavailableError("Another request is releasing this sandbox; release it again.") from None
        try:
            await self._release_locked(task, deadline)
        finally:
            lock.release()

    async def _release_locked(self, task: Task, deadline: float) -> None:
        files = self.layout(task)
        try:
            if files is None or not await asyncio.to_thread(self.is_preserved, task):
                raise SandboxNotPreservedError(task)
            async with self._lock_when_idle(task, deadline):
                async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                    await self._remove_files(files)
        except (OSError, TimeoutError) as error:
            reason = error_reason(error)
            raise UnavailableError(f"The sandbox could not be removed: {reason}; release it again.") from error

    @asynccontextmanager
    async def _lock_when_idle(self, task: Task, deadline: float) -> AsyncIterator[None]:
        """Hold the lock, after waiting for a debug session that was just closed.

        Raises SandboxNotPreservedError, UnavailableError.
        """
        while True:
            with self.try_lock(task) as (liveness, _):
                if liveness is Liveness.FREE:
                    yield
                    return
            if asyncio.get_running_loop().time() > deadline:
                raise UnavailableError(_RELEASE_REFUSALS[liveness])
            await asyncio.sleep(_POLL_SECONDS)

    @contextmanager
    def try_lock(self, task: Task) -> Iterator[tuple[Liveness, PreservedDisk]]:
        """Hold the lock on the preserved files if it is FREE; yield the lock's state before, and the disk.

        Raises SandboxNotPreservedError, OSError.
        """
        files = self.layout(task)
        if files is None or not self.is_preserved(task):
            raise SandboxNotPreservedError(task)
        disk = self.disk(task)
        with disk.try_lock() as liveness:
            if liveness is Liveness.FREE and not self.is_preserved(task):  # released in the meantime
                files.debug_session_lock.unlink(missing_ok=True)
                raise SandboxNotPreservedError(task)
            yield liveness, disk

    def disk(self, task: Task) -> PreservedDisk:
        """Return the disk with the preserved files."""
        return self._placement.preserved_disk(task.id, self.disk_attempt_id(task) or "")

    @asynccontextmanager
    async def exclusive(self, task: Task) -> AsyncIterator[bool]:
        """Yield whether the files are preserved and unused. If so, nothing else can use them during the context."""
        async with self._locks.lock_for(task.id):
            try:
                with self.try_lock(task) as (liveness, _):
                    yield liveness is Liveness.FREE
            except SandboxNotPreservedError:
                yield False

    async def _remove_files(self, layout: AttemptLayout) -> None:
        """Remove the handle and then the lock last; without the lock a session could start on half-removed files."""
        removed_last = (layout.handle, layout.debug_session_lock, layout.runner_log)
        paths = [
            path for path in await asyncio.to_thread(lambda: list(layout.root.iterdir())) if path not in removed_last
        ]
        await self._remove(paths)
        layout.handle.unlink(missing_ok=True)
        layout.debug_session_lock.unlink(missing_ok=True)


_SHELL_POLL_SECONDS = 0.05


class DebugSessions:
    """Debug sessions of preserved sandboxes: the first client starts a runner, and later clients share it.

    The runner inherits a lock on the preserved files, as other runners inherit that of a journal. So each disk has at
    most one sandbox, and no disk is released while it is in use.
    """

    def __init__(
        self,
        preserved_sandboxes: PreservedSandboxes,
        secrets: TaskSecrets,
        find_image: FindImage,
        prober: RuntimeProber,
    ) -> None:
        self._preserved_sandboxes = preserved_sandboxes
        self._secrets = secrets
        self._find_image = find_image
        self._prober = prober
        self._start_locks = KeyedLock()

    async def open_terminal(self, task: Task, order: TerminalOrder) -> TerminalConnection:
        """Open a shell in a preserved sandbox. Raises TerminalRefusedError, UnavailableError."""
        try:
            return await self._open_terminal(task, order)
        except SandboxNotPreservedError as error:
            raise TerminalRefusedError(error.message) from error
        except OSError as error:
            reason = error_reason(error)
            raise UnavailableError(f"No shell can be opened for task {task.id}: {reason}; try again.") from error

    async def _open_terminal(self, task: Task, order: TerminalOrder) -> TerminalConnection:
        """Like `open_terminal`; also raises SandboxNotPreservedError and OSError."""
        if not self._preserved_sandboxes.is_preserved(task):
            raise SandboxNotPreservedError(task)
        if order.is_agent_terminal:
            raise TerminalRefusedError(
                f"The agent of task {task.id} has ended; open a debug shell in its preserved sandbox."
            )
        deadline = asyncio.get_running_loop().time() + DEBUG_SESSION_START_SECONDS
        lock = self._start_locks.lock_for(task.id)
        try:
            # One client of a task at a time starts the session or polls for its start, so waiting clients cost nothing.
            async with asyncio.timeout_at(deadline):
                await lock.acquire()
        except TimeoutError:
            problem = "too many clients wait for its session; try again."
            raise UnavailableError(f"No shell can be opened for task {task.id}: {problem}") from None
        try:
            return await self._open_when_started(task, order, deadline)
        finally:
            lock.release()

    async def _open_when_started(self, task: Task, order: TerminalOrder, deadline: float) -> TerminalConnection:
        """Start the session unless it runs, and open a terminal."""
        has_launched = is_unknown = False
        while asyncio.get_running_loop().time() < deadline:
            with suppress(RunnerUnreachableError):
                return await self._preserved_sandboxes.disk(task).open_terminal(order)
            with self._preserved_sandboxes.try_lock(task) as (liveness, disk):
                is_unknown = liveness is Liveness.UNKNOWN
                if liveness is Liveness.FREE and has_launched:
                    break
                if liveness is Liveness.FREE:
                    await self._start_session(task, disk)
                    has_launched = True
            await asyncio.sleep(_SHELL_POLL_SECONDS)
        if is_unknown:
            raise UnavailableError(f"No shell can be opened for task {task.id}: {_UNKNOWN_DISK}; try again.")
        problem = f"The preserved sandbox of task {task.id} could not be started"
        raise UnavailableError(f"{problem}; the log of its runner, on the server's host, has the reason.")

    async def _start_session(self, task: Task, disk: PreservedDisk) -> None:
        """Start the session's runner. Raises TerminalRefusedError if a retry cannot help, else UnavailableError."""
        if (blocked_reason := self._prober.blocked_reason) is not None:
            problem = f"No shell can be opened for task {task.id}. {blocked_reason}"
            raise UnavailableError(problem, retry_after_seconds=self._prober.retry_after_seconds)
        secrets = await self._resolve_secrets(task)
        try:
            if not await asyncio.to_thread(self._preserved_sandboxes.has_same_secrets, task, secrets):
                reason = "its secrets have changed since the agent ran, so the old values could not be redacted"
                raise UnavailableError(f"No shell can be opened for task {task.id}: {reason}.")
            attempt_id = self._preserved_sandboxes.disk_attempt_id(task) or ""
            image = await asyncio.to_thread(self._find_image, task.manifest.vm.profile)
            await disk.start_session(DebugSession(task.id, attempt_id, image, secrets))
        except ImageUnusableError as error:
            raise TerminalRefusedError(f"No shell can be opened for task {task.id}: {error.message}") from error
        except OSError as error:
            raise UnavailableError(f"No runner could be started: {error}; try again.") from error

    async def _resolve_secrets(self, task: Task) -> dict[str, str]:
        """Resolve secrets for redaction only. Without them, the agent's files must not be shown."""
        try:
            return await self._secrets.resolve(task)
        except SecretUnavailableError as error:
            reason = error.detail  # only operators open terminals
        problem = f"No shell can be opened for task {task.id}. Its output could not be redacted: {reason}"
        raise UnavailableError(problem)
