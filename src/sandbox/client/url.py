"""URLs: the server's base URL and the paths of requests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote, urlsplit

from sandbox.client.errors import HostNotFoundError, InvalidParameterError, TaskNotFoundError
from sandbox.model.default_server_address import DEFAULT_SERVER

_LOOPBACK = re.compile(
    r"((?:[a-z0-9-]+\.)*localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?=[:/]|\Z)", re.ASCII | re.IGNORECASE
)


def validate_base_url(address: str) -> str:
    """Return the normalized base URL: ASCII, no trailing slash. Raises InvalidParameterError.

    For an address on this machine, the scheme may be omitted: `localhost:8122`. Any other address needs a scheme, so
    that no token is sent unencrypted by mistake.
    """
    import httpx2

    if "@" in address:  # not included in the message: it may contain a password
        message = "The server's address must not contain credentials or an @."
        raise InvalidParameterError(f"{message} Give a token with --token or SANDBOX_TOKEN.")
    full_address = f"http://{address}" if _LOOPBACK.match(address) else address
    try:
        url = httpx2.URL(full_address)
        is_address = url.scheme in {"http", "https"} and bool(url.host) and urlsplit(full_address).port != 0
        # Convert the host name as a connection would: the conversion raises an error if a label is invalid.
        url.raw_host.decode().encode("idna")
        url.raw_host.decode("idna")
    except (httpx2.InvalidURL, ValueError):
        is_address = False
    if not is_address or "?" in address or "#" in address:
        message = f"The server's address must look like {DEFAULT_SERVER}, not {address!r}."
        advice = "" if "://" in full_address else " Only localhost needs no https:// or http://."
        raise InvalidParameterError(message + advice)
    return str(url).rstrip("/")


def is_loopback_url(url: str) -> bool:
    """Return whether a base URL points to this machine."""
    return _LOOPBACK.match(url.partition("://")[2]) is not None


def task_page_url(server: str, task_id: str) -> str:
    """Return the address of a task's page in the dashboard. Raises InvalidParameterError or TaskNotFoundError."""
    return validate_base_url(server) + task_path(task_id)


def task_path(task_id: str, *rest: str) -> str:
    """Return the path of a task or of one of its resources. Raises InvalidParameterError or TaskNotFoundError."""
    if not task_id:
        raise InvalidParameterError("The id of a task must not be empty.")
    if "/" in task_id:  # a proxy may decode an encoded slash, and `a/vm` is a different path than `a`
        raise TaskNotFoundError(f"There is no task {task_id!r}; ids contain no slashes.")
    with translate_url_errors():
        return "/".join(["/tasks", *map(_quote_segment, (task_id, *rest))])


def host_path(host: str, *rest: str) -> str:
    """Return the path of a host or of one of its resources. Raises InvalidParameterError or HostNotFoundError."""
    if not host:
        raise InvalidParameterError("The name of a host must not be empty.")
    if "/" in host:
        raise HostNotFoundError(f"There is no host {host!r}; names contain no slashes.")
    with translate_url_errors():
        return "/".join(["/hosts", *map(_quote_segment, (host, *rest))])


def _quote_segment(part: str) -> str:
    """Quote a path segment, including `.` and `..`, which URL normalization would remove with the preceding segment."""
    return part.replace(".", "%2E") if part in {".", ".."} else quote(part, safe="")


@contextmanager
def translate_url_errors() -> Iterator[None]:
    """Raise InvalidParameterError for a URL that is too long or cannot be encoded."""
    import httpx2

    try:
        yield
    except httpx2.InvalidURL as error:
        raise InvalidParameterError("The request cannot be sent; it is too long.") from error
    except UnicodeEncodeError as error:
        raise InvalidParameterError("The request cannot be sent; it is not UTF-8.") from error
