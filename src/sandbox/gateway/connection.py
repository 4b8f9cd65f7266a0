"""A connection from inside, carried through its conversation by sockets."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from sandbox.gateway import limits
from sandbox.gateway.limits import MODEL_DEBT_SECONDS, NEW_MODEL_DEBT_SECONDS
from sandbox.gateway.model.dialer import ModelDialler, UnreachableError
from sandbox.gateway.model.protocol import ModelConversation
from sandbox.gateway.protocol import Conversation, Phase, Reaction
from sandbox.gateway.transport import FIRST_READ_BYTES, READ_BYTES, Line
from sandbox.system.cpu_throttle import CpuQueue, CpuThrottle

T = TypeVar("T")


class Turns:
    """Queues by priority: traffic that is not for the model, new model connections, model connections in use.

    A sandbox can cause any amount of parsing. So data of one connection is parsed at a time, other work of the runner
    (such as ending the sandbox) runs in between, and the CPU time is bounded.
    """

    def __init__(self, throttle: CpuThrottle) -> None:
        self.others = throttle.queue()
        self.names = throttle.queue()
        self.new_model = throttle.queue(NEW_MODEL_DEBT_SECONDS)
        self.model = throttle.queue(MODEL_DEBT_SECONDS)
        self._judging = asyncio.Lock()

    async def judge(self, queue: CpuQueue, work: Callable[[], T]) -> T:
        """Run `work` once it is its turn; return its result."""
        async with queue, self._judging:
            await asyncio.sleep(0)
            return work()


PATIENCE = {
    Phase.HEAD: limits.HEAD_SECONDS,
    Phase.BODY: limits.BODY_SECONDS,
    Phase.HELD: limits.HOLD_SECONDS + limits.LINGER_SECONDS,
    Phase.ANSWER: limits.ANSWER_SECONDS,
    Phase.IDLE: limits.KEEP_ALIVE_SECONDS,
    Phase.OVER: limits.LINGER_SECONDS,
}
"""Seconds until a client in this phase is cut off."""


class Visit:
    """One connection from inside, carried through its conversation. What comes waits for its turn in `queue`."""

    def __init__(self, conversation: Conversation, client: Line, turns: Turns, queue: CpuQueue) -> None:
        self._conversation = conversation
        self._client = client
        self._turns = turns
        self._queue = queue
        self._phase: Phase | None = None
        self._read_bytes = READ_BYTES

    async def run(self) -> None:
        """Until either side ends it."""
        try:
            await self._listen()
        finally:
            self._client.cut()

    async def _listen(self) -> None:
        self._renew()
        while data := await self._client.read(self._read_bytes):
            await self._carry_out(await self._in_turn(partial(self._conversation.client_sent, data)))
        await self._carry_out(self._conversation.client_sent(b""))

    async def _in_turn(self, judge: Callable[[], Reaction]) -> Reaction:
        return await self._turns.judge(self._queue, judge)

    async def _carry_out(self, reaction: Reaction) -> None:
        self._client.write(reaction.to_client)
        self._renew()
        if reaction.hang_up_client:
            self._client.end()
        if reaction.to_client:
            await self._wait_for_client()

    async def _wait_for_client(self) -> None:
        await self._client.drain()

    def _renew(self) -> None:
        phase = self._conversation.phase
        # A head and a last answer have one bound from beginning to end, however slowly they drip.
        if phase is self._phase and phase in (Phase.HEAD, Phase.OVER):
            return
        self._phase = phase
        self._client.renew(PATIENCE[phase])


class ModelVisit(Visit):
    """A visit that talks to the upstream too. The connection there is kept for the same client's next request.

    It has the model's priority from a request that was forwarded on, and loses it to one that was refused.
    """

    def __init__(
        self,
        conversation: ModelConversation,
        client: Line,
        turns: Turns,
        dialler: ModelDialler,
        released: asyncio.Event,
    ) -> None:
        super().__init__(conversation, client, turns, turns.new_model)
        self._unproven_cpu_seconds, self._read_bytes = 0.0, FIRST_READ_BYTES
        self._released = released
        self._hold: asyncio.Task[None] | None = None
        self._model_conversation = conversation
        self._dialler = dialler
        self._upstream: Line | None = None
        self._patience_seconds = limits.TAKING_SECONDS
        self._relaying: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until either side ends it, or the model has said what its client did not wait for."""
        try:
            async with asyncio.TaskGroup() as self._group:
                await super().run()
                if self._relaying is not None and self._model_conversation.is_in_flight:
                    await asyncio.wait({self._relaying})
                self._drop_upstream()  # which ends the relay
                if self._hold is not None:
                    self._hold.cancel()
        finally:
            self._drop_upstream()

    async def _in_turn(self, judge: Callable[[], Reaction]) -> Reaction:
        reaction = await super()._in_turn(partial(self._timed, judge))
        if self._model_conversation.is_in_flight:
            self._queue, self._unproven_cpu_seconds, self._read_bytes = self._turns.model, 0.0, READ_BYTES
        elif reaction.to_client or self._unproven_cpu_seconds > limits.MODEL_PRIORITY_CPU_SECONDS:
            self._queue = self._turns.others
        return reaction

    def _timed(self, judge: Callable[[], Reaction]) -> Reaction:
        began = time.thread_time()
        try:
            return judge()
        finally:
            self._unproven_cpu_seconds += time.thread_time() - began

    async def _carry_out(self, reaction: Reaction) -> None:
        if reaction.hang_up_upstream:
            self._drop_upstream()
        if reaction.dial:
            reaction = await self._dial(reaction)
        upstream, has_more = self._upstream, bool(reaction.to_upstream)
        if upstream is not None:
            upstream.write(reaction.to_upstream)
            reaction.to_upstream.clear()  # a large body need not be there twice
            upstream.pause()
        if has_more:
            self._patience_seconds = limits.TAKING_SECONDS
        await super()._carry_out(reaction)
        self._renew_upstream()
        if upstream is not None and has_more:
            await upstream.drain()
            self._model_conversation.upstream_took()
        if self._phase is Phase.HELD and self._hold is None:
            self._hold = self._group.create_task(self._await_release())

    async def _wait_for_client(self) -> None:
        if not self._model_conversation.must_be_heard:
            await super()._wait_for_client()
            return
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(self._patience_seconds):
                await super()._wait_for_client()
        except TimeoutError:
            await self._carry_out(self._model_conversation.client_stalled())
        self._patience_seconds -= loop.time() - began

    def _renew_upstream(self) -> None:
        if self._upstream is not None:
            # While it owes nothing it is kept for a short time only: the other end may close it at any moment.
            is_owed = self._model_conversation.is_in_flight
            self._upstream.renew(limits.UPSTREAM_SECONDS if is_owed else limits.UPSTREAM_IDLE_SECONDS)

    async def _await_release(self) -> None:
        try:
            async with asyncio.timeout(limits.HOLD_SECONDS):
                await self._released.wait()
            judge = self._model_conversation.go_on
        except TimeoutError:
            judge = self._model_conversation.give_up_waiting
        reaction = await self._in_turn(judge)  # all that were held are released at once
        self._hold = None
        await self._carry_out(reaction)

    async def _dial(self, reaction: Reaction) -> Reaction:
        """Open the connection that the reaction needs; gives what is to be done instead when that fails."""
        try:
            line = await self._dialler.dial()
        except UnreachableError as error:
            failed = self._model_conversation.upstream_failed(error.status, error.message)
            failed.to_client[:0] = reaction.to_client
            return failed
        if not self._model_conversation.is_in_flight:  # its client has gone meanwhile
            line.cut()
            return Reaction()
        self._upstream = line
        self._relaying = self._group.create_task(self._relay(line))
        return reaction

    async def _relay(self, line: Line) -> None:
        """Hear the upstream until this connection to it ends or is given up."""
        data = b"-"
        while data:
            data = await line.read()
            await self._turns.model.wait()
            if line is not self._upstream:
                return
            if line.has_timed_out:
                await self._carry_out(self._model_conversation.upstream_fell_silent())
            else:
                await self._carry_out(self._model_conversation.upstream_sent(data))

    def _drop_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.cut()
            self._upstream = None
