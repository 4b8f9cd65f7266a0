"""Where model requests go: the operator's base URL taken apart, and the header that carries the server's key."""

import re
from urllib.parse import urlsplit

import msgspec

from sandbox.contracts.gateway import ModelUpstream


class Upstream(msgspec.Struct, frozen=True):
    """`prefix` is the path of the base URL without its last slash; `credential` a header's name and value."""

    host: str
    port: int
    is_tls: bool
    prefix: bytes
    authority: bytes
    credential: tuple[bytes, bytes]

    def __repr__(self) -> str:
        """Without the credential."""
        return f"{type(self).__name__}({self.address!r})"

    @property
    def key(self) -> bytes:
        """The server's key itself."""
        return self.credential[1].removeprefix(b"Bearer ")

    @property
    def address(self) -> str:
        """For people."""
        return self.authority.decode()


def parse_upstream(upstream: ModelUpstream) -> Upstream:
    """Raises ValueError with a sentence (without the credential) for what is no usable upstream."""
    try:
        parts = urlsplit(upstream.base_url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("ANTHROPIC_BASE_URL has a host or a port that cannot be.") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("ANTHROPIC_BASE_URL must be an http:// or https:// address with a host.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError("ANTHROPIC_BASE_URL must have no user, password, query or fragment.")
    if port == 0:
        raise ValueError("ANTHROPIC_BASE_URL has port 0, at which nothing is reached.")
    is_tls = parts.scheme == "https"
    host, port = _host(host), port or (443 if is_tls else 80)
    prefix = parts.path.rstrip("/")
    if not re.fullmatch(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*", prefix):
        raise ValueError("ANTHROPIC_BASE_URL has a path with characters that a path cannot have.")
    shown = f"[{host}]" if ":" in host else host
    authority = shown if port == (443 if is_tls else 80) else f"{shown}:{port}"
    return Upstream(host, port, is_tls, prefix.encode(), authority.encode(), _credential(upstream))


def _host(host: str) -> str:
    try:
        return host if ":" in host else host.encode("idna").decode()
    except UnicodeError:
        raise ValueError("ANTHROPIC_BASE_URL has a host that is no host name.") from None


def _credential(upstream: ModelUpstream) -> tuple[bytes, bytes]:
    key = upstream.api_key or upstream.auth_token
    if bool(upstream.api_key) == bool(upstream.auth_token):
        raise ValueError("Set exactly one of ANTHROPIC_API_KEY and ANTHROPIC_AUTH_TOKEN.")
    if not re.fullmatch(r"[!-~]+", key):
        name = "ANTHROPIC_API_KEY" if upstream.api_key else "ANTHROPIC_AUTH_TOKEN"
        raise ValueError(f"{name} has characters that a header cannot have.")
    if upstream.api_key:
        return b"x-api-key", key.encode()
    return b"authorization", b"Bearer " + key.encode()
