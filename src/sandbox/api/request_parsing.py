"""Parsing and strict validation of query parameters, page cursors and request bodies."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from datetime import datetime
from difflib import get_close_matches
from typing import Any, TypeVar

import msgspec
from fastapi.dependencies.utils import get_flat_params
from fastapi.routing import APIRoute
from pydantic.config import JsonDict
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection, Request

from sandbox.api.errors import InvalidParameterError, PayloadTooLargeError, RequestTimeoutError
from sandbox.interfaces.store import Cursor, Order, Sort, TaskQuery
from sandbox.model import fixed_limits
from sandbox.model.errors import DECODE_ERRORS
from sandbox.model.manifest.field_formats import VISIBLE
from sandbox.model.wire.requests import REASON_LENGTH_MAX, CancelRequest
from sandbox.primitives import client_fairness

SEQ_MAX = 2**63 - 1
_SEQ_DIGITS_MAX = len(str(SEQ_MAX))


def parse_seq(text: str, field: str) -> int | None:
    """Parse an event's seq; return None for empty text. Raises InvalidParameterError."""
    if not text:
        return None
    is_number = text.isascii() and text.isdecimal() and len(text) <= _SEQ_DIGITS_MAX
    if not is_number or int(text) > SEQ_MAX:
        raise InvalidParameterError(field, f"must be the seq of an event, a whole number from 0 to {SEQ_MAX}")
    return int(text)


TIME_SCHEMA: JsonDict = {"anyOf": [{"format": "date-time"}, {"maxLength": 0}]}
"""A time, or an empty string."""

_RFC_3339 = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d(?:\.\d+)?)([Zz]|[+ -]\d\d:\d\d)", re.ASCII)


def parse_time(text: str, field: str) -> datetime | None:
    """Parse a time (RFC 3339); return None for empty text. Raises InvalidParameterError."""
    if not text:
        return None
    match = _RFC_3339.fullmatch(text)
    try:
        if match is None:
            raise invalid_time(field)
        # A plus sign that was not escaped in a URL arrives as a space.
        return datetime.fromisoformat(f"{match[1]}T{match[2]}{match[3].upper().replace(' ', '+')}")
    except ValueError:
        raise invalid_time(field) from None


def invalid_time(field: str) -> InvalidParameterError:
    """Return the error for text that is not a time, or is a time that cannot be converted to UTC."""
    return InvalidParameterError(field, "must be a time such as 2026-01-29T10:10:15Z")


ECHOED_NAME_LENGTH_MAX = 64


async def reject_unknown_query_params(connection: HTTPConnection) -> None:
    """Reject query parameters that the route does not declare. Raises InvalidParameterError."""
    if not connection.query_params:
        return
    route = connection.scope["route"]
    assert isinstance(route, APIRoute)
    reject_unknown_params(connection.query_params, known=_declared_names(route), patterns=_declared_patterns(route))


def _declared_names(route: APIRoute) -> list[str]:
    """Return the parameter names. Reads them from the route, because building the schema of all routes takes 0.1 s."""
    return [field.alias for field in get_flat_params(route.dependant) if field.alias not in route.param_convertors]


def _declared_patterns(route: APIRoute) -> list[str]:
    """Return name patterns for the parameters that the route itself reads; header parameters have none."""
    parameters = (route.openapi_extra or {}).get("parameters", ())
    return [pattern for parameter in parameters for pattern in parameter["schema"].get("patternProperties", {})]


def reject_repeated_params(params: QueryParams, known: Collection[str]) -> None:
    """Raise InvalidParameterError for the first known name that occurs more than once."""
    for name in params:
        if name in known and len(params.getlist(name)) > 1:
            raise InvalidParameterError(name, "is given more than once; give it once")


def reject_unknown_params(params: QueryParams, *, known: Collection[str], patterns: Collection[str] = ()) -> None:
    """Raise InvalidParameterError for the first name that is unknown and matches no pattern, or is repeated."""
    reject_repeated_params(params, known)
    for name in params:
        if name not in known and not any(re.search(pattern, name) for pattern in patterns):
            raise InvalidParameterError(
                name[:ECHOED_NAME_LENGTH_MAX], _unknown_param_message(name, known, patterns), rule="unknown_field"
            )


def _unknown_param_message(name: str, known: Collection[str], patterns: Collection[str]) -> str:
    close = get_close_matches(name[:ECHOED_NAME_LENGTH_MAX], known, n=1)
    suggestion = f" (did you mean {close[0]}?)" if close else ""
    families = [pattern.strip("^").replace("\\", "") + "*" for pattern in patterns]
    return f"is unknown{suggestion}; valid parameters: {', '.join(sorted([*known, *families])) or 'none'}"


CURSOR_LENGTH_MAX = 2048

CURSOR_PATTERN = rf"^[A-Za-z0-9_-]{{1,{CURSOR_LENGTH_MAX}}}$"
_CURSOR_VERSION = 1
_CURSOR_ADVICE = "must be the next_cursor of an earlier response; omit it to start at the beginning"


class PageCursor(msgspec.Struct, frozen=True, array_like=True):
    """A cursor with the sort order of its list; it is invalid for other lists."""

    version: int
    sort: Sort
    order: Order
    value: str | None
    task_id: str

    @property
    def cursor(self) -> Cursor:
        """The position in the list."""
        return Cursor(self.value, self.task_id)


def encode_cursor(cursor: Cursor | None, query: TaskQuery) -> str | None:
    """Encode a cursor for this query; None stays None."""
    if cursor is None:
        return None
    page_cursor = PageCursor(_CURSOR_VERSION, query.sort, query.order, cursor.value, cursor.task_id)
    return base64.urlsafe_b64encode(msgspec.json.encode(page_cursor)).rstrip(b"=").decode()


def decode_cursor(text: str) -> PageCursor:
    """Decode a cursor made by `encode_cursor`. Raises InvalidParameterError."""
    if not re.fullmatch(CURSOR_PATTERN.strip("^$"), text):
        raise InvalidParameterError("cursor", _CURSOR_ADVICE)
    try:
        page_cursor = msgspec.json.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), type=PageCursor)
    except (binascii.Error, ValueError, RecursionError):
        raise InvalidParameterError("cursor", _CURSOR_ADVICE) from None
    if page_cursor.version != _CURSOR_VERSION or (page_cursor.value is None and page_cursor.sort != "started_at"):
        raise InvalidParameterError("cursor", _CURSOR_ADVICE)
    return page_cursor


BODY_TIMEOUT_SECONDS = 30.0
_BODY_COPIES = 2
"""A body is in memory twice while its chunks are joined."""


@asynccontextmanager
async def body_memory(request: Request, additional_bytes: int = 0) -> AsyncIterator[None]:
    """Reserve memory for the body in the client's share; wait until it is available.

    additional_bytes: size of other data that the request loads and copies in the same way as its body.
    """
    declared = request.headers.get("content-length", "")
    is_known = declared.isdecimal() and len(declared) <= 15
    size_bytes = min(int(declared), fixed_limits.BODY_BYTES_MAX) if is_known else fixed_limits.BODY_BYTES_MAX
    async with client_fairness.current_memory().reservation(_BODY_COPIES * (size_bytes + additional_bytes)):
        yield


async def read_body(request: Request) -> bytes:
    """Read the whole body.

    Raises RequestTimeoutError, or PayloadTooLargeError as soon as the size is known to exceed the limit.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 15 or int(declared) > fixed_limits.BODY_BYTES_MAX):
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            return await _read_bounded(request)
    except TimeoutError:
        raise RequestTimeoutError(
            f"The body did not arrive within {BODY_TIMEOUT_SECONDS:.0f} s; send it again."
        ) from None


async def _read_bounded(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > fixed_limits.BODY_BYTES_MAX:
            raise _too_large()
        body += chunk
    return bytes(body)


def _too_large() -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The body can have at most {fixed_limits.BODY_BYTES_MAX} bytes.")


def has_json_body(request: Request) -> bool:
    """Return whether the client declares a JSON body; everything else is parsed as YAML."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


async def read_cancel_request(request: Request, defaults: CancelRequest) -> CancelRequest:
    """Read the cancellation from the body; `defaults` (from the query) fill missing fields.

    Raises InvalidParameterError.
    """
    body = await read_body(request)
    if not body.strip():
        return _validated(defaults)
    try:
        fields: Any = msgspec.json.decode(body)
        cancel_request = msgspec.convert({**msgspec.structs.asdict(defaults), **fields}, CancelRequest)
    except (TypeError, *DECODE_ERRORS) as error:
        allowed = json.dumps({"reason": "…", "force": False}, ensure_ascii=False)
        raise InvalidParameterError("body", f"must be a JSON object such as {allowed} ({error})", rule="type") from None
    return _validated(cancel_request)


RequestT = TypeVar("RequestT")


def decode_json_body(body: bytes, kind: type[RequestT], example: str) -> RequestT:
    """Decode a JSON object; an empty body is treated as an empty object. Raises InvalidParameterError.

    example: a valid body, for the message.
    """
    try:
        return msgspec.json.decode(body if body.strip() else b"{}", type=kind)
    except DECODE_ERRORS as error:
        message = f"must be a JSON object such as {example} ({error})"
        raise InvalidParameterError("body", message, rule="type") from None


def _validated(cancel_request: CancelRequest) -> CancelRequest:
    reason = cancel_request.reason
    if len(reason) > REASON_LENGTH_MAX or VISIBLE.find_error(reason) is not None:
        allowed = f"one line of at most {REASON_LENGTH_MAX} characters, without control characters"
        raise InvalidParameterError("reason", f"must be {allowed}")
    return cancel_request
