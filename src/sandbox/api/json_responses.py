"""JSON responses, including those of errors (RFC 9457)."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import msgspec
from starlette.requests import HTTPConnection
from starlette.responses import Response

from sandbox.api.middleware.response_headers import get_request_id
from sandbox.model.wire.problem_bodies import FieldErrorBody, ProblemBody, ProblemExtensions

BodyT = TypeVar("BodyT")


class JsonResponse(Response, Generic[BodyT]):
    """A JSON response. The body is encoded with msgspec and ends with a newline for terminals.

    As the return type of a route, `JsonResponse[TaskBody]` also describes the response in the schema.
    """

    media_type = "application/json"

    def __init__(self, content: BodyT, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(content, status_code, headers)

    def render(self, content: Any) -> bytes:
        """Encode the value as UTF-8 JSON."""
        return msgspec.json.encode(content) + b"\n"


_REASON_PHRASES = {
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}
"""Reason phrases of RFC 9110 that differ from those of Python before 3.13.

Responses and the schema must not depend on the version of Python.
"""


def reason_phrase(status: int) -> str:
    """Return the reason phrase, such as `Not Found`."""
    return _REASON_PHRASES.get(status) or HTTPStatus(status).phrase


class ProblemResponse(JsonResponse[ProblemBody]):
    """An error response (RFC 9457)."""

    media_type = "application/problem+json"


_NO_EXTENSIONS: ProblemExtensions = {}


def problem_response(
    connection: HTTPConnection,
    status: int,
    code: str,
    message: str,
    *,
    details: list[FieldErrorBody] | None = None,
    extensions: ProblemExtensions | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Create an error response. code: for programs; message: for users; details: every error in the request."""
    identity = get_request_id(connection)
    body: ProblemBody = {
        "error": code,
        "message": message,
        "details": details,
        "request_id": identity,
        "type": f"urn:sandbox:error:{code}",
        "title": reason_phrase(status),
        "status": status,
        "detail": message,
        "instance": _raw_path(connection),
        **(extensions or _NO_EXTENSIONS),
    }
    return ProblemResponse(body, status, {**(headers or {}), "x-request-id": identity})


def _raw_path(connection: HTTPConnection) -> str:
    raw_path = connection.scope.get("raw_path") or quote(connection.scope["path"]).encode()
    return raw_path.decode("ascii", errors="replace")
