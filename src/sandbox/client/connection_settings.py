"""The connection settings of a client: base URL, token and timeouts. Checks responses and translates errors."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from sandbox.client.errors import (
    ClientError,
    InvalidParameterError,
    UnreachableError,
    error_from_response,
    refine_not_found,
    unexpected_response_error,
)
from sandbox.client.parsing import matches_schema, parse_object
from sandbox.client.requests import Request, is_loopback_url, translate_url_errors, validate_base_url
from sandbox.model.default_server_address import DEFAULT_SERVER

CONNECT_TIMEOUT_SECONDS = 5.0
ERROR_BYTES_MAX = 1024 * 1024
TIMEOUT_SECONDS = 30.0

_TOKEN_PATTERN = re.compile("[!-~]+")
_HEADER_VALUE = re.compile("[!-~]([ -~]*[!-~])?")

if TYPE_CHECKING:
    import httpx2

ResponseT = TypeVar("ResponseT")


@dataclass(frozen=True)
class ConnectionSettings:
    """A server's base URL and token. timeout_seconds: the timeout for each response, and for each read of a stream."""

    server: str
    token: str | None
    timeout_seconds: float

    def client_arguments(self) -> dict[str, Any]:
        """Return the arguments for an httpx2 client."""
        import httpx2

        return {
            "base_url": self.server,
            "headers": authorization_header(self.token),
            "timeout": httpx2.Timeout(self.timeout_seconds, connect=CONNECT_TIMEOUT_SECONDS),
            "trust_env": False,  # a proxy variable must not affect requests to a server on this machine
            "verify": _ssl_context(self.server),
        }

    def request_arguments(self, request: Request[Any]) -> dict[str, Any]:
        """Return the httpx2 arguments for one request.

        Raises InvalidParameterError for a header that cannot be sent.
        """
        import httpx2

        for name, value in request.headers.items():
            if not _HEADER_VALUE.fullmatch(value):
                raise InvalidParameterError(f"{name} must be ASCII without line breaks and without spaces around it.")
        arguments: dict[str, Any] = {
            "method": request.method,
            "url": "/api/v1" + request.path,
            "params": request.params,
            "headers": request.headers,
            "content": request.content,
        }
        if request.read_timeout_seconds is not None:
            arguments["timeout"] = httpx2.Timeout(
                self.timeout_seconds, connect=CONNECT_TIMEOUT_SECONDS, read=request.read_timeout_seconds
            )
        return arguments

    def check_encoding(self, response: httpx2.Response) -> None:
        """Raise UnexpectedResponseError for a body compressed several times, which could expand to gigabytes."""
        if "," in response.headers.get("Content-Encoding", ""):
            raise unexpected_response_error(self.server, response.status_code)

    def parse_response(self, request: Request[ResponseT], status: int, body: bytes) -> ResponseT:
        """Parse the JSON object in a response. Raises UnexpectedResponseError if it does not match the request."""
        response = parse_object(body)
        if (
            response is None
            or not response.keys() >= set(request.required_keys)
            or not matches_schema(response, request.response_type)
        ):
            raise unexpected_response_error(self.server, status)
        return cast("ResponseT", response)

    def parse_error(self, response: httpx2.Response, body: bytes) -> ClientError:
        """Convert an error response to an exception. body: the first part of the response body."""
        error = error_from_response(self.server, response.status_code, body, response.headers.get("Retry-After"))
        return refine_not_found(error, self.server, response.url.path)

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Convert httpx2 errors: UnreachableError, or InvalidParameterError if httpx2 cannot send the request."""
        import httpx2

        try:
            with translate_url_errors():
                yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise unreachable_error(self.server, error) from error
        except httpx2.TimeoutException as error:
            message = f"{self.server} did not respond in time. Try again."
            raise UnreachableError(message, may_have_arrived=True) from error
        except httpx2.LocalProtocolError as error:
            raise InvalidParameterError("The request cannot be sent; it is not valid HTTP.") from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            message = f"The connection to {self.server} was lost. Try again."
            raise UnreachableError(message, may_have_arrived=True) from error


def unreachable_error(server: str, error: BaseException) -> UnreachableError:
    """Return the exception for a failure to connect to this server. error: the library's error."""
    if is_loopback_url(server):
        return UnreachableError(f"Cannot reach {server}. Is the server running? Start it with: sandbox serve")
    causes = list(_causes(error))
    reason = ""
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        reason = f": the name {urlsplit(server).hostname} cannot be resolved"
    elif any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        reason = ": the connection was refused"
    return UnreachableError(f"Cannot reach {server}{reason}. Check --server or the context.")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and all errors that caused it."""
    if error is not None:
        yield error
        for each in getattr(error, "exceptions", ()):
            yield from _causes(each)
        yield from _causes(error.__cause__ or error.__context__)


def resolve_connection(server: str | None, token: str | None, timeout_seconds: float) -> ConnectionSettings:
    """Resolve the connection settings. None uses the environment (SANDBOX_SERVER, SANDBOX_TOKEN).

    Raises InvalidParameterError.
    """
    address = server if server is not None else os.environ.get("SANDBOX_SERVER") or DEFAULT_SERVER
    resolved_token = token if token is not None else os.environ.get("SANDBOX_TOKEN")
    authorization_header(resolved_token)
    return ConnectionSettings(validate_base_url(address), resolved_token or None, timeout_seconds)


def authorization_header(token: str | None) -> dict[str, str]:
    """Return the Authorization header; empty if there is no token.

    Raises InvalidParameterError, whose message does not contain the token.
    """
    if not token:
        return {}
    if not _TOKEN_PATTERN.fullmatch(token):
        message = (
            "The token (--token, SANDBOX_TOKEN) must consist of visible ASCII characters, "
            "without spaces or line breaks."
        )
        raise InvalidParameterError(message)
    return {"Authorization": f"Bearer {token}"}


def _ssl_context(server: str) -> Any:
    if server.startswith("http:"):
        return False  # no TLS and no redirects, so no certificates are needed; loading them costs 20 ms
    import ssl

    return ssl.create_default_context()
