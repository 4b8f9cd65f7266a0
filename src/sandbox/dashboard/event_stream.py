"""Event stream of a task's page: all events as resumable server-sent events."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.context import AppContext
from sandbox.api.request_parameters import parse_seq
from sandbox.api.streaming.response import SSE_KEEP_ALIVE, EventStreamResponse, Messages, close_iterator
from sandbox.model.wire.events import WireEvent, wire_size_bytes

_BATCH_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class PageEncoder:
    """Encodes all events of a batch as one message: a page handles about a thousand messages per second."""

    def encode(self, frames: Sequence[WireEvent]) -> Messages:
        """Encode the events as one JSON array, with the last seq as its id."""
        return (b"id: %d\ndata: " % frames[-1]["seq"] + msgspec.json.encode(frames) + b"\n\n",)


async def send_events(request: Request, context: AppContext) -> Response:
    """Send the events after `after` or the Last-Event-ID, then live events until the task's end."""
    task = await context.tasks.status(request.path_params["task_id"])
    resumed = parse_seq(request.headers.get("last-event-id", ""), "Last-Event-ID")
    after = (parse_seq(request.query_params.get("after", ""), "after") if resumed is None else resumed) or 0
    is_finished = task.state.is_terminal
    if is_finished and after > task.last_seq:
        return Response(status_code=204)
    view = PageEncoder()
    return EventStreamResponse(
        _encode_batches(context.tasks.replay(task.id, after=after), view)
        if is_finished
        else context.stream_cache.follow(task, view, after=after),
        "text/event-stream",
        stop_event=context.shutting_down,
        keep_alive=SSE_KEEP_ALIVE,
        tracker=context.metrics.track_stream("logs"),
    )


async def _encode_batches(frames: AsyncIterator[WireEvent], view: PageEncoder) -> AsyncIterator[Messages]:
    """Encode the events of an ended task in large messages: each costs a page as much as a hundred events."""
    batch: list[WireEvent] = []
    batch_bytes = 0
    try:
        async for frame in frames:
            batch.append(frame)
            batch_bytes += wire_size_bytes(frame)
            if batch_bytes > _BATCH_BYTES:
                yield view.encode(batch)
                batch, batch_bytes = [], 0
            del frame  # so that a stream that waits for memory holds little
        if batch:
            yield view.encode(batch)
    finally:
        await close_iterator(frames)
