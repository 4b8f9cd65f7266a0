"""Drain mode, in which the server accepts and starts no tasks."""

import threading
from datetime import UTC, datetime
from pathlib import Path

from sandbox.interfaces.server_services import UnavailableError
from sandbox.primitives.durable_files import fsync_path, write_durably

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
