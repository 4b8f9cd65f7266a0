"""What may go wrong between a client and the server: one exception for each error code, in families."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from sandbox.client.responses import ExistingTask, Mistake
from sandbox.model.errors import SandboxError
from sandbox.model.limits import DEFAULT_SERVER


class ClientError(SandboxError):
    """A call did not give what it was made for.

    code: the API's stable word, or one of the client's own (`unreachable`, `unexpected_answer`, `checksum_mismatch`).
    status: the HTTP status, None without an answer; request_id: what the server's log knows the request by;
    details: the API's, mostly a list of mistakes; retry_after_seconds: when the server would have it tried again;
    body: the whole response.
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

    @property
    def told(self) -> dict[str, Any]:
        """Deprecated: use `body`."""
        return self.body

    def _text(self, field: str) -> str | None:
        value = self.body.get(field)
        return value if isinstance(value, str) else None

    def _number(self, field: str) -> int | None:
        value = self.body.get(field)
        return value if isinstance(value, int) else None


class UnreachableError(ClientError):
    """No answer: nobody listens there, or the connection broke.

    may_have_arrived: the request was on its way already, so the server may have done what it asks for.
    """

    code = "unreachable"
    retryable = True

    def __init__(self, message: str, *, may_have_arrived: bool = False) -> None:
        super().__init__(message)
        self.may_have_arrived = may_have_arrived


class InvalidManifestError(ClientError):
    """The manifest has mistakes; `mistakes` lists them all with field, rule, message, line and column."""

    code = "invalid_manifest"

    @property
    def mistakes(self) -> list[Mistake]:
        """All of them, in the order of the manifest."""
        listed = self.details if isinstance(self.details, list) else []
        return [cast("Mistake", mistake) for mistake in listed if isinstance(mistake, dict)]


class PayloadTooLargeError(InvalidManifestError):
    """The manifest has more bytes than any may have."""

    code = "payload_too_large"


class InvalidRequestError(ClientError):
    """The request is not one that the server takes."""


class InvalidParameterError(InvalidRequestError):
    """A parameter, or the address of the server itself, is not acceptable."""

    code = "invalid_parameter"


class BadRequestError(InvalidRequestError):
    """The request is not proper HTTP for this address."""

    code = "bad_request"


class MethodNotAllowedError(InvalidRequestError):
    """The address takes other methods."""

    code = "method_not_allowed"


class RangeNotSatisfiableError(InvalidRequestError):
    """The range begins past the end of the file."""

    code = "range_not_satisfiable"


class AccessError(ClientError):
    """The token is missing, unknown, or not enough."""


class UnauthorizedError(AccessError):
    """The server has tokens, and no good one was shown."""

    code = "unauthorized"


class ForbiddenError(AccessError):
    """The token's role does not allow it."""

    code = "forbidden"


class ArtifactContainsSecretError(AccessError):
    """The artifact has a secret in it, and the token may only look on."""

    code = "artifact_contains_secret"


class NotFoundError(ClientError):
    """It is not there: nothing at this address, or no sandbox that is kept."""

    code = "not_found"


class TaskNotFoundError(NotFoundError):
    """No task has this id."""

    code = "task_not_found"


class ArtifactNotFoundError(NotFoundError):
    """The task has no such artifact."""

    code = "artifact_not_found"


class ConflictError(ClientError):
    """What is asked for does not go with what is there."""


class DuplicateTaskIdError(ConflictError):
    """The task's id is taken."""

    code = "duplicate_task_id"

    @property
    def existing_task(self) -> ExistingTask | None:
        """Who has it."""
        task = self.body.get("existing_task")
        return cast("ExistingTask", task) if isinstance(task, dict) else None


class TaskAlreadyTerminalError(ConflictError):
    """The task has ended already."""

    code = "task_already_terminal"

    @property
    def task_state(self) -> str | None:
        """How."""
        return self._text("task_state")


class NoTerminalError(ConflictError):
    """The task has no such terminal."""

    code = "no_terminal"


class IdempotencyKeyReusedError(ConflictError):
    """The idempotency key was used for another manifest."""

    code = "idempotency_key_reused"


class RateLimitError(ClientError):
    """Too many requests; try again after `retry_after_seconds`."""

    code = "rate_limit_exceeded"
    retryable = True


class InsufficientResourcesError(ClientError):
    """The manifest asks for more than the server ever has."""

    code = "insufficient_resources"

    @property
    def requested_cpus(self) -> int | None:
        """What the manifest asks for."""
        return self._number("requested_cpus")

    @property
    def available_cpus(self) -> int | None:
        """What one task may have."""
        return self._number("available_cpus")

    @property
    def requested_memory(self) -> str | None:
        """As a manifest has it, `8G`."""
        return self._text("requested_memory")

    @property
    def available_memory(self) -> str | None:
        """As a manifest has it, `8G`."""
        return self._text("available_memory")


class ServerError(ClientError):
    """The server did not do it, through no fault of the request."""

    retryable = True


class InternalServerError(ServerError):
    """Something went wrong inside the server."""

    code = "internal_error"


class ServiceUnavailableError(ServerError):
    """The server cannot do it at the moment; try again after `retry_after_seconds`."""

    code = "service_unavailable"


class RequestTimeoutError(ServerError):
    """The body did not arrive in time."""

    code = "request_timeout"


class UnexpectedAnswerError(ServerError):
    """What answered is not a Sandbox server, or not one of this version."""

    code = "unexpected_answer"
    retryable = False


class ChecksumError(ClientError):
    """What arrived is not what the server has stored; nothing was kept."""

    code = "checksum_mismatch"
    retryable = True


class TooLargeError(ClientError):
    """An artifact that was to be read into memory has more bytes than that may take."""

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
    NotFoundError,
    MethodNotAllowedError,
    RequestTimeoutError,
    DuplicateTaskIdError,
    TaskAlreadyTerminalError,
    NoTerminalError,
    PayloadTooLargeError,
    RangeNotSatisfiableError,
    IdempotencyKeyReusedError,
    RateLimitError,
    InternalServerError,
    ServiceUnavailableError,
    InsufficientResourcesError,
)
"""The exceptions that stand for an answer, in the order of docs/errors.md."""

LOCAL_ERRORS: tuple[type[ClientError], ...] = (UnreachableError, UnexpectedAnswerError, ChecksumError, TooLargeError)
"""Those that stand for what the client itself finds."""

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
"""For a code that this client does not know, because the server is newer."""


def error_from_response(server: str, status: int, body: bytes, retry_after: str | None = None) -> ClientError:
    """The exception for an answer of `server` that is not the one hoped for; `retry_after`: its header."""
    try:
        response = json.loads(body)
        code, message = str(response["error"]), str(response["message"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return unexpected_response_error(server, status)
    family = _FAMILY_BY_STATUS.get(status, InvalidRequestError if 400 <= status < 500 else ServerError)
    seconds = float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdecimal() else None
    return _BY_CODE.get(code, family)(message, code=code, status=status, body=response, retry_after_seconds=seconds)


def refine_not_found(error: ClientError, server: str, path: str) -> ClientError:
    """The error as it is, or another where the server does not know the path, which each of this version does.

    What is kept of a sandbox is the one thing that is told to be missing by the same code.
    """
    if error.code != NotFoundError.code or path.endswith("/vm"):
        return error
    message = f"{server} has no such address: it is no Sandbox server, or not one of this version."
    advice = f"Check the address of the server; it is {DEFAULT_SERVER} by default, without a path."
    return UnexpectedAnswerError(f"{message} {advice}", status=error.status, body=error.body)


def unexpected_response_error(server: str, status: int) -> UnexpectedAnswerError:
    """The error for an answer that no Sandbox server gives."""
    message = f"{server} gave an answer (HTTP {status}) that is not Sandbox's. Check the address of the server."
    return UnexpectedAnswerError(message, status=status)
