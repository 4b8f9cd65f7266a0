"""URLs of repositories: locations, names, the parts that may be shown, and the hosts from which the server clones."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

_SCHEME_AND_USER = re.compile(r"(?P<scheme>https?|ssh)://(?:[^/@]*@)?", re.IGNORECASE)
_OPTIONAL_SCHEME_AND_USER = re.compile("^([a-z]+://)?([^/@]*@)?", re.IGNORECASE)
_SCP_USER_AND_HOST = re.compile(r"^[^/@:]+@([^/:]+):/*")
DEFAULT_PORTS = {"http": 80, "https": 443, "ssh": 22}


def repository_location(url: str) -> str:
    """Return the location of a repository, in lower case and without `.git`: `github.com/org/repo`.

    All URLs of a repository have the same location, regardless of the protocol and the user. A part of a URL is
    converted in the same way: `Org/repo.git` becomes `org/repo`.
    """
    if match := _SCHEME_AND_USER.match(url):
        host, slash, path = url[match.end() :].partition("/")
        location = host.removesuffix(f":{DEFAULT_PORTS[match['scheme'].lower()]}") + slash + path.lstrip("/")
    else:
        location = _SCP_USER_AND_HOST.sub(r"\1/", url)
    return location.lower().rstrip("/").removesuffix(".git").rstrip("/")


def repository_names(url: str) -> frozenset[str]:
    """Return the names of a repository: its location, the path in it, the path's last part, and its last two parts."""
    location = repository_location(url)
    path = location.partition("/")[2]
    ends = ("/".join(path.rsplit("/", count)[-count:]) for count in (1, 2))
    return frozenset((location, path, *ends)) - {""}


def public_repository_url(url: str) -> str:
    """Return the URL without a password, and for HTTP without a user, which may be a token.

    A manifest with credentials in its URL is rejected, but journals of other versions are not trusted.
    """
    match = re.match(r"(?P<scheme>https?|ssh)://(?P<user>[^/@]*)@", url, re.IGNORECASE)
    if match is None:
        return url
    user = match["user"].partition(":")[0] if match["scheme"].lower() == "ssh" else ""
    return f"{match['scheme']}://{user and f'{user}@'}{url[match.end() :]}"


def short_repository(url: str) -> str:
    """Return the last two parts of the path, or the host and the path if the path is shorter.

    The repository filter of task lists accepts these names.
    """
    location = _OPTIONAL_SCHEME_AND_USER.sub("", url).rstrip("/").removesuffix(".git")
    host, _, path = location.partition("/" if "://" in url else ":")
    parts = [part for part in path.split("/") if part]
    return "/".join(parts[-2:] if len(parts) > 1 else [host, *parts])


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
