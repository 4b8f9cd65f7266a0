"""The gateway's sockets, and no other file of the gateway has any.

Runs inside the task's runner, on the listeners that the runtime opened inside the sandbox's network namespace.
The upstream is dialled directly, with the system's resolver: no HTTPS_PROXY, no redirect.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from socket import socket
from typing import TYPE_CHECKING, Any

from sandbox.contracts.gateway import Gateway, ModelUpstream, Report
from sandbox.contracts.runtime import Listeners
from sandbox.gateway import limits
from sandbox.gateway.conversation import Conversation, Phase, Reaction
from sandbox.gateway.model import ModelConversation
from sandbox.gateway.policy import ModelPolicy
from sandbox.gateway.refusal import HttpRefusal, NamesRefusal, TlsRefusal, refuse_name
from sandbox.gateway.reports import Reports
from sandbox.gateway.upstream import Upstream, parse_upstream

if TYPE_CHECKING:
    from ssl import SSLContext

_READ_BYTES = 16 * 1024
"""So little that what is in it, a thousand chunks of a byte each for example, is soon judged."""

_PATIENCE_SECONDS = {
    Phase.HEAD: limits.HEAD_SECONDS,
    Phase.BODY: limits.BODY_SECONDS,
    Phase.ANSWER: limits.ANSWER_SECONDS,
    Phase.IDLE: limits.KEEP_ALIVE_SECONDS,
    Phase.OVER: limits.LINGER_SECONDS,
}


class SocketGateways:
    """Makes gateways that serve `isolated` tasks: the model and nothing else."""

    def open(self, upstream: ModelUpstream, task_key: str, report: Report) -> Gateway:
        """Raises ValueError, with a sentence, for an upstream or a key that cannot be used."""
        return SocketGateway(parse_upstream(upstream), task_key, report)


class SocketGateway:
    """Serves one sandbox."""

    def __init__(self, upstream: Upstream, task_key: str, report: Report) -> None:
        self._dialler = _Dialler(upstream)
        self._task_key = task_key
        self._reports = Reports(report, time.monotonic)
        self._model_conversations: set[ModelConversation] = set()
        self._turns = asyncio.Lock()

    @property
    def requests_in_flight(self) -> int:
        """Model requests that were forwarded and are not answered to their end."""
        return sum(conversation.is_in_flight for conversation in self._model_conversations)

    async def serve(self, listeners: Listeners) -> None:
        """Answer until cancelled; then every connection and every listener is closed."""
        others = asyncio.Semaphore(limits.CONNECTIONS_MAX)
        doors: list[tuple[socket, Callable[[socket], Coroutine[Any, Any, None]], asyncio.Semaphore]] = [
            (listeners.model, self._model_door(listeners.model), asyncio.Semaphore(limits.CONNECTIONS_MAX)),
            (listeners.proxy, self._attend_proxy, others),
            (listeners.names_tcp, self._attend_names, others),
            *(
                (listener, partial(self._attend_transparent, port), others)
                for port, listener in listeners.transparent.items()
            ),
        ]
        try:
            async with asyncio.TaskGroup() as group:
                for listener, attend, room in doors:
                    group.create_task(self._accept(group, listener, attend, room))
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
    ) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            await room.acquire()
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError:  # the peer is gone already, or there is no descriptor left
                room.release()
                await asyncio.sleep(0.1)
                continue
            task = group.create_task(self._contain(attend, accepted))
            task.add_done_callback(partial(_leave, accepted, room))
            await asyncio.sleep(0)  # an accept that need not wait gives nobody else a turn

    async def _contain(self, attend: Callable[[socket], Coroutine[Any, Any, None]], accepted: socket) -> None:
        """What goes wrong with one connection ends that connection only."""
        try:
            await attend(accepted)
        except Exception as error:
            kinds = sorted({type(one).__name__ for one in getattr(error, "exceptions", [error])})
            with suppress(Exception):
                self._reports.trouble("gateway_error", f"A connection was given up: {', '.join(kinds)}.")

    def _model_door(self, listener: socket) -> Callable[[socket], Coroutine[Any, Any, None]]:
        port = listener.getsockname()[1]
        policy = ModelPolicy(self._task_key, port)

        async def attend(accepted: socket) -> None:
            conversation = ModelConversation(policy, self._dialler.upstream, self._reports, port)
            self._model_conversations.add(conversation)
            try:
                await _ModelVisit(conversation, await _Line.over(accepted), self._turns, self._dialler).run()
            finally:
                self._model_conversations.discard(conversation)

        return attend

    async def _attend_proxy(self, accepted: socket) -> None:
        port = accepted.getsockname()[1]
        await _Visit(HttpRefusal("proxy", port, self._reports), await _Line.over(accepted), self._turns).run()

    async def _attend_names(self, accepted: socket) -> None:
        await _Visit(NamesRefusal(self._reports), await _Line.over(accepted), self._turns).run()

    async def _attend_transparent(self, port: int, accepted: socket) -> None:
        address = accepted.getsockname()[0]
        refusal = (HttpRefusal if port == 80 else TlsRefusal)(address, port, self._reports)
        await _Visit(refusal, await _Line.over(accepted), self._turns).run()

    async def _answer_names(self, listener: socket) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                query, sender = await loop.sock_recvfrom(listener, limits.DATAGRAM_BYTES_MAX)
                reply = refuse_name(query, self._reports)
                if reply is not None:
                    listener.sendto(reply, sender)
            except OSError:  # a reply that cannot be sent now is lost, as datagrams may be
                await asyncio.sleep(0.01)
            await asyncio.sleep(0)  # a flood of queries must not take the loop from everybody else


def _leave(accepted: socket, room: asyncio.Semaphore, _task: asyncio.Task[None]) -> None:
    accepted.close()
    room.release()


class _UnreachableError(Exception):
    """The upstream could not be dialled."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class _Dialler:
    """Opens connections to the upstream."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self._tls: SSLContext | None = None

    async def dial(self) -> "_Line":
        """Raises _UnreachableError."""
        upstream = self.upstream
        tls = self._context() if upstream.is_tls else None
        try:
            async with asyncio.timeout(limits.CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(
                    upstream.host, upstream.port, ssl=tls, server_hostname=upstream.host if tls else None
                )
        except TimeoutError:
            message = f"The model at {upstream.address} could not be reached within {limits.CONNECT_SECONDS:.0f} s."
            raise _UnreachableError(504, message) from None
        except OSError as error:
            reason = error.strerror or type(error).__name__
            message = f"The model at {upstream.address} cannot be reached ({reason}); check ANTHROPIC_BASE_URL."
            raise _UnreachableError(502, message) from None
        return _Line(reader, writer)

    def _context(self) -> "SSLContext":
        if self._tls is None:
            import ssl

            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls


class _Line:
    """One TCP connection, cut when it is not renewed in time. Its peer going away is an end, never an error."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._timer: asyncio.TimerHandle | None = None
        self.has_timed_out = False

    @classmethod
    async def over(cls, accepted: socket) -> "_Line":
        return cls(*await asyncio.open_connection(sock=accepted))

    async def read(self) -> bytes:
        """The next bytes, none at the end."""
        try:
            return await self._reader.read(_READ_BYTES)
        except OSError:
            return b""

    def write(self, data: bytearray) -> None:
        if data and not self._writer.is_closing():
            self._writer.write(bytes(data))

    async def drain(self) -> None:
        """Wait until the peer has taken most of what was written."""
        with suppress(OSError):
            await self._writer.drain()

    def end(self) -> None:
        """Nothing more is written after what was."""
        with suppress(OSError):
            self._writer.write_eof()

    def renew(self, seconds: float) -> None:
        """Cut the line after so long from now."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._time_out)

    def cut(self) -> None:
        """End it at once, whatever was not yet sent."""
        if self._timer is not None:
            self._timer.cancel()
        self._writer.transport.abort()

    def _time_out(self) -> None:
        self.has_timed_out = True
        self._writer.transport.abort()


class _Visit:
    """One connection from inside, carried through its conversation.

    Judging what came is work, and inside they can make as much of it as they like. So the connections of a sandbox
    take turns, and after each turn everything else that the runner has to do comes first: ending the sandbox, say.
    """

    def __init__(self, conversation: Conversation, client: _Line, turns: asyncio.Lock) -> None:
        self._conversation = conversation
        self._client = client
        self._turns = turns
        self._phase: Phase | None = None

    async def run(self) -> None:
        """Until either side ends it."""
        try:
            await self._listen()
        finally:
            self._client.cut()

    async def _listen(self) -> None:
        self._renew()
        while data := await self._client.read():
            async with self._turns:
                await asyncio.sleep(0)
                reaction = self._conversation.client_sent(data)
            await self._carry_out(reaction)
        await self._carry_out(self._conversation.client_sent(b""))

    async def _carry_out(self, reaction: Reaction) -> None:
        self._client.write(reaction.to_client)
        self._renew()
        if reaction.hang_up_client:
            self._client.end()
        if reaction.to_client:
            await self._client.drain()

    def _renew(self) -> None:
        phase = self._conversation.phase
        # A head and a last answer have one bound from beginning to end, however slowly they drip.
        if phase is self._phase and phase in (Phase.HEAD, Phase.OVER):
            return
        self._phase = phase
        self._client.renew(_PATIENCE_SECONDS[phase])


class _ModelVisit(_Visit):
    """A visit that talks to the upstream too. The connection there is kept for the same client's next request."""

    def __init__(self, conversation: ModelConversation, client: _Line, turns: asyncio.Lock, dialler: _Dialler) -> None:
        super().__init__(conversation, client, turns)
        self._model_conversation = conversation
        self._dialler = dialler
        self._upstream: _Line | None = None

    async def run(self) -> None:
        """Until either side ends it."""
        try:
            async with asyncio.TaskGroup() as self._group:
                await super().run()
                self._drop_upstream()  # which ends the relay
        finally:
            self._drop_upstream()

    async def _carry_out(self, reaction: Reaction) -> None:
        if reaction.hang_up_upstream:
            self._drop_upstream()
        if reaction.dial:
            reaction = await self._dial(reaction)
        upstream = self._upstream
        if upstream is not None:
            upstream.write(reaction.to_upstream)
            # While it owes nothing it is kept for a short time only: the other end may close it at any moment.
            is_owed = self._model_conversation.is_in_flight
            upstream.renew(limits.UPSTREAM_SECONDS if is_owed else limits.UPSTREAM_IDLE_SECONDS)
        await super()._carry_out(reaction)
        if upstream is not None and reaction.to_upstream:
            await upstream.drain()

    async def _dial(self, reaction: Reaction) -> Reaction:
        """Open the connection that the reaction needs; gives what is to be done instead when that fails."""
        try:
            self._upstream = await self._dialler.dial()
        except _UnreachableError as error:
            failed = self._model_conversation.upstream_failed(error.status, error.message)
            failed.to_client[:0] = reaction.to_client
            return failed
        self._group.create_task(self._relay(self._upstream))
        return reaction

    async def _relay(self, line: _Line) -> None:
        """Hear the upstream until this connection to it ends or is given up."""
        data = b"-"
        while data:
            data = await line.read()
            if line is not self._upstream:
                return
            if line.has_timed_out:
                await self._carry_out(
                    self._model_conversation.upstream_failed(504, "The model did not answer in time.")
                )
            else:
                await self._carry_out(self._model_conversation.upstream_sent(data))

    def _drop_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.cut()
            self._upstream = None
