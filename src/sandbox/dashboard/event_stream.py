"""A task's story as its page reads it: everything that happens, as server-sent events that can be resumed."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.context import Context
from sandbox.api.request_parameters import read_seq
from sandbox.api.streaming.response import SSE_KEEP_ALIVE, Messages, Streamed, close
from sandbox.model.wire.events import Frame, size_bytes

_MESSAGE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class PageView:
    """All frames; those that came together are one message, because a page takes a thousand a second."""

    def messages(self, frames: Sequence[Frame]) -> Messages:
        """An array of frames, numbered by the last one."""
        return (b"id: %d\ndata: " % frames[-1]["seq"] + msgspec.json.encode(frames) + b"\n\n",)


async def send_story(request: Request, asked: Context) -> Response:
    """What has happened after `after` or the last event that the page had, then live, until the end."""
    task = await asked.tasks.status(request.path_params["task_id"])
    resumed = read_seq(request.headers.get("last-event-id", ""), "Last-Event-ID")
    after = (read_seq(request.query_params.get("after", ""), "after") if resumed is None else resumed) or 0
    is_past = task.state.is_terminal
    if is_past and after > task.last_seq:
        return Response(status_code=204)
    view = PageView()
    return Streamed(
        _told_together(asked.tasks.frames(task.id, after=after), view)
        if is_past
        else asked.tails.follow(task, view, after=after),
        "text/event-stream",
        ending=asked.shutting_down,
        keep_alive=SSE_KEEP_ALIVE,
        counted=asked.metrics.streaming("logs"),
    )


async def _told_together(frames: AsyncIterator[Frame], view: PageView) -> AsyncIterator[Messages]:
    """A story that is over, in messages of some size: each costs a page as much as a hundred events in it."""
    together: list[Frame] = []
    together_bytes = 0
    try:
        async for frame in frames:
            together.append(frame)
            together_bytes += size_bytes(frame)
            if together_bytes > _MESSAGE_BYTES:
                yield view.messages(together)
                together, together_bytes = [], 0
        if together:
            yield view.messages(together)
    finally:
        await close(frames)
