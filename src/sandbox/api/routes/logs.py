"""Routes for a task's logs: plain text, server-sent events or NDJSON."""

import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from fastapi import Header, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from sandbox.api import paths
from sandbox.api.app_context import ContextDep
from sandbox.api.request_parsing import SEQ, SEQ_MAX, TIME, parse_seq, parse_time
from sandbox.api.route_declarations import create_router, problem_responses, raw_content, with_item_schemas
from sandbox.api.streaming_response import (
    EVENT_SCHEMA,
    SSE,
    SSE_KEEP_ALIVE,
    SSE_SCHEMA,
    EventStreamResponse,
    MessageBatch,
    close_iterator,
    encode_each,
    format_sse_event,
)
from sandbox.interfaces.server_services import TaskEvents
from sandbox.model.display_text import format_timestamp
from sandbox.model.errors import FieldError, InvalidParameterError
from sandbox.model.wire.event_conversion import (
    LogStream,
    WireEvent,
    estimate_memory_bytes,
    extract_conversation,
    log_stream_of,
)
from sandbox.primitives import fair_client_shares

TAIL_MAX = 1_000_000
TEXT_LINE_BYTES_MAX = 16 * 1024 * 1024

_JSON = "application/json"
_NDJSON = "application/x-ndjson"
_TEXT = "text/plain; charset=utf-8"

_TAIL_GROWTH_FACTOR = 4
"""Factor by which the number of records to read grows until the records contain enough lines for the tail."""

_TAIL_BLOCKS_MAX = 1000
"""Maximum number of line blocks whose start is stored for a tail. One number per line would take 40 bytes per line."""

_Formatter = Callable[[WireEvent], bytes]


@dataclass(frozen=True, slots=True)
class LogEncoder:
    """Filters and formats events. In a followed log, `gap` and `end` events pass every filter.

    since: a timestamp in the format that events use; empty for all events.
    is_text: whether each line is text, rather than a JSON object.
    """

    stream: LogStream
    since: str
    format_event: _Formatter
    is_following: bool
    is_text: bool = False

    def includes(self, event: WireEvent) -> bool:
        """Return whether the event passes the filter."""
        if self.is_following and event["type"] in {"gap", "end"}:
            return True
        if self.stream == "conversation":
            event = extract_conversation(event) or event
        belongs_to = log_stream_of(event)
        return belongs_to is not None and self.stream in {"all", belongs_to} and event["timestamp"] >= self.since

    def encode(self, events: Sequence[WireEvent]) -> MessageBatch:
        """Return one message with all events that pass the filter."""
        selected = [part for event in events if self.includes(event) for part in self._parts(event)]
        text = b"".join(map(self.format_event, selected))
        return (text,) if text else ()

    def _parts(self, event: WireEvent) -> tuple[WireEvent, ...]:
        """Return the event, the conversation event converted from it, or both, as the stream and format require."""
        conversation = extract_conversation(event)
        if conversation is None:
            return (event,)
        if self.stream == "conversation":
            return (conversation,)
        return (event, conversation) if self.stream == "all" and self.is_text else (event,)


class LogQuery(BaseModel):
    """Query parameters of the logs."""

    stream: LogStream = Field("all", description="Stream to return")
    since: Annotated[str, TIME] = Field("", description="Earliest time, inclusive (RFC 3339)")
    tail: int = Field(0, ge=0, le=TAIL_MAX, description="Number of last lines, after filtering; 0 for all")
    after: int | None = Field(None, ge=0, le=SEQ_MAX, description="Only events with a greater `seq`")
    limit: int = Field(
        0,
        ge=0,
        le=TAIL_MAX,
        description="Maximum number of events, after filtering; 0 for all. Cannot be combined with tail or follow",
    )
    follow: bool = Field(default=False, description="Stream until the task has ended")


_LastEventId = Annotated[
    str,
    SEQ,
    Header(alias="Last-Event-ID", description="Continue after this seq; `after` in the query takes precedence"),
]

_TEXT_SCHEMA = {"type": "string"}
_JSON_MEDIA_RANGE = "application/*"
"""The media type of JSON logs in the schema. Generated clients would parse every log as JSON if the schema listed
`application/json`, because they send no `Accept` header and choose one of the listed types.
"""

_LOG_DESCRIPTION = "The log as text, as NDJSON or as an array (`application/json`); when followed, as a stream"
_LOG_SCHEMAS: dict[str, dict[str, Any]] = {
    "text_plain": _TEXT_SCHEMA,
    "text_event_stream": {},
    "application_x_ndjson": _TEXT_SCHEMA,
    _JSON_MEDIA_RANGE: {"type": "array", "items": EVENT_SCHEMA},
}

router = create_router("Logs")


@router.get(
    paths.LOGS,
    response_class=Response,
    responses={
        200: with_item_schemas(
            raw_content(_LOG_DESCRIPTION, **_LOG_SCHEMAS),
            text_event_stream=SSE_SCHEMA,
            application_x_ndjson=EVENT_SCHEMA,
        ),
        204: {"description": "The client already has the last event"},
        **problem_responses("task_not_found", "service_unavailable"),
    },
)
async def get_logs(
    request: Request,
    context: ContextDep,
    task_id: paths.TaskId,
    query: Annotated[LogQuery, Query()],
    last_event_id: _LastEventId = "",
) -> Response:
    """Get the agent's output and the task's events, ordered by seq.

    The header `Accept` selects the format. Without `follow`: `text/plain`, `application/x-ndjson`, or
    `application/json` for an array of events. With `follow`: `text/event-stream`, or `application/x-ndjson`.
    """
    _check_limit(query)
    task = await context.services.tasks.status(task_id)
    media_type, form = _choose_stream_format(request) if query.follow else _choose_format(request)
    since = "" if (time := parse_time(query.since)) is None else format_timestamp(time)
    encoder = LogEncoder(query.stream, since, form, query.follow, is_text=media_type == _TEXT)
    resumed = parse_seq(last_event_id) if query.follow else None
    if task.state.is_final and resumed is not None and resumed > task.last_seq:
        return Response(status_code=204)
    position = query.after if query.after is not None else resumed
    start = position or 0
    if query.tail and not (query.follow and position is not None):
        last_seq = task.last_seq
        del task  # it can have megabytes, and the search can take minutes
        start = await _find_tail_start(context.services.events, task_id, last_seq, start, query.tail, encoder)
        task = await context.services.tasks.status(task_id)
    if not query.follow:
        messages = _limit(
            encode_each(context.services.events.recorded_events(task_id, after=start), encoder), query.limit
        )
        return EventStreamResponse(_as_array(messages) if media_type == _JSON else messages, media_type)
    return EventStreamResponse(
        context.stream_cache.follow(task, encoder, after=start),
        media_type,
        stop_event=context.shutting_down,
        keep_alive=SSE_KEEP_ALIVE if media_type == SSE else b"",
        tracker=context.metrics.track_stream("logs"),
    )


def _check_limit(query: LogQuery) -> None:
    """Raise InvalidParameterError if `limit` is combined with a parameter that excludes it."""
    message = "cannot be combined with limit"
    conflicts = [name for name, value in (("tail", query.tail), ("follow", query.follow)) if value and query.limit]
    if conflicts:
        raise InvalidParameterError([FieldError.at((name,), "format", message, part="query") for name in conflicts])


async def _limit(source: AsyncIterator[MessageBatch], count: int) -> AsyncIterator[MessageBatch]:
    """Yield the messages of the first `count` events that pass the filter; of all such events if `count` is 0."""
    found = 0
    try:
        async for messages in source:
            yield messages
            found += bool(messages)
            if count and found == count:
                return
            del messages  # a stream that is waiting for memory must not hold any
    finally:
        await close_iterator(source)


async def _find_tail_start(
    events: TaskEvents, task_id: str, last_seq: int, after: int, lines: int, encoder: LogEncoder
) -> int:
    """Return the `after` that selects the last `lines` existing lines, reading only as far back as needed."""
    block_lines = 1 + lines // _TAIL_BLOCKS_MAX
    scan_count = lines
    while True:
        scan_count *= _TAIL_GROWTH_FACTOR
        begin = max(after, last_seq - scan_count)
        block_seqs: deque[int] = deque(maxlen=lines // block_lines + 2)
        count = 0
        async for seq in _matching_seqs(events, task_id, begin, encoder):
            if count % block_lines == 0:
                block_seqs.append(seq)
            count += 1
        if count > lines:
            blocks_back = (count - 1) // block_lines - (count - lines - 1) // block_lines
            skipped = (count - lines - 1) % block_lines
            return await _skip_lines(events, task_id, block_seqs[-1 - blocks_back], skipped, encoder)
        if begin == after:
            return after


async def _skip_lines(events: TaskEvents, task_id: str, seq: int, skipped: int, encoder: LogEncoder) -> int:
    """Return the seq of the line that is `skipped` lines after the line with `seq`."""
    if skipped == 0:
        return seq
    async for found in _matching_seqs(events, task_id, seq, encoder):
        seq, skipped = found, skipped - 1
        if skipped == 0:
            break
    return seq


async def _matching_seqs(events: TaskEvents, task_id: str, after: int, encoder: LogEncoder) -> AsyncIterator[int]:
    async for event in events.recorded_events(task_id, after=after):
        await fair_client_shares.wait_for_turn(estimate_memory_bytes(event))
        if event["type"] != "end" and encoder.includes(event):
            yield event["seq"]


def _choose_format(request: Request) -> tuple[str, _Formatter]:
    """Return the format that the client prefers; text if it has no preference."""
    formats: dict[str, _Formatter] = {
        _TEXT: _TextFormatter().format_event,
        _NDJSON: _format_ndjson,
        _JSON: _format_array_item,
    }
    qualities = _parse_qualities(request.headers.get("accept", "").lower())
    chosen = max(formats, key=lambda media_type: _quality(qualities, media_type.partition(";")[0]))
    return chosen, formats[chosen]


def _parse_qualities(accept: str) -> Mapping[str, float]:
    """Return the quality of each media range in an Accept header (RFC 9110, section 12.5.1)."""
    qualities: dict[str, float] = {}
    for entry in accept.split(","):
        accepted, *parameters = (part.strip() for part in entry.split(";"))
        match = next(filter(None, (_QUALITY.fullmatch(parameter) for parameter in parameters)), None)
        qualities[accepted] = float(match[1]) if match else 1.0
    return qualities


def _quality(qualities: Mapping[str, float], media_type: str) -> float:
    wildcards = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
    return next((qualities[each] for each in wildcards if each in qualities), 0.0)


_QUALITY = re.compile(r"q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)", re.ASCII)


async def _as_array(source: AsyncIterator[MessageBatch]) -> AsyncIterator[MessageBatch]:
    """Yield a JSON array in parts. The part of each item begins with a comma, except for the first item."""
    start = b"["
    try:
        async for messages in source:
            text = b"".join(messages)
            if text:
                yield (start + text.removeprefix(b",") if start else text,)
                start = b""
    finally:
        await close_iterator(source)
    yield (start + b"\n]\n",)


def _choose_stream_format(request: Request) -> tuple[str, _Formatter]:
    if _NDJSON in request.headers.get("accept", "").lower():
        return _NDJSON, _format_ndjson
    return SSE, _format_sse


class _TextFormatter:
    """Formats events as lines. Joins the parts of a split line unless another event comes between them."""

    def __init__(self) -> None:
        self._open_source = ""
        self._length = 0

    def format_event(self, event: WireEvent) -> bytes:
        """Format each line of output as `[time] [STDOUT] text`, and every other event as `[time] [EVENT] {json}`."""
        if event["type"] == "output":
            source, is_continued = event["stream"].upper(), event["continued"]
            text = event["data"].removesuffix("\n").encode()
        else:
            source, is_continued, text = "EVENT", False, msgspec.json.encode(event)
        prefix = f"[{event['timestamp']}] [{source}] ".encode()
        if source == self._open_source and self._length + len(text) <= TEXT_LINE_BYTES_MAX:
            begin = b""
        else:
            begin, self._length = (b"\n" if self._open_source else b"") + prefix, 0
        self._open_source = source if is_continued else ""
        self._length += len(text)
        # Terminal output may contain several lines. A line without a prefix could be mistaken for an event.
        return begin + text.replace(b"\n", b"\n" + prefix) + (b"" if is_continued else b"\n")


def _format_ndjson(event: WireEvent) -> bytes:
    return msgspec.json.encode(event) + b"\n"


def _format_array_item(event: WireEvent) -> bytes:
    return b",\n" + msgspec.json.encode(event)


def _format_sse(event: WireEvent) -> bytes:
    return f"id: {event['seq']}\n".encode() + format_sse_event(event)
