"""A bound on how long is looked for the values of secrets."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sandbox.contracts.redaction import Redaction, StreamRedaction


class TimelyRedaction:
    """Implements `contracts.redaction.Redaction`; what it has no time to look at counts as if it held a value.

    seconds: for all that is looked through, waiting for it not counted; monotonic: gives seconds.
    """

    def __init__(self, redaction: Redaction, seconds: float, monotonic: Callable[[], float]) -> None:
        self._redaction = redaction
        self._seconds_left = seconds
        self._monotonic = monotonic

    @property
    def too_short(self) -> tuple[str, ...]:
        """See `Redaction.too_short`."""
        return self._redaction.too_short

    def redact(self, data: bytes) -> bytes:
        """See `Redaction.redact`."""
        return self._redaction.redact(data)

    def redact_text(self, text: str) -> str:
        """See `Redaction.redact_text`."""
        return self._redaction.redact_text(text)

    def redact_value(self, value: Any) -> Any:
        """See `Redaction.redact_value`."""
        return self._redaction.redact_value(value)

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

    def stream(self) -> StreamRedaction:
        """See `Redaction.stream`."""
        return self._redaction.stream()
