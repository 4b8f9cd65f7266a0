"""Exceptions of the client: one per error code, grouped by base class."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any, cast

from sandbox.client.response_types import ExistingTask, FieldError
from sandbox.model.default_server_address import DEFAULT_SERVER
from sandbox.model.errors import SandboxError

_LISTED_ERRORS_MAX = 5
"""Maximum number of `field_errors` that the text of an exception lists."""


class ClientError(SandboxError):
    """Base class of all client errors.

    code: the API's stable code, or one of the client's (`unreachable`, `unexpected_answer`, `checksum_mismatch`,
    `artifact_too_large`).
    status: the HTTP status; None if there was no response.
    request_id: the request's id in the server's log.
    details: the API's details; see `field_errors`.
    retry_after_seconds: when to retry, according to the server.
    body: the complete response body.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        body: Mapping[str, Any] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code or type(self).code
        self.status = status
        self.body = dict(body or {})
        self.details: Any = self.body.get("details")
        self.request_id = self._text("request_id")
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        """Return the message, followed by the first errors in the request."""
        listed = [f"  {_describe(error)}" for error in self.field_errors]
        omitted = len(listed) - _LISTED_ERRORS_MAX
        more = [f"  and {omitted} more"] if omitted > 0 else []
        return "\n".join([self.message, *listed[:_LISTED_ERRORS_MAX], *more])

    @property
    def field_errors(self) -> list[FieldError]:
        """Every error in the request, for an invalid manifest, body or parameter; otherwise empty."""
        listed = self.details if isinstance(self.details, list) else []
        return [cast("FieldError", entry) for entry in listed if isinstance(entry, dict)]

    @property
    def told(self) -> dict[str, Any]:
        """Deprecated: use `body`."""
        warnings.warn("ClientError.told is deprecated; use body.", DeprecationWarning, stacklevel=2)
        return self.body

    def _text(self, field: str) -> str | None:
        value = self.body.get(field)
        return value if isinstance(value, str) else None

    def _number(self, field: str) -> int | None:
        value = self.body.get(field)
        return value if isinstance(value, int) else None


def _describe(error: Mapping[str, Any]) -> str:
    """Return an error's location and message. An older server has no `location`."""
    location = error.get("location") or error.get("field")
    message = error.get("message", "")
    return f"{location}: {message}" if location else f"{message}"


class UnreachableError(ClientError):
    """There was no response: the connection was refused or lost.

    may_have_arrived: the request was already sent, so the server may have executed it.
    """

    code = "unreachable"
    retryable = True

    def __init__(self, message: str, *, may_have_arrived: bool = False) -> None:
        super().__init__(message)
        self.may_have_arrived = may_have_arrived


class InvalidManifestError(ClientError):
    """The manifest is invalid; `field_errors` lists all errors in the order in which they occur."""

    code = "invalid_manifest"

    @property
    def mistakes(self) -> list[FieldError]:
        """Deprecated: use `field_errors`."""
        warnings.warn(
            "InvalidManifestError.mistakes is deprecated; use field_errors.", DeprecationWarning, stacklevel=2
        )
        return self.field_errors


class PayloadTooLargeError(InvalidManifestError):
    """The manifest exceeds the size limit."""

    code = "payload_too_large"


class InvalidRequestError(ClientError):
    """The server rejects the request as invalid."""


class InvalidParameterError(InvalidRequestError):
    """Parameters or fields of the body are invalid (see `field_errors`), or the server's base URL is invalid."""

    code = "invalid_parameter"


class BadRequestError(InvalidRequestError):
    """The request is not a valid HTTP request for this path."""

    code = "bad_request"


class MethodNotAllowedError(InvalidRequestError):
    """The path does not support this method."""

    code = "method_not_allowed"


class RangeNotSatisfiableError(InvalidRequestError):
    """The range starts after the end of the file."""

    code = "range_not_satisfiable"


class AccessError(ClientError):
    """The token is missing or invalid, or lacks the required role."""


class UnauthorizedError(AccessError):
    """The server requires a token, but the request contained none or an invalid one."""

    code = "unauthorized"


class ForbiddenError(AccessError):
    """The token's role does not permit the request."""

    code = "forbidden"


class ArtifactContainsSecretError(AccessError):
    """The artifact contains a secret, and the token lacks the operator role."""

    code = "artifact_contains_secret"


class NotFoundError(ClientError):
    """The path does not exist."""

    code = "not_found"


class TaskNotFoundError(NotFoundError):
    """No task has this id."""

    code = "task_not_found"


class ArtifactNotFoundError(NotFoundError):
    """The task has no such artifact."""

    code = "artifact_not_found"


class SandboxNotFoundError(NotFoundError):
    """The task has no preserved sandbox."""

    code = "sandbox_not_found"

    @property
    def task_state(self) -> str | None:
        """The state of the task."""
        return self._text("task_state")


class HostNotFoundError(NotFoundError):
    """The cluster has no such host, or there is no cluster."""

    code = "host_not_found"


class ConflictError(ClientError):
    """The request conflicts with the current state."""


class DuplicateTaskIdError(ConflictError):
    """A task with this id already exists."""

    code = "duplicate_task_id"

    @property
    def existing_task(self) -> ExistingTask | None:
        """The existing task."""
        task = self.body.get("existing_task")
        return cast("ExistingTask", task) if isinstance(task, dict) else None


class TaskAlreadyTerminalError(ConflictError):
    """The task has already ended."""

    code = "task_already_terminal"

    @property
    def task_state(self) -> str | None:
        """The final state of the task."""
        return self._text("task_state")


class TaskNotEndedError(ConflictError):
    """The task has not ended, so it cannot be continued."""

    code = "task_not_ended"

    @property
    def task_state(self) -> str | None:
        """The current state of the task."""
        return self._text("task_state")


class TaskNotContinuableError(ConflictError):
    """The task has ended, but no other task can start from its work."""

    code = "task_not_continuable"


class NoTerminalError(ConflictError):
    """The task has no such terminal."""

    code = "no_terminal"


class IdempotencyKeyReusedError(ConflictError):
    """The idempotency key was used with a different manifest."""

    code = "idempotency_key_reused"


class RateLimitError(ClientError):
    """Too many requests; retry after `retry_after_seconds`."""

    code = "rate_limit_exceeded"
    retryable = True


class ResponseMemoryError(RateLimitError):
    """The unread response data of this token exceeds its limit. Read or close open responses, then retry."""

    code = "response_memory_exceeded"


class InsufficientResourcesError(ClientError):
    """The task requests more than the capacity of the machine, or of every host of the cluster."""

    code = "insufficient_resources"

    @property
    def requested_cpus(self) -> int | None:
        """CPUs that the manifest requests."""
        return self._number("requested_cpus")

    @property
    def available_cpus(self) -> int | None:
        """CPUs available to one task."""
        return self._number("available_cpus")

    @property
    def requested_memory(self) -> str | None:
        """Memory that the manifest requests, in the manifest's format: `8G`."""
        return self._text("requested_memory")

    @property
    def available_memory(self) -> str | None:
        """Memory available to one task, in the manifest's format: `8G`."""
        return self._text("available_memory")


class ServerError(ClientError):
    """The server failed to process a valid request."""

    retryable = True


class InternalServerError(ServerError):
    """An internal server error."""

    code = "internal_error"


class ServiceUnavailableError(ServerError):
    """The server is temporarily unavailable; retry after `retry_after_seconds`."""

    code = "service_unavailable"


class RequestTimeoutError(ServerError):
    """The request body did not arrive in time."""

    code = "request_timeout"


class UnexpectedResponseError(ServerError):
    """The response is not from a Sandbox server, or is from an incompatible version."""

    code = "unexpected_answer"
    retryable = False


class ChecksumError(ClientError):
    """The downloaded bytes do not match the stored checksum; nothing was saved."""

    code = "checksum_mismatch"
    retryable = True


class ArtifactTooLargeError(ClientError):
    """The artifact exceeds the size limit for reading into memory."""

    code = "artifact_too_large"


API_ERRORS: tuple[type[ClientError], ...] = (
    InvalidManifestError,
    InvalidParameterError,
    BadRequestError,
    UnauthorizedError,
    ForbiddenError,
    ArtifactContainsSecretError,
    TaskNotFoundError,
    ArtifactNotFoundError,
    SandboxNotFoundError,
    HostNotFoundError,
    NotFoundError,
    MethodNotAllowedError,
    RequestTimeoutError,
    DuplicateTaskIdError,
    TaskAlreadyTerminalError,
    TaskNotEndedError,
    TaskNotContinuableError,
    NoTerminalError,
    PayloadTooLargeError,
    RangeNotSatisfiableError,
    IdempotencyKeyReusedError,
    RateLimitError,
    ResponseMemoryError,
    InternalServerError,
    ServiceUnavailableError,
    InsufficientResourcesError,
)
"""Exceptions for error responses, in the order of docs/errors.md."""

LOCAL_ERRORS: tuple[type[ClientError], ...] = (
    UnreachableError,
    UnexpectedResponseError,
    ChecksumError,
    ArtifactTooLargeError,
)
"""Exceptions for conditions that the client detects."""

_BY_CODE = {error.code: error for error in API_ERRORS}

_FAMILY_BY_STATUS: dict[int, type[ClientError]] = {
    401: AccessError,
    403: AccessError,
    404: NotFoundError,
    409: ConflictError,
    413: InvalidManifestError,
    422: ConflictError,
    429: RateLimitError,
}
"""Base classes, keyed by status, for error codes that only newer servers send."""


def error_from_response(server: str, status: int, body: bytes, retry_after: str | None = None) -> ClientError:
    """Convert an error response from `server` to an exception. retry_after: the value of its Retry-After header."""
    try:
        response = json.loads(body)
        code, message = str(response["error"]), str(response["message"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return unexpected_response_error(server, status)
    family = _FAMILY_BY_STATUS.get(status, InvalidRequestError if 400 <= status < 500 else ServerError)
    seconds = float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdecimal() else None
    return _BY_CODE.get(code, family)(message, code=code, status=status, body=response, retry_after_seconds=seconds)


def refine_not_found(error: ClientError, server: str, path: str) -> ClientError:
    """Return the error, or UnexpectedResponseError if the server lacks a path that every compatible version has.

    Paths that end in `/vm` are exempt: older servers send the same code for a missing preserved sandbox.
    """
    if error.code != NotFoundError.code or path.endswith("/vm"):
        return error
    message = f"{server} has no such endpoint: it is not a Sandbox server, or has a different version."
    advice = f"Check the address of the server; it is {DEFAULT_SERVER} by default, without a path."
    return UnexpectedResponseError(f"{message} {advice}", status=error.status, body=error.body)


def unexpected_response_error(server: str, status: int) -> UnexpectedResponseError:
    """Create the error for a response that no Sandbox server sends."""
    message = f"{server} sent an unexpected response (HTTP {status}). Check the address of the server."
    return UnexpectedResponseError(message, status=status)
