"""The order in which the connections of a sandbox are attended to."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from sandbox.contracts.cpu_throttle import CpuQueue, CpuThrottle
from sandbox.gateway.limits import MODEL_DEBT_SECONDS, NEW_MODEL_DEBT_SECONDS

T = TypeVar("T")


class Turns:
    """Queues by priority: all that is not the model's, new connections to the model, those that were let through.

    Judging what came is work, and inside they can make as much of it as they like. So one connection is judged at a
    time, after each of them everything else that the runner has to do comes first (ending the sandbox, say), and the
    CPU time of all this is bounded.
    """

    def __init__(self, throttle: CpuThrottle) -> None:
        self.others = throttle.queue()
        self.names = throttle.queue()
        self.new_model = throttle.queue(NEW_MODEL_DEBT_SECONDS)
        self.model = throttle.queue(MODEL_DEBT_SECONDS)
        self._judging = asyncio.Lock()

    async def judge(self, queue: CpuQueue, work: Callable[[], T]) -> T:
        """What `work` gives, once it is its turn."""
        async with queue, self._judging:
            await asyncio.sleep(0)
            return work()
