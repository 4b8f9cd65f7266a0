"""WebSocket endpoint of a terminal in a task's sandbox."""

import json
import logging
from typing import Annotated, Literal

import msgspec
from pydantic import BaseModel, Field
from starlette.datastructures import QueryParams
from starlette.websockets import WebSocket, WebSocketDisconnect

from sandbox.api import paths
from sandbox.api.app_context import AppContext, get_context
from sandbox.api.observability import set_route
from sandbox.api.request_parsing import parse_query_params
from sandbox.interfaces.runner import (
    EndFrame,
    InputFrame,
    OpenTerminal,
    OutputFrame,
    ResizeFrame,
    TerminalConnection,
    WriteAccessFrame,
)
from sandbox.model.errors import DECODE_ERRORS, FieldError, InvalidParameterError
from sandbox.model.manifest.field_formats import pattern_format
from sandbox.primitives.concurrency import run_until_first_complete
from sandbox.primitives.log_context import TASK_ID

_NORMAL, _GOING_AWAY, _POLICY_VIOLATION = 1000, 1001, 1008
_TERM = pattern_format("term", "[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}", "must be a terminal type, such as xterm-256color")
_SIZE_MAX = 1000
_log = logging.getLogger(__name__)


class _TerminalQuery(BaseModel):
    """Query parameters of a terminal."""

    of: Literal["shell", "agent"] = "shell"
    watch: Literal["true", "false"] = "false"
    rows: int = Field(24, ge=1, le=_SIZE_MAX)
    columns: int = Field(80, ge=1, le=_SIZE_MAX)
    term: Annotated[str, _TERM] = "xterm-256color"


class _ResizeMessage(msgspec.Struct, forbid_unknown_fields=True, tag="resize", tag_field="type"):
    """A new window size in characters. Clients must not send any other text message."""

    rows: int
    columns: int


async def serve_terminal(websocket: WebSocket) -> None:
    """Serve a terminal. Errors before the first message become HTTP responses to the handshake."""
    set_route(websocket, paths.TERMINAL)
    context = await get_context(websocket)
    task_id = websocket.path_params["task_id"]
    TASK_ID.set(task_id)
    request = parse_open_terminal(websocket.query_params)
    connection = await context.services.sandboxes.open_terminal(task_id, request)
    _log.info("A terminal was opened", extra={"kind": "agent" if request.is_agent_terminal else "shell"})
    try:
        with context.metrics.track_stream("websocket"):
            await websocket.accept()
            await _serve(websocket, context, connection)
    except WebSocketDisconnect:
        return
    finally:
        await connection.close()
        _log.info("A terminal was closed")


def parse_open_terminal(query: QueryParams) -> OpenTerminal:
    """Parse the query parameters. Raises InvalidParameterError."""
    params = parse_query_params(query, _TerminalQuery)
    is_agent_terminal, is_read_only = params.of == "agent", params.watch == "true"
    if is_read_only and not is_agent_terminal:
        message = "can be true only with of=agent"
        raise InvalidParameterError([FieldError.at(("watch",), "format", message, part="query")])
    return OpenTerminal(
        params.rows, params.columns, is_agent_terminal=is_agent_terminal, is_read_only=is_read_only, term=params.term
    )


async def _serve(websocket: WebSocket, context: AppContext, connection: TerminalConnection) -> None:
    """Serve until the terminal ends, the client disconnects or the server shuts down.

    A shutdown ends a shell, but not the runner of a running task.
    """
    sending = _send_output(websocket, connection)
    done = await run_until_first_complete(sending, _receive_input(websocket, connection), context.shutting_down.wait())
    if context.shutting_down.is_set() and done is not None:
        await websocket.close(_GOING_AWAY)


async def _send_output(websocket: WebSocket, connection: TerminalConnection) -> None:
    """Send output as fast as the client reads; the runner buffers the remaining output, up to a limit."""
    while True:
        match await connection.read():
            case OutputFrame(data=data):
                if data:
                    await websocket.send_bytes(data)
            case WriteAccessFrame(may_write=may_write):
                await websocket.send_text(json.dumps({"type": "role", "types": may_write}))
            case EndFrame(exit_code=exit_code, message=message):
                await websocket.send_text(json.dumps({"type": "exit", "exit_code": exit_code, "message": message}))
                await websocket.close(_NORMAL)
                return


async def _receive_input(websocket: WebSocket, connection: TerminalConnection) -> None:
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
        if (data := message.get("bytes")) is not None:
            if data:
                await connection.send(InputFrame(data))
            continue
        try:
            size = msgspec.json.decode(message.get("text") or "", type=_ResizeMessage)
        except DECODE_ERRORS:
            await websocket.close(
                _POLICY_VIOLATION, "Text frames must be a resize message; send input in binary frames."
            )
            return
        if 1 <= size.rows <= _SIZE_MAX and 1 <= size.columns <= _SIZE_MAX:
            await connection.send(ResizeFrame(size.rows, size.columns))
