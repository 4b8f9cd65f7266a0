"""How much output a task may write down, and how fast."""

import asyncio

from sandbox.contracts.clock import Clock
from sandbox.model.limits import OUTPUT_BURST_BYTES, OUTPUT_BYTES_MAX, OUTPUT_BYTES_PER_SECOND
from sandbox.model.task import Task

_RECORD_BYTES = 128
"""What a record takes in the journal beside its text: a flood of empty lines is a flood all the same."""


def output_cost_bytes(task: Task) -> int:
    """Of what earlier attempts wrote down. Which of their records were output is told nowhere: all count as such."""
    return task.progress.output_bytes + task.last_seq * _RECORD_BYTES


class OutputAllowance:
    """Holds back whoever writes too fast, loses nothing of it, and ends at a total.

    left_out_bytes: what came after the total was used up. used_bytes: what earlier attempts cost.
    """

    def __init__(self, clock: Clock, used_bytes: int = 0) -> None:
        self.left_out_bytes = 0
        self._clock = clock
        self._used_bytes = used_bytes
        self._at_once_bytes = float(OUTPUT_BURST_BYTES)
        self._seen_at = clock.monotonic()

    async def admits(self, size_bytes: int) -> bool:
        """Whether a piece may be written down; returns when it is its turn."""
        cost_bytes = size_bytes + _RECORD_BYTES
        if self._used_bytes + cost_bytes > OUTPUT_BYTES_MAX:
            self.left_out_bytes += size_bytes
            return False
        self._used_bytes += cost_bytes
        self._at_once_bytes -= cost_bytes
        if self._at_once_bytes < 0:
            await self._wait()
        return True

    async def _wait(self) -> None:
        now = self._clock.monotonic()
        gained_bytes = (now - self._seen_at) * OUTPUT_BYTES_PER_SECOND
        self._at_once_bytes = min(self._at_once_bytes + gained_bytes, OUTPUT_BURST_BYTES)
        self._seen_at = now
        if self._at_once_bytes < 0:
            await asyncio.sleep(-self._at_once_bytes / OUTPUT_BYTES_PER_SECOND)
