"""Server-sent events: their media type, their schema in OpenAPI and their encoding."""

import msgspec

from sandbox.api.route_declarations import component_ref
from sandbox.model.wire.event_conversion import WireEvent

SSE = "text/event-stream"

EVENT_SCHEMA = component_ref("Event")

_SSE_DATA = {"type": "string", "contentMediaType": "application/json", "contentSchema": EVENT_SCHEMA}
SSE_SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "event": {"type": "string"}, "data": _SSE_DATA},
    "required": ["id", "event", "data"],
}


def format_sse_event(event: WireEvent) -> bytes:
    """Encode an event without an id."""
    return f"event: {event['type']}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n"
