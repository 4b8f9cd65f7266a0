"""Redaction of events, and a secret scan with a deadline."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from sandbox.interfaces.secrets import Redactor, StreamRedactor
from sandbox.model.events import (
    AgentMessage,
    AgentStarted,
    Artifact,
    ErrorReported,
    Event,
    Output,
    SandboxCreated,
    WorkspacePrepared,
)

_UNREDACTED_FIELDS: Mapping[type, frozenset[str]] = {
    WorkspacePrepared: frozenset({"base_commit"}),
    SandboxCreated: frozenset({"vm_name", "tier", "image"}),
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


class DeadlineRedactor:
    """Implements `interfaces.secrets.Redactor`. Data that is not scanned in time counts as containing a secret.

    seconds: total time limit for all scans, excluding the time spent waiting for chunks.
    monotonic: returns seconds.
    """

    def __init__(self, redactor: Redactor, seconds: float, monotonic: Callable[[], float]) -> None:
        self._redactor = redactor
        self._seconds_left = seconds
        self._monotonic = monotonic

    @property
    def unsearchable_secret_names(self) -> tuple[str, ...]:
        """See `Redactor.unsearchable_secret_names`."""
        return self._redactor.unsearchable_secret_names

    def redact(self, data: bytes) -> bytes:
        """See `Redactor.redact`."""
        return self._redactor.redact(data)

    def redact_text(self, text: str) -> str:
        """See `Redactor.redact_text`."""
        return self._redactor.redact_text(text)

    def redact_json(self, value: Any) -> Any:
        """See `Redactor.redact_json`."""
        return self._redactor.redact_json(value)

    def contains(self, chunks: Iterable[bytes]) -> bool:
        """Return whether the chunks contain a secret value or were not all scanned in time."""
        deadline = self._monotonic() + self._seconds_left
        is_cut = False

        def until_deadline() -> Iterator[bytes]:
            nonlocal deadline, is_cut
            started_at = self._monotonic()
            for chunk in chunks:
                deadline += self._monotonic() - started_at
                if self._monotonic() >= deadline:
                    is_cut = True
                    return
                yield chunk
                started_at = self._monotonic()
            deadline += self._monotonic() - started_at

        contains_secret = self._redactor.contains(until_deadline())
        self._seconds_left = deadline - self._monotonic()
        return contains_secret or is_cut

    def stream(self) -> StreamRedactor:
        """See `Redactor.stream`."""
        return self._redactor.stream()
