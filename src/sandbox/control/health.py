"""How the server is."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from sandbox import __version__
from sandbox.contracts.clock import Clock
from sandbox.contracts.runtime import Probe
from sandbox.contracts.store import Store, StoreError
from sandbox.contracts.tasks import Health
from sandbox.model.limits import DISK_FREE_BYTES_MIN
from sandbox.model.state import TaskState


class HealthReport:
    """Looks afresh each time it is asked.

    probes: of the runtimes, made at start. blockers: sentences, found at start, that say why no task can run for as
    long as this server lives.
    """

    def __init__(
        self, store: Store, clock: Clock, data_dir: Path, probes: Sequence[Probe], blockers: Sequence[str]
    ) -> None:
        self.blockers = blockers
        self._store = store
        self._clock = clock
        self._data_dir = data_dir
        self._probes = probes
        self._started_at = clock.monotonic()

    def make(self) -> Health:
        """The report; `reasons` tells what keeps tasks from being taken or run."""
        counts = self._counts()
        disk = os.statvfs(self._data_dir)
        free_bytes = disk.f_bavail * disk.f_frsize
        reasons = list(self.blockers)
        if counts is None:
            reasons.append("The index of tasks cannot be read.")
        if disk.f_flag & os.ST_RDONLY:
            reasons.append(f"The disk of {self._data_dir} is read-only.")
        elif free_bytes < DISK_FREE_BYTES_MIN:
            reasons.append(f"The disk of {self._data_dir} is full.")
        return Health(
            version=__version__,
            uptime_seconds=self._clock.monotonic() - self._started_at,
            tasks_by_state=counts or {},
            runtimes=self._probes,
            store_ok=counts is not None,
            disk_free_bytes=free_bytes,
            disk_total_bytes=disk.f_blocks * disk.f_frsize,
            ready=not reasons,
            reasons=reasons,
        )

    def _counts(self) -> Mapping[TaskState, int] | None:
        try:
            return self._store.count_by_state()
        except (OSError, StoreError):
            return None
