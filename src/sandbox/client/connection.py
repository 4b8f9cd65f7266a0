"""HTTP to one server: requests that answer with JSON, streams, and errors in the client's own words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sandbox.client.errors import InvalidRequestError, UnreachableError, error_of, unexpected_answer

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 5.0
ERROR_BYTES_MAX = 1024 * 1024


class Connection:
    """One server's address, token and connection pool. Raises InvalidRequestError for an address that is none."""

    def __init__(self, base_url: str, token: str | None, timeout_seconds: float) -> None:
        import httpx

        self.server = _checked(base_url)
        self._timeout = httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS)
        self._http = httpx.Client(
            base_url=self.server,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=self._timeout,
            trust_env=False,  # a proxy variable must not catch a server on this machine
            verify=_certificates(self.server),
        )

    def close(self) -> None:
        """Give the sockets back."""
        self._http.close()

    def json(self, method: str, path: str, *, read_seconds: float | None = None, **request: Any) -> Any:
        """The JSON object that the server answers with.

        read_seconds: how long the answer may take where that is known to be long.
        Raises ClientError (its families) for every other answer, UnreachableError for none.
        """
        with self.stream(method, path, read_seconds=read_seconds, **request) as response:
            body = response.read()
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise unexpected_answer(self.server, response.status_code)
        return answer

    @contextmanager
    def stream(
        self, method: str, path: str, *, read_seconds: float | None = None, **request: Any
    ) -> Iterator[httpx.Response]:
        """A successful answer whose body is read by the caller. Raises as `json` does, also while it is being read."""
        import httpx

        if read_seconds is not None:
            request["timeout"] = httpx.Timeout(self._timeout.read, connect=CONNECT_SECONDS, read=read_seconds)
        try:
            with self._http.stream(method, "/api/v1" + path, **request) as response:
                if not response.is_success:
                    raise error_of(self.server, response.status_code, _beginning(response))
                yield response
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            message = f"Cannot reach {self.server}. Is the server running? Start it with: sandbox serve"
            raise UnreachableError(message) from error
        except httpx.TimeoutException as error:
            raise UnreachableError(
                f"{self.server} did not answer in time. Try again.", may_have_arrived=True
            ) from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            message = f"The connection to {self.server} broke. Try again."
            raise UnreachableError(message, may_have_arrived=True) from error


def _beginning(response: httpx.Response) -> bytes:
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > ERROR_BYTES_MAX:
            break
    return bytes(body)


def _checked(base_url: str) -> str:
    try:
        parts = urlsplit(base_url)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        message = f"The server's address must look like http://localhost:8122, not {base_url!r}."
        raise InvalidRequestError(message, code="invalid_parameter")
    return base_url.rstrip("/")


def _certificates(server: str) -> Any:
    if server.startswith("http:"):
        return False  # nothing is encrypted and no redirect is followed; reading the certificates would cost 20 ms
    import ssl

    return ssl.create_default_context()
