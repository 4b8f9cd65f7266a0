"""Maps errors to HTTP responses, including messages about requests that match no endpoint."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute

from sandbox.api import paths
from sandbox.api.responses import problem_response
from sandbox.interfaces.placement import HostNotFoundError
from sandbox.interfaces.runner import TerminalRefusedError
from sandbox.interfaces.server_services import (
    ArtifactNotFoundError,
    IdempotencyKeyReusedError,
    InsufficientResourcesError,
    SandboxNotPreservedError,
    TaskEndedError,
    TaskNotContinuableError,
    TaskNotEndedError,
    TaskNotFoundError,
    UnavailableError,
)
from sandbox.interfaces.store import DuplicateTaskError, StoreError
from sandbox.model.display_text import format_timestamp
from sandbox.model.errors import (
    InvalidInputError,
    InvalidManifestError,
    InvalidParameterError,
    SandboxError,
    closest_name,
    with_suggestion,
)
from sandbox.model.wire.server_and_error_bodies import FieldErrorBody, ProblemExtensions

_PATH_LENGTH_MAX = 256
_CANCEL_PATH = re.compile(rf"({re.escape(paths.TASKS)}/[A-Za-z0-9._-]{{1,128}})/(?:cancel|stop|abort|kill)/?")
_TASK_RESOURCE_PATH = re.compile(rf"{re.escape(paths.TASKS)}/([A-Za-z0-9._-]{{1,128}})/([a-z_-]+)/?")
_RESOURCES_BY_OTHER_NAME = {
    **dict.fromkeys(("patch", "diff", "changes"), "artifacts/{task_id}.patch"),
    **dict.fromkeys(("retry", "restart", "resubmit"), "rerun"),
    **dict.fromkeys(("events", "output"), "logs"),
    "resume": "continue",
    "release": "vm",
}
"""Maps names that other systems use for a task's resources to the names used here."""

_SIMILARITY_MIN = 0.75
"""Minimum similarity of the last segments of two similar paths, from 0 to 1."""

_NO_ENDPOINT = "No such endpoint; /openapi.json lists all endpoints."


def not_found_message(connection: HTTPConnection) -> str:
    """Return the message of a 404: it names the right request or a similar path, if there is one."""
    routes, path = connection.app.routes, connection.scope["path"]
    if any(isinstance(route, WebSocketRoute) and route.path_regex.match(path) for route in routes):
        return "This is a WebSocket endpoint; connect with ws:// (wss:// behind TLS)."
    if isinstance(connection.app, FastAPI):
        if cancelled := _CANCEL_PATH.fullmatch(path):
            return f"No such endpoint; cancel with DELETE {cancelled[1]}."
        suggestion = _closest_path(routes, path) if path.isprintable() and len(path) <= _PATH_LENGTH_MAX else None
        return with_suggestion("No such endpoint", suggestion) if suggestion else _NO_ENDPOINT
    return f"No such endpoint; this port serves the WebSockets {paths.STREAM} and {paths.TERMINAL}."


def _closest_path(routes: Sequence[Any], path: str) -> str | None:
    """Return an existing path that is similar, or None.

    It is the same path without trailing slashes, another resource of the same task, or a path without parameters. A
    misspelled path never leads to an administrative endpoint, which may delete the tasks of other users.
    """
    endpoints = [route for route in routes if isinstance(route, Route)]
    without_slash = path.rstrip("/")
    if without_slash != path and any(route.path_regex.match(without_slash) for route in endpoints):
        return without_slash
    if resource := _TASK_RESOURCE_PATH.fullmatch(path):
        task_id, name = resource.groups()
        similar = closest_name(name, set(_similar_names(name, _task_resources(endpoints))))
        found = _RESOURCES_BY_OTHER_NAME.get(name) or similar
        return f"{paths.TASKS}/{task_id}/{found.format(task_id=task_id)}" if found else None
    known = {route.path for route in endpoints if not route.param_convertors and "/admin/" not in route.path}
    return closest_name(path, set(_similar_names(path, known)))


def _task_resources(endpoints: Sequence[Route]) -> set[str]:
    """Return the names of the endpoints under a task, such as `logs`."""
    names = {route.path.removeprefix(f"{paths.TASK}/") for route in endpoints if route.path != paths.TASK}
    return {name for name in names if "/" not in name}


def _similar_names(name: str, known: Collection[str]) -> Iterator[str]:
    """Yield the known names whose last segment is similar to the last segment of this name."""
    last = name.rpartition("/")[2]
    for each in known:
        if SequenceMatcher(None, last, each.rpartition("/")[2]).ratio() >= _SIMILARITY_MIN:
            yield each


def allowed_methods(routes: Sequence[Any], path: str) -> list[str]:
    """Return the methods of all routes that match this path."""
    methods: set[str] = set()
    for route in routes:
        if isinstance(route, Route) and route.path_regex.match(path):
            methods |= route.methods or set()
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


DEFAULT_RETRY_AFTER_SECONDS = 5


class SecretArtifactError(SandboxError):
    """The artifact contains a secret's value, and the caller lacks the operator role."""

    code = "artifact_contains_secret"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name!r} contains the value of one of the task's secrets; downloading it requires a token with the "
            "operator role."
        )


class ManifestForbiddenError(SandboxError):
    """The caller lacks the operator role, which is required because the manifest contains the sources of secrets."""

    code = "forbidden"

    def __init__(self) -> None:
        super().__init__(
            "The manifest lists the sources of secrets; reading it requires a token with the operator role."
        )


class TooManyStreamsError(SandboxError):
    """The token has the maximum number of open all-task streams."""

    code = "rate_limit_exceeded"

    def __init__(self, limit: int) -> None:
        super().__init__(f"This token already has {limit} open streams of all tasks; set task_id, or close one.")


class PayloadTooLargeError(SandboxError):
    """The request body is too large."""

    code = "payload_too_large"


class RequestTimeoutError(SandboxError):
    """The request body did not arrive in time."""

    code = "request_timeout"
    retryable = True

    @classmethod
    def after(cls, seconds: float) -> "RequestTimeoutError":
        """Create the error for a body that did not arrive within this time."""
        return cls(f"The body did not arrive within {seconds:.0f} s; send it again.")


class RangeNotSatisfiableError(SandboxError):
    """The range starts after the end of the file; `size_bytes` is the file's size."""

    code = "range_not_satisfiable"

    def __init__(self, size_bytes: int) -> None:
        super().__init__(f"The range starts after the end; the size is {size_bytes} bytes.")
        self.size_bytes = size_bytes


def add_error_handlers(app: Starlette) -> None:
    """Register a handler for every error."""
    for error_class, (status, get_extensions) in _ERROR_RESPONSES.items():
        app.add_exception_handler(error_class, _problem_handler(status, get_extensions))
    handlers: dict[type[Exception], Callable[..., Any]] = {
        RangeNotSatisfiableError: _range_not_satisfiable,
        TaskNotContinuableError: _task_not_continuable,
        HTTPException: _http_error,
        ClientDisconnect: _client_disconnected,
        Exception: _internal_error,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def status_of(error: SandboxError) -> int:
    """Return the HTTP status for this error; 500 by default."""
    return next((_ERROR_RESPONSES[kind][0] for kind in type(error).__mro__ if kind in _ERROR_RESPONSES), 500)


_Extensions = Callable[[Any], ProblemExtensions]


def _problem_handler(status: int, get_extensions: _Extensions) -> Callable[..., Any]:
    async def handle(connection: HTTPConnection, error: SandboxError) -> Response:
        seconds = error.retry_after_seconds if isinstance(error, UnavailableError) else None
        headers = retry_after_header(seconds) if status in {429, 503} else None
        return problem_response(
            connection,
            status,
            error.code,
            error.message,
            details=_details(error),
            extensions=get_extensions(error),
            headers=headers,
        )

    return handle


def retry_after_header(seconds: int | None) -> dict[str, str]:
    """Return the Retry-After header for a 429 or 503 response. seconds: None uses the default."""
    return {"retry-after": str(seconds or DEFAULT_RETRY_AFTER_SECONDS)}


def _details(error: SandboxError) -> list[FieldErrorBody] | None:
    return [msgspec.to_builtins(each) for each in error.errors] if isinstance(error, InvalidInputError) else None


def _no_extensions(_: SandboxError) -> ProblemExtensions:
    return {}


def _existing_task(error: DuplicateTaskError) -> ProblemExtensions:
    task = error.existing
    created_at = format_timestamp(task.created_at)
    return {"existing_task": {"id": task.id, "state": task.state.value, "created_at": created_at}}


def _task_state(error: TaskEndedError | TaskNotEndedError | SandboxNotPreservedError) -> ProblemExtensions:
    return {"task_state": error.task.state.value}


def _resources(error: InsufficientResourcesError) -> ProblemExtensions:
    return {
        "requested_cpus": error.requested_cpus,
        "available_cpus": error.available_cpus,
        "requested_memory": _byte_size(error.requested_memory_bytes),
        "available_memory": _byte_size(error.available_memory_bytes),
    }


def _byte_size(size_bytes: int) -> str:
    """Format a size as in a manifest: `8G`, or whole mebibytes."""
    mebibytes = size_bytes // 1024**2
    return f"{mebibytes // 1024}G" if mebibytes % 1024 == 0 else f"{mebibytes}M"


_ERROR_RESPONSES: dict[type[SandboxError], tuple[int, _Extensions]] = {
    InvalidManifestError: (400, _no_extensions),
    InvalidParameterError: (400, _no_extensions),
    SecretArtifactError: (403, _no_extensions),
    ManifestForbiddenError: (403, _no_extensions),
    TaskNotFoundError: (404, _no_extensions),
    ArtifactNotFoundError: (404, _no_extensions),
    SandboxNotPreservedError: (404, _task_state),
    RequestTimeoutError: (408, _no_extensions),
    DuplicateTaskError: (409, _existing_task),
    TerminalRefusedError: (409, _no_extensions),
    TaskEndedError: (409, _task_state),
    HostNotFoundError: (404, _no_extensions),
    TaskNotEndedError: (409, _task_state),
    TaskNotContinuableError: (409, _no_extensions),
    PayloadTooLargeError: (413, _no_extensions),
    IdempotencyKeyReusedError: (422, _no_extensions),
    TooManyStreamsError: (429, _no_extensions),
    UnavailableError: (503, _no_extensions),
    StoreError: (503, _no_extensions),
    InsufficientResourcesError: (507, _resources),
}


STATUS_BY_CODE: dict[str, int] = {
    "internal_error": 500,
    "unauthorized": 401,
    "forbidden": 403,
    "rate_limit_exceeded": 429,
    "response_memory_exceeded": 429,
    RangeNotSatisfiableError.code: 416,
    **{error_class.code: status for error_class, (status, _) in _ERROR_RESPONSES.items()},
}
"""The status of each error code that an operation may return."""

ERROR_CODES = frozenset({*STATUS_BY_CODE, "bad_request", "not_found", "method_not_allowed"})
"""All error codes of responses: those of operations, and those of requests that match no operation."""


async def _range_not_satisfiable(connection: HTTPConnection, error: RangeNotSatisfiableError) -> Response:
    headers = {"content-range": f"bytes */{error.size_bytes}"}
    return problem_response(connection, 416, error.code, error.message, headers=headers)


async def _task_not_continuable(connection: HTTPConnection, error: TaskNotContinuableError) -> Response:
    """Return the error response. If the task can be run again, the message names the request that does so."""
    message = error.message
    if error.can_rerun:
        message = f"{message.removesuffix('.')} with POST {paths.task_path(error.task_id)}/rerun."
    return problem_response(connection, status_of(error), error.code, message)


async def _http_error(connection: HTTPConnection, error: HTTPException) -> Response:
    """Convert errors raised by the router."""
    if error.status_code == 405:
        allowed = allowed_methods(connection.app.routes, connection.scope["path"])
        message = f"Method not allowed; use {', '.join(allowed)}."
        return problem_response(connection, 405, "method_not_allowed", message, headers={"allow": ", ".join(allowed)})
    if error.status_code == 404:
        return problem_response(connection, 404, "not_found", not_found_message(connection))
    return problem_response(connection, error.status_code, "bad_request", str(error.detail), headers=error.headers)


async def _client_disconnected(_: HTTPConnection, __: ClientDisconnect) -> Response:
    return Response(status_code=400)


async def _internal_error(connection: HTTPConnection, _: Exception) -> Response:
    """Return a generic 500. The cause is in the server's log under the same request id."""
    message = "Internal server error; the server's log has details under this request id."
    return problem_response(connection, 500, "internal_error", message)
