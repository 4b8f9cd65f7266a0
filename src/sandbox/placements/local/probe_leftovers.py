"""Removes the leftovers of killed probes.

A probe is a sandbox without a task that tests what the host supports.
"""

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from sandbox.interfaces.disks import RemovePaths
from sandbox.interfaces.file_layout import AttemptLayout, probe_directory
from sandbox.interfaces.placement import LeftoverSource
from sandbox.model.errors import SandboxError, error_reason
from sandbox.model.fixed_limits import PROBE_CLEANUP_TIMEOUT_SECONDS, SANDBOX_TEARDOWN_SECONDS

_POLL_SECONDS = 0.05


@contextmanager
def probe_lock(run_dir: Path) -> Iterator[None]:
    """Hold a shared lock during a probe, so the cleanup does not remove the probe.

    Blocks while a server removes leftovers of earlier probes. Raises TimeoutError after PROBE_CLEANUP_TIMEOUT_SECONDS.
    """
    with _open_directory(run_dir) as descriptor:
        for _ in _poll_shared_lock(descriptor, run_dir):
            time.sleep(_POLL_SECONDS)
        yield


@asynccontextmanager
async def probe_lock_async(run_dir: Path) -> AsyncIterator[None]:
    """Like `probe_lock`, but does not block the event loop, because the cleanup may run on the same loop."""
    with _open_directory(run_dir) as descriptor:
        for _ in _poll_shared_lock(descriptor, run_dir):
            await asyncio.sleep(_POLL_SECONDS)
        yield


def _poll_shared_lock(descriptor: int, run_dir: Path) -> Iterator[None]:
    """Yield before each retry; return once the lock is held."""
    deadline = time.monotonic() + PROBE_CLEANUP_TIMEOUT_SECONDS
    while not _try_lock(descriptor, fcntl.LOCK_SH):
        if time.monotonic() > deadline:
            raise TimeoutError(f"The server that uses {run_dir} is busy; try again.")
        yield


class ProbeCleanup:
    """Removes the probes in a run directory, and everything on the host that has their ids."""

    def __init__(self, run_dir: Path, leftover_sources: Sequence[LeftoverSource], remove: RemovePaths) -> None:
        self._run_dir = run_dir
        self._leftover_sources = leftover_sources
        self._remove = remove

    async def sweep(self) -> None:
        """Remove all leftovers, unless a probe is running.

        A failure does not stop the rest; raises OSError at the end.
        """
        try:
            with _open_directory(self._run_dir) as descriptor:
                if _try_lock(descriptor, fcntl.LOCK_EX):
                    await self._sweep()
        except FileNotFoundError:  # the directory was removed as an old temporary file
            return

    async def _sweep(self) -> None:
        prefix = probe_directory(self._run_dir, "").name
        failures: list[str] = []
        for directory in [path for path in self._run_dir.iterdir() if path.name.startswith(prefix)]:
            try:
                async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                    await self._remove_probe(directory, directory.name.removeprefix(prefix))
            except (SandboxError, OSError, ValueError, TimeoutError) as error:
                failures.append(f"{directory.name}: {error_reason(error)}")
        if failures:
            raise OSError("; ".join(failures))

    async def _remove_probe(self, directory: Path, probe_id: str) -> None:
        for source in self._leftover_sources if probe_id.isalnum() else ():
            await source.clean_up(probe_id, AttemptLayout(directory))
        await self._remove([directory])


@contextmanager
def _open_directory(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
