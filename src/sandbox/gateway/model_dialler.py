"""Connections to the model: dialled directly, with the system's resolver, without HTTPS_PROXY or a redirect."""

import asyncio
from ipaddress import ip_address
from typing import TYPE_CHECKING

from sandbox.gateway import limits
from sandbox.gateway.address_table import Address, unwrapped
from sandbox.gateway.line import Line, bound_buffers
from sandbox.gateway.pace import Pace
from sandbox.gateway.upstream import Upstream
from sandbox.gateway.wide_lines import WideLines

if TYPE_CHECKING:
    from ssl import SSLContext


class UnreachableError(Exception):
    """The upstream could not be dialled."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class ModelDialler:
    """Opens connections to the upstream, and remembers at which addresses it was."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.addresses: set[Address] = set()
        self._tls: SSLContext | None = None
        self._wide = WideLines()
        self._pace = Pace(limits.MODEL_CONNECTIONS_AT_ONCE, limits.MODEL_CONNECTIONS_PER_SECOND)

    async def dial(self) -> Line:
        """Raises UnreachableError. Waits where connections are opened too often."""
        await self._pace.wait()
        upstream = self.upstream
        tls = self._context() if upstream.is_tls else None
        try:
            async with asyncio.timeout(limits.CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(
                    upstream.host, upstream.port, ssl=tls, server_hostname=upstream.host if tls else None
                )
        except TimeoutError:
            message = f"The model at {upstream.address} could not be reached within {limits.CONNECT_SECONDS:.0f} s."
            raise UnreachableError(504, message) from None
        except OSError as error:
            reason = error.strerror or type(error).__name__
            message = f"The model at {upstream.address} cannot be reached ({reason}); check ANTHROPIC_BASE_URL."
            raise UnreachableError(502, message) from None
        bound_buffers(writer.get_extra_info("socket"))
        self.addresses.add(unwrapped(ip_address(writer.get_extra_info("peername")[0])))
        line = Line(reader, writer)
        self._wide.add(line)
        return line

    def _context(self) -> "SSLContext":
        if self._tls is None:
            import ssl

            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls
