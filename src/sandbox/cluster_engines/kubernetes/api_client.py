"""Sends requests to the API server of Kubernetes. Responses are limited in size, and are untrusted until parsed."""

import asyncio
import errno
import os
import re
import ssl
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from sandbox.cluster_engines.kubernetes.api_objects import ObjectList, Status
from sandbox.interfaces.cluster_engine import EngineUnavailableError
from sandbox.model.errors import DECODE_ERRORS, error_reason
from sandbox.model.printable import replace_unprintable, replacement_character

Response = TypeVar("Response")
Item = TypeVar("Item")

REQUEST_TIMEOUT_SECONDS = 15.0
"""Time limit for one request."""

RESPONSE_BYTES_MAX = 32 * 1024 * 1024
"""Maximum size of a response."""

ITEMS_PER_PAGE = 250
ITEMS_MAX = 25_000
PAGES_MAX = 2 * ITEMS_MAX // ITEMS_PER_PAGE
"""Bounds of a list. The API server may return pages that are smaller than requested."""

CREDENTIALS_RELOAD_SECONDS = 60.0
"""Interval at which the files with the token and the certificates are read again: Kubernetes replaces them."""

RETRY_SECONDS, RETRY_SECONDS_MAX = 1.0, 30.0
"""How long no request is sent after the API server asked for a pause: the default, and the maximum."""

MESSAGE_CHARACTERS_MAX = 300
MERGE_PATCH = "application/merge-patch+json"
_FILE_BYTES_MAX = 1024 * 1024
_CONNECT_SECONDS = 5.0
_TOKEN = re.compile(rb"[!-~]{1,65536}")
_ADVICE = "check cluster.kubernetes, and the API server with 'kubectl cluster-info'"


class ApiAddress(NamedTuple):
    """Where to reach the API server. server: its URL. token_file: the token to send. ca_file: the CA certificates."""

    server: str
    token_file: Path
    ca_file: Path


class ApiError(Exception):
    """The API server refuses a request. status: the HTTP status. reason: Kubernetes' name for the error."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class _Credentials(NamedTuple):
    token: str
    certificates: bytes
    tls: ssl.SSLContext


class ApiClient:
    """Sends requests with the server's token.

    Every method raises EngineUnavailableError if the API server is not responding or its response is invalid, and
    ApiError if it refuses the request.
    """

    def __init__(self, address: ApiAddress) -> None:
        self._address = address
        self._credentials: _Credentials | None = None
        self._read_at = 0.0
        self._is_expired = False
        self._paused_until = 0.0

    async def send(
        self,
        method: str,
        path: str,
        response_type: type[Response],
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Response:
        """Send a request, and parse the response. body: encoded as JSON; None for no body."""
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"Content-Type": content_type}
        try:
            try:
                data = await self._send(method, path, query or {}, headers, content)
            except ApiError as error:
                if error.status != 401:
                    raise
                self._is_expired = True  # the token may have been replaced
                data = await self._send(method, path, query or {}, headers, content)
        except ApiError as error:
            if error.status == 401:
                raise unavailable(f"it rejects the token in {self._address.token_file}") from error
            raise
        try:
            return msgspec.json.decode(data, type=response_type)
        except DECODE_ERRORS as error:
            message = f"The API server answers {method} {path} in an unknown format: {one_line(str(error))}."
            raise EngineUnavailableError(f"{message} Check cluster.kubernetes.server.") from error

    async def list_all(self, path: str, page_type: type[ObjectList[Item]], selector: str) -> Sequence[Item]:
        """Return all objects that a label selector selects. page_type: the type of a page of the list."""
        try:
            return await self._list_pages(path, page_type, selector)
        except ApiError as error:
            if error.status != 410:
                raise
            return await self._list_pages(path, page_type, selector)  # the list changed too much between two pages

    async def _list_pages(self, path: str, page_type: type[ObjectList[Item]], selector: str) -> Sequence[Item]:
        query = {"limit": str(ITEMS_PER_PAGE)} | ({"labelSelector": selector} if selector else {})
        items: list[Item] = []
        for _ in range(PAGES_MAX):
            page = await self.send("GET", path, page_type, query=query)
            items += page.items or ()
            if len(items) > ITEMS_MAX:
                break
            if not page.metadata.continue_token:
                return items
            query["continue"] = page.metadata.continue_token
        raise unavailable(f"{path} has more than {ITEMS_MAX} objects")

    async def _send(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], content: bytes | None
    ) -> bytes:
        """Return the body of a successful response."""
        import httpx2  # slow to import, and only needed with this engine

        if (pause := self._paused_until - time.monotonic()) > 0:
            raise unavailable(f"it asked for a pause of {pause:.0f} s")
        credentials = self._read_credentials()
        headers = {
            **headers,
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # a small compressed response could expand to gigabytes
            "Authorization": f"Bearer {credentials.token}",
        }
        timeout = httpx2.Timeout(REQUEST_TIMEOUT_SECONDS, connect=_CONNECT_SECONDS)
        try:
            async with (
                asyncio.timeout(REQUEST_TIMEOUT_SECONDS),
                httpx2.AsyncClient(verify=credentials.tls, trust_env=False, timeout=timeout) as client,
                client.stream(
                    method, self._address.server.rstrip("/") + path, params=query, headers=headers, content=content
                ) as response,
            ):
                body = bytearray()
                async for part in response.aiter_raw():
                    body += part
                    if len(body) > RESPONSE_BYTES_MAX:
                        raise unavailable(f"a response has more than {RESPONSE_BYTES_MAX} bytes")
        except (httpx2.TimeoutException, TimeoutError) as error:
            raise unavailable(f"no response within {REQUEST_TIMEOUT_SECONDS:g} s") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise unavailable(one_line(error_reason(error))) from error
        if not response.is_success:
            self._raise_error(response.status_code, response.headers.get("Retry-After"), bytes(body))
        return bytes(body)

    def _raise_error(self, code: int, retry_after: str | None, body: bytes) -> None:
        """Raise the exception for a failed request, and start a pause if the API server asks for one."""
        try:
            status = msgspec.json.decode(body, type=Status)
        except DECODE_ERRORS:
            status = Status()
        message = one_line(status.message) or f"HTTP status {code}"
        if code == 429 or code >= 500:
            if code == 429 or retry_after is not None:
                is_number = retry_after is not None and re.fullmatch(r"\d{1,6}", retry_after, re.ASCII)
                seconds = float(retry_after or 0) if is_number else RETRY_SECONDS
                self._paused_until = time.monotonic() + min(max(seconds, RETRY_SECONDS), RETRY_SECONDS_MAX)
            raise unavailable(message)
        raise ApiError(code, one_line(status.reason), message)

    def _read_credentials(self) -> _Credentials:
        """Return the token and the TLS settings, which were read at most CREDENTIALS_RELOAD_SECONDS ago."""
        known = self._credentials
        is_fresh = time.monotonic() - self._read_at < CREDENTIALS_RELOAD_SECONDS and not self._is_expired
        if known is not None and is_fresh:
            return known
        token = _read_file(self._address.token_file, "token").strip()
        certificates = _read_file(self._address.ca_file, "certificates")
        if not _TOKEN.fullmatch(token):
            raise EngineUnavailableError(f"{self._address.token_file} contains no token; check cluster.kubernetes.")
        if known is not None and known.certificates == certificates:
            tls = known.tls
        else:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            tls.minimum_version = ssl.TLSVersion.TLSv1_2
            try:
                tls.load_verify_locations(cadata=certificates.decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                message = f"{self._address.ca_file} contains no certificates in PEM format; check cluster.kubernetes."
                raise EngineUnavailableError(message) from error
        self._credentials, self._read_at = _Credentials(token.decode(), certificates, tls), time.monotonic()
        self._is_expired = False
        return self._credentials


def unavailable(reason: str) -> EngineUnavailableError:
    """Return the error for an API server that does not respond as it should."""
    return EngineUnavailableError(f"Kubernetes is not responding ({reason.removesuffix('.')}); {_ADVICE}.")


def one_line(text: str) -> str:
    """Return text from the API server as one printable line of bounded length, without a period at the end."""
    words = " ".join(text[: 4 * MESSAGE_CHARACTERS_MAX].split())
    return replace_unprintable(words, replacement_character)[:MESSAGE_CHARACTERS_MAX].removesuffix(".")


def _read_file(path: Path, content: str) -> bytes:
    """Return the content of a file. Raises EngineUnavailableError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            return os.read(descriptor, _FILE_BYTES_MAX)
        finally:
            os.close(descriptor)
    except OSError as error:
        message = f"The file with the {content} for Kubernetes, {path}, cannot be read: {error.strerror}"
        raise EngineUnavailableError(f"{message}; check cluster.kubernetes.") from error
