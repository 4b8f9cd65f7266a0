"""Which hosts repositories may be cloned from, where the server names them."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

CLONE_HOST_PATTERN = r"((\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?"
"""How an allowed host is written: a name, an address, or `*.` and a domain (its subdomains), with an optional port."""

_PORTS = {"https": 443, "http": 80, "ssh": 22}
_URL = re.compile(r"(?P<scheme>[a-z]+)://(?:[^/@]*@)?(?P<host>\[[^\]/]*\]|[^/:]+)(?::(?P<port>[0-9]+))?/.*", re.DOTALL)
_SCP_URL = re.compile(r"[^/@:]+@(?P<host>[^/:]+):.*", re.DOTALL)


class ClonePlace(NamedTuple):
    """Where git would connect to. is_default_port: the port is the scheme's own."""

    host: str
    port: int
    is_default_port: bool


def clone_place(url: str) -> ClonePlace | None:
    """The place that a repository's URL names; None for what is no such URL."""
    if (match := _URL.fullmatch(url)) and match["scheme"] in _PORTS:
        default = _PORTS[match["scheme"]]
        port = int(match["port"] or default)
        return ClonePlace(_plain(match["host"]), port, port == default)
    if match := _SCP_URL.fullmatch(url):
        return ClonePlace(_plain(match["host"]), _PORTS["ssh"], is_default_port=True)
    return None


def may_clone(url: str, allowed: Collection[str]) -> bool:
    """Whether an entry allows the place. An entry without a port stands for the scheme's own port only."""
    place = clone_place(url)
    return place is not None and any(_allows(entry, place) for entry in allowed)


def _allows(entry: str, place: ClonePlace) -> bool:
    match = re.fullmatch(r"(?P<host>.*?)(?::(?P<port>[0-9]+))?", entry) if not entry.endswith("]") else None
    host, port = (match["host"], match["port"]) if match else (entry, None)
    if not (place.is_default_port if port is None else int(port) == place.port):
        return False
    host = _plain(host)
    if host.startswith("*."):
        return place.host.endswith(host[1:]) and len(place.host) >= len(host)
    return place.host == host


def _plain(host: str) -> str:
    return host.lower().rstrip(".")
