"""Direct connections to the model, through the system's resolver. Ignores HTTPS_PROXY and follows no redirects."""

import asyncio
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from sandbox.gateway import limits
from sandbox.gateway.communication_lease import LEASE_EXPIRED_MESSAGE
from sandbox.gateway.model_api.key_redactor import KeyRedactor
from sandbox.gateway.transport import (
    Address,
    ConnectionRateLimiter,
    FullSizeBufferLimit,
    OutboundConnections,
    Stream,
)
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.model_dialect import ModelDialect

if TYPE_CHECKING:
    from ssl import SSLContext


_READ_AHEAD_BYTES = 64 * 1024


class Upstream(msgspec.Struct, frozen=True):
    """A parsed upstream URL and credential.

    path_prefix: the path of the base URL without trailing slashes.
    credential: the name and value of the header.
    key_redactor: replaces the server's key, without the authentication scheme of the header.
    base_url_setting: the name of the setting that contains the address, for messages.
    """

    host: str
    port: int
    is_tls: bool
    path_prefix: bytes
    authority: bytes
    credential: tuple[bytes, bytes]
    key_redactor: KeyRedactor
    base_url_setting: str

    def __repr__(self) -> str:
        """Omit the credential."""
        return f"{type(self).__name__}({self.address!r})"

    @property
    def address(self) -> str:
        """The host, with the port unless it is the default, for messages."""
        return self.authority.decode()


def parse_upstream(upstream: ModelUpstream, dialect: ModelDialect) -> Upstream:
    """Parse and validate the upstream. Raises ValueError, with a message that never contains the credential."""
    setting = dialect.base_url_setting
    try:
        parts = urlsplit(upstream.base_url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"{setting} has an invalid host or port.") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"{setting} must be an http:// or https:// address with a host.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(f"{setting} must have no user, password, query or fragment.")
    if port == 0:
        raise ValueError(f"{setting} has port 0, which is invalid.")
    is_tls = parts.scheme == "https"
    host, port = _normalize_host(host, setting), port or (443 if is_tls else 80)
    prefix = parts.path.rstrip("/")
    if not re.fullmatch(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*", prefix):
        raise ValueError(f"{setting} has invalid characters in its path.")
    display_host = f"[{host}]" if ":" in host else host
    authority = display_host if port == (443 if is_tls else 80) else f"{display_host}:{port}"
    credential = dialect.credential(upstream)  # raises ValueError for an invalid key
    key_redactor = KeyRedactor(dialect.presented_key(*credential))
    return Upstream(host, port, is_tls, prefix.encode(), authority.encode(), credential, key_redactor, setting)


def _normalize_host(host: str, setting: str) -> str:
    try:
        return host if ":" in host else host.encode("idna").decode()
    except UnicodeError:
        raise ValueError(f"{setting} has an invalid host name.") from None


class UpstreamUnreachableError(Exception):
    """The upstream could not be dialed. `status` is the HTTP status for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class UpstreamDialer:
    """Opens connections to the upstream and records the upstream's addresses."""

    def __init__(self, upstream: Upstream, connections: OutboundConnections) -> None:
        self.upstream = upstream
        self._connections = connections
        self.addresses: set[Address] = set()
        self._ssl_context: SSLContext | None = None
        self._full_buffer_connections = FullSizeBufferLimit()
        self._rate_limiter = ConnectionRateLimiter(limits.MODEL_CONNECTIONS_BURST, limits.MODEL_CONNECTIONS_PER_SECOND)

    async def dial(self) -> Stream:
        """Connect to the upstream. Waits while the connection rate is exceeded. Raises UpstreamUnreachableError."""
        await self._wait_for_lease()
        await self._rate_limiter.wait()
        upstream = self.upstream
        tls = self._tls_context() if upstream.is_tls else None
        try:
            async with asyncio.timeout(limits.CONNECT_TIMEOUT_SECONDS):
                stream = await self._connections.open(
                    upstream.host, upstream.port, tls=tls, read_ahead_bytes=_READ_AHEAD_BYTES
                )
        except TimeoutError:
            seconds = f"{limits.CONNECT_TIMEOUT_SECONDS:.0f}"
            message = f"The model at {upstream.address} did not accept a connection within {seconds} s."
            raise UpstreamUnreachableError(504, message) from None
        except OSError as error:
            reason = error.strerror or type(error).__name__
            message = (
                f"The model at {upstream.address} cannot be reached ({reason}); check {upstream.base_url_setting}."
            )
            raise UpstreamUnreachableError(502, message) from None
        self.addresses.add(stream.peer_address)
        self._full_buffer_connections.add(stream)
        return stream

    async def _wait_for_lease(self) -> None:
        if self._connections.is_allowed:
            return
        try:
            async with asyncio.timeout(limits.HOLD_TIMEOUT_SECONDS):
                await self._connections.wait_until_allowed()
        except TimeoutError:
            raise UpstreamUnreachableError(503, LEASE_EXPIRED_MESSAGE) from None

    def _tls_context(self) -> "SSLContext":
        if self._ssl_context is None:
            import ssl

            self._ssl_context = ssl.create_default_context()
            self._ssl_context.set_alpn_protocols(["http/1.1"])
        return self._ssl_context
