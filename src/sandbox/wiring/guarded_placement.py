"""Runners of a server with tokens are told to clone from the named host only."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from sandbox.contracts.access import Access
from sandbox.contracts.placement import LaunchOrder, Placement


@dataclass(frozen=True, slots=True)
class GuardedPlacement:
    """Looks whether there are tokens each time a runner starts: they may come while the server runs."""

    placement: Placement
    access: Access

    async def launch(self, order: LaunchOrder, lock_fd: int) -> None:
        """See `Placement.launch`."""
        told = msgspec.structs.replace(order, follow_redirects=not self.access.has_tokens)
        await self.placement.launch(told, lock_fd)
