"""Redaction and sources of secrets."""

from collections.abc import Iterable
from typing import Any, Protocol

from sandbox.model.errors import SandboxError
from sandbox.model.manifest.schema import Secret


class StreamRedactor(Protocol):
    """Redacts one stream that arrives in chunks. The concatenated output equals the redaction of the whole stream."""

    @property
    def pending_bytes(self) -> int:
        """Number of bytes held back because they may be the start of a secret value."""
        ...

    def feed(self, chunk: bytes) -> bytes:
        """Return the output that may be released now."""
        ...

    def flush_lines(self) -> bytes:
        """Release the complete lines that are held back, for use after a pause in the stream."""
        ...

    def flush(self) -> bytes:
        """Release everything that is held back, at the end of the stream."""
        ...


class Redactor(Protocol):
    """Replaces the values of a task's secrets, in every common encoding, with `[REDACTED:NAME]`."""

    @property
    def unsearchable_secret_names(self) -> tuple[str, ...]:
        """Names of the secrets whose values are too short to search for."""
        ...

    def redact(self, data: bytes) -> bytes:
        """Return the bytes without secret values."""
        ...

    def redact_text(self, text: str) -> str:
        """Return the text without secret values."""
        ...

    def redact_json(self, value: Any) -> Any:
        """Return the plain JSON data without secret values in strings and keys."""
        ...

    def contains(self, chunks: Iterable[bytes]) -> bool:
        """Return whether the concatenation of the chunks contains a secret value."""
        ...

    def stream(self) -> StreamRedactor:
        """Create a redactor for one stream."""
        ...


class SecretUnavailableError(SandboxError):
    """A secret has no usable value. Only operators may see `detail` (source, key, remedy); others see the message.

    Neither contains the value.
    """

    code = "secret_unavailable"

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail or message


class SecretSource(Protocol):
    """One source of secrets. Used only in the server's process."""

    async def resolve(self, secret: Secret) -> str:
        """Return the value: text without NUL. Raises SecretUnavailableError."""
        ...
