"""Events without the values of secrets."""

from collections.abc import Mapping
from typing import Any

import msgspec

from sandbox.contracts.redaction import Redaction
from sandbox.model.artifact import Artifact
from sandbox.model.event import AgentStarted, Event, Output, SandboxCreated, Trouble, WorkspacePrepared

_OURS: Mapping[type, frozenset[str]] = {
    WorkspacePrepared: frozenset({"base_commit"}),
    SandboxCreated: frozenset({"vm_name", "tier", "image"}),
    AgentStarted: frozenset({"session_id"}),
    Artifact: frozenset({"name", "content_type", "checksum"}),
    Trouble: frozenset({"error"}),
}
"""Codes, and names by which something is found again: words of ours, whatever a secret's value happens to be."""


def redact_event(event: Event, redaction: Redaction) -> Event:
    """The same event with every text of it redacted; output is redacted as a stream, before it is an event."""
    if isinstance(event, Output):
        return event
    redacted: Event = _redact(event, redaction)
    return redacted


def _redact(value: Any, redaction: Redaction) -> Any:
    """Exactly `str`: what is of a type of its own is a word of ours too."""
    if type(value) is str:
        return redaction.redact_text(value)
    if isinstance(value, dict):
        return redaction.redact_value(value)
    if isinstance(value, msgspec.Struct):
        if isinstance(value, Artifact) and value.is_own:
            return value
        theirs = set(value.__struct_fields__) - _OURS.get(type(value), frozenset())
        return msgspec.structs.replace(value, **{name: _redact(getattr(value, name), redaction) for name in theirs})
    return value
