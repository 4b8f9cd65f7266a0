"""The gateway at its doors: who comes in is attended to by a visit.

Runs inside the task's runner, on the listeners that the runtime opened inside the sandbox's network namespace.
Sockets are touched here and in `line`, `visit`, `egress_visit`, `model_dialler` and `outward`, nowhere else.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from errno import EINVAL
from functools import partial
from socket import MSG_PEEK, socket
from typing import Any

from sandbox.gateway import limits
from sandbox.gateway.connection import ModelVisit, Turns, Visit
from sandbox.gateway.dns import NameAddresses, NamesConversation, NameService
from sandbox.gateway.egress.connection import EgressVisit
from sandbox.gateway.egress.dialer import AddressPolicy, Outward, may_be_dialled
from sandbox.gateway.egress.http_handshake import HttpOpening
from sandbox.gateway.egress.policy import HTTP_PORT, HTTPS_PORT, EgressPolicy, Opening, Passage, Refusal
from sandbox.gateway.egress.proxy_handshake import ProxyOpening
from sandbox.gateway.egress.tls_handshake import TlsOpening
from sandbox.gateway.egress.unknown_protocol import open_at_once
from sandbox.gateway.event_reporter import Reports
from sandbox.gateway.model.budget import Admission
from sandbox.gateway.model.dialer import ModelDialler, Upstream, parse_upstream
from sandbox.gateway.model.protocol import ModelConversation
from sandbox.gateway.model.request_policy import ModelPolicy
from sandbox.gateway.transport import Line, WideLines
from sandbox.interfaces.gateway import Gateway, GatewayRules, ModelUpstream, Report
from sandbox.interfaces.runtime import Listeners
from sandbox.system.cpu_throttle import CpuQueue, CpuThrottle


class SocketGateways:
    """Makes gateways.

    address_policy: says which addresses are dialled for hosts that a task may reach. throttle: bounds their CPU time.
    """

    def __init__(self, address_policy: AddressPolicy = may_be_dialled, throttle: CpuThrottle | None = None) -> None:
        self._address_policy = address_policy
        self._throttle = throttle or CpuThrottle()

    def open(
        self,
        upstream: ModelUpstream,
        task_key: str,
        report: Report,
        rules: GatewayRules = GatewayRules(),
        redact: Callable[[str], str] = str,
    ) -> Gateway:
        """Raises ValueError, with a sentence, for an upstream or a key that cannot be used."""
        reports = Reports(report, time.monotonic, redact)
        turns = Turns(self._throttle)
        return SocketGateway(parse_upstream(upstream), task_key, reports, rules, self._address_policy, turns)


class SocketGateway:
    """Serves one sandbox."""

    def __init__(
        self,
        upstream: Upstream,
        task_key: str,
        reports: Reports,
        rules: GatewayRules,
        address_policy: AddressPolicy,
        turns: Turns,
    ) -> None:
        self._dialler = ModelDialler(upstream)
        self._task_key = task_key
        self._reports = reports
        self._policy = EgressPolicy(rules.egress, upstream.host)
        self._proxy_policy = EgressPolicy(rules.egress, upstream.host, takes_addresses=True)
        self._addresses = NameAddresses(self._policy.knows)
        self._names = NameService(self._policy, self._addresses, self._reports)
        self._outward = Outward(upstream.host, address_policy, self._dialler.addresses)
        self._admission = Admission(rules, self._reports)
        self._released = asyncio.Event()
        self._model_conversations: set[ModelConversation] = set()
        self._turns = turns
        self._inside = WideLines()

    @property
    def requests_in_flight(self) -> int:
        """Model requests that were forwarded and are not answered to their end; those held back are not among them."""
        return sum(conversation.is_in_flight for conversation in self._model_conversations)

    @property
    def denials(self) -> int:
        """What was refused so far, reported or not."""
        return self._reports.denials

    def release_model(self) -> None:
        """Let model requests pass that were held back. Does nothing the second time."""
        self._admission.release()
        self._released.set()

    async def serve(self, listeners: Listeners) -> None:
        """Answer until cancelled; then every connection and every listener is closed.

        Raises ExceptionGroup when a listener is lost.
        """
        others, names = asyncio.Semaphore(limits.CONNECTIONS_MAX), asyncio.Semaphore(limits.CONNECTIONS_MAX)
        doors: list[tuple[socket, Callable[[socket], Coroutine[Any, Any, None]], asyncio.Semaphore]] = [
            (listeners.model, self._model_door(listeners.model), asyncio.Semaphore(limits.CONNECTIONS_MAX)),
            (listeners.proxy, self._attend_proxy, others),
            (listeners.names_tcp, self._attend_names, names),
            *(
                (listener, partial(self._attend_transparent, port), others)
                for port, listener in listeners.transparent.items()
            ),
        ]
        try:
            async with asyncio.TaskGroup() as group:
                for listener, attend, room in doors:
                    queue = self._turns.new_model if listener is listeners.model else self._turns.others
                    group.create_task(self._accept(group, listener, attend, room, queue))
                group.create_task(self._answer_names(listeners.names_udp))
        finally:
            for listener in (listeners.names_udp, *(listener for listener, _, _ in doors)):
                listener.close()
            self._reports.flush()

    async def _accept(
        self,
        group: asyncio.TaskGroup,
        listener: socket,
        attend: Callable[[socket], Coroutine[Any, Any, None]],
        room: asyncio.Semaphore,
        queue: CpuQueue,
    ) -> None:
        listener.setblocking(False)
        while True:
            try:
                accepted = await _accepted(listener, room, queue)
            except OSError as error:  # the peer is gone already, or there is no descriptor left
                if error.errno == EINVAL:
                    raise  # it does not listen any more: nobody will ever come
                await asyncio.sleep(0.1)
                continue
            task = group.create_task(self._contain(attend, accepted))
            task.add_done_callback(partial(_leave, accepted, room))

    async def _contain(self, attend: Callable[[socket], Coroutine[Any, Any, None]], accepted: socket) -> None:
        """What goes wrong with one connection ends that connection only."""
        try:
            await attend(accepted)
        except Exception as error:
            self._give_up("A connection", error)

    def _give_up(self, what: str, error: Exception) -> None:
        kinds = sorted({type(one).__name__ for one in getattr(error, "exceptions", [error])})
        with suppress(Exception):
            self._reports.trouble("gateway_error", f"{what} was given up: {', '.join(kinds)}.")

    def _model_door(self, listener: socket) -> Callable[[socket], Coroutine[Any, Any, None]]:
        port = listener.getsockname()[1]
        policy = ModelPolicy(self._task_key, port)

        async def attend(accepted: socket) -> None:
            if _has_left(accepted):
                return
            conversation = ModelConversation(policy, self._admission, self._dialler.upstream, self._reports, port)
            self._model_conversations.add(conversation)
            try:
                line = await self._line(accepted)
                await ModelVisit(conversation, line, self._turns, self._dialler, self._released).run()
            finally:
                self._model_conversations.discard(conversation)
                conversation.abandon()

        return attend

    async def _attend_proxy(self, accepted: socket) -> None:
        await self._attend_egress(ProxyOpening(self._proxy_policy, accepted.getsockname()[1]), accepted)

    async def _attend_transparent(self, port: int, accepted: socket) -> None:
        address = accepted.getsockname()[0]
        name = self._addresses.name_of(address)
        if port not in (HTTP_PORT, HTTPS_PORT):
            await self._attend_egress(open_at_once(self._policy, name, address, port), accepted)
            return
        kind = HttpOpening if port == HTTP_PORT else TlsOpening
        await self._attend_egress(kind(self._policy, name, address, port), accepted)

    async def _line(self, accepted: socket) -> Line:
        line = await Line.over(accepted)
        self._inside.add(line)
        return line

    async def _attend_egress(self, opening: Opening | Passage | Refusal, accepted: socket) -> None:
        line = await self._line(accepted)
        await EgressVisit(opening, line, self._reports, self._outward, self._turns).run()

    async def _attend_names(self, accepted: socket) -> None:
        line = await self._line(accepted)
        await Visit(NamesConversation(self._names), line, self._turns, self._turns.others).run()

    async def _answer_names(self, listener: socket) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                await self._turns.names.wait()
                query, sender = await loop.sock_recvfrom(listener, limits.DATAGRAM_BYTES_MAX)
                reply = self._names.answer(query)
                if reply is not None:
                    listener.sendto(reply, sender)
            except OSError:  # a reply that cannot be sent now is lost, as datagrams may be
                await asyncio.sleep(0.01)
            except Exception as error:
                self._give_up("A name query", error)
            await asyncio.sleep(0)  # a flood of queries must not take the loop from everybody else


async def _accepted(listener: socket, room: asyncio.Semaphore, queue: CpuQueue) -> socket:
    """The next connection, as of a loop's `sock_accept`, which complains where it is cancelled as the listener dies.

    It has a place in the room; a listener that nobody comes to keeps none from the others. Raises OSError.
    """
    while True:
        await _readable(listener)
        await queue.wait()
        await room.acquire()
        try:
            accepted, _ = listener.accept()
        except (BlockingIOError, InterruptedError):
            room.release()
        except OSError:
            room.release()
            raise
        else:
            accepted.setblocking(False)
            return accepted


def _has_left(accepted: socket) -> bool:
    """Whether the peer closed the connection before it sent anything."""
    try:
        return not accepted.recv(1, MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


async def _readable(listener: socket) -> None:
    loop, there_is = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(listener, there_is.set)
    try:
        await there_is.wait()
    finally:
        loop.remove_reader(listener)


def _leave(accepted: socket, room: asyncio.Semaphore, _task: asyncio.Task[None]) -> None:
    accepted.close()
    room.release()
