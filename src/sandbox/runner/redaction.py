"""Events without the values of secrets."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from sandbox.interfaces.secrets import Redactor, StreamRedactor
from sandbox.model.events import AgentStarted, Artifact, ErrorReported, Event, Output, SandboxCreated, WorkspacePrepared

_UNREDACTED_FIELDS: Mapping[type, frozenset[str]] = {
    WorkspacePrepared: frozenset({"base_commit"}),
    SandboxCreated: frozenset({"vm_name", "tier", "image"}),
    AgentStarted: frozenset({"session_id"}),
    Artifact: frozenset({"name", "content_type", "checksum"}),
    ErrorReported: frozenset({"error"}),
}
"""Codes, and names by which something is found again: words of ours, whatever a secret's value happens to be."""


def redact_event(event: Event, redaction: Redactor) -> Event:
    """The same event with every text of it redacted; output is redacted as a stream, before it is an event."""
    if isinstance(event, Output):
        return event
    redacted: Event = _redact_value(event, redaction)
    return redacted


def _redact_value(value: Any, redaction: Redactor) -> Any:
    """Exactly `str`: what is of a type of its own is a word of ours too."""
    if type(value) is str:
        return redaction.redact_text(value)
    if isinstance(value, dict):
        return redaction.redact_json(value)
    if isinstance(value, msgspec.Struct):
        if isinstance(value, Artifact) and value.is_generated:
            return value
        theirs = set(value.__struct_fields__) - _UNREDACTED_FIELDS.get(type(value), frozenset())
        return msgspec.structs.replace(
            value, **{name: _redact_value(getattr(value, name), redaction) for name in theirs}
        )
    return value


class DeadlineRedactor:
    """Implements `contracts.redaction.Redaction`; what it has no time to look at counts as if it held a value.

    seconds: for all that is looked through, waiting for it not counted; monotonic: gives seconds.
    """

    def __init__(self, redaction: Redactor, seconds: float, monotonic: Callable[[], float]) -> None:
        self._redaction = redaction
        self._seconds_left = seconds
        self._monotonic = monotonic

    @property
    def too_short_names(self) -> tuple[str, ...]:
        """See `Redaction.too_short`."""
        return self._redaction.too_short_names

    def redact(self, data: bytes) -> bytes:
        """See `Redaction.redact`."""
        return self._redaction.redact(data)

    def redact_text(self, text: str) -> str:
        """See `Redaction.redact_text`."""
        return self._redaction.redact_text(text)

    def redact_json(self, value: Any) -> Any:
        """See `Redaction.redact_value`."""
        return self._redaction.redact_json(value)

    def contains(self, chunks: Iterable[bytes]) -> bool:
        """Whether a value stands in the concatenation of the chunks, or there was no time to look at all of them."""
        over_at = self._monotonic() + self._seconds_left
        is_cut = False

        def in_time() -> Iterator[bytes]:
            nonlocal over_at, is_cut
            asked_at = self._monotonic()
            for chunk in chunks:
                over_at += self._monotonic() - asked_at
                if self._monotonic() >= over_at:
                    is_cut = True
                    return
                yield chunk
                asked_at = self._monotonic()
            over_at += self._monotonic() - asked_at

        contains_secret = self._redaction.contains(in_time())
        self._seconds_left = over_at - self._monotonic()
        return contains_secret or is_cut

    def stream(self) -> StreamRedactor:
        """See `Redaction.stream`."""
        return self._redaction.stream()
