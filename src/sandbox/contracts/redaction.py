"""Keeps the values of secrets out of what leaves a runner."""

from collections.abc import Iterable
from typing import Any, Protocol


class StreamRedaction(Protocol):
    """One stream that comes in chunks. What is let go, put together, is what redacting the whole stream gives."""

    @property
    def held_bytes(self) -> int:
        """How many bytes are held back because they may be the beginning of a value."""
        ...

    def feed(self, chunk: bytes) -> bytes:
        """What may be let go now."""
        ...

    def pause(self) -> bytes:
        """The whole lines that are held back, for when nothing has come for a while."""
        ...

    def flush(self) -> bytes:
        """What is held back, at the end of the stream."""
        ...


class Redaction(Protocol):
    """Replaces the values of a task's secrets, in every usual encoding, by `[REDACTED:NAME]`."""

    @property
    def too_short(self) -> tuple[str, ...]:
        """Names of the secrets whose values are too short to be looked for."""
        ...

    def redact(self, data: bytes) -> bytes:
        """The bytes without values."""
        ...

    def redact_text(self, text: str) -> str:
        """The text without values."""
        ...

    def redact_value(self, value: Any) -> Any:
        """Plain JSON data without values, neither in texts nor in keys."""
        ...

    def contains(self, chunks: Iterable[bytes]) -> bool:
        """Whether a value stands in the concatenation of the chunks."""
        ...

    def stream(self) -> StreamRedaction:
        """A redaction for one more stream."""
        ...
