"""The drained hosts of a cluster: no worker gets a new task there, and running tasks continue."""

import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec

from sandbox.interfaces.placement import HostDrainError
from sandbox.interfaces.worker_messages import HostName
from sandbox.model.errors import DECODE_ERRORS
from sandbox.primitives.files import write_durably

DRAINED_HOSTS_MAX = 400
"""Maximum number of drained hosts. Their names are one argument of sbatch, which the kernel limits to 128 KiB."""

_NAMES_IN_REASON_MAX = 5

_Time = Annotated[datetime, msgspec.Meta(tz=True)]


class HostDrains:
    """The drained hosts, stored in a file, so drains survive restarts. Reading is thread-safe.

    The constructor raises OSError if the file cannot be decoded, because tasks would otherwise start on drained hosts.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._since: Mapping[str, datetime] = _load(file)

    @property
    def names(self) -> tuple[str, ...]:
        """The drained hosts, sorted."""
        return tuple(sorted(self._since))

    def since(self, name: str) -> datetime | None:
        """Return when the drain of a host started; None if the host is not drained."""
        return self._since.get(name)

    def describe(self) -> str:
        """Return which hosts are drained (human-readable); empty if no host is drained."""
        names = self.names
        if not names:
            return ""
        more = len(names) - _NAMES_IN_REASON_MAX
        listed = ", ".join(names[:_NAMES_IN_REASON_MAX]) + (f" and {more} more" if more > 0 else "")
        return f"Drained hosts: {listed}. `sandbox admin drain --host NAME --undo` ends a drain."

    def start(self, name: str, now: datetime) -> None:
        """Drain a host. Idempotent: the first start time is kept. On return, the drain is durable.

        Raises HostDrainError, OSError.
        """
        with self._lock:
            if name in self._since:
                return
            if len(self._since) >= DRAINED_HOSTS_MAX:
                raise HostDrainError(f"{DRAINED_HOSTS_MAX} hosts are drained already; use the engine to drain more.")
            self._store({**self._since, name: now})

    def undo(self, name: str) -> None:
        """End the drain of a host. Idempotent. Raises OSError."""
        with self._lock:
            if name in self._since:
                self._store({each: since for each, since in self._since.items() if each != name})

    def _store(self, since: Mapping[str, datetime]) -> None:
        write_durably(self._file, msgspec.json.encode(since))
        self._since = since


def _load(file: Path) -> Mapping[str, datetime]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[HostName, _Time])
    except FileNotFoundError:
        return {}
    except DECODE_ERRORS as error:
        raise OSError(f"{file} is damaged: {error}; remove the file, then drain the hosts again.") from error
