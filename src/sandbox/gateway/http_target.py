"""Where a request to a proxy wants to go (RFC 9112 §3.2)."""

import re

import msgspec

_AUTHORITY = re.compile(rb"([A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?")
_ABSOLUTE = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)")


class Authority(msgspec.Struct, frozen=True):
    """A host, as it was written, without brackets, and a port."""

    host: str
    port: int


class AbsoluteTarget(msgspec.Struct, frozen=True):
    """A target with its scheme, and the path and query that are left of it for the host itself."""

    scheme: str
    authority: Authority
    path: bytes


def parse_authority(authority: bytes, default_port: int) -> Authority | None:
    """A host and an optional port; None for everything else, a user's name before it included."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None or (port := int(match[2] or default_port)) > 65535:
        return None
    return Authority(match[1].decode().strip("[]"), port)


def parse_absolute(target: bytes) -> AbsoluteTarget | None:
    """A target in absolute form; None for everything else."""
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        return None
    scheme = match[1].decode().lower()
    authority = parse_authority(match[2], default_port=443 if scheme == "https" else 80)
    path = match[3] if match[3].startswith(b"/") else b"/" + match[3]
    return AbsoluteTarget(scheme, authority, path) if authority is not None else None
