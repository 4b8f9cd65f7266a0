"""Handles connections from the sandbox: moves bytes between sockets and a sans-I/O protocol."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from sandbox.gateway import limits
from sandbox.gateway.limits import MODEL_CONNECTION_CPU_DEBT_SECONDS_MAX, NEW_MODEL_CONNECTION_CPU_DEBT_SECONDS_MAX
from sandbox.gateway.sans_io import Effects, Phase, SansIOProtocol
from sandbox.gateway.tcp_connections import READ_BYTES, Stream
from sandbox.primitives.runner_cpu_throttle import CpuQueue, CpuThrottle

T = TypeVar("T")


class PriorityCpuQueues:
    """CPU queues in order of ascending priority.

    The first queue is for DNS and other non-model traffic, the second for new model connections, the last for active
    ones.

    A sandbox can send any amount of data for the gateway to parse. CPU time is therefore limited, and the data of only
    one connection is parsed at a time. The runner's other work, such as measuring and stopping the sandbox, runs in
    between. After long work, the next work waits for as long as the long work took, because one turn of the event loop
    is too short for a measurement.
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
