"""Event stream of a task's page: all events as resumable server-sent events."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.app_context import AppContext
from sandbox.api.request_parameters import parse_seq
from sandbox.api.streaming.response import SSE_KEEP_ALIVE, EventStreamResponse, Messages, close_iterator
from sandbox.model.wire.events import WireEvent, wire_size_bytes

_BATCH_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class PageEncoder:
    """Encodes all events of a batch as one message: a page handles only about a thousand messages per second."""

    def encode(self, events: Sequence[WireEvent]) -> Messages:
        """Encode the events as one JSON array, with the last seq as its id."""
        return (b"id: %d\ndata: " % events[-1]["seq"] + msgspec.json.encode(events) + b"\n\n",)


async def send_events(request: Request, context: AppContext) -> Response:
    """Send the events after `after` or the Last-Event-ID, then live events until the task's end."""
    task = await context.tasks.status(request.path_params["task_id"])
    resumed = parse_seq(request.headers.get("last-event-id", ""), "Last-Event-ID")
    after = (parse_seq(request.query_params.get("after", ""), "after") if resumed is None else resumed) or 0
    is_finished = task.state.is_final
    if is_finished and after > task.last_seq:
        return Response(status_code=204)
    encoder = PageEncoder()
    return EventStreamResponse(
        _encode_batches(context.events.replay(task.id, after=after), encoder)
        if is_finished
        else context.stream_cache.follow(task, encoder, after=after),
        "text/event-stream",
        stop_event=context.shutting_down,
        keep_alive=SSE_KEEP_ALIVE,
        tracker=context.metrics.track_stream("logs"),
    )


async def _encode_batches(events: AsyncIterator[WireEvent], encoder: PageEncoder) -> AsyncIterator[Messages]:
    """Encode the events of an ended task in large messages: one message takes the page as long as a hundred events."""
    batch: list[WireEvent] = []
    batch_bytes = 0
    try:
        async for event in events:
            batch.append(event)
            batch_bytes += wire_size_bytes(event)
            if batch_bytes > _BATCH_BYTES:
                yield encoder.encode(batch)
                batch, batch_bytes = [], 0
            del event  # release its memory before waiting for the next one
        if batch:
            yield encoder.encode(batch)
    finally:
        await close_iterator(events)
