"""The live end of a task's story, read and encoded once for all who follow it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from sandbox.api.streaming.response import Messages, View, close, seen_alone
from sandbox.interfaces.tasks import Tasks
from sandbox.model.task import Task
from sandbox.model.wire.events import Frame, size_bytes

BATCH_SECONDS = 0.05
TAIL_BYTES_MAX = 1024 * 1024
PAST_BYTES_MAX = 4 * 1024 * 1024
_PIECE_BYTES = 64 * 1024
_PAST_PIECE_BYTES = 256 * 1024
VIEWS_KEPT_MAX = 8


class Batch:
    """Frames that came together, all those past `after`, and what the first views to ask make of them.

    Views are chosen by those who follow: not as many are kept as they can think of.
    """

    def __init__(self, after: int, frames: Sequence[Frame], size_bytes: int) -> None:
        self.after = after
        self.last_seq = int(frames[-1]["seq"])
        self.is_end = frames[-1]["type"] == "end"
        self.size_bytes = size_bytes
        self._frames = frames
        self._shown: dict[View, Messages] = {}

    def messages(self, view: View, after: int) -> Messages:
        """What the view makes of what is past `after`."""
        if after > self.after:
            return view.messages([frame for frame in self._frames if frame["seq"] > after])
        found = self._shown.get(view)
        if found is None:
            found = view.messages(self._frames)
            if len(self._shown) < VIEWS_KEPT_MAX:
                self._shown[view] = found
        return found


class Past:
    """What was last read for those who are behind the tail; others who come by the same place share it."""

    def __init__(self) -> None:
        self._pieces: deque[Batch] = deque()
        self._kept_bytes = 0
        self._reading = asyncio.Lock()

    async def after(self, position: int, frames: Callable[[], AsyncIterator[Frame]]) -> Batch | None:
        """A batch that begins with, or has, what comes next; None when there is nothing.

        frames: all past `position`. One reads at a time, so that many who come at once share what the first has read.
        """
        async with self._reading:
            return self.around(position) or await self.read(frames(), position)

    def around(self, position: int) -> Batch | None:
        """A batch that has what comes next after `position`."""
        return next((piece for piece in self._pieces if piece.after <= position < piece.last_seq), None)

    async def read(self, frames: AsyncIterator[Frame], after: int) -> Batch | None:
        """A batch of the first of these frames, which are those past `after`; None when there are none."""
        found: list[Frame] = []
        kept_bytes = 0
        try:
            async for frame in frames:
                found.append(frame)
                kept_bytes += size_bytes(frame)
                if kept_bytes > _PAST_PIECE_BYTES:
                    break
        finally:
            await close(frames)
        return self._keep(Batch(after, found, kept_bytes)) if found else None

    def _keep(self, piece: Batch) -> Batch:
        self._pieces.append(piece)
        self._kept_bytes += piece.size_bytes
        while self._kept_bytes > PAST_BYTES_MAX and len(self._pieces) > 1:
            self._kept_bytes -= self._pieces.popleft().size_bytes
        return piece


class Tail:
    """The last batches of one task. `frames` begins with the present state, as `Tasks.follow` without `after` does."""

    def __init__(self, frames: AsyncIterator[Frame]) -> None:
        self.followers = 0
        self.bell = asyncio.Event()
        self.before = Past()
        self._batches: deque[Batch] = deque()
        self._kept_bytes = 0
        self._fresh: list[Frame] = []
        self._fresh_bytes = 0
        self._floor: int | None = None
        self._reached = 0
        self.is_over = False
        self._loop = asyncio.get_running_loop()
        self._published_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._reading = asyncio.create_task(self._read(frames))

    async def started(self) -> None:
        """Return as soon as `reaches` can tell."""
        while self._floor is None and not self.is_over:
            await self.bell.wait()

    def reaches(self, position: int) -> bool:
        """Whether everything past `position` is here, or will be."""
        is_to_come = not self.is_over or position < self._reached
        return is_to_come and self._floor is not None and position >= self._floor

    def past(self, position: int) -> list[Batch]:
        """The batches with something past `position`, oldest first."""
        found: list[Batch] = []
        for batch in reversed(self._batches):
            if batch.last_seq <= position:
                break
            found.append(batch)
        return found[::-1]

    async def close(self) -> None:
        """Read no more."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self, frames: AsyncIterator[Frame]) -> None:
        try:
            async for frame in frames:
                if self._floor is None:
                    self._floor = self._reached = int(frame["seq"])
                    self._ring()
                    continue
                self._fresh.append(frame)
                self._fresh_bytes += size_bytes(frame)
                if self._fresh_bytes > _PIECE_BYTES:
                    self._publish()
                    await asyncio.sleep(0)
                elif self._timer is None:
                    self._timer = self._loop.call_at(self._published_at + BATCH_SECONDS, self._publish)
            self._publish()
        finally:
            # Who has not read the end here goes on alone, and meets there what went wrong.
            self.is_over = True
            if self._timer is not None:
                self._timer.cancel()
            self._ring()
            await close(frames)

    def _publish(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._fresh:
            return
        batch = Batch(self._reached, self._fresh, self._fresh_bytes)
        self._fresh, self._fresh_bytes = [], 0
        self._batches.append(batch)
        self._kept_bytes += batch.size_bytes
        while self._kept_bytes > TAIL_BYTES_MAX and len(self._batches) > 1:
            dropped = self._batches.popleft()
            self._kept_bytes -= dropped.size_bytes
            self._floor = dropped.last_seq
        self._reached, self._published_at = batch.last_seq, self._loop.time()
        self._ring()

    def _ring(self) -> None:
        bell, self.bell = self.bell, asyncio.Event()
        bell.set()


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
