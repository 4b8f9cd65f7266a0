"""URLs of repositories: locations and names, and the parts that may be shown."""

from __future__ import annotations

import re

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
