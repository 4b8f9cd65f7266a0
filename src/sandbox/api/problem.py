"""The shape of every error answer."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from starlette.requests import HTTPConnection
from starlette.responses import Response

from sandbox.api.answer import Json
from sandbox.api.envelope import request_id
from sandbox.api.phrase import phrase


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
