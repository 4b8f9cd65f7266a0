"""The caller's key for one submission."""

from __future__ import annotations

import hashlib
import re

from starlette.requests import Request

from sandbox.api.errors import InvalidParameterError
from sandbox.model.event import Idempotency

HEADER = "Idempotency-Key"
KEY_LENGTH_MAX = 255
KEY_PATTERN = rf"^[!-~]{{1,{KEY_LENGTH_MAX}}}$"

_KEY = re.compile(KEY_PATTERN.strip("^$"), re.ASCII)


def read_idempotency(request: Request, body: bytes) -> Idempotency | None:
    """The key with the digest of the body that it came with; None without one. Raises InvalidParameterError."""
    keys = request.headers.getlist(HEADER)
    if not keys:
        return None
    if len(keys) > 1 or not _KEY.fullmatch(keys[0]):
        message = f"must be one key of 1 to {KEY_LENGTH_MAX} visible ASCII characters"
        raise InvalidParameterError(HEADER, message)
    return Idempotency(keys[0], hashlib.sha256(body).hexdigest())
