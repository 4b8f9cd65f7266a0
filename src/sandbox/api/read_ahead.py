"""What one client of a stream is sent: read ahead within a bound, handed out in batches."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from sandbox.api import share
from sandbox.api.view import Messages, close

READ_AHEAD_BYTES_MAX = 256 * 1024
"""What waits in memory for one client; past it the source is not asked for more until the client took some."""

_SKIPPED_MAX = 256


class ReadAhead:
    """Reads `source` in a task of its own from `__aenter__` on, until it ends or one of `end_after` comes."""

    def __init__(self, source: AsyncIterator[Messages]) -> None:
        self._source = source
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._is_over = False
        self._changed = asyncio.Event()
        self._has_room = asyncio.Event()
        self._helpers: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> Self:
        """The source has taken its first step on return, so a subscription stands."""
        self.end_after(self._read())
        await asyncio.sleep(0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing of it runs any longer on return."""
        for helper in self._helpers:
            helper.cancel()
        await asyncio.gather(*self._helpers, return_exceptions=True)

    def end_after(self, occasion: Coroutine[Any, Any, Any]) -> None:
        """End when `occasion` is over; what is in memory by then is still handed out."""
        helper: asyncio.Task[Any] = asyncio.create_task(occasion)
        helper.add_done_callback(self._note_end)
        self._helpers.append(helper)

    def _note_end(self, _: asyncio.Task[Any]) -> None:
        self._is_over = True
        self._changed.set()

    async def batch(self, idle_seconds: float | None = None) -> list[bytes] | None:
        """Everything that waits; empty when nothing came for `idle_seconds`, None at the end.

        Raises what the source raised.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(idle_seconds):
                await self._changed.wait()
        batch, self._waiting, self._waiting_bytes = self._waiting, [], 0
        self._has_room.set()
        if not self._is_over:
            self._changed.clear()
            return batch
        if not batch:
            self._raise_what_went_wrong()
        return batch or None

    def _raise_what_went_wrong(self) -> None:
        for helper in self._helpers:
            if helper.done() and not helper.cancelled() and (error := helper.exception()):
                raise error

    async def _read(self) -> None:
        skipped = 0
        try:
            async for messages in self._source:
                await share.take(sum(map(len, messages)))
                if messages:
                    await self._hand_over(messages)
                    continue
                skipped += 1
                if skipped % _SKIPPED_MAX == 0:
                    await asyncio.sleep(0)
        finally:
            await close(self._source)

    async def _hand_over(self, messages: Messages) -> None:
        self._waiting.extend(messages)
        self._waiting_bytes += sum(map(len, messages))
        self._changed.set()
        if self._waiting_bytes > READ_AHEAD_BYTES_MAX:
            self._has_room.clear()
            await self._has_room.wait()
