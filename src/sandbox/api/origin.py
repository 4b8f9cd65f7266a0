"""Who may speak to a server that takes whoever reaches its port for the operator.

A browser reaches loopback too: a page of any site can send requests there, and a name that its owner points at
127.0.0.1 makes them look harmless. `Host` and `Origin` tell such pages from the server's own and from programs, and
`Sec-Fetch-Site` those that embed what the server answers, which send no `Origin`.
"""

import re
from collections.abc import Collection, Mapping

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?")
_SCHEME_PORTS = {"http": 80, "https": 443}
_FETCHED = frozenset({"document", "empty"})
"""A navigation, which downloads what is no page, and what a script asks for: `fetch`, `EventSource`."""
_LOADED = _FETCHED | {"script", "style", "image"}


def refusal(host: str | None, origin: str | None, *, names: Collection[str], ports: Collection[int]) -> str | None:
    """Why a request with these headers is refused, None when it is not.

    names: the host names that are this server's; ports: the ports that it listens on.
    """
    if host is None or _name_and_port(f"http://{host}", names) is None:
        return "The Host header names another server; use the address that this one listens on, or a configured name."
    return origin_refusal(host, origin, names=names, ports=ports)


def origin_refusal(
    host: str | None, origin: str | None, *, names: Collection[str], ports: Collection[int]
) -> str | None:
    """Why a request from this page is refused, None when it is not; programs send no `Origin`."""
    if origin is None or origin.lower() in {f"http://{host}".lower(), f"https://{host}".lower()}:
        return None
    place = _name_and_port(origin, names)
    if place is None or place[1] not in ports:
        return "The Origin header names a page that is not of this server."
    return None


def embedding_refusal(method: str | None, headers: Mapping[str, str]) -> str | None:
    """Why a request without `Origin` for a page of another site is refused, None when it is not; links are followed."""
    if "origin" in headers or headers.get("sec-fetch-site") not in {"cross-site", "same-site"}:
        return None
    is_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest", "document") == "document"
    if method == "GET" and is_link:
        return None
    return "The Sec-Fetch-Site header names a page that is not of this server."


def destination_refusal(destination: str | None, *, is_part_of_page: bool) -> str | None:
    """Why a browser may not have this for its `Sec-Fetch-Dest`, None when it may; programs send none.

    Only the files of the server's own pages may run or style anything. Other answers may have text of an agent in them.
    """
    if destination is None or destination in (_LOADED if is_part_of_page else _FETCHED):
        return None
    return "The Sec-Fetch-Dest header says that a page would run, show or embed this; it can be fetched or downloaded."


def _name_and_port(origin: str, names: Collection[str]) -> tuple[str, int] | None:
    """The host and port of an origin, None when it is malformed or not among `names`."""
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None:
        return None
    name = match["name"].strip("[]")
    return (name, int(match["port"] or _SCHEME_PORTS[match["scheme"]])) if name in names else None
