"""A task's story as its page reads it: everything that happens, as server-sent events that can be resumed."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.context import Context
from sandbox.api.errors import InvalidParameterError
from sandbox.api.streamed import Streamed
from sandbox.api.view import Messages, close
from sandbox.model.frame import Frame

_KEEP_ALIVE = b": keep-alive\n\n"
_DIGITS_MAX = 18
_MESSAGE_BYTES = 64 * 1024
_FRAME_BYTES = 256


@dataclass(frozen=True, slots=True)
class PageView:
    """All frames; those that came together are one message, because a page takes a thousand a second."""

    def messages(self, frames: Sequence[Frame]) -> Messages:
        """An array of frames, numbered by the last one."""
        return (b"id: %d\ndata: " % frames[-1]["seq"] + msgspec.json.encode(frames) + b"\n\n",)


async def send_story(request: Request, asked: Context) -> Response:
    """What has happened after `after` or the last event that the page had, then live, until the end."""
    task = await asked.tasks.status(request.path_params["task_id"])
    resumed = _seq(request.headers.get("last-event-id", ""), "Last-Event-ID")
    after = _seq(request.query_params.get("after", ""), "after") if resumed is None else resumed
    if task.state.is_terminal and (after or 0) > task.last_seq:
        return Response(status_code=204)
    view = PageView()
    is_past = task.state.is_terminal
    return Streamed(
        _told_together(asked.tasks.frames(task.id, after=after or 0), view)
        if is_past
        else asked.tails.follow(task, view, after=after or 0),
        "text/event-stream",
        ending=asked.shutting_down,
        keep_alive=_KEEP_ALIVE,
        counted=asked.metrics.streaming("logs"),
    )


async def _told_together(frames: AsyncIterator[Frame], view: PageView) -> AsyncIterator[Messages]:
    """A story that is over, in messages of some size: each costs a page as much as a hundred events in it."""
    together: list[Frame] = []
    size_bytes = 0
    try:
        async for frame in frames:
            together.append(frame)
            size_bytes += _FRAME_BYTES + len(frame.get("data", ""))
            if size_bytes > _MESSAGE_BYTES:
                yield view.messages(together)
                together, size_bytes = [], 0
        if together:
            yield view.messages(together)
    finally:
        await close(frames)


def _seq(text: str, name: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MAX):
        raise InvalidParameterError(name, "must be the number of an event")
    return int(text)
