"""JSON answers."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.requests import HTTPConnection
from starlette.responses import Response

from sandbox.api.middleware.response_headers import request_id


class Json(Response):
    """Any value that msgspec can write, with a newline at the end for people at terminals."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The value as UTF-8 JSON."""
        return msgspec.json.encode(content) + b"\n"


_PHRASES = {
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}
"""Those of RFC 9110, which Python knows from 3.13 on only: answers and schema are the same with every version."""


def phrase(status: int) -> str:
    """Such as `Not Found`."""
    return _PHRASES.get(status) or HTTPStatus(status).phrase


class Problem(Json):
    """An error answer."""

    media_type = "application/problem+json"


def problem(
    connection: HTTPConnection,
    status: int,
    code: str,
    message: str,
    *,
    fields: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error answer: `code` for programs, `message` for people; `fields` stand at the top level beside them."""
    identity = request_id(connection)
    body = {
        "error": code,
        "message": message,
        "details": None,
        "request_id": identity,
        "type": f"urn:sandbox:error:{code}",
        "title": phrase(status),
        "status": status,
        "detail": message,
        "instance": _path_as_sent(connection),
        **(fields or {}),
    }
    return Problem(body, status, {**(headers or {}), "x-request-id": identity})


def _path_as_sent(connection: HTTPConnection) -> str:
    raw_path = connection.scope.get("raw_path") or quote(connection.scope["path"]).encode()
    return raw_path.decode("ascii", errors="replace")
