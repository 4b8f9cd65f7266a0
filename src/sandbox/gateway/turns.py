"""The order in which the connections of a sandbox are served."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from sandbox.contracts.cpu_throttle import CpuQueue, CpuThrottle
from sandbox.gateway.limits import MODEL_DEBT_SECONDS, NEW_MODEL_DEBT_SECONDS

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
