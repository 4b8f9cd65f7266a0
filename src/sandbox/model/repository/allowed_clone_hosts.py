"""Checks whether the server may clone from the host of a repository URL."""

import re
from collections.abc import Collection
from typing import NamedTuple

from sandbox.model.repository.url import DEFAULT_PORTS

CLONE_HOST_PATTERN = r"((\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?"
"""An allowed clone host: a name, an address, or `*.` and a domain (its subdomains), with an optional port."""

_URL = re.compile(r"(?P<scheme>[a-z]+)://(?:[^/@]*@)?(?P<host>\[[^\]/]*\]|[^/:]+)(?::(?P<port>[0-9]+))?/.*", re.DOTALL)
_SCP_URL = re.compile(r"[^/@:]+@(?P<host>[^/:]+):.*", re.DOTALL)


class CloneEndpoint(NamedTuple):
    """The host and port that git connects to. is_default_port: the port is the default of the URL's scheme."""

    host: str
    port: int
    is_default_port: bool


def clone_endpoint(url: str) -> CloneEndpoint | None:
    """Return the endpoint of a repository URL, or None if the text is not a supported URL."""
    if (match := _URL.fullmatch(url)) and match["scheme"] in DEFAULT_PORTS:
        default = DEFAULT_PORTS[match["scheme"]]
        port = int(match["port"] or default)
        return CloneEndpoint(_normalize_host(match["host"]), port, port == default)
    if match := _SCP_URL.fullmatch(url):
        return CloneEndpoint(_normalize_host(match["host"]), DEFAULT_PORTS["ssh"], is_default_port=True)
    return None


def is_clone_allowed(url: str, allowed: Collection[str]) -> bool:
    """Return whether an entry of `allowed` matches the URL's endpoint.

    An entry without a port allows only the default port of the URL's scheme.
    """
    endpoint = clone_endpoint(url)
    return endpoint is not None and any(_entry_allows(entry, endpoint) for entry in allowed)


def _entry_allows(entry: str, endpoint: CloneEndpoint) -> bool:
    match = re.fullmatch(r"(?P<host>.*?)(?::(?P<port>[0-9]+))?", entry) if not entry.endswith("]") else None
    host, port = (match["host"], match["port"]) if match else (entry, None)
    if not (endpoint.is_default_port if port is None else int(port) == endpoint.port):
        return False
    host = _normalize_host(host)
    if host.startswith("*."):
        return endpoint.host.endswith(host[1:]) and len(endpoint.host) >= len(host)
    return endpoint.host == host


def _normalize_host(host: str) -> str:
    return host.lower().rstrip(".")
