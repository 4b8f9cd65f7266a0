"""Destroys sandboxes that still exist although their attempts no longer have a runner."""

import asyncio
from collections.abc import Collection
from pathlib import Path

import msgspec

from sandbox.interfaces.file_layout import AttemptLayout
from sandbox.interfaces.runtime import Runtime, SandboxHandle
from sandbox.model.errors import DECODE_ERRORS
from sandbox.primitives.concurrency import run_in_daemon_thread


class SandboxLeftovers:
    """Finds and destroys leftover sandboxes. Implements `interfaces.placement.LeftoverSource`.

    One runtime suffices for the sandboxes of all runtimes, which are named, marked and killed in the same way.
    """

    kind = "sandbox"
    belongs_to_this_server = False

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def attempt_ids(self) -> Collection[str]:
        """Return the attempts that have a control group or a marked process."""
        return self._runtime.attempt_ids()

    async def clean_up(self, attempt_id: str, layout: AttemptLayout) -> None:
        """Destroy the sandbox, using its handle on disk or a recovered one. On return, the caller owns the disk."""
        # Use a separate event loop: scanning all processes on the machine would block the server's event loop.
        await run_in_daemon_thread(lambda: asyncio.run(self._destroy(attempt_id, layout)))

    async def _destroy(self, attempt_id: str, layout: AttemptLayout) -> None:
        handle = _read_handle(layout.handle) or self._runtime.recover_handle(attempt_id)
        await self._runtime.destroy(handle, layout.disk)


def _read_handle(path: Path) -> SandboxHandle | None:
    """Return the stored handle, or None if it is missing or unreadable: the sandbox may be found without a handle."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=SandboxHandle)
    except (OSError, *DECODE_ERRORS):
        return None
