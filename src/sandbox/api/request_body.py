"""Bodies of requests, read within bounds of size and time."""

import asyncio
import json
from typing import Any

import msgspec
from starlette.requests import Request

from sandbox.api.errors import InvalidParameterError, PayloadTooLargeError, SlowRequestError
from sandbox.model import limits
from sandbox.model.decoding import DECODE_ERRORS
from sandbox.model.manifest_formats import VISIBLE

BODY_SECONDS = 30.0
REASON_LENGTH_MAX = 1024


class CancelWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a cancel may say. `force` leaves out the grace."""

    reason: str = ""
    force: bool = False

    def checked(self) -> "CancelWish":
        """Itself. Raises InvalidParameterError."""
        if len(self.reason) > REASON_LENGTH_MAX or VISIBLE.complain(self.reason) is not None:
            allowed = f"one line of at most {REASON_LENGTH_MAX} characters, without control characters"
            raise InvalidParameterError("reason", f"must be {allowed}")
        return self


async def read_body(request: Request) -> bytes:
    """The whole body. Raises PayloadTooLargeError as soon as it is known to be too large, SlowRequestError."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 15 or int(declared) > limits.BODY_BYTES_MAX):
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _read_bounded(request)
    except TimeoutError:
        raise SlowRequestError(f"The body did not arrive within {BODY_SECONDS:.0f} s; send it again.") from None


async def _read_bounded(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > limits.BODY_BYTES_MAX:
            raise _too_large()
        body += chunk
    return bytes(body)


def _too_large() -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The body may have {limits.BODY_BYTES_MAX} bytes at most.")


def is_json(request: Request) -> bool:
    """The client says that its body is JSON; everything else is tried as YAML."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


async def read_cancel_wish(request: Request, asked: CancelWish) -> CancelWish:
    """The wish in the body, `asked` (from the query) where the body does not say. Raises InvalidParameterError."""
    body = await read_body(request)
    if not body.strip():
        return asked.checked()
    try:
        given: Any = msgspec.json.decode(body)
        wish = msgspec.convert({**msgspec.structs.asdict(asked), **given}, CancelWish)
    except (TypeError, *DECODE_ERRORS) as error:
        allowed = json.dumps({"reason": "…", "force": False}, ensure_ascii=False)
        raise InvalidParameterError("body", f"must be a JSON object such as {allowed} ({error})", rule="type") from None
    return wish.checked()
