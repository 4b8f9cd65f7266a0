"""What both clients share of HTTP: a server's address, the settings, and errors in the client's own words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sandbox.client.errors import (
    ClientError,
    InvalidParameterError,
    UnreachableError,
    checked_against,
    error_of,
    unexpected_answer,
)
from sandbox.client.requests import Call
from sandbox.client.response_dict import fits, read_object
from sandbox.client.url import addressing, checked_address
from sandbox.model.limits import DEFAULT_SERVER

CONNECT_SECONDS = 5.0
ERROR_BYTES_MAX = 1024 * 1024
TIMEOUT_SECONDS = 30.0

_TOKEN = re.compile("[!-~]+")
_HEADER_VALUE = re.compile("[!-~]([ -~]*[!-~])?")

if TYPE_CHECKING:
    import httpx

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True)
class Connection:
    """One server's address and token. timeout_seconds: for each answer, and for each read of a stream."""

    server: str
    token: str | None
    timeout_seconds: float

    def settings(self) -> dict[str, Any]:
        """The arguments of an httpx client."""
        import httpx

        return {
            "base_url": self.server,
            "headers": authorization(self.token),
            "timeout": httpx.Timeout(self.timeout_seconds, connect=CONNECT_SECONDS),
            "trust_env": False,  # a proxy variable must not catch a server on this machine
            "verify": _certificates(self.server),
        }

    def request(self, call: Call[Any]) -> dict[str, Any]:
        """The arguments of httpx for one call. Raises InvalidParameterError for a header that cannot be sent."""
        import httpx

        for name, value in call.headers.items():
            if not _HEADER_VALUE.fullmatch(value):
                raise InvalidParameterError(f"{name} must be ASCII without line ends and without spaces around it.")
        arguments: dict[str, Any] = {
            "method": call.method,
            "url": "/api/v1" + call.path,
            "params": call.params,
            "headers": call.headers,
            "content": call.content,
        }
        if call.read_seconds is not None:
            arguments["timeout"] = httpx.Timeout(self.timeout_seconds, connect=CONNECT_SECONDS, read=call.read_seconds)
        return arguments

    def answer(self, call: Call[AnswerT], status: int, body: bytes) -> AnswerT:
        """The JSON object of an answer. Raises UnexpectedAnswerError for what is no answer to this call."""
        told = read_object(body)
        if told is None or not told.keys() >= set(call.keys) or not fits(told, call.answers):
            raise unexpected_answer(self.server, status)
        return cast("AnswerT", told)

    def refusal(self, response: httpx.Response, body: bytes) -> ClientError:
        """The error that an answer stands for; `body`: its beginning."""
        error = error_of(self.server, response.status_code, body, response.headers.get("Retry-After"))
        return checked_against(error, self.server, response.url.path)

    @contextmanager
    def translating(self) -> Iterator[None]:
        """What httpx raises inside comes out as UnreachableError; as InvalidParameterError what it will not send."""
        import httpx

        try:
            with addressing():
                yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            message = f"Cannot reach {self.server}. Is the server running? Start it with: sandbox serve"
            raise UnreachableError(message) from error
        except httpx.TimeoutException as error:
            message = f"{self.server} did not answer in time. Try again."
            raise UnreachableError(message, may_have_arrived=True) from error
        except httpx.LocalProtocolError as error:
            raise InvalidParameterError("The request cannot be sent; what is asked for is no proper HTTP.") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            message = f"The connection to {self.server} broke. Try again."
            raise UnreachableError(message, may_have_arrived=True) from error


def connection_to(server: str | None, token: str | None, timeout_seconds: float) -> Connection:
    """None: what the environment says, SANDBOX_SERVER and SANDBOX_TOKEN. Raises InvalidParameterError."""
    address = server if server is not None else os.environ.get("SANDBOX_SERVER") or DEFAULT_SERVER
    shown = token if token is not None else os.environ.get("SANDBOX_TOKEN")
    authorization(shown)
    return Connection(checked_address(address), shown or None, timeout_seconds)


def authorization(token: str | None) -> dict[str, str]:
    """The header that shows a token, none without one. Raises InvalidParameterError, which does not tell the token."""
    if not token:
        return {}
    if not _TOKEN.fullmatch(token):
        message = "The token (--token, SANDBOX_TOKEN) must be visible ASCII without spaces and line ends."
        raise InvalidParameterError(message)
    return {"Authorization": f"Bearer {token}"}


def _certificates(server: str) -> Any:
    if server.startswith("http:"):
        return False  # nothing is encrypted and no redirect is followed; reading the certificates would cost 20 ms
    import ssl

    return ssl.create_default_context()
