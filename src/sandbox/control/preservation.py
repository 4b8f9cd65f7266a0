"""Sandboxes that failed tasks left for their users, until somebody releases them or their time is over."""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from sandbox.contracts.disks import Remove
from sandbox.contracts.layout import AttemptLayout, TaskLayout
from sandbox.contracts.secret_fingerprint import has_fingerprint
from sandbox.contracts.tasks import SandboxNotPreservedError, UnavailableError
from sandbox.control.locks import Locks
from sandbox.model.errors import reason_of
from sandbox.model.limits import SANDBOX_TEARDOWN_SECONDS, VISIT_END_SECONDS
from sandbox.model.state import TaskState
from sandbox.model.task import Task

_POLL_SECONDS = 0.1


class Preservation:
    """Knows what is kept, and removes it."""

    def __init__(self, data_dir: Path, remove: Remove) -> None:
        self._data_dir = data_dir
        self._remove = remove
        self._locks = Locks()

    def is_kept(self, task: Task) -> bool:
        """Whether files of the task's sandbox are still there for its user."""
        files = self._files(task)
        return files is not None and (files.handle.exists() or _has_disk(files))

    def attempt_of(self, task: Task) -> str | None:
        """In whose directory the files are: the last one's, or an earlier one's whose disk it was to take over."""
        last = task.attempt
        if task.state is not TaskState.FAILED_PRESERVED or last is None:
            return None
        attempts = (last, *reversed(task.past_attempts)) if last.resumes else (last,)
        layout = TaskLayout(self._data_dir, task.id)
        return next((attempt.id for attempt in attempts if _has_disk(layout.attempt(attempt.id))), last.id)

    def was_made_with(self, task: Task, secrets: Mapping[str, str]) -> bool:
        """Whether the agent that made the kept files had these values, and no others that nobody knows any more."""
        files = self._files(task)
        return not secrets or (files is not None and has_fingerprint(files.secret_fingerprint, secrets))

    async def release(self, task: Task) -> None:
        """Remove the files; what is left of a release that was broken off goes as well.

        Raises SandboxNotPreservedError, UnavailableError.
        """
        async with self._locks.of(task.id):
            files = self._files(task)
            try:
                if files is None or not await asyncio.to_thread(self.is_kept, task):
                    raise SandboxNotPreservedError(task)
                async with self._holding_after_a_visit(task):
                    async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                        await self._empty(files)
            except (OSError, TimeoutError) as error:
                reason = reason_of(error)
                raise UnavailableError(f"The sandbox could not be removed: {reason}; release it again.") from error

    @asynccontextmanager
    async def _holding_after_a_visit(self, task: Task) -> AsyncIterator[None]:
        """The lock, when a shell that was just left has let it go.

        Raises SandboxNotPreservedError, UnavailableError.
        """
        deadline = asyncio.get_running_loop().time() + VISIT_END_SECONDS
        while True:
            with self.holding(task) as lock_fd:
                if lock_fd is not None:
                    yield
                    return
            if asyncio.get_running_loop().time() > deadline:
                raise UnavailableError("Somebody has a shell in this sandbox; release it when they have left.")
            await asyncio.sleep(_POLL_SECONDS)

    @contextmanager
    def holding(self, task: Task) -> Iterator[int | None]:
        """The lock on the kept files, which a copy of the descriptor goes on holding; None while another has it.

        Raises SandboxNotPreservedError, OSError.
        """
        files = self._files(task)
        if files is None or not self.is_kept(task):
            raise SandboxNotPreservedError(task)
        lock_fd = os.open(files.visit_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_fd)
            yield None
            return
        try:
            if not self.is_kept(task):  # it was released meanwhile
                files.visit_lock.unlink(missing_ok=True)
                raise SandboxNotPreservedError(task)
            yield lock_fd
        finally:
            os.close(lock_fd)

    @asynccontextmanager
    async def undisturbed(self, task: Task) -> AsyncIterator[bool]:
        """Whether the files are kept and nobody uses or releases them, for as long as the context lasts."""
        async with self._locks.of(task.id):
            try:
                with self.holding(task) as lock_fd:
                    yield lock_fd is not None
            except SandboxNotPreservedError:
                yield False

    async def _empty(self, files: AttemptLayout) -> None:
        """The handle goes last, but for the lock: without that somebody could begin to use what is half removed."""
        kept = (files.handle, files.visit_lock, files.runner_log)
        paths = [path for path in await asyncio.to_thread(lambda: list(files.root.iterdir())) if path not in kept]
        await self._remove(paths)
        files.handle.unlink(missing_ok=True)
        files.visit_lock.unlink(missing_ok=True)

    def _files(self, task: Task) -> AttemptLayout | None:
        attempt_id = self.attempt_of(task)
        return None if attempt_id is None else TaskLayout(self._data_dir, task.id).attempt(attempt_id)


def _has_disk(files: AttemptLayout) -> bool:
    return files.disk.exists() or files.disk_image.exists()
