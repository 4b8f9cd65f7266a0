"""JSON responses, error responses (RFC 9457), and the headers of every response: request id and security headers.

The middleware that adds the headers also handles HEAD.
"""

import re
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandbox.model.wire.server_and_error_bodies import FieldErrorBody, ProblemBody, ProblemExtensions
from sandbox.primitives.log_context import REQUEST_ID

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CONTENT_SECURITY_POLICY = (
    "script-src 'none'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The default policy for responses. It prevents their content from executing, wherever it is displayed."""
_START_MESSAGES = {"http.response.start", "websocket.accept", "websocket.http.response.start"}


def get_request_id(connection: HTTPConnection) -> str:
    """Return the request id that the client sent, or a generated one."""
    request_id: str = connection.scope.setdefault("state", {}).get("request_id") or uuid.uuid4().hex
    connection.scope["state"]["request_id"] = request_id
    return request_id


def is_head_request(scope: Scope) -> bool:
    """Return whether the client sent HEAD; routes see GET."""
    return bool(scope.get("state", {}).get("wants_head_only"))


class ResponseHeadersMiddleware:
    """Adds X-Request-Id and security headers, and handles HEAD as a GET whose body is dropped."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app; add the headers to its response."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        request_id_header = Headers(scope=scope).get("x-request-id", "")
        state = scope.setdefault("state", {})
        if _REQUEST_ID.fullmatch(request_id_header):
            state["request_id"] = request_id_header
        request_id = get_request_id(HTTPConnection(scope))
        # Never reset the variable: the server runs each request in a separate context, and logs the errors of the
        # request in that context.
        REQUEST_ID.set(request_id)
        if scope.get("method") == "HEAD":
            state["wants_head_only"] = True
            scope = {**scope, "method": "GET"}

        async def send_wrapped(message: Message) -> None:
            await send(_with_headers(message, request_id, head_only=bool(state.get("wants_head_only"))))

        await self._app(scope, receive, send_wrapped)


def _with_headers(message: Message, request_id: str, *, head_only: bool) -> Message:
    if message["type"] in _START_MESSAGES:
        message = {**message, "headers": list(message.get("headers", []))}
        headers = MutableHeaders(raw=message["headers"])
        headers.setdefault("x-request-id", request_id)
        if message["type"] != "websocket.accept":
            headers.setdefault("x-content-type-options", "nosniff")
            headers.setdefault("cache-control", "no-store")
            headers.setdefault("cross-origin-resource-policy", "same-origin")
            headers.setdefault("content-security-policy", _CONTENT_SECURITY_POLICY)
    elif head_only and message["type"] == "http.response.body":
        return {**message, "body": b""}
    return message


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
    """Create an error response. code: machine-readable; message: for users; details: every error in the request."""
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
