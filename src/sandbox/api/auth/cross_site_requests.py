"""Detects requests that pages of other sites have sent, by the headers `Host`, `Origin` and `Sec-Fetch-*`."""

import re
from collections.abc import Collection, Mapping

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_ORIGIN_PATTERN = re.compile(r"(?P<scheme>https?)://(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?")
_SCHEME_PORTS = {"http": 80, "https": 443}
_DATA_DESTINATIONS = frozenset({"document", "empty"})
"""Fetch destinations for which all responses are allowed: `document` (navigation) and `empty` (fetch, EventSource)."""
_ASSET_DESTINATIONS = _DATA_DESTINATIONS | {"script", "style", "image", "worker"}


def check_host_and_origin(
    host: str | None, origin: str | None, *, names: Collection[str], ports: Collection[int]
) -> str | None:
    """Return why a request with these headers is denied, or None if it is allowed.

    names: this server's host names.
    ports: the ports on which this server listens.
    """
    if host is None or _parse_origin(f"http://{host}", names) is None:
        return "The Host header names a different server; use this server's address or a name from server.host_names."
    return check_origin(host, origin, names=names, ports=ports)


def check_origin(host: str | None, origin: str | None, *, names: Collection[str], ports: Collection[int]) -> str | None:
    """Return why a request from this origin is denied, or None if it is allowed.

    Non-browser clients send no `Origin`.
    """
    if origin is None or origin.lower() in {f"http://{host}".lower(), f"https://{host}".lower()}:
        return None
    parsed = _parse_origin(origin, names)
    if parsed is None or parsed[1] not in ports:
        return "The Origin header names a different site; send the request from this server's pages."
    return None


def check_fetch_site(method: str | None, headers: Mapping[str, str]) -> str | None:
    """Return why a request without `Origin` is denied, or None.

    Denies requests from pages of other sites, except when the user follows a link.
    """
    if "origin" in headers or headers.get("sec-fetch-site") not in {"cross-site", "same-site"}:
        return None
    is_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest", "document") == "document"
    if method == "GET" and is_link:
        return None
    return "The Sec-Fetch-Site header names a different site; send the request from this server's pages."


def check_fetch_destination(destination: str | None, *, is_page_asset: bool) -> str | None:
    """Return why a browser must not load a resource for this `Sec-Fetch-Dest`, or None.

    Only the assets of the server's own pages may be executed, in a page or a worker, or used as style sheets. Other
    responses may contain text written by an agent. Non-browser clients do not send this header.
    """
    if destination is None or destination in (_ASSET_DESTINATIONS if is_page_asset else _DATA_DESTINATIONS):
        return None
    return "The Sec-Fetch-Dest header is for a script, style, frame or image; fetch or download this resource instead."


def _parse_origin(origin: str, names: Collection[str]) -> tuple[str, int] | None:
    """Return the host and port of an origin, or None if it is malformed or its host is not in `names`."""
    match = _ORIGIN_PATTERN.fullmatch(origin.lower())
    if match is None:
        return None
    name = match["name"].strip("[]")
    return (name, int(match["port"] or _SCHEME_PORTS[match["scheme"]])) if name in names else None
