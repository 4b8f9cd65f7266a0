"""Keeps the values of secrets out of what leaves a runner."""

import hashlib
import hmac
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from sandbox.model.errors import SandboxError
from sandbox.model.manifest.schema import Secret


class StreamRedactor(Protocol):
    """One stream that comes in chunks. What is let go, put together, is what redacting the whole stream gives."""

    @property
    def pending_bytes(self) -> int:
        """How many bytes are held back because they may be the beginning of a value."""
        ...

    def feed(self, chunk: bytes) -> bytes:
        """What may be let go now."""
        ...

    def flush_lines(self) -> bytes:
        """The whole lines that are held back, for when nothing has come for a while."""
        ...

    def flush(self) -> bytes:
        """What is held back, at the end of the stream."""
        ...


class Redactor(Protocol):
    """Replaces the values of a task's secrets, in every usual encoding, by `[REDACTED:NAME]`."""

    @property
    def too_short_names(self) -> tuple[str, ...]:
        """Names of the secrets whose values are too short to be looked for."""
        ...

    def redact(self, data: bytes) -> bytes:
        """The bytes without values."""
        ...

    def redact_text(self, text: str) -> str:
        """The text without values."""
        ...

    def redact_json(self, value: Any) -> Any:
        """Plain JSON data without values, neither in texts nor in keys."""
        ...

    def contains(self, chunks: Iterable[bytes]) -> bool:
        """Whether a value stands in the concatenation of the chunks."""
        ...

    def stream(self) -> StreamRedactor:
        """A redaction for one more stream."""
        ...


_SALT_BYTES = 16
_SCRYPT_COST = 2**14
"""Of scrypt: 16 MiB and some 50 ms for each guess."""


def make_fingerprint(secrets: Mapping[str, str]) -> bytes:
    """What is to be kept beside the disk from before an agent has the values."""
    salt = os.urandom(_SALT_BYTES)
    return salt + _digest(secrets, salt)


def matches_fingerprint(path: Path, secrets: Mapping[str, str]) -> bool:
    """Whether these are the values that the fingerprint was made of. Raises OSError."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return False
    salt, digest = stored[:_SALT_BYTES], stored[_SALT_BYTES:]
    return hmac.compare_digest(digest, _digest(secrets, salt))


def _digest(secrets: Mapping[str, str], salt: bytes) -> bytes:
    values = json.dumps(secrets, sort_keys=True).encode()
    return hashlib.scrypt(values, salt=salt, n=_SCRYPT_COST, r=8, p=1)


class SecretUnavailableError(SandboxError):
    """A value cannot be had. The message is for everybody, `detail` for operators: source, key, what to do.

    Neither has a value in it.
    """

    code = "secret_unavailable"

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail or message


class SecretSource(Protocol):
    """One place that holds secrets. Lives in the server's process only."""

    async def resolve(self, secret: Secret) -> str:
        """The value: text without NUL. Raises SecretUnavailableError."""
        ...
