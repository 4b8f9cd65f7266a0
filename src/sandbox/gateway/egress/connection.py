"""A connection from the sandbox to a host other than the model: inspects it, dials, and relays in both directions.

`PublicDialer` resolves the host's name, checks its addresses and connects to a checked address.
"""

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
from sandbox.gateway.egress.inspector_interface import ConnectionInspector, Denial, StreamFilter, Tunnel
from sandbox.gateway.egress.policy import AddressPolicy, denial_message, is_address
from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.tcp_connections import (
    READ_BYTES,
    RELAY_BYTES,
    Address,
    ConnectionRateLimiter,
    FullSizeBufferLimit,
    OutboundConnections,
    PriorityCpuQueues,
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
    """Dials hosts by name or address, but never the model. The system resolves names, without its search domains.

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
        if not self._connections.is_lease_valid:
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


class EgressConnection:
    """One egress connection.

    inspector_or_decision: decides whether the connection is allowed; if that is already decided, the decision itself.
    """

    def __init__(
        self,
        inspector_or_decision: ConnectionInspector | Tunnel | Denial,
        client: Stream,
        reporter: EventReporter,
        dialer: PublicDialer,
        queues: PriorityCpuQueues,
    ) -> None:
        self._inspector_or_decision = inspector_or_decision
        self._client = client
        self._reporter = reporter
        self._dialer = dialer
        self._queues = queues
        self._is_half_closed = False
        self._has_host_data = False
        self._denial: Denial | None = None

    async def run(self) -> None:
        """Serve until both sides have closed the connection, or until neither has sent data for too long."""
        try:
            start = self._inspector_or_decision
            outcome = start if isinstance(start, Tunnel | Denial) else await self._inspect(start)
            dialed = await self._dial(outcome) if isinstance(outcome, Tunnel) else outcome
            if isinstance(dialed, Denial):
                await self._deny(dialed)
            elif isinstance(outcome, Tunnel) and dialed is not None:
                await self._relay(outcome, dialed)
        finally:
            self._client.abort()

    async def _inspect(self, inspector: ConnectionInspector) -> Tunnel | Denial:
        self._client.set_timeout(limits.HEAD_TIMEOUT_SECONDS)
        while True:
            data = await self._client.read()
            outcome = await self._queues.run(self._queues.low_priority, partial(inspector.client_data_received, data))
            if outcome is not None:
                return outcome

    async def _dial(self, tunnel: Tunnel) -> Stream | Denial | None:
        # The timeout includes the wait for connections queued before this one.
        waiting_seconds = limits.CONNECTIONS_MAX / limits.EGRESS_CONNECTIONS_PER_SECOND
        self._client.set_timeout(waiting_seconds + limits.CONNECT_TIMEOUT_SECONDS + 2 * limits.LOOKUP_TIMEOUT_SECONDS)
        host, port = tunnel.host.lower(), tunnel.port  # as in denial reports
        try:
            return await self._dialer.dial(host, port)
        except AddressDeniedError as error:
            return Denial(
                host, port, str(error), tunnel.unreachable_response(403, denial_message(host, port, str(error)))
            )
        except EgressHostUnreachableError as error:
            self._reporter.report_error("host_unreachable", str(error))
            await self._send_and_linger(tunnel.unreachable_response(error.status, str(error)))
            return None

    async def _deny(self, denial: Denial) -> None:
        self._reporter.report_denied(denial.host, denial.port, denial.reason)
        await self._send_and_linger(denial.response)

    async def _send_and_linger(self, response: bytes) -> None:
        """Send the response, then discard the client's remaining data, because a reset would lose the response."""
        self._client.set_timeout(limits.LINGER_TIMEOUT_SECONDS)
        self._client.write(response)
        self._client.write_eof()
        while await self._client.read():
            await self._queues.low_priority.wait()

    async def _relay(self, tunnel: Tunnel, host_stream: Stream) -> None:
        try:
            self._client.write(tunnel.established_response)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._relay_to_host(tunnel.stream_filter, host_stream))
                group.create_task(self._relay_to_client(tunnel.stream_filter, host_stream))
        finally:
            host_stream.abort()
        if self._denial is not None:
            await self._deny(self._denial)

    async def _relay_to_host(self, stream_filter: StreamFilter, host_stream: Stream) -> None:
        output = stream_filter.start()
        data = b"-"
        while True:
            self._reset_timeouts(host_stream)
            if isinstance(output, Denial):
                self._denial = output
                host_stream.abort()  # this also ends the other direction
                if self._has_host_data:  # the gateway's response would be inserted into the host's
                    self._client.abort()
                return
            host_stream.set_reset_on_abort(stream_filter.may_end_in_denied_line)
            host_stream.write(output)
            await host_stream.drain()
            if not data:
                host_stream.set_reset_on_abort(False)
                host_stream.write_eof()
                self._is_half_closed = True
                self._reset_timeouts(host_stream)
                return
            data = await self._client.read(RELAY_BYTES if stream_filter.is_passthrough else READ_BYTES)
            output = await self._queues.run(
                self._queues.low_priority, partial(stream_filter.client_data_received, data)
            )

    async def _relay_to_client(self, stream_filter: StreamFilter, host_stream: Stream) -> None:
        while (data := await host_stream.read(RELAY_BYTES)) and not self._client.is_closing:
            await self._queues.low_priority.wait()
            self._reset_timeouts(host_stream)
            self._has_host_data = True
            stream_filter.host_data_received()
            self._client.write(data)
            await self._client.drain()
        if self._denial is not None:
            return
        self._has_host_data = True
        self._client.write_eof()
        self._is_half_closed = True
        self._reset_timeouts(host_stream)
        if stream_filter.drops_rest:
            self._client.set_timeout(limits.LINGER_TIMEOUT_SECONDS)
        if self._client.is_closing:
            host_stream.abort()

    def _reset_timeouts(self, host_stream: Stream) -> None:
        seconds = limits.HALF_CLOSED_TIMEOUT_SECONDS if self._is_half_closed else limits.TUNNEL_IDLE_TIMEOUT_SECONDS
        self._client.set_timeout(seconds)
        host_stream.set_timeout(seconds)
