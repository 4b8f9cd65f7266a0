"""Parses the targets of proxy requests."""

import re

import msgspec

_AUTHORITY = re.compile(rb"([A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?")
_ABSOLUTE = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)")


class HostPort(msgspec.Struct, frozen=True):
    """A host (in its original spelling, without brackets) and a port."""

    host: str
    port: int


class AbsoluteTarget(msgspec.Struct, frozen=True):
    """An absolute-form target: scheme, authority, and the path and query to send to the host."""

    scheme: str
    authority: HostPort
    path: bytes


def parse_authority(authority: bytes, default_port: int) -> HostPort | None:
    """Parse a host and an optional port; return None for anything else, including an authority with user info."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None or (port := int(match[2] or default_port)) > 65535:
        return None
    return HostPort(match[1].decode().strip("[]"), port)


def parse_absolute_form(target: bytes) -> AbsoluteTarget | None:
    """Parse a target in absolute form; return None for anything else."""
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        return None
    scheme = match[1].decode().lower()
    authority = parse_authority(match[2], default_port=443 if scheme == "https" else 80)
    path = match[3] if match[3].startswith(b"/") else b"/" + match[3]
    return AbsoluteTarget(scheme, authority, path) if authority is not None else None
