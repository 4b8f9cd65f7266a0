"""Direct connections to the model, through the system's resolver. Ignores HTTPS_PROXY and follows no redirects."""

import asyncio
from typing import TYPE_CHECKING

from sandbox.gateway import limits
from sandbox.gateway.communication_lease import LEASE_EXPIRED_MESSAGE
from sandbox.gateway.model_api.upstream import Upstream
from sandbox.gateway.tcp_connections import (
    Address,
    ConnectionRateLimiter,
    FullSizeBufferLimit,
    OutboundConnections,
    Stream,
)

if TYPE_CHECKING:
    from ssl import SSLContext


_READ_AHEAD_BYTES = 64 * 1024


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
                f"The model at {upstream.address} cannot be reached ({reason}); check {upstream.base_url_variable}."
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
