"""A connection from inside to a host beside the model: opened as it must be, then carried both ways."""

import asyncio
from functools import partial

from sandbox.gateway import limits
from sandbox.gateway.connection import Turns
from sandbox.gateway.egress.dialer import NotDialledError, NotReachedError, Outward
from sandbox.gateway.egress.policy import Opening, Passage, Refusal, Sieve, sentence
from sandbox.gateway.event_reporter import Reports
from sandbox.gateway.transport import READ_BYTES, RELAY_BYTES, Line


class EgressVisit:
    """One of them; `opening` may be judged already. Its work waits for its turn among the sandbox's connections."""

    def __init__(
        self,
        opening: Opening | Passage | Refusal,
        client: Line,
        reports: Reports,
        outward: Outward,
        turns: Turns,
    ) -> None:
        self._opening = opening
        self._client = client
        self._reports = reports
        self._outward = outward
        self._turns = turns
        self._has_half_ended = False
        self._host_was_heard = False
        self._refusal: Refusal | None = None

    async def run(self) -> None:
        """Until both sides have ended, or one is silent for too long."""
        try:
            opening = self._opening
            outcome = opening if isinstance(opening, Passage | Refusal) else await self._open(opening)
            host = await self._dial(outcome) if isinstance(outcome, Passage) else outcome
            if isinstance(host, Refusal):
                await self._refuse(host)
            elif isinstance(outcome, Passage) and host is not None:
                await self._carry(outcome, host)
        finally:
            self._client.cut()

    async def _open(self, opening: Opening) -> Passage | Refusal:
        self._client.renew(limits.HEAD_SECONDS)
        while True:
            data = await self._client.read()
            outcome = await self._turns.judge(self._turns.others, partial(opening.client_sent, data))
            if outcome is not None:
                return outcome

    async def _dial(self, passage: Passage) -> Line | Refusal | None:
        waiting_seconds = limits.CONNECTIONS_MAX / limits.HOST_CONNECTIONS_PER_SECOND  # for those that came before
        self._client.renew(waiting_seconds + limits.CONNECT_SECONDS + 2 * limits.LOOKUP_SECONDS)
        host, port = passage.host, passage.port
        try:
            return await self._outward.dial(host, port)
        except NotDialledError as error:
            return Refusal(host, port, str(error), passage.unreached(403, sentence(host, port, str(error))))
        except NotReachedError as error:
            self._reports.trouble("host_unreachable", str(error))
            await self._say_last(passage.unreached(error.status, str(error)))
            return None

    async def _refuse(self, refusal: Refusal) -> None:
        self._reports.denied(refusal.host, refusal.port, refusal.reason)
        await self._say_last(refusal.answer)

    async def _say_last(self, answer: bytes) -> None:
        """What the client has sent beyond is read, so that its answer is not lost."""
        self._client.renew(limits.LINGER_SECONDS)
        self._client.write(answer)
        self._client.end()
        while await self._client.read():
            await self._turns.others.wait()

    async def _carry(self, passage: Passage, host: Line) -> None:
        try:
            self._client.write(passage.greeting)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry_out(passage.sieve, host))
                group.create_task(self._carry_in(passage.sieve, host))
        finally:
            host.cut()
        if self._refusal is not None:
            await self._refuse(self._refusal)

    async def _carry_out(self, sieve: Sieve, host: Line) -> None:
        onward = sieve.begin()
        data = b"-"
        while True:
            self._renew(host)
            if isinstance(onward, Refusal):
                self._refusal = onward
                host.cut()  # which ends the other way too
                if self._host_was_heard:  # and an answer of ours would stand in the middle of the host's
                    self._client.cut()
                return
            host.write(onward)
            await host.drain()
            if not data:
                host.end()
                self._has_half_ended = True
                self._renew(host)
                return
            data = await self._client.read(RELAY_BYTES if sieve.is_free else READ_BYTES)
            onward = await self._turns.judge(self._turns.others, partial(sieve.client_sent, data))

    async def _carry_in(self, sieve: Sieve, host: Line) -> None:
        while (data := await host.read(RELAY_BYTES)) and not self._client.is_gone:
            await self._turns.others.wait()
            self._renew(host)
            self._host_was_heard = True
            sieve.host_spoke()
            self._client.write(data)
            await self._client.drain()
        if self._refusal is not None:
            return
        self._host_was_heard = True
        self._client.end()
        self._has_half_ended = True
        self._renew(host)
        if sieve.is_over:
            self._client.renew(limits.LINGER_SECONDS)
        if self._client.is_gone:
            host.cut()

    def _renew(self, host: Line) -> None:
        seconds = limits.HALF_OPEN_SECONDS if self._has_half_ended else limits.TUNNEL_IDLE_SECONDS
        self._client.renew(seconds)
        host.renew(seconds)
