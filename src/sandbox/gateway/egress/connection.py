"""A connection from the sandbox to a host other than the model: inspects it, dials, and relays in both directions."""

import asyncio
from functools import partial

from sandbox.gateway import limits
from sandbox.gateway.egress.dialer import AddressDeniedError, EgressHostUnreachableError, PublicDialer
from sandbox.gateway.egress.inspector_interface import ConnectionInspector, Denial, StreamFilter, Tunnel
from sandbox.gateway.egress.policy import denial_message
from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.sans_io_driver import PriorityCpuQueues
from sandbox.gateway.tcp_connections import READ_BYTES, RELAY_BYTES, Stream


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
        """Serve until both sides have closed the connection, or until one side is idle for too long."""
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
