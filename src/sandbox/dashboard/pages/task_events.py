"""The events of a task's page, as resumable server-sent events."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sandbox.api.app_context import AppContext
from sandbox.api.request_parsing import SEQ, check_format, parse_seq
from sandbox.api.streaming.response import SSE_KEEP_ALIVE, EventStreamResponse, MessageBatch, close_iterator
from sandbox.model.wire.event_conversion import WireEvent, wire_size_bytes

PAGE_EVENTS_MAX = 200_000
"""Maximum number of events that the page shows. It shows the latest ones; the log contains all of them."""

_BATCH_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class PageEncoder:
    """Encodes a batch as one message, because a page can handle only about a thousand messages per second."""

    def encode(self, events: Sequence[WireEvent]) -> MessageBatch:
        """Encode the events as one JSON array, with the last seq as its id."""
        return (b"id: %d\ndata: " % events[-1]["seq"] + msgspec.json.encode(events) + b"\n\n",)


async def send_events(request: Request, context: AppContext) -> Response:
    """Send the events after `after` or the Last-Event-ID, then live events until the task ends."""
    task = await context.services.tasks.status(request.path_params["task_id"])
    resumed = parse_seq(check_format(request.headers.get("last-event-id", ""), SEQ, "Last-Event-ID", "header"))
    requested = parse_seq(check_format(request.query_params.get("after", ""), SEQ, "after", "query"))
    after = (requested if resumed is None else resumed) or 0
    is_finished = task.state.is_final
    if is_finished and after > task.last_seq:
        return Response(status_code=204)
    encoder = PageEncoder()
    return EventStreamResponse(
        _encode_batches(context.services.events.recorded_events(task.id, after=after), encoder)
        if is_finished
        else context.stream_cache.follow(task, encoder, after=after),
        "text/event-stream",
        stop_event=context.shutting_down,
        keep_alive=SSE_KEEP_ALIVE,
        tracker=context.metrics.track_stream("logs"),
    )


async def _encode_batches(events: AsyncIterator[WireEvent], encoder: PageEncoder) -> AsyncIterator[MessageBatch]:
    """Encode an ended task's events in large messages, because a message takes the page as long as a hundred events."""
    batch: list[WireEvent] = []
    batch_bytes = 0
    try:
        async for event in events:
            batch.append(event)
            batch_bytes += wire_size_bytes(event)
            if batch_bytes > _BATCH_BYTES:
                yield encoder.encode(batch)
                batch, batch_bytes = [], 0
            del event  # release the event's memory before waiting for the next event
        if batch:
            yield encoder.encode(batch)
    finally:
        await close_iterator(events)
