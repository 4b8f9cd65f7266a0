"""TCP connections of the gateway, with timeouts and bounded buffers.

`SansIODriver` moves bytes between a connection and a sans-I/O protocol.
"""

import asyncio
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from socket import IPPROTO_TCP, SO_LINGER, SO_RCVBUF, SO_SNDBUF, SOCK_STREAM, SOL_SOCKET, TCP_NOTSENT_LOWAT, socket
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from sandbox.gateway import limits
from sandbox.gateway.communication_lease import CommunicationLease, LeasedSocket, LeaseExpiredError
from sandbox.gateway.limits import (
    FULL_SIZE_BUFFER_CONNECTIONS_MAX,
    MODEL_CONNECTION_CPU_DEBT_SECONDS_MAX,
    NEW_MODEL_CONNECTION_CPU_DEBT_SECONDS_MAX,
    OUTBOUND_RECEIVE_BUFFER_BYTES,
    REDUCED_BUFFER_BYTES,
    UNSENT_BYTES_MAX,
)
from sandbox.gateway.sans_io import Effects, Phase, SansIOProtocol
from sandbox.primitives.runner_cpu_throttle import CpuQueue, CpuThrottle

if TYPE_CHECKING:
    from ssl import SSLContext


Address = IPv4Address | IPv6Address

READ_BYTES = 16 * 1024
"""Read size. It is small, so that even data that is costly to parse, such as one-byte chunks, is parsed quickly."""

UNFORWARDED_READ_BYTES = 4 * 1024
"""Read size of a model connection without a forwarded request.

It limits how long a costly read delays other connections.
"""

RELAY_BYTES = 256 * 1024
"""Read size for data that is relayed without inspection; equal to asyncio's own maximum."""

_READ_AHEAD_BYTES = 1
"""Disables read-ahead: the kernel merges small segments, and a waiting connection uses no user-space buffer."""

_SO_RCVBUFFORCE = 33  # asm-generic/socket.h


def unmap_ipv4(address: Address) -> Address:
    """Return the IPv4 address of an IPv4-mapped IPv6 address; return any other address unchanged."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


class Stream:
    """A TCP connection that is aborted when its timeout expires. A lost peer is reported as EOF, never as an error."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._timer: asyncio.TimerHandle | None = None
        self._is_reset_on_abort = False
        self.has_timed_out = False

    @classmethod
    async def from_socket(cls, accepted: socket) -> "Stream":
        """Wrap a connection accepted from the sandbox."""
        with suppress(OSError):  # the peer has already disconnected
            accepted.setsockopt(IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)
        return cls(*await asyncio.open_connection(sock=accepted, limit=_READ_AHEAD_BYTES))

    def shrink_buffers(self) -> None:
        """Shrink the kernel's send and receive buffers."""
        with suppress(OSError):  # the peer has already disconnected
            for buffer in (SO_RCVBUF, SO_SNDBUF):
                self._writer.get_extra_info("socket").setsockopt(SOL_SOCKET, buffer, REDUCED_BUFFER_BYTES)

    async def read(self, bytes_max: int = READ_BYTES) -> bytes:
        """Return the next bytes, or b"" at EOF."""
        try:
            return await self._reader.read(bytes_max)
        except OSError:
            return b""

    @property
    def peer_address(self) -> Address:
        """The peer's address."""
        return unmap_ipv4(ip_address(self._writer.get_extra_info("peername")[0]))

    @property
    def is_closing(self) -> bool:
        """Whether the connection is closing, so that written data would be lost."""
        return self._writer.is_closing()

    def write(self, data: bytes | bytearray) -> None:
        if data and not self._writer.is_closing():
            self._writer.write(bytes(data))

    async def drain(self) -> None:
        """Wait while the write buffer is too full."""
        with suppress(OSError):
            await self._writer.drain()

    def write_eof(self) -> None:
        """Send EOF after the data written so far."""
        with suppress(OSError):
            self._writer.write_eof()

    def set_timeout(self, seconds: float) -> None:
        """Abort the connection after this time; replaces an earlier timeout."""
        self.clear_timeout()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._abort_on_timeout)

    def clear_timeout(self) -> None:
        """Cancel the timeout, for example while nothing reads from the connection."""
        if self._timer is not None:
            self._timer.cancel()

    def abort(self) -> None:
        """Abort the connection immediately; unsent data is lost."""
        self.clear_timeout()
        self._writer.transport.abort()

    def set_reset_on_abort(self, is_reset: bool) -> None:
        """Set whether `abort`, a timeout or the end of this process resets the connection instead of sending EOF.

        A lenient server might handle an incomplete request that ends with EOF.
        """
        if is_reset == self._is_reset_on_abort:
            return
        self._is_reset_on_abort = is_reset
        connection = self._writer.get_extra_info("socket")
        with suppress(OSError):
            connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", is_reset, 0))

    def _abort_on_timeout(self) -> None:
        self.has_timed_out = True
        self._writer.transport.abort()


def limit_buffers(connection: socket) -> None:
    """Limit the kernel's buffers for a stalled connection, because their memory is not charged to any task.

    Only root may exceed the machine's rmem_max. For other users, the system's default sizes apply.
    """
    with suppress(PermissionError):
        connection.setsockopt(SOL_SOCKET, _SO_RCVBUFFORCE, OUTBOUND_RECEIVE_BUFFER_BYTES)
    connection.setsockopt(IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)


class OutboundConnections:
    """Opens connections to the model and to other hosts.

    lease: limits how long data may be sent; None means no limit.
    """

    def __init__(self, lease: CommunicationLease | None = None) -> None:
        self._lease = lease
        self._streams: WeakSet[Stream] = WeakSet()

    @property
    def is_lease_valid(self) -> bool:
        """Whether connections may be opened now."""
        return self._lease is None or self._lease.is_valid

    async def wait_until_lease_valid(self) -> None:
        """Wait until connections may be opened."""
        if self._lease is not None:
            await self._lease.wait_until_valid()

    async def open(
        self, host: str, port: int, *, tls: "SSLContext | None" = None, read_ahead_bytes: int = _READ_AHEAD_BYTES
    ) -> Stream:
        """Connect to a host by address or name. Raises OSError.

        read_ahead_bytes: half the size of the buffer for data that has not been read yet (asyncio's `limit`).
        """
        endpoint: dict[str, Any] = {"host": host, "port": port}
        if self._lease is not None:
            endpoint = {"sock": await _connect_leased(host, port, self._lease)}
        reader, writer = await asyncio.open_connection(
            **endpoint, ssl=tls, server_hostname=host if tls else None, limit=read_ahead_bytes
        )
        limit_buffers(writer.get_extra_info("socket"))
        stream = Stream(reader, writer)
        if self._lease is not None:
            self._streams.add(stream)
        return stream

    async def enforce_lease(self) -> None:
        """Reset every connection whenever the lease expires, until cancelled."""
        if self._lease is None:
            return
        while True:
            await self._lease.wait_until_expired()
            for stream in list(self._streams):
                stream.set_reset_on_abort(True)
                stream.abort()
            await self._lease.wait_until_valid()


async def _connect_leased(host: str, port: int, lease: CommunicationLease) -> LeasedSocket:
    loop = asyncio.get_running_loop()
    error: OSError = LeaseExpiredError()
    if lease.is_valid:
        for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=SOCK_STREAM):
            connection = LeasedSocket(family, kind, protocol)
            connection.lease = lease
            connection.setblocking(False)
            try:
                await loop.sock_connect(connection, address)
            except OSError as failure:
                error = failure
                connection.close()
            except BaseException:
                connection.close()
                raise
            else:
                return connection
    raise error


class FullSizeBufferLimit:
    """Limits how many connections to one side (hosts, model or sandbox) have full-size buffers.

    A connection above the limit gets smaller buffers and keeps them.
    """

    def __init__(self) -> None:
        self._streams: list[Stream] = []

    def add(self, stream: Stream) -> None:
        """Add a connection; shrink its buffers if the limit is reached."""
        self._streams = [one for one in self._streams if not one.is_closing]
        if len(self._streams) < FULL_SIZE_BUFFER_CONNECTIONS_MAX:
            self._streams.append(stream)
        else:
            stream.shrink_buffers()


class ConnectionRateLimiter:
    """Limits the rate of outbound connections, each of which occupies a local port for a minute after it is closed.

    A token bucket: allows `burst` acquisitions at once, then `per_second` per second, in FIFO order.
    """

    def __init__(self, burst: int, per_second: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._per_second = per_second
        self._monotonic = monotonic
        self._tokens = float(burst)
        self._counted_at = monotonic()
        self._queue_lock = asyncio.Lock()

    async def wait(self) -> None:
        """Wait for a token and consume it."""
        async with self._queue_lock:
            if (seconds := self._wait_seconds()) > 0:
                await asyncio.sleep(seconds)
            self._tokens -= 1

    def _wait_seconds(self) -> float:
        now = self._monotonic()
        self._tokens = min(self._tokens + (now - self._counted_at) * self._per_second, self._burst)
        self._counted_at = now
        return max(0.0, 1 - self._tokens) / self._per_second


T = TypeVar("T")


class PriorityCpuQueues:
    """CPU queues for the gateway's work.

    `model` is for active model connections and has the highest priority. `new_model`, for new ones, is the next.
    `dns` (DNS over UDP) and `low_priority` (hosts, DNS over TCP, and model connections that lost their priority) are
    the last.

    A sandbox can send any amount of data for the gateway to parse. CPU time is therefore limited, and the data of only
    one connection is parsed at a time. The runner's other work, such as measuring and stopping the sandbox, runs in
    between. A long piece of work is followed by a pause of the same duration, because one turn of the event loop is too
    short for a measurement.
    """

    def __init__(self, throttle: CpuThrottle) -> None:
        self.low_priority = throttle.queue()
        self.dns = throttle.queue()
        self.new_model = throttle.queue(NEW_MODEL_CONNECTION_CPU_DEBT_SECONDS_MAX)
        self.model = throttle.queue(MODEL_CONNECTION_CPU_DEBT_SECONDS_MAX)
        self._lock = asyncio.Lock()
        self._pauses_until = 0.0

    async def run(self, queue: CpuQueue, work: Callable[[], T]) -> T:
        """Wait for a turn in `queue`, run `work` and return its result."""
        async with queue, self._lock:
            loop = asyncio.get_running_loop()
            await asyncio.sleep(max(0.0, self._pauses_until - loop.time()))
            started_at = loop.time()
            try:
                return work()
            finally:
                seconds = loop.time() - started_at
                if seconds > limits.WORK_SECONDS_WITHOUT_PAUSE:
                    self._pauses_until = loop.time() + seconds


PHASE_TIMEOUT_SECONDS = {
    Phase.HEAD: limits.HEAD_TIMEOUT_SECONDS,
    Phase.BODY: limits.BODY_TIMEOUT_SECONDS,
    Phase.HELD: limits.HOLD_TIMEOUT_SECONDS + limits.LINGER_TIMEOUT_SECONDS,
    Phase.RESPONSE: limits.RESPONSE_TIMEOUT_SECONDS,
    Phase.IDLE: limits.KEEP_ALIVE_TIMEOUT_SECONDS,
    Phase.CLOSING: limits.LINGER_TIMEOUT_SECONDS,
}
"""Timeout for a client connection in each phase, in seconds."""


class SansIODriver:
    """Passes the data of one connection from the sandbox to a protocol. Received data waits for its turn in `queue`."""

    def __init__(self, protocol: SansIOProtocol, client: Stream, queues: PriorityCpuQueues, queue: CpuQueue) -> None:
        self._protocol = protocol
        self._client = client
        self._queues = queues
        self._queue = queue
        self._phase: Phase | None = None
        self._read_bytes = READ_BYTES

    async def run(self) -> None:
        """Serve the connection until either side ends it."""
        try:
            await self._read_loop()
        finally:
            self._client.abort()

    async def _read_loop(self) -> None:
        self._reset_timeout()
        while data := await self._client.read(self._read_bytes):
            await self._apply(await self._run_queued(partial(self._protocol.client_data_received, data)))
        await self._apply(self._protocol.client_data_received(b""))

    async def _run_queued(self, work: Callable[[], Effects]) -> Effects:
        return await self._queues.run(self._queue, work)

    async def _apply(self, effects: Effects) -> None:
        self._client.write(effects.to_client)
        self._reset_timeout()
        if effects.close_client:
            self._client.write_eof()
        if effects.to_client:
            await self._drain_client()

    async def _drain_client(self) -> None:
        await self._client.drain()

    def _reset_timeout(self) -> None:
        phase = self._protocol.phase
        # A request head and a final response each have a fixed timeout: further bytes do not extend it.
        if phase is self._phase and phase in (Phase.HEAD, Phase.CLOSING):
            return
        self._phase = phase
        self._client.set_timeout(PHASE_TIMEOUT_SECONDS[phase])
