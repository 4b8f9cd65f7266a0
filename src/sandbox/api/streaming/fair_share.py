"""Fair sharing of the event loop: a client with many streams does not delay the others."""

from __future__ import annotations

import asyncio
from collections import deque
from contextvars import ContextVar
from weakref import WeakValueDictionary

MESSAGES_PER_TURN_MAX = 64
"""Messages of up to 4 KiB that are encoded or sent for one client per iteration of the event loop."""

_UNIT_BYTES = 4 * 1024


class FairShare:
    """The share of one client, over all of its connections. FIFO."""

    def __init__(self) -> None:
        self._messages_left = MESSAGES_PER_TURN_MAX
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._has_renewal_scheduled = False

    async def take(self, size_bytes: int) -> None:
        """Wait until a message of this size may be encoded or sent."""
        units = 1 + size_bytes // _UNIT_BYTES
        if self._messages_left > 0 and not self._waiting:
            self._messages_left -= units
            self._schedule_renewal()
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, units))
        self._schedule_renewal()
        await turn

    def _schedule_renewal(self) -> None:
        if not self._has_renewal_scheduled:
            self._has_renewal_scheduled = True
            asyncio.get_running_loop().call_soon(self._renew)

    def _renew(self) -> None:
        self._has_renewal_scheduled = False
        self._messages_left = MESSAGES_PER_TURN_MAX
        while self._waiting and self._messages_left > 0:
            turn, units = self._waiting.popleft()
            if not turn.done():  # otherwise it was cancelled
                turn.set_result(None)
                self._messages_left -= units
        if self._waiting:
            self._schedule_renewal()


class FairShares:
    """The shares of all active clients."""

    def __init__(self) -> None:
        self._shares: WeakValueDictionary[str, FairShare] = WeakValueDictionary()

    def of(self, client: str) -> FairShare:
        """Return the client's share, the same one for as long as it is referenced."""
        share = self._shares.get(client)
        if share is None:
            share = self._shares[client] = FairShare()
        return share


_SHARE: ContextVar[FairShare | None] = ContextVar("share", default=None)


def use(share: FairShare) -> None:
    """Use this share in the current asyncio task and in tasks it creates."""
    _SHARE.set(share)


async def take(size_bytes: int) -> None:
    """Wait for the current share to admit a message of this size; returns immediately without a share."""
    if (share := _SHARE.get()) is not None:
        await share.take(size_bytes)
