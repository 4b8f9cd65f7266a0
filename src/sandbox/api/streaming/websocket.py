"""The WebSocket: everything that happens, as it happens."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import msgspec
from starlette.datastructures import QueryParams
from starlette.websockets import WebSocket, WebSocketDisconnect

from sandbox.api import paths
from sandbox.api.context import Context, context
from sandbox.api.errors import InvalidParameterError
from sandbox.api.middleware.authentication import visitor_of
from sandbox.api.middleware.metrics import note_route
from sandbox.api.request_parameters import read_seq, refuse_unknown
from sandbox.api.streaming.response import Messages, ReadAhead, disconnected, seen_alone
from sandbox.model.wire.events import Frame
from sandbox.system.log_context import TASK_ID

TYPES = frozenset(
    {"state_change", "attempt", "output", "progress", "metrics", "tool_call", "egress_denied", "error", "gap", "end"}
)
"""What the stream carries."""

_ALWAYS = frozenset({"gap", "end"})
_NORMAL, _GOING_AWAY, _INTERNAL = 1000, 1001, 1011
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client asked to be sent; no task id means all tasks."""

    task_id: str | None
    types: frozenset[str]
    after: int | None

    @classmethod
    def of(cls, query: QueryParams) -> "Wish":
        """From the address. Raises InvalidParameterError."""
        refuse_unknown(query, known=("task_id", "filter", "after"))
        task_id = query.get("task_id") or None
        after = read_seq(query.get("after", ""), "after")
        if after is not None and task_id is None:
            raise InvalidParameterError("after", "needs a task_id, for seq counts within a task")
        return cls(task_id, _types(query.get("filter", "")), after)


@dataclass(frozen=True, slots=True)
class StreamView:
    """A message for each frame of one of these types."""

    types: frozenset[str]

    def messages(self, frames: Sequence[Frame]) -> Messages:
        """The messages."""
        return [msgspec.json.encode(frame) for frame in frames if frame["type"] in self.types]


async def stream(websocket: WebSocket) -> None:
    """Answer a handshake. Errors before the first message are HTTP answers to it."""
    note_route(websocket, paths.STREAM)
    asked = await context(websocket)
    wish = Wish.of(websocket.query_params)
    TASK_ID.set(wish.task_id)
    follows_all = asked.guard.following_all(visitor_of(websocket)) if wish.task_id is None else nullcontext()
    with follows_all, asked.metrics.streaming("websocket"):
        await _tell(websocket, asked, wish)


async def _tell(websocket: WebSocket, asked: Context, wish: Wish) -> None:
    async with ReadAhead(await _messages(asked, wish)) as read_ahead:
        await websocket.accept()
        read_ahead.end_after(disconnected(websocket.receive))
        read_ahead.end_after(asked.shutting_down.wait())
        try:
            await _send(websocket, read_ahead)
            await websocket.close(_GOING_AWAY if asked.shutting_down.is_set() else _NORMAL)
        except WebSocketDisconnect:
            return
        except Exception:
            _log.exception("A stream broke")
            await websocket.close(_INTERNAL, "The server could not go on; its log tells more.")


async def _messages(asked: Context, wish: Wish) -> AsyncIterator[Messages]:
    view = StreamView(wish.types)
    if wish.task_id is None:
        return seen_alone(asked.tasks.follow_all(), view)
    return asked.tails.follow(await asked.tasks.status(wish.task_id), view, after=wish.after)


async def _send(websocket: WebSocket, read_ahead: ReadAhead) -> None:
    while (batch := await read_ahead.batch()) is not None:
        for message in batch:
            await websocket.send_text(message.decode())


def _types(text: str) -> frozenset[str]:
    names = frozenset(name.strip() for name in text.split(",")) - {""}
    if names - TYPES:
        raise InvalidParameterError("filter", f"must be one of {', '.join(sorted(TYPES))}", rule="enum")
    return names | _ALWAYS if names else TYPES
