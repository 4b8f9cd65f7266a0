"""What prevents tasks from starting: a drain, an unusable host, missing model keys, a full disk."""

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from sandbox.interfaces.server_services import UnavailableError
from sandbox.model.manifest.schema import Manifest
from sandbox.primitives.files import fsync_path, write_durably
from sandbox.server.maintenance.disk_monitor import DiskMonitor
from sandbox.server.runtime_probing import ProbedHost

DRAINING_REASON = "The server is being drained: it accepts and starts no tasks until `sandbox admin drain --undo`."


class Drain:
    """Drain mode, stored in a file, so it survives restarts. since: None if the server is not draining."""

    def __init__(self, data_dir: Path) -> None:
        self._file = data_dir / "draining"
        self._lock = threading.Lock()
        self.since = self._read()

    def start(self, now: datetime) -> None:
        """Start draining. Idempotent: the first start time is kept. Raises UnavailableError."""
        with self._lock:
            if self.since is None:
                self._write(now)
                self.since = now

    def undo(self) -> None:
        """Stop draining. Idempotent. Raises UnavailableError."""
        with self._lock:
            try:
                self._file.unlink(missing_ok=True)
                fsync_path(self._file.parent)
            except OSError as error:
                raise UnavailableError(f"The drain could not be undone: {error}; try again.") from error
            self.since = None

    def _write(self, now: datetime) -> None:
        try:
            write_durably(self._file, now.astimezone(UTC).isoformat().encode())
        except OSError as error:
            raise UnavailableError(f"The drain could not be stored: {error}; try again.") from error

    def _read(self) -> datetime | None:
        """Return when the drain started. An unreadable file counts as a drain."""
        try:
            return datetime.fromisoformat(self._file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return datetime.fromtimestamp(0, UTC)


class StartConditions:
    """Determines what prevents tasks from starting, apart from reserved resources.

    Each call to `blocking_reasons` measures the free disk space again.

    host: the host that runs new attempts.
    api_key_variables: the name of the environment variable that contains the model key, keyed by the agent's kind.
    missing_keys: the kinds of agents without a model key.
    """

    def __init__(
        self,
        drain: Drain,
        host: ProbedHost,
        disk_monitor: DiskMonitor,
        api_key_variables: Mapping[str, str],
        missing_keys: Collection[str],
    ) -> None:
        self._drain = drain
        self._host = host
        self._disk_monitor = disk_monitor
        self._api_key_variables = api_key_variables
        self._missing_keys = missing_keys

    def rejection_reasons(self) -> Iterator[str]:
        """Yield the reasons why the server is not accepting or starting tasks, as sentences, most important first."""
        if self._drain.since is not None:
            yield DRAINING_REASON
        if (reason := self._host.blocked_reason) is not None:
            yield reason
        if self._api_key_variables.keys() <= set(self._missing_keys):
            yield _missing_key_reason(self._api_key_variables.values())

    def blocking_reasons(self) -> Iterator[str]:
        """Yield the reasons why the server starts no tasks: `rejection_reasons`, then a shortage of disk space."""
        yield from self.rejection_reasons()
        if (shortage := self._disk_monitor.check()) is not None:
            yield shortage

    def missing_key_reason(self, manifest: Manifest) -> str | None:
        """Return why a task's agent cannot use its model until the server restarts; None if it can."""
        kind = manifest.agent.kind
        return _missing_key_reason([self._api_key_variables[kind]]) if kind in self._missing_keys else None

    def check_acceptance(self, manifest: Manifest) -> None:
        """Raise UnavailableError if the server does not accept the task now."""
        reasons = [*self.rejection_reasons()]
        if not reasons and (reason := self.missing_key_reason(manifest)) is not None:
            reasons = [reason]
        if reasons:
            raise UnavailableError(" ".join(reasons), retry_after_seconds=self._host.retry_after_seconds)


def _missing_key_reason(settings: Iterable[str]) -> str:
    return f"No model key is set: set {' or '.join(settings)} and restart the server."
