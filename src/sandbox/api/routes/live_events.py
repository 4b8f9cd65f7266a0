"""Event streams: state changes of all tasks as server-sent events, and the WebSocket endpoint of the event stream."""

import logging
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Annotated

import msgspec
from fastapi import Header, Query, Request
from pydantic import BaseModel
from starlette.datastructures import QueryParams
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from sandbox.api import paths
from sandbox.api.app_context import AppContext, ContextDep, get_context
from sandbox.api.authentication import get_caller
from sandbox.api.http.connections import MORE_TEXT
from sandbox.api.observability import set_route
from sandbox.api.request_parsing import SEQ, CommaSeparated, parse_query_params, parse_seq
from sandbox.api.route_declarations import create_router, problem_responses, raw_content, with_item_schemas
from sandbox.api.streaming_response import (
    SSE,
    SSE_KEEP_ALIVE,
    SSE_SCHEMA,
    EventStreamResponse,
    MessageBatch,
    Prefetcher,
    close_iterator,
    encode_each,
    format_sse_event,
    wait_for_disconnect,
)
from sandbox.interfaces.server_services import StateChange, TaskNotFoundError
from sandbox.interfaces.store import ChangePosition
from sandbox.model.errors import FieldError, InvalidParameterError
from sandbox.model.manifest.field_formats import Format
from sandbox.model.wire import event_bodies
from sandbox.model.wire.event_conversion import WireEvent
from sandbox.primitives.log_context import TASK_ID

router = create_router("Logs")

_POSITION_REGEX = re.compile("[0-9a-f]{1,32}-[0-9]{1,18}", re.ASCII)


def _check_position(text: str) -> str | None:
    if text and not _POSITION_REGEX.fullmatch(text):
        return "must be the id of an earlier event; omit it for changes from now on"
    return None


_POSITION = Format("position", _check_position, {"pattern": f"^({_POSITION_REGEX.pattern})?$"})
"""The id of an event in the stream of all tasks, or empty text."""

_AfterPosition = Annotated[str, _POSITION, Query(description="Continue after the event with this `id`")]
_LastPosition = Annotated[
    str,
    _POSITION,
    Header(
        alias="Last-Event-ID",
        description="Continue after the event with this `id`; `after` in the query takes precedence",
    ),
]


@router.get(
    paths.STATE_CHANGES,
    response_class=Response,
    responses={
        200: with_item_schemas(
            raw_content("The changes, as server-sent events", text_event_stream={}), text_event_stream=SSE_SCHEMA
        ),
        **problem_responses("service_unavailable"),
    },
)
async def get_events(
    request: Request,
    context: ContextDep,
    after: _AfterPosition = "",
    last_event_id: _LastPosition = "",
    *,
    follow: Annotated[bool, Query(description="Keep the stream open and send new changes")] = False,
) -> Response:
    """Get state changes of all tasks, as server-sent events.

    Sends `state_change` when a task has changed its state, and then `end` if the task has ended. If a task changes its
    state several times before the event is sent, only the latest state is sent. The stream begins with the current
    position as an `id` without an event.
    """
    position = _parse_position(after or last_event_id)
    changes = context.services.events.follow_states(position, is_live=follow)
    stack = ExitStack()
    stack.enter_context(context.admission.client_limits.reserved_all_tasks_stream(get_caller(request).principal))
    stack.enter_context(context.metrics.track_stream("events"))
    return EventStreamResponse(
        _encode_changes(changes),
        SSE,
        stop_event=context.shutting_down,
        keep_alive=SSE_KEEP_ALIVE,
        tracker=stack,
    )


def _parse_position(text: str) -> ChangePosition | None:
    """Parse text that has the format `_POSITION`; return None for empty text."""
    index_id, _, number = text.partition("-")
    return ChangePosition(index_id, int(number)) if text else None


async def _encode_changes(changes: AsyncIterator[StateChange | ChangePosition]) -> AsyncIterator[MessageBatch]:
    """Encode each change. Only its last event has an id, so a client that missed it gets the whole change again."""
    try:
        async for each in changes:
            if isinstance(each, ChangePosition):
                yield [f"id: {each.index_id}-{each.number}\n\n".encode()]
                continue
            position = f"id: {each.position.index_id}-{each.position.number}\n".encode()
            *earlier, last = each.events
            yield [*map(format_sse_event, earlier), position + format_sse_event(last)]
    finally:
        await close_iterator(changes)


STREAMED_EVENT_TYPES = event_bodies.EVENT_TYPES - {"usage"}
"""Event types that the stream sends."""

_TYPES = CommaSeparated(tuple(sorted(STREAMED_EVENT_TYPES)))
_UNFILTERED_TYPES = frozenset({"gap", "end"})
FRAGMENT_BYTES_MAX = 64 * 1024
"""Maximum size of a part of a message. A part never ends within a character."""

_CONTINUATION_MASK, _CONTINUATION_BYTE = 0xC0, 0x80
"""Mask and value that identify a UTF-8 continuation byte, which is any byte of a character except the first."""

_NORMAL, _GOING_AWAY, _INTERNAL = 1000, 1001, 1011
_log = logging.getLogger(__name__)


class _StreamQuery(BaseModel):
    """Query parameters of the event stream."""

    task_id: str = ""
    filter: Annotated[str, _TYPES] = ""
    after: Annotated[str, SEQ] = ""


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """The parameters of a stream. Without a task id, the stream covers all tasks."""

    task_id: str | None
    types: frozenset[str]
    after: int | None

    @classmethod
    def parse(cls, query: QueryParams) -> "StreamRequest":
        """Parse the query parameters. Raises InvalidParameterError."""
        params = parse_query_params(query, _StreamQuery)
        after = parse_seq(params.after)
        if after is not None and not params.task_id:
            message = "requires task_id, because seq is per task"
            raise InvalidParameterError([FieldError.at(("after",), "format", message, part="query")])
        names = _TYPES.parse(params.filter)
        return cls(params.task_id or None, names | _UNFILTERED_TYPES if names else STREAMED_EVENT_TYPES, after)


@dataclass(frozen=True, slots=True)
class WebSocketEncoder:
    """Encodes each event that has a selected type as one message."""

    types: frozenset[str]

    def encode(self, events: Sequence[WireEvent]) -> MessageBatch:
        """Return the messages."""
        return [msgspec.json.encode(event) for event in events if event["type"] in self.types]


async def serve_event_stream(websocket: WebSocket) -> None:
    """Serve an event stream. Errors before the first message become HTTP responses to the handshake."""
    set_route(websocket, paths.STREAM)
    context = await get_context(websocket)
    request = StreamRequest.parse(websocket.query_params)
    TASK_ID.set(request.task_id)
    follows_all = (
        context.admission.client_limits.reserved_all_tasks_stream(get_caller(websocket).principal)
        if request.task_id is None
        else nullcontext()
    )
    with follows_all, context.metrics.track_stream("websocket"):
        await _serve(websocket, context, request)


async def _serve(websocket: WebSocket, context: AppContext, request: StreamRequest) -> None:
    async with Prefetcher(await _open_source(context, request)) as prefetcher:
        await websocket.accept()
        prefetcher.stop_after(wait_for_disconnect(websocket.receive))
        prefetcher.stop_after(context.shutting_down.wait())
        try:
            await _send_messages(websocket, prefetcher)
            await websocket.close(_GOING_AWAY if context.shutting_down.is_set() else _NORMAL)
        except WebSocketDisconnect:
            return
        except TaskNotFoundError:
            await websocket.close(_INTERNAL, "The task was deleted.")
        except Exception:
            _log.exception("A stream failed")
            await websocket.close(_INTERNAL, "Internal server error; the server's log has details.")


async def _open_source(context: AppContext, request: StreamRequest) -> AsyncIterator[MessageBatch]:
    encoder = WebSocketEncoder(request.types)
    if request.task_id is None:
        return encode_each(context.services.events.follow_all(), encoder)
    return context.stream_cache.follow(
        await context.services.tasks.status(request.task_id), encoder, after=request.after
    )


async def _send_messages(websocket: WebSocket, prefetcher: Prefetcher) -> None:
    while (batch := await prefetcher.next_batch()) is not None:
        await _send_batch(websocket, batch)
        batch.clear()  # release the memory before waiting for the next batch


async def _send_batch(websocket: WebSocket, batch: MessageBatch) -> None:
    for message in batch:
        for text, has_more in _fragments(message):
            await websocket.send({"type": "websocket.send", "text": text, MORE_TEXT: has_more})


def _fragments(message: bytes) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a message, and whether more follow. Only one part at a time is decoded and buffered."""
    begin = 0
    while begin < len(message):
        end = begin + FRAGMENT_BYTES_MAX
        while end < len(message) and message[end] & _CONTINUATION_MASK == _CONTINUATION_BYTE:
            end -= 1
        yield message[begin:end].decode(), end < len(message)
        begin = end
