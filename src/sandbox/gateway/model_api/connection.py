"""Handles a connection from the sandbox to the model API, and dials its connection to the upstream API.

The dialer uses the system's resolver, ignores HTTPS_PROXY and follows no redirects.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from sandbox.gateway import limits
from sandbox.gateway.communication_lease import LEASE_EXPIRED_MESSAGE
from sandbox.gateway.model_api.connection_protocol import ModelProtocol
from sandbox.gateway.model_api.upstream import Upstream
from sandbox.gateway.sans_io import Effects, Phase
from sandbox.gateway.tcp_connections import (
    READ_BYTES,
    UNFORWARDED_READ_BYTES,
    Address,
    ConnectionRateLimiter,
    FullSizeBufferLimit,
    OutboundConnections,
    PriorityCpuQueues,
    SansIODriver,
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
        """Connect to the upstream. Waits for a valid lease, and while the connection rate is exceeded.

        Raises UpstreamUnreachableError.
        """
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
        if self._connections.is_lease_valid:
            return
        try:
            async with asyncio.timeout(limits.HOLD_TIMEOUT_SECONDS):
                await self._connections.wait_until_lease_valid()
        except TimeoutError:
            raise UpstreamUnreachableError(503, LEASE_EXPIRED_MESSAGE) from None

    def _tls_context(self) -> "SSLContext":
        if self._ssl_context is None:
            import ssl

            self._ssl_context = ssl.create_default_context()
            self._ssl_context.set_alpn_protocols(["http/1.1"])
        return self._ssl_context


class ModelConnection(SansIODriver):
    """A client connection to the model's listener. Its upstream connection is reused for the client's next request.

    The connection gets the priority `model` once a request has been forwarded. It gets a low priority when a request is
    rejected, or when data without a forwarded request takes more than MODEL_PRIORITY_CPU_SECONDS_MAX.
    """

    def __init__(
        self,
        protocol: ModelProtocol,
        client: Stream,
        queues: PriorityCpuQueues,
        dialer: UpstreamDialer,
        released: asyncio.Event,
    ) -> None:
        super().__init__(protocol, client, queues, queues.new_model)
        self._unforwarded_cpu_seconds, self._read_bytes = 0.0, UNFORWARDED_READ_BYTES
        self._released = released
        self._tasks = asyncio.TaskGroup()
        self._hold_task: asyncio.Task[None] | None = None
        self._model_protocol = protocol
        self._dialer = dialer
        self._upstream: Stream | None = None
        self._stall_seconds_left = limits.CLIENT_STALL_TIMEOUT_SECONDS
        self._relay_task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until either side ends the connection.

        A response that must be metered is read to its end even if its client is gone.
        """
        try:
            async with self._tasks:
                await super().run()
                if self._relay_task is not None and self._model_protocol.is_in_flight:
                    await asyncio.wait({self._relay_task})
                self._close_upstream()  # ends the relay
                if self._hold_task is not None:
                    self._hold_task.cancel()
        finally:
            self._close_upstream()

    async def _run_queued(self, work: Callable[[], Effects]) -> Effects:
        effects = await super()._run_queued(partial(self._measure_cpu, work))
        if self._model_protocol.is_in_flight:
            self._queue, self._unforwarded_cpu_seconds, self._read_bytes = self._queues.model, 0.0, READ_BYTES
        elif effects.to_client or self._unforwarded_cpu_seconds > limits.MODEL_PRIORITY_CPU_SECONDS_MAX:
            self._queue = self._queues.low_priority
        return effects

    def _measure_cpu(self, work: Callable[[], Effects]) -> Effects:
        started_at = time.thread_time()
        try:
            return work()
        finally:
            self._unforwarded_cpu_seconds += time.thread_time() - started_at

    async def _apply(self, effects: Effects) -> None:
        if effects.close_upstream:
            self._close_upstream()
        if effects.dial:
            effects = await self._dial(effects)
        upstream, has_more = self._upstream, bool(effects.to_upstream)
        if upstream is not None:
            upstream.write(effects.to_upstream)
            effects.to_upstream.clear()  # do not keep a large body in memory twice
            upstream.clear_timeout()
        if has_more:
            self._stall_seconds_left = limits.CLIENT_STALL_TIMEOUT_SECONDS
        await super()._apply(effects)
        self._reset_upstream_timeout()
        if upstream is not None and has_more:
            await upstream.drain()
            self._model_protocol.upstream_drained()
        if self._phase is Phase.HELD and self._hold_task is None:
            self._hold_task = self._tasks.create_task(self._wait_for_release())

    async def _drain_client(self) -> None:
        if not self._model_protocol.should_read_full_response:
            await super()._drain_client()
            return
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        try:
            async with asyncio.timeout(self._stall_seconds_left):
                await super()._drain_client()
        except TimeoutError:
            await self._apply(self._model_protocol.client_stalled())
        self._stall_seconds_left -= loop.time() - started_at

    def _reset_upstream_timeout(self) -> None:
        if self._upstream is not None:
            # An idle upstream connection is kept only for a short time, because the upstream may close it at any
            # moment.
            is_in_flight = self._model_protocol.is_in_flight
            self._upstream.set_timeout(
                limits.UPSTREAM_TIMEOUT_SECONDS if is_in_flight else limits.UPSTREAM_IDLE_TIMEOUT_SECONDS
            )

    async def _wait_for_release(self) -> None:
        try:
            async with asyncio.timeout(limits.HOLD_TIMEOUT_SECONDS):
                await self._released.wait()
            resume = self._model_protocol.resume
        except TimeoutError:
            resume = self._model_protocol.hold_timed_out
        effects = await self._run_queued(resume)  # queued, because all held requests are released at once
        self._hold_task = None
        await self._apply(effects)

    async def _dial(self, effects: Effects) -> Effects:
        """Open the upstream connection and return the effects to apply.

        These are the given effects, unless the connection fails or is denied, or the client has left.
        """
        self._client.clear_timeout()  # dialing may take longer than the timeout; `_apply` sets the next one
        try:
            stream = await self._dialer.dial()
        except UpstreamUnreachableError as error:
            failed = self._model_protocol.upstream_failed(error.status, error.message)
            failed.to_client[:0] = effects.to_client
            return failed
        if not self._model_protocol.is_in_flight:  # the client has disconnected
            stream.abort()
            return Effects()
        denied = self._model_protocol.upstream_connected()
        if denied is not None:
            stream.abort()
            denied.to_client[:0] = effects.to_client
            return denied
        self._upstream = stream
        self._relay_task = self._tasks.create_task(self._relay(stream))
        return effects

    async def _relay(self, stream: Stream) -> None:
        """Pass upstream data to the protocol until this connection ends or is replaced."""
        data = b"-"
        while data:
            data = await stream.read()
            await self._queues.model.wait()
            if stream is not self._upstream:
                return
            if stream.has_timed_out:
                await self._apply(self._model_protocol.upstream_timed_out())
            else:
                await self._apply(self._model_protocol.upstream_data_received(data))

    def _close_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.abort()
            self._upstream = None
