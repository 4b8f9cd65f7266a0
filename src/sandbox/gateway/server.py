"""The gateway server: accepts connections from the sandbox and runs a handler for each.

It runs in the task's runner, on the listeners that the runtime opened inside the sandbox's network namespace. Only this
module, `tcp_connections`, `communication_lease`, `egress.policy`, and `connection` of `egress` and `model_api` use
sockets or the event loop.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from errno import EINVAL
from functools import partial
from socket import MSG_PEEK, socket
from typing import Any, NamedTuple

from sandbox.gateway import limits
from sandbox.gateway.communication_lease import CommunicationLease
from sandbox.gateway.egress.connection import EgressConnection, PublicDialer
from sandbox.gateway.egress.http import HttpInspector
from sandbox.gateway.egress.inspector_interface import ConnectionInspector, Denial, Tunnel
from sandbox.gateway.egress.policy import HTTP_PORT, HTTPS_PORT, AddressPolicy, EgressPolicy, is_dialable
from sandbox.gateway.egress.protocol_sniffing import decide_transparent_connection
from sandbox.gateway.egress.proxy_inspector import ProxyInspector
from sandbox.gateway.egress.tls import TlsInspector
from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.model_api.connection import ModelConnection, UpstreamDialer
from sandbox.gateway.model_api.connection_protocol import ModelProtocol
from sandbox.gateway.model_api.request_gate import ModelPolicy, ModelRequestGate
from sandbox.gateway.model_api.upstream import parse_upstream
from sandbox.gateway.synthetic_dns import DnsResponder, DnsTcpProtocol, SyntheticIps
from sandbox.gateway.tcp_connections import (
    FullSizeBufferLimit,
    OutboundConnections,
    PriorityCpuQueues,
    SansIODriver,
    Stream,
)
from sandbox.interfaces.gateway import Gateway, GatewayRules, ModelDialect, ModelUpstream, ReportEvent
from sandbox.interfaces.runtime import Listeners
from sandbox.primitives.concurrency import wait_readable
from sandbox.primitives.runner_cpu_throttle import CpuQueue, CpuThrottle


class SocketGatewayFactory:
    """Creates gateways.

    dialect: the API of the model.
    address_policy: decides which addresses may be dialed for allowed hosts.
    throttle: limits the gateways' CPU time.
    lease: limits how long the sandbox may communicate; None means no limit.
    """

    def __init__(
        self,
        dialect: ModelDialect,
        address_policy: AddressPolicy = is_dialable,
        throttle: CpuThrottle | None = None,
        lease: CommunicationLease | None = None,
    ) -> None:
        self._dialect = dialect
        self._address_policy = address_policy
        self._throttle = throttle or CpuThrottle()
        self._lease = lease

    def create(
        self,
        upstream: ModelUpstream,
        gateway_key: str,
        report: ReportEvent,
        rules: GatewayRules = GatewayRules(),
        redact: Callable[[str], str] = str,
    ) -> Gateway:
        """Create a gateway. Raises ValueError, with a message for users, if the upstream or its key is invalid."""
        reporter = EventReporter(report, time.monotonic, redact)
        queues = PriorityCpuQueues(self._throttle)
        upstream_server = parse_upstream(upstream, self._dialect)
        connections = OutboundConnections(self._lease)
        model = UpstreamDialer(upstream_server, connections)
        public = PublicDialer(upstream_server.host, self._address_policy, model.addresses, connections)
        network = OutboundNetwork(connections, model, public)
        return SocketGateway(self._dialect, network, gateway_key, reporter, rules, queues)


class OutboundNetwork(NamedTuple):
    """The outbound connections of one sandbox, and their dialers."""

    connections: OutboundConnections
    model: UpstreamDialer
    public: PublicDialer


class SocketGateway:
    """The gateway of one sandbox."""

    def __init__(
        self,
        dialect: ModelDialect,
        network: OutboundNetwork,
        gateway_key: str,
        reporter: EventReporter,
        rules: GatewayRules,
        queues: PriorityCpuQueues,
    ) -> None:
        self._dialect = dialect
        self._network = network
        self._gateway_key = gateway_key
        self._reporter = reporter
        model_host = network.model.upstream.host
        self._policy = EgressPolicy(rules.egress, model_host)
        self._proxy_policy = EgressPolicy(rules.egress, model_host, allows_ip_addresses=True)
        self._synthetic_ips = SyntheticIps(self._policy.allows_host)
        self._dns = DnsResponder(self._policy, self._synthetic_ips, self._reporter)
        self._request_gate = ModelRequestGate(rules, self._reporter, dialect)
        self._released = asyncio.Event()
        self._model_protocols: set[ModelProtocol] = set()
        self._queues = queues
        self._full_buffer_connections = FullSizeBufferLimit()

    @property
    def requests_in_flight(self) -> int:
        """The number of forwarded model requests without a complete response; held requests are not included."""
        return sum(protocol.is_in_flight for protocol in self._model_protocols)

    @property
    def denied_count(self) -> int:
        """The number of denials so far, reported or not."""
        return self._reporter.denied_count

    def release_model_requests(self) -> None:
        """Forward the held model requests and stop holding new ones. Idempotent."""
        self._request_gate.release()
        self._released.set()

    async def serve(self, listeners: Listeners) -> None:
        """Wait until the lease is valid, and serve until cancelled. Then close every connection and listener.

        Raises ExceptionGroup if a listener is lost.
        """
        egress_slots, dns_slots = asyncio.Semaphore(limits.CONNECTIONS_MAX), asyncio.Semaphore(limits.CONNECTIONS_MAX)
        handlers: list[tuple[socket, Callable[[socket], Coroutine[Any, Any, None]], asyncio.Semaphore]] = [
            (listeners.model, self._create_model_handler(listeners.model), asyncio.Semaphore(limits.CONNECTIONS_MAX)),
            (listeners.proxy, self._serve_proxy, egress_slots),
            (listeners.dns_tcp, self._serve_dns_tcp, dns_slots),
            *(
                (listener, partial(self._serve_transparent, port), egress_slots)
                for port, listener in listeners.transparent.items()
            ),
        ]
        try:
            await self._network.connections.wait_until_lease_valid()  # meanwhile, the kernel accepts connections
            async with asyncio.TaskGroup() as group:
                for listener, handle, slots in handlers:
                    queue = self._queues.new_model if listener is listeners.model else self._queues.low_priority
                    group.create_task(self._accept_loop(group, listener, handle, slots, queue))
                group.create_task(self._serve_dns_udp(listeners.dns_udp))
                group.create_task(self._network.connections.enforce_lease())
        finally:
            for listener in (listeners.dns_udp, *(listener for listener, _, _ in handlers)):
                listener.close()
            self._reporter.flush()

    async def _accept_loop(
        self,
        group: asyncio.TaskGroup,
        listener: socket,
        handle: Callable[[socket], Coroutine[Any, Any, None]],
        slots: asyncio.Semaphore,
        queue: CpuQueue,
    ) -> None:
        listener.setblocking(False)
        while True:
            try:
                accepted = await _accept_connection(listener, slots, queue)
            except OSError as error:  # the peer is already gone, or no file descriptor is left
                if error.errno == EINVAL:
                    raise  # the socket is no longer listening: no connection will ever arrive
                await asyncio.sleep(0.1)
                continue
            task = group.create_task(self._handle_and_report_errors(handle, accepted))
            task.add_done_callback(partial(_close_connection, accepted, slots))

    async def _handle_and_report_errors(
        self, handle: Callable[[socket], Coroutine[Any, Any, None]], accepted: socket
    ) -> None:
        """Run a handler; an error ends only its connection."""
        try:
            await handle(accepted)
        except Exception as error:
            self._report_failure("A connection", error)

    def _report_failure(self, subject: str, error: Exception) -> None:
        kinds = sorted({type(one).__name__ for one in getattr(error, "exceptions", [error])})
        with suppress(Exception):
            self._reporter.report_error("gateway_error", f"{subject} was aborted: {', '.join(kinds)}.")

    def _create_model_handler(self, listener: socket) -> Callable[[socket], Coroutine[Any, Any, None]]:
        port = listener.getsockname()[1]
        policy = ModelPolicy(self._dialect, self._gateway_key, port)

        async def handle_connection(accepted: socket) -> None:
            if _is_peer_closed(accepted):
                return
            protocol = ModelProtocol(
                self._dialect, policy, self._request_gate, self._network.model.upstream, self._reporter, port
            )
            self._model_protocols.add(protocol)
            try:
                stream = await self._open_stream(accepted)
                await ModelConnection(protocol, stream, self._queues, self._network.model, self._released).run()
            finally:
                self._model_protocols.discard(protocol)
                protocol.connection_lost()

        return handle_connection

    async def _serve_proxy(self, accepted: socket) -> None:
        await self._serve_egress(ProxyInspector(self._proxy_policy, accepted.getsockname()[1]), accepted)

    async def _serve_transparent(self, port: int, accepted: socket) -> None:
        address = accepted.getsockname()[0]
        name = self._synthetic_ips.name_of(address)
        if port not in (HTTP_PORT, HTTPS_PORT):
            await self._serve_egress(decide_transparent_connection(self._policy, name, address, port), accepted)
            return
        kind = HttpInspector if port == HTTP_PORT else TlsInspector
        await self._serve_egress(kind(self._policy, name, address, port), accepted)

    async def _open_stream(self, accepted: socket) -> Stream:
        stream = await Stream.from_socket(accepted)
        self._full_buffer_connections.add(stream)
        return stream

    async def _serve_egress(
        self, inspector_or_decision: ConnectionInspector | Tunnel | Denial, accepted: socket
    ) -> None:
        stream = await self._open_stream(accepted)
        await EgressConnection(inspector_or_decision, stream, self._reporter, self._network.public, self._queues).run()

    async def _serve_dns_tcp(self, accepted: socket) -> None:
        stream = await self._open_stream(accepted)
        await SansIODriver(DnsTcpProtocol(self._dns), stream, self._queues, self._queues.low_priority).run()

    async def _serve_dns_udp(self, listener: socket) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                await self._queues.dns.wait()
                query, sender = await loop.sock_recvfrom(listener, limits.DNS_DATAGRAM_BYTES_MAX)
                reply = self._dns.respond(query)
                if reply is not None:
                    listener.sendto(reply, sender)
            except OSError:  # a reply that cannot be sent now is dropped, as UDP allows
                await asyncio.sleep(0.01)
            except Exception as error:
                self._report_failure("A DNS query", error)
            await asyncio.sleep(0)  # a flood of queries must not block the event loop


async def _accept_connection(listener: socket, slots: asyncio.Semaphore, queue: CpuQueue) -> socket:
    """Accept the next connection once a slot is free. Raises OSError.

    A slot is taken only once a connection is waiting, so an idle listener does not block the other listeners.
    """
    while True:
        await wait_readable(listener)
        await queue.wait()
        await slots.acquire()
        try:
            accepted, _ = listener.accept()
        except (BlockingIOError, InterruptedError):
            slots.release()
        except OSError:
            slots.release()
            raise
        else:
            accepted.setblocking(False)
            return accepted


def _is_peer_closed(accepted: socket) -> bool:
    """Return whether the peer closed the connection before sending anything."""
    try:
        return not accepted.recv(1, MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _close_connection(accepted: socket, slots: asyncio.Semaphore, _task: asyncio.Task[None]) -> None:
    accepted.close()
    slots.release()
