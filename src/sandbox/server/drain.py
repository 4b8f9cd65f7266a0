"""Drain mode: the server finishes running tasks and starts none."""

import os
import threading
from datetime import UTC, datetime
from pathlib import Path

from sandbox.interfaces.tasks import UnavailableError

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
                self._sync_directory()
            except OSError as error:
                raise UnavailableError(f"The drain could not be undone: {error}; try again.") from error
            self.since = None

    def _write(self, now: datetime) -> None:
        part = self._file.with_suffix(".part")
        try:
            with part.open("w") as file:
                file.write(now.astimezone(UTC).isoformat())
                file.flush()
                os.fsync(file.fileno())
            part.rename(self._file)
            self._sync_directory()
        except OSError as error:
            raise UnavailableError(f"The drain could not be stored: {error}; try again.") from error

    def _read(self) -> datetime | None:
        """Return the start of the drain. An unreadable file counts as a drain."""
        try:
            return datetime.fromisoformat(self._file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return datetime.fromtimestamp(0, UTC)

    def _sync_directory(self) -> None:
        directory_fd = os.open(self._file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory_fd)
        finally:
            os.close(directory_fd)
