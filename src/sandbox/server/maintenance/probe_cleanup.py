"""What killed probes left. A probe is a sandbox of nobody's, made to find out what a machine can do."""

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from sandbox.interfaces.disks import Remove
from sandbox.interfaces.layout import AttemptLayout, probe_place
from sandbox.interfaces.placement import Leftovers
from sandbox.model.errors import SandboxError, reason_of
from sandbox.model.limits import PROBE_WAIT_SECONDS, SANDBOX_TEARDOWN_SECONDS

_POLL_SECONDS = 0.05


@contextmanager
def probing(run_dir: Path) -> Iterator[None]:
    """Whoever probes is in this context, so that nothing is taken away from it.

    Blocks while a server clears away what earlier probes left. Raises TimeoutError past PROBE_WAIT_SECONDS.
    """
    with _opened(run_dir) as descriptor:
        for _ in _until_shared(descriptor, run_dir):
            time.sleep(_POLL_SECONDS)
        yield


@asynccontextmanager
async def probing_in_background(run_dir: Path) -> AsyncIterator[None]:
    """The same without blocking the event loop, on which the server itself clears away."""
    with _opened(run_dir) as descriptor:
        for _ in _until_shared(descriptor, run_dir):
            await asyncio.sleep(_POLL_SECONDS)
        yield


def _until_shared(descriptor: int, run_dir: Path) -> Iterator[None]:
    """Yields before each further try; ends once the lock is held."""
    deadline = time.monotonic() + PROBE_WAIT_SECONDS
    while not _lock(descriptor, fcntl.LOCK_SH):
        if time.monotonic() > deadline:
            raise TimeoutError(f"The server that uses {run_dir} is busy there; try again.")
        yield


class ProbeClearing:
    """Clears away what is in a run directory, and what is on the machine by the names found there."""

    def __init__(self, run_dir: Path, kinds: Sequence[Leftovers], remove: Remove) -> None:
        self._run_dir = run_dir
        self._kinds = kinds
        self._remove = remove

    async def clear(self) -> None:
        """Nothing happens while anybody probes. What does not go keeps no other; raises OSError for it at the end."""
        try:
            with _opened(self._run_dir) as descriptor:
                if _lock(descriptor, fcntl.LOCK_EX):
                    await self._clear()
        except FileNotFoundError:  # a cleaner of temporary files was there
            return

    async def _clear(self) -> None:
        prefix = probe_place(self._run_dir, "").name
        failures: list[str] = []
        for place in [path for path in self._run_dir.iterdir() if path.name.startswith(prefix)]:
            try:
                async with asyncio.timeout(SANDBOX_TEARDOWN_SECONDS):
                    await self._clear_place(place, place.name.removeprefix(prefix))
            except (SandboxError, OSError, ValueError, TimeoutError) as error:
                failures.append(f"{place.name}: {reason_of(error)}")
        if failures:
            raise OSError("; ".join(failures))

    async def _clear_place(self, place: Path, probe_id: str) -> None:
        for kind in self._kinds if probe_id.isalnum() else ():
            await kind.end(probe_id, AttemptLayout(place))
        await self._remove([place])


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
