"""What prevents tasks from starting: a drain, an unusable host, missing model keys, a full disk.

Also the limit on unfinished tasks, which prevents the server from accepting more.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import msgspec

from sandbox.interfaces.server_services import UnavailableError
from sandbox.model import fixed_limits
from sandbox.model.manifest.schema import Manifest, encode_manifest
from sandbox.server.drain import DRAINING_REASON, Drain
from sandbox.server.maintenance.disk_monitor import DiskMonitor
from sandbox.server.runtime_probing import ProbedHost


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


def _size_bytes(manifest: Manifest) -> int:
    return len(msgspec.json.encode(manifest, enc_hook=encode_manifest))
