"""WebSocket endpoint of the event stream."""

import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated

import msgspec
from pydantic import BaseModel
from starlette.datastructures import QueryParams
from starlette.websockets import WebSocket, WebSocketDisconnect

from sandbox.api import paths
from sandbox.api.app_context import AppContext, get_context
from sandbox.api.http.connections import MORE_TEXT
from sandbox.api.middleware.access_log_and_metrics import set_route
from sandbox.api.middleware.authentication import get_caller
from sandbox.api.request_parsing import SEQ, CommaSeparated, parse_query_params, parse_seq
from sandbox.api.streaming.response import MessageBatch, Prefetcher, encode_each, wait_for_disconnect
from sandbox.interfaces.server_services import TaskNotFoundError
from sandbox.model.input_errors import FieldError, InvalidParameterError
from sandbox.model.wire import event_bodies
from sandbox.model.wire.event_conversion import WireEvent
from sandbox.primitives.log_context import TASK_ID

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
