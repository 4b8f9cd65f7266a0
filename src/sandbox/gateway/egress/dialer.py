"""Dials public hosts: resolves the host's name, checks its addresses and connects to a checked address."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address, ip_address
from itertools import islice
from pathlib import Path

from sandbox.gateway import limits
from sandbox.gateway.communication_lease import LEASE_EXPIRED_MESSAGE
from sandbox.gateway.egress.policy import is_address
from sandbox.gateway.egress.public_addresses import AddressPolicy
from sandbox.gateway.tcp_connections import (
    Address,
    ConnectionRateLimiter,
    FullSizeBufferLimit,
    OutboundConnections,
    Stream,
    unmap_ipv4,
)
from sandbox.primitives.concurrency import run_in_daemon_thread

_HOSTS_FILE = Path("/etc/hosts")


class AddressDeniedError(Exception):
    """No address of the name may be dialed. The message is for users."""


class EgressHostUnreachableError(Exception):
    """The host could not be reached. `status` is the HTTP status for the client; the message is for users."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class PublicDialer:
    """Dials hosts by name, but never the model's host. Names are resolved by the system, without its search domains.

    model_addresses: all known addresses of the model; this class and `UpstreamDialer` add to the set.
    """

    def __init__(
        self,
        model_host: str,
        address_policy: AddressPolicy,
        model_addresses: set[Address],
        connections: OutboundConnections,
    ) -> None:
        self._connections = connections
        self._model_host = model_host
        self._model_addresses = model_addresses
        self._model_resolved_at = float("-inf")
        self._address_policy = address_policy
        self._lookups = asyncio.Semaphore(limits.CONCURRENT_LOOKUPS_MAX)
        self._full_buffer_connections = FullSizeBufferLimit()
        self._rate_limiter = ConnectionRateLimiter(
            limits.EGRESS_CONNECTIONS_BURST, limits.EGRESS_CONNECTIONS_PER_SECOND
        )

    async def dial(self, host: str, port: int) -> Stream:
        """Resolve a host and connect to it. Waits first while the connection rate is exceeded.

        Raises AddressDeniedError or EgressHostUnreachableError.
        """
        if not self._connections.is_allowed:
            raise EgressHostUnreachableError(503, LEASE_EXPIRED_MESSAGE)
        await self._rate_limiter.wait()  # before the lookup, because all tasks share the machine's resolver
        addresses = await self._resolve_host(partial(_resolve, host), host)
        await self._refresh_model_addresses()
        if not self._model_addresses.isdisjoint(addresses):
            raise AddressDeniedError("its address is the model's, which is reachable only through the gateway.")
        allowed = [address for address in addresses if self._address_policy(address)]
        if not allowed:
            raise AddressDeniedError("its name resolves to no public address.")
        stream = await _connect(self._connections, host, port, allowed[: limits.TRIED_ADDRESSES_MAX])
        self._full_buffer_connections.add(stream)
        return stream

    async def _refresh_model_addresses(self) -> None:
        """Update the model's addresses; old ones stay denied.

        While none are known, every dial fails, because no host can be distinguished from the model.
        """
        now = asyncio.get_running_loop().time()
        if now - self._model_resolved_at < limits.MODEL_LOOKUP_INTERVAL_SECONDS:
            return
        try:
            lookup = partial(_resolve, self._model_host, is_absolute=False)
            self._model_addresses.update(await self._resolve_host(lookup, self._model_host))
            self._model_resolved_at = now
        except EgressHostUnreachableError:
            if not self._model_addresses:
                message = "The model's host does not resolve; until it does, no other host is reachable."
                raise EgressHostUnreachableError(502, message) from None

    async def _resolve_host(self, lookup: Callable[[], set[str]], host: str) -> list[Address]:
        with suppress(ValueError):
            return [unmap_ipv4(ip_address(host))]
        try:
            async with asyncio.timeout(limits.LOOKUP_TIMEOUT_SECONDS):
                await self._lookups.acquire()
                return _sort_ipv4_first(await run_in_daemon_thread(lookup, self._lookups.release))
        except TimeoutError:
            raise EgressHostUnreachableError(
                504, f"{host} was not resolved within {limits.LOOKUP_TIMEOUT_SECONDS:.0f} s."
            ) from None
        except (OSError, UnicodeError):
            raise EgressHostUnreachableError(502, f"{host} does not resolve.") from None


async def _connect(connections: OutboundConnections, host: str, port: int, addresses: list[Address]) -> Stream:
    for address in addresses:
        with suppress(OSError):  # TimeoutError included
            async with asyncio.timeout(limits.CONNECT_TIMEOUT_SECONDS / len(addresses)):
                return await connections.open(str(address), port)
    raise EgressHostUnreachableError(502, f"{host}:{port} is not responding.")


def _resolve(host: str, *, is_absolute: bool = True) -> set[str]:
    """Return at most RESOLVED_ADDRESSES_MAX addresses of a host, because checking thousands takes a long time.

    is_absolute: do not search for the name in the system's search domains. Otherwise, an allowed name that does not
    exist could lead to another host.
    """
    listed = _read_hosts_file(host) if is_absolute else []
    if not listed:
        name = f"{host.removesuffix('.')}." if is_absolute else host
        listed = [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    return set(islice(dict.fromkeys(listed), limits.RESOLVED_ADDRESSES_MAX))


def _read_hosts_file(host: str) -> list[str]:
    """Return a host's addresses from /etc/hosts, where the system does not find a name with a final dot."""
    name = host.removesuffix(".").lower()
    with suppress(OSError):
        text = _HOSTS_FILE.read_text(errors="replace").lower()
        lines = text.splitlines() if name in text else []  # the file may be long
        fields = [line.partition("#")[0].split() for line in lines]
        return [address for address, *names in filter(None, fields) if name in names and is_address(address)]
    return []


def _sort_ipv4_first(addresses_text: set[str]) -> list[Address]:
    """Sort IPv4 addresses first, because more machines have IPv4 connectivity."""
    addresses = {unmap_ipv4(ip_address(one)) for one in addresses_text}
    return sorted(addresses, key=lambda address: (not isinstance(address, IPv4Address), int(address)))
