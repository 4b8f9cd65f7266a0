"""Reading, parsing and strict validation of parameters, headers and bodies.

Bodies are read within limits on memory, size and time.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from fastapi.dependencies.utils import get_flat_params, request_params_to_args
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError, core_schema
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection, Request

from sandbox.api.errors import PayloadTooLargeError, RequestTimeoutError
from sandbox.model import fixed_limits
from sandbox.model.errors import (
    FieldError,
    FieldPath,
    InvalidInputError,
    InvalidParameterError,
    RequestPart,
    closest_name,
)
from sandbox.model.manifest.field_formats import Format
from sandbox.model.manifest.parser import parse_object
from sandbox.model.manifest.validation import describe_violation
from sandbox.primitives import fair_client_shares

BODY_TIMEOUT_SECONDS = 30.0
_BODY_COPIES = 2
"""Number of copies of a body in memory: while its chunks are joined, there are two."""


@asynccontextmanager
async def body_memory(request: Request, additional_bytes: int = 0) -> AsyncIterator[None]:
    """Reserve memory for the body from the client's share; wait until it is available.

    additional_bytes: size of other data that the request loads and copies in the same way as its body.
    """
    declared = request.headers.get("content-length", "")
    is_known = declared.isdecimal() and len(declared) <= 15
    size_bytes = min(int(declared), fixed_limits.BODY_BYTES_MAX) if is_known else fixed_limits.BODY_BYTES_MAX
    async with fair_client_shares.reserve_for_whole_request(_BODY_COPIES * (size_bytes + additional_bytes)):
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
        raise RequestTimeoutError.after(BODY_TIMEOUT_SECONDS) from None


async def _read_bounded(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > fixed_limits.BODY_BYTES_MAX:
            raise _too_large()
        body += chunk
    return bytes(body)


def _too_large() -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The body can have at most {fixed_limits.BODY_BYTES_MAX} bytes.")


SEQ_MAX = 2**63 - 1
_SEQ_DIGITS_MAX = len(str(SEQ_MAX))


def _check_seq(text: str) -> str | None:
    is_number = text.isascii() and text.isdecimal() and len(text) <= _SEQ_DIGITS_MAX
    if text and (not is_number or int(text) > SEQ_MAX):
        return f"must be the seq of an event, a whole number from 0 to {SEQ_MAX}"
    return None


SEQ = Format("seq", _check_seq, {"pattern": "^([0-9]{0,18}|[0-8][0-9]{18})$"})
"""The seq of an event, or empty text."""


def parse_seq(text: str) -> int | None:
    """Parse text that has the format `SEQ`; return None for empty text."""
    return int(text) if text else None


def check_format(text: str, expected: Format, name: str, part: RequestPart) -> str:
    """Return the value of a parameter if it matches the format. Raises InvalidParameterError."""
    message = expected.find_error(text)
    if message is not None:
        raise InvalidParameterError([FieldError.at((name,), "format", message, part=part)])
    return text


_RFC_3339 = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d(?:\.\d+)?)([Zz]|[+ -]\d\d:\d\d)", re.ASCII)


_DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


def _check_time(text: str) -> str | None:
    try:
        parse_time(text)
    except (ValueError, OverflowError):
        return "must be a time such as 2026-01-29T10:10:15Z, or a date such as 2026-01-29"
    return None


TIME = Format("time", _check_time, {"format": "date-time"})
"""A time that can be converted to UTC (RFC 3339), a date, or empty text.

The schema describes only times, so that documentation and generated clients use a single type.
"""


def parse_time(text: str) -> datetime | None:
    """Parse text that has the format `TIME`; return None for empty text. A date is midnight UTC."""
    if not text:
        return None
    if _DATE.fullmatch(text):
        return datetime.fromisoformat(text).replace(tzinfo=UTC)
    match = _RFC_3339.fullmatch(text)
    if match is None:
        raise ValueError(text)
    # A plus sign that was not escaped in a URL arrives as a space.
    return datetime.fromisoformat(f"{match[1]}T{match[2]}{match[3].upper().replace(' ', '+')}").astimezone(UTC)


@dataclass(frozen=True)
class CommaSeparated:
    """The format of a comma-separated list of names."""

    names: tuple[str, ...]

    def parse(self, text: str) -> frozenset[str]:
        """Return the names in the list."""
        return frozenset(name.strip() for name in text.split(",")) - {""}

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Make pydantic run the check."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        """Describe the format as a pattern."""
        name = f"({'|'.join(self.names)})"
        return {**handler(schema), "pattern": f"^({name}(,{name})*)?$"}

    def _check(self, text: str) -> str:
        unknown = sorted(self.parse(text) - {*self.names})
        if unknown:
            context = {
                "message": f"must be one of {', '.join(self.names)}",
                "suggestion": closest_name(unknown[0], self.names),
            }
            raise PydanticCustomError("enum", "{message}", context)
        return text


ECHOED_NAME_LENGTH_MAX = 64


_METHODS_WITH_BODY = frozenset({"DELETE", "PATCH", "POST", "PUT"})
_EMPTY_BODY_LENGTHS = frozenset({"0", "1", "2"})
"""Lengths of an empty body, a line break, and an empty object."""

BodyValidator = Callable[[bytes, Request], object]
"""Checks a body. Raises InvalidInputError with all errors."""

EndpointT = TypeVar("EndpointT", bound=Callable[..., Any])


def accepts_body(validate: BodyValidator) -> Callable[[EndpointT], EndpointT]:
    """Mark a route that reads a body.

    validate: called only if parameters are invalid, so that the response also lists the body's errors.
    """

    def mark(endpoint: EndpointT) -> EndpointT:
        vars(endpoint)["validate_body"] = validate
        return endpoint

    return mark


async def check_params(request: Request) -> None:
    """Check the parameters of a request before the route runs. Raises InvalidParameterError with all errors."""
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    validate_body = vars(route.endpoint).get("validate_body")
    if errors := [*_all_name_errors(request, route), *_value_errors(request, route)]:
        raise InvalidParameterError([*errors, *await _body_errors(request, validate_body)])
    if validate_body is None and request.method in _METHODS_WITH_BODY:
        _require_empty_body(request)


def _all_name_errors(request: Request, route: APIRoute) -> Iterator[FieldError]:
    if request.query_params:
        yield from _name_errors(request.query_params, _declared_names(route), _declared_patterns(route))
    for name in _header_names(route):
        if len(request.headers.getlist(name)) > 1:
            yield _repeated(name, "header")


def _value_errors(request: Request, route: APIRoute) -> Iterator[FieldError]:
    dependant = route.dependant
    for fields, values in (
        (dependant.path_params, request.path_params),
        (dependant.query_params, request.query_params),
        (dependant.header_params, request.headers),
    ):
        _, errors = request_params_to_args(fields, values)
        yield from (_value_error(error, error["loc"][1:], error["loc"][0]) for error in errors)


def _value_error(error: ErrorDetails, path: FieldPath, part: Any) -> FieldError:
    violation = describe_violation(error)
    return FieldError.at(path, violation.rule, violation.message, part=part, suggestion=violation.suggestion)


async def _body_errors(request: Request, validate_body: BodyValidator | None) -> Sequence[FieldError]:
    if validate_body is None:
        return ()
    async with body_memory(request):
        content = await read_body(request)
        try:
            await fair_client_shares.to_thread(validate_body, content, request)
        except InvalidInputError as error:
            return error.errors
    return ()


def _require_empty_body(request: Request) -> None:
    """Reject a body, because it may contain misplaced parameters. An empty object is allowed."""
    declared = request.headers.get("content-length", "0")
    if declared not in _EMPTY_BODY_LENGTHS or "transfer-encoding" in request.headers:
        message = "must be empty; this request has only parameters in the URL."
        raise InvalidParameterError([FieldError.at((), "format", message)])


def _declared_names(route: APIRoute) -> list[str]:
    """Return the names of query parameters.

    Reads them from the route, because building the schema of all routes takes 0.1 s.
    """
    others = {*route.param_convertors, *_header_names(route)}
    return [field.alias for field in get_flat_params(route.dependant) if field.alias not in others]


def _header_names(route: APIRoute) -> list[str]:
    return [field.alias for field in route.dependant.header_params]


def _declared_patterns(route: APIRoute) -> list[str]:
    """Return the name patterns of the parameters that the route itself reads; header parameters have none."""
    parameters = (route.openapi_extra or {}).get("parameters", ())
    return [pattern for parameter in parameters for pattern in parameter["schema"].get("patternProperties", {})]


def _name_errors(params: QueryParams, known: Collection[str], patterns: Collection[str] = ()) -> Iterable[FieldError]:
    unknown: list[FieldError] = []
    for name in params:
        if name in known:
            if len(params.getlist(name)) > 1:
                yield _repeated(name, "query")
        elif not any(re.search(pattern, name) for pattern in patterns):
            # Errors above the maximum are only counted. Searching for suggestions would be wasted.
            if len(unknown) < fixed_limits.INPUT_ERRORS_MAX:
                unknown.append(_unknown(name, known, patterns))
            yield unknown[-1]


def _repeated(name: str, part: RequestPart) -> FieldError:
    return FieldError.at((name,), "format", "is given more than once; give it once", part=part)


_NAMES_IN_OTHER_APIS = {
    "max_results": "limit",
    "page": "cursor",
    "page_size": "limit",
    "page_token": "cursor",
    "per_page": "limit",
    "query": "q",
    "search": "q",
    "since": "created_after",
    "starting_after": "cursor",
    "status": "state",
    "until": "created_before",
}
"""Parameters keyed by the names that other APIs use for the same purpose.

They take precedence over parameters with similar names, which may have different purposes.
"""


def _unknown(name: str, known: Collection[str], patterns: Collection[str]) -> FieldError:
    other = _NAMES_IN_OTHER_APIS.get(name)
    suggestion = other if other in known else closest_name(name, known)
    families = [pattern.strip("^").replace("\\", "") + "*" for pattern in patterns]
    listed = f"; valid parameters: {', '.join(sorted([*known, *families])) or 'none'}"
    message = f"is an unknown parameter{'' if suggestion else listed}"
    path = (name[:ECHOED_NAME_LENGTH_MAX],)
    return FieldError.at(path, "unknown_field", message, part="query", suggestion=suggestion)


ParamsT = TypeVar("ParamsT", bound=BaseModel)


def parse_query_params(
    params: QueryParams,
    kind: type[ParamsT],
    *,
    defaults: Mapping[str, str] | None = None,
    ignores_unknown: bool = False,
) -> ParamsT:
    """Parse the query parameters of a WebSocket or a page. Raises InvalidParameterError with all errors.

    defaults: values for absent parameters, used instead of the model's defaults.
    """
    known = kind.model_fields
    named = {name: value for name, value in params.items() if name in known}
    errors = [each for each in _name_errors(params, known) if each.rule != "unknown_field" or not ignores_unknown]
    try:
        parsed = kind.model_validate({**(defaults or {}), **named})
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise InvalidParameterError(
            [*errors, *(_value_error(each, each["loc"], "query") for each in details)]
        ) from None
    if errors:
        raise InvalidParameterError(errors)
    return parsed


ObjectT = TypeVar("ObjectT")


def parse_json_body(
    content: bytes, request: Request, kind: type[ObjectT], defaults: Mapping[str, Any] | None = None
) -> ObjectT:
    """Parse a JSON body, as `parse_object` does. If an unknown field is a query parameter, the error says so."""
    try:
        return parse_object(content, kind, defaults)
    except InvalidParameterError as error:
        names = _declared_names(request.scope["route"])
        raise InvalidParameterError([_as_query_parameter(each, names) for each in error.errors]) from None


def _as_query_parameter(error: FieldError, names: Collection[str]) -> FieldError:
    if error.rule != "unknown_field" or error.field not in names:
        return error
    return FieldError.at((error.field,), error.rule, f"is a query parameter; add ?{error.field}=VALUE to the URL")


def has_json_body(request: Request) -> bool:
    """Return whether the client declares a JSON body; everything else is parsed as YAML."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def accepts_html(connection: HTTPConnection) -> bool:
    """Return whether the client accepts HTML. Browsers that request a page do; programs that request data do not."""
    return "text/html" in connection.headers.get("accept", "").lower()
