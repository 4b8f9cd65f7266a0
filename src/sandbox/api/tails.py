"""The tails of all tasks that are followed at the moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from sandbox.api.tail import Batch, Tail
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
        tail = self._join(task_id)
        try:
            while True:
                batches = None if position is None else await self._next(task_id, tail, position)
                if position is None or batches is None:
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
                for batch in batches:
                    yield batch.messages(view, position)
                    position = batch.last_seq
                    if batch.is_end:
                        return
        finally:
            await self._leave(task_id, tail)

    async def _next(self, task_id: str, tail: Tail, position: int) -> Sequence[Batch] | None:
        """What there is past `position`, nothing after a wait; None when it is neither here nor to come.

        Who is behind the tail has a piece of the past read, or shares what others had read, until the tail is reached.
        """
        await tail.started()
        if tail.reaches(position):
            bell, batches = tail.bell, tail.past(position)
            if not batches:
                await bell.wait()
            return batches
        await asyncio.sleep(0)
        piece = await tail.before.after(position, lambda: self._tasks.frames(task_id, after=position))
        return None if piece is None else [piece]

    def _join(self, task_id: str) -> Tail:
        tail = self._open.get(task_id)
        if tail is None or tail.is_over:  # a pruned task's id may be taken again while somebody still reads of its end
            tail = self._open[task_id] = Tail(self._tasks.follow(task_id))
        tail.followers += 1
        return tail

    async def _leave(self, task_id: str, tail: Tail) -> None:
        tail.followers -= 1
        if tail.followers == 0:
            if self._open.get(task_id) is tail:
                del self._open[task_id]
            await tail.close()
