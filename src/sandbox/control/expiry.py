"""The end of what was kept for users, when its time is over."""

import asyncio
import logging
from datetime import timedelta

from sandbox.contracts.clock import Clock
from sandbox.contracts.store import Cursor, Store, TaskQuery
from sandbox.contracts.tasks import SandboxNotPreservedError, UnavailableError
from sandbox.control.preservation import Preservation
from sandbox.model.state import TaskState
from sandbox.model.task import Task

_log = logging.getLogger(__name__)


class Expiry:
    """Releases preserved sandboxes after their time to live, counted from the task's end."""

    def __init__(self, store: Store, preservation: Preservation, clock: Clock, time_to_live_seconds: float) -> None:
        self._store = store
        self._preservation = preservation
        self._clock = clock
        self._time_to_live = timedelta(seconds=time_to_live_seconds)
        self._swept: Cursor | None = None
        """Everything up to this place was released."""

    async def sweep(self) -> None:
        """Release all whose time is over."""
        begun_before, place, is_swept = self._clock.now() - self._time_to_live, self._swept, True
        while True:
            query = TaskQuery(
                frozenset({TaskState.FAILED_PRESERVED}), sort="state_changed_at", order="asc", cursor=place
            )
            page = await asyncio.to_thread(self._store.query, query)
            for task in page.tasks:
                if task.state_changed_at > begun_before:
                    return
                is_swept = await self._release(task) and is_swept
            if page.next_cursor is None:
                return
            place = page.next_cursor
            self._swept = place if is_swept else self._swept

    async def _release(self, task: Task) -> bool:
        try:
            await self._preservation.release(task)
        except SandboxNotPreservedError:
            return True
        except UnavailableError as error:
            _log.error("Task %s: %s", task.id, error, extra={"task_id": task.id})
            return False
        return True
