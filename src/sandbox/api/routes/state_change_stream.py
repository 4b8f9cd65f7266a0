"""Route for state changes of all tasks, as server-sent events."""

import re
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Annotated

from fastapi import Header, Query, Request
from starlette.responses import Response

from sandbox.api import paths
from sandbox.api.app_context import ContextDep
from sandbox.api.middleware.authentication import get_caller
from sandbox.api.route_declarations import create_router, problem_responses, raw_content, with_item_schemas
from sandbox.api.streaming.response import SSE_KEEP_ALIVE, EventStreamResponse, MessageBatch, close_iterator
from sandbox.api.streaming.sse import SSE, SSE_SCHEMA, format_sse_event
from sandbox.interfaces.server_services import StateChange
from sandbox.interfaces.store import ChangePosition
from sandbox.model.manifest.field_formats import Format

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
    follow: Annotated[bool, Query(description="Stream without end")] = False,
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
    """Encode each change. Only the last event has an id. A client that missed this event gets all of them again."""
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
