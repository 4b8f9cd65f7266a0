"""Conditions that prevent tasks from starting: a drain, an unusable host, missing model keys, a full disk.

The disk monitor measures the free space in the data directory's file system.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from sandbox.interfaces.disks import DiskReserve, MeasureDiskSpace
from sandbox.interfaces.server_services import UnavailableError
from sandbox.model import fixed_limits
from sandbox.model.fixed_limits import (
    DISK_SPACE_CHECK_INTERVAL_SECONDS,
    SERVER_RESERVE_BYTES,
    WATERMARK_HYSTERESIS_FACTOR,
)
from sandbox.model.manifest.schema import Manifest, encode_manifest
from sandbox.model.resources import DiskSpace, Watermark
from sandbox.primitives.files import fsync_path, write_durably
from sandbox.server.placements import ProbedHost

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


_log = logging.getLogger(__name__)
_UNKNOWN_SPACE = DiskSpace(0, 0)


class DiskMonitor:
    """Decides whether new tasks wait for disk space, and manages a reserve for records that must always be written."""

    def __init__(self, data_dir: Path, measure: MeasureDiskSpace, watermark: Watermark, reserve: DiskReserve) -> None:
        self.space = _UNKNOWN_SPACE
        self.shortage: str | None = None
        """Why new tasks wait (human-readable); set by `check`."""
        self._data_dir = data_dir
        self._measure = measure
        self._watermark = watermark
        self._reserve = reserve

    async def run(self, on_space_freed: Callable[[], None]) -> None:
        """Check the free space periodically. on_space_freed: called when new tasks no longer need to wait."""
        while True:
            was_short = self.check() is not None
            await asyncio.sleep(DISK_SPACE_CHECK_INTERVAL_SECONDS)
            if was_short and self.check() is None:
                on_space_freed()

    def check(self) -> str | None:
        """Measure free space, then release or allocate the reserve as needed. Return the shortage, if any."""
        previous = self.shortage
        try:
            self.space = self._measure()
            self.shortage = self._find_shortage(was_short=previous is not None)
            self._adjust_reserve()
        except OSError as error:
            self.shortage = f"The disk that contains {self._data_dir} cannot be checked: {error.strerror}."
        if self.shortage is not None and previous is None:
            _log.warning("New tasks wait. %s", self.shortage)
        elif self.shortage is None and previous is not None:
            _log.info("New tasks can start again: the disk that contains %s is usable", self._data_dir)
        return self.shortage

    def _find_shortage(self, *, was_short: bool) -> str | None:
        if self.space.is_read_only:
            return f"The disk that contains {self._data_dir} is read-only."
        # New tasks cannot use the space of a released reserve: before they start, the reserve is allocated again.
        space = self.space if self._reserve.is_allocated else self.space.minus_reserve(SERVER_RESERVE_BYTES)
        if not self._watermark.is_low(space, was_low=was_short):
            return None
        required_bytes = int(self._watermark.threshold_bytes(self.space) * WATERMARK_HYSTERESIS_FACTOR)
        if space.free_bytes >= required_bytes:
            return f"The disk that contains {self._data_dir} has almost no free inodes; remove files."
        return (
            f"The disk that contains {self._data_dir} is nearly full: "
            f"{_format_mebibytes(max(space.free_bytes, 0))} are free, but new tasks need "
            f"{_format_mebibytes(required_bytes)}."
        )

    def _adjust_reserve(self) -> None:
        has_no_inodes = self.space.files_total > 0 and self.space.files_free == 0
        if self.shortage is not None and (has_no_inodes or self.space.free_bytes < SERVER_RESERVE_BYTES):
            self._reserve.release()
        elif self.shortage is None:
            with contextlib.suppress(OSError):
                self._reserve.allocate()


def _format_mebibytes(byte_count: int) -> str:
    return f"{byte_count // 1024**2} MiB"


class StartConditions:
    """Determines what prevents tasks from starting, apart from reserved resources.

    `blocking_reasons` measures the free disk space again once all `rejection_reasons` were read.

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


class UnfinishedTaskLimit:
    """Limits the number of unfinished tasks and the total size of their manifests, which the server keeps in memory."""

    def __init__(self, tasks_max: int) -> None:
        self._tasks_max = tasks_max
        self._sizes: dict[object, int] = {}
        self._total_bytes = 0

    def add(self, task_id: str, manifest: Manifest) -> None:
        """Count a task, even above the limits."""
        self._count(task_id, _size_bytes(manifest))

    def remove(self, task_id: object) -> None:
        """Stop counting a task; unknown ids are ignored."""
        self._total_bytes -= self._sizes.pop(task_id, 0)

    @contextmanager
    def reserved(self, manifest: Manifest) -> Iterator[None]:
        """Count a task that is being accepted. Raises UnavailableError if a limit would be exceeded."""
        size_bytes = _size_bytes(manifest)
        if len(self._sizes) >= self._tasks_max:
            raise UnavailableError(
                f"The server has {self._tasks_max} unfinished tasks, its maximum; submit the task again later."
            )
        if self._sizes and self._total_bytes + size_bytes > fixed_limits.UNFINISHED_MANIFEST_BYTES_MAX:
            limit = f"{fixed_limits.UNFINISHED_MANIFEST_BYTES_MAX // 1024**2} MiB"
            raise UnavailableError(
                f"The manifests of unfinished tasks would exceed {limit}; submit the task again later."
            )
        key = object()
        self._count(key, size_bytes)
        try:
            yield
        finally:
            self.remove(key)

    def _count(self, key: object, size_bytes: int) -> None:
        self.remove(key)
        self._sizes[key] = size_bytes
        self._total_bytes += size_bytes


_VALUE_BYTES = 64


def _size_bytes(manifest: Manifest) -> int:
    """Return the size of the encoded manifest, plus _VALUE_BYTES for each value: short values use more in memory."""
    encoded = msgspec.json.encode(manifest, enc_hook=encode_manifest)
    return len(encoded) + _VALUE_BYTES * sum(map(encoded.count, (b",", b"[", b"{")))
