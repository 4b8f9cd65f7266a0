"""Sandboxes that nobody carries on any more: their processes, namespaces, mounts and control groups."""

import asyncio
from collections.abc import Collection
from pathlib import Path

import msgspec

from sandbox.contracts.layout import AttemptLayout
from sandbox.contracts.runtime import Runtime, SandboxHandle
from sandbox.model.decoding import DECODE_ERRORS


class SandboxLeftovers:
    """Implements `contracts.leftovers.Leftovers`.

    One runtime is enough for all of them: they are named, marked and ended in the same way.
    """

    kind = "sandbox"
    is_private = False

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def attempt_ids(self) -> Collection[str]:
        """Those with a control group, or with a marked process."""
        return self._runtime.leftovers()

    async def end(self, attempt_id: str, files: AttemptLayout) -> None:
        """By the handle on disk, or as far as the machine remembers. The disk is the caller's afterwards."""
        # An event loop of its own: looking at every process of the machine would hold the server's up.
        await asyncio.to_thread(lambda: asyncio.run(self._destroy(attempt_id, files)))

    async def _destroy(self, attempt_id: str, files: AttemptLayout) -> None:
        handle = _read(files.handle) or self._runtime.recall(attempt_id)
        await self._runtime.destroy(handle, files.disk)


def _read(path: Path) -> SandboxHandle | None:
    """None also for one that cannot be read: what it said may be found without it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=SandboxHandle)
    except (OSError, *DECODE_ERRORS):
        return None
