"""The tails of all tasks that are followed at the moment."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sandbox.api.tail import Tail
from sandbox.api.view import Messages, View, close, seen_alone
from sandbox.contracts.tasks import Tasks
from sandbox.model.task import Task


class Tails:
    """Followers of one task share what was read and encoded; each has a place of its own, and nothing is left out."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._open: dict[str, Tail] = {}

    def follow(self, task: Task, view: View, *, after: int | None) -> AsyncIterator[Messages]:
        """As `Tasks.follow`, encoded."""
        if task.state.is_terminal:
            return seen_alone(self._tasks.follow(task.id, after=after), view)
        return self._follow(task.id, view, after)

    async def _follow(self, task_id: str, view: View, position: int | None) -> AsyncIterator[Messages]:
        """Who is behind the tail reads alone until it is reached."""
        tail = self._join(task_id)
        try:
            while True:
                if position is not None:
                    await tail.started()
                if position is None or not tail.reaches(position):
                    frames = self._tasks.follow(task_id, after=position)
                    try:
                        async for frame in frames:
                            yield view.messages((frame,))
                            position = int(frame["seq"])
                            if frame["type"] == "end":
                                return
                            await tail.started()
                            if tail.reaches(position):
                                break
                    finally:
                        await close(frames)
                    continue
                bell, batches = tail.bell, tail.past(position)
                for batch in batches:
                    yield batch.messages(view, position)
                    position = batch.last_seq
                    if batch.is_end:
                        return
                if not batches:
                    await bell.wait()
        finally:
            await self._leave(task_id, tail)

    def _join(self, task_id: str) -> Tail:
        tail = self._open.get(task_id)
        if tail is None:
            tail = self._open[task_id] = Tail(self._tasks.follow(task_id))
        tail.followers += 1
        return tail

    async def _leave(self, task_id: str, tail: Tail) -> None:
        tail.followers -= 1
        if tail.followers == 0:
            if self._open.get(task_id) is tail:
                del self._open[task_id]
            await tail.close()
