"""What may go wrong between a client and the server: one exception for each family of error codes."""

from __future__ import annotations

import json
from typing import Any

from sandbox.model.errors import SandboxError


class ClientError(SandboxError):
    """A call did not give what it was made for.

    code: the API's stable word, or one of the client's own (`unreachable`, `unexpected_answer`, `checksum_mismatch`).
    status: the HTTP status, None without an answer; details: the API's, mostly a list of mistakes.
    """

    def __init__(self, message: str, *, code: str, status: int | None = None, details: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.details = details


class UnreachableError(ClientError):
    """No answer: nobody listens there, or the connection broke.

    may_have_arrived: the request was on its way already, so the server may have done what it asks for.
    """

    retryable = True

    def __init__(self, message: str, *, may_have_arrived: bool = False) -> None:
        super().__init__(message, code="unreachable")
        self.may_have_arrived = may_have_arrived


class InvalidManifestError(ClientError):
    """The manifest has mistakes; `details` lists them all with field, rule, message, line and column."""


class InvalidRequestError(ClientError):
    """A parameter, or the address of the server itself, is not acceptable."""


class AccessError(ClientError):
    """The token is missing, unknown, or not enough."""


class NotFoundError(ClientError):
    """No such task or artifact."""


class ConflictError(ClientError):
    """The task's id is taken, the task has ended already, or an idempotency key was used for another manifest."""


class RateLimitError(ClientError):
    """Too many requests; try again later."""

    retryable = True


class InsufficientResourcesError(ClientError):
    """The manifest asks for more than the server ever has."""


class ServerError(ClientError):
    """The server failed."""

    retryable = True


class UnexpectedAnswerError(ServerError):
    """What answered is not a Sandbox server, or not one of this version."""

    retryable = False

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message, code="unexpected_answer", status=status)


class ChecksumError(ClientError):
    """What arrived is not what the server has stored; nothing was kept."""

    retryable = True

    def __init__(self, message: str) -> None:
        super().__init__(message, code="checksum_mismatch")


_FAMILIES: dict[int, type[ClientError]] = {
    400: InvalidRequestError,
    401: AccessError,
    403: AccessError,
    404: NotFoundError,
    409: ConflictError,
    413: InvalidManifestError,
    422: ConflictError,
    429: RateLimitError,
    507: InsufficientResourcesError,
}


def error_of(server: str, status: int, body: bytes) -> ClientError:
    """The exception for an answer of `server` that is not the one hoped for."""
    try:
        told = json.loads(body)
        code, message = str(told["error"]), str(told["message"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return unexpected_answer(server, status)
    family = InvalidManifestError if code == "invalid_manifest" else _FAMILIES.get(status, ServerError)
    return family(message, code=code, status=status, details=told.get("details"))


def unexpected_answer(server: str, status: int) -> UnexpectedAnswerError:
    """The error for an answer that no Sandbox server gives."""
    message = f"{server} gave an answer (HTTP {status}) that is not Sandbox's. Check the address of the server."
    return UnexpectedAnswerError(message, status=status)
