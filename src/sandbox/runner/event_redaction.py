"""Redaction of events."""

from collections.abc import Mapping
from typing import Any

import msgspec

from sandbox.interfaces.secrets import Redactor
from sandbox.model.artifacts import Artifact
from sandbox.model.events import (
    AgentMessage,
    AgentStarted,
    ErrorReported,
    Event,
    Output,
    SandboxCreated,
    WorkspacePrepared,
)

_UNREDACTED_FIELDS: Mapping[type, frozenset[str]] = {
    WorkspacePrepared: frozenset({"base_commit"}),
    SandboxCreated: frozenset({"sandbox_name", "tier", "image"}),
    AgentStarted: frozenset({"session_id"}),
    AgentMessage: frozenset({"kind"}),
    Artifact: frozenset({"name", "content_type", "checksum"}),
    ErrorReported: frozenset({"error"}),
}
"""Codes and lookup names that Sandbox defines. They are never redacted, even if a secret has such a value."""


def redact_event(event: Event, redactor: Redactor) -> Event:
    """Redact every text of an event. Output is redacted as a stream, before it becomes an event."""
    if isinstance(event, Output):
        return event
    redacted: Event = _redact_value(event, redactor)
    return redacted


def _redact_value(value: Any, redactor: Redactor) -> Any:
    """Redact `str` but none of its subclasses, such as enums, because Sandbox defines their values."""
    if type(value) is str:
        return redactor.redact_text(value)
    if isinstance(value, dict):
        return redactor.redact_json(value)
    if isinstance(value, tuple):
        return tuple(_redact_value(item, redactor) for item in value)
    if isinstance(value, msgspec.Struct):
        if isinstance(value, Artifact) and value.is_generated:
            return value
        redacted_fields = set(value.__struct_fields__) - _UNREDACTED_FIELDS.get(type(value), frozenset())
        return msgspec.structs.replace(
            value, **{name: _redact_value(getattr(value, name), redactor) for name in redacted_fields}
        )
    return value
