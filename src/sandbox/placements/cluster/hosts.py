"""The hosts on which workers have run: what the workers reported, and when the server last heard from them."""

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from sandbox.interfaces.cluster_engine import JobPhase
from sandbox.interfaces.placement import HostState, HostStatus
from sandbox.interfaces.worker_messages import Claim
from sandbox.model.errors import DECODE_ERRORS, error_reason
from sandbox.placements.cluster.jobs import Job
from sandbox.primitives.files import write_durably

HOSTS_MAX = 1000
"""Maximum number of hosts that are remembered. Beyond that, the one with the earliest last contact is forgotten."""

_SAVE_SECONDS = 60.0
_SILENCE_SECONDS = 15.0
"""Time without a heartbeat after which connected workers count as unreachable. They send one every two seconds."""

_log = logging.getLogger(__name__)


class SeenHost(msgspec.Struct, frozen=True):
    """A host on which a worker has claimed a task.

    last_contact: when a worker on the host last sent a message, in seconds since 1970.
    version, cpus, memory_bytes: sent by the last worker that connected; empty or 0 if it did not send them.
    """

    name: str
    last_contact: float
    version: str = ""
    cpus: int = 0
    memory_bytes: int = 0


class SeenHosts:
    """The hosts on which workers have run, stored in a file. Not thread-safe, except as noted."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._hosts = {host.name: host for host in _load(file)}
        self._is_saved = True
        self._saving: asyncio.Task[None] | None = None

    def snapshot(self) -> Sequence[SeenHost]:
        """Return the hosts. Thread-safe."""
        return list(self._hosts.values())

    def statuses(self, jobs: Iterable[Job]) -> Sequence[HostStatus]:
        """Return the status of each host that has run a worker or on which a job runs, sorted by name. Thread-safe."""
        return host_statuses(self.snapshot(), jobs, time.time())

    def record_claim(self, claim: Claim) -> None:
        """Store what a worker reported about its host."""
        self.add(SeenHost(claim.host, time.time(), claim.version, claim.cpus, claim.memory_bytes))

    def add(self, host: SeenHost) -> None:
        """Add or replace a host."""
        is_new = host.name not in self._hosts
        self._hosts[host.name] = host
        self._is_saved = False
        if len(self._hosts) > HOSTS_MAX:
            del self._hosts[min(self._hosts.values(), key=lambda host: host.last_contact).name]
        if is_new:
            self.save()

    def record_contact(self, name: str) -> None:
        """Record that a worker on the host has just sent a heartbeat, unless the host was forgotten."""
        if (host := self._hosts.get(name)) is not None:
            self._hosts[name] = msgspec.structs.replace(host, last_contact=time.time())
            self._is_saved = False

    def start(self) -> None:
        """Save the hosts periodically, and once more when the tasks of the event loop are cancelled."""
        self._saving = asyncio.create_task(self._save_periodically())

    async def _save_periodically(self) -> None:
        try:
            while True:
                await asyncio.sleep(_SAVE_SECONDS)
                self.save()
        finally:
            self.save()

    def save(self) -> None:
        """Save the hosts, unless nothing has changed. An error is only logged: the next call tries again."""
        if self._is_saved:
            return
        try:
            write_durably(self._file, msgspec.json.encode(tuple(self._hosts.values())))
        except OSError as error:
            _log.warning("The list of hosts was not saved: %s", error_reason(error))
            return
        self._is_saved = True


def _load(file: Path) -> Sequence[SeenHost]:
    """Return the stored hosts. The file only has information for users, so a damaged one counts as empty."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=tuple[SeenHost, ...])
    except FileNotFoundError:
        return ()
    except (OSError, *DECODE_ERRORS) as error:
        _log.warning("The list of hosts cannot be read, and starts empty: %s", error_reason(error))
        return ()


def host_statuses(seen: Iterable[SeenHost], jobs: Iterable[Job], now: float) -> Sequence[HostStatus]:
    """See `SeenHosts.statuses`. now: in seconds since 1970."""
    states: dict[str, tuple[HostState, str]] = {}
    for job in jobs:
        name, state, reason = _state_of_host(job)
        current = states.get(name)
        if name and (current is None or _PRECEDENCE.index(state) < _PRECEDENCE.index(current[0])):
            states[name] = state, reason
    hosts, idle = {host.name: host for host in seen}, (HostState.IDLE, "No worker is running on the host.")
    return [_status(name, hosts.get(name), *states.get(name, idle), now) for name in sorted({*states, *hosts})]


_PRECEDENCE = (HostState.READY, HostState.UNREACHABLE, HostState.IDLE)
"""If the workers on a host differ, the first of these states applies."""

_NO_RESPONSE = "No worker on the host is responding."


def _state_of_host(job: Job) -> tuple[str, HostState, str]:
    """Return the host of a job, the state of this host, and the reason. The name is empty if there is no worker."""
    stored, status = job.stored, job.status
    if not job.is_claimed:
        is_starting = status is not None and status.phase is JobPhase.RUNNING and not stored.is_given_up
        return status.host if status and is_starting else "", HostState.IDLE, "A worker is starting on the host."
    if stored.has_ended or stored.is_given_up or job.phase is JobPhase.ENDED:
        return "", HostState.IDLE, ""
    if job.session is not None:
        return stored.host, HostState.READY, ""
    reason = f"{_NO_RESPONSE} {job.reason}" if job.phase is JobPhase.UNREACHABLE else _NO_RESPONSE
    return stored.host, HostState.UNREACHABLE, reason


def _status(name: str, seen: SeenHost | None, state: HostState, reason: str, now: float) -> HostStatus:
    if seen is None:
        return HostStatus(name, state, reason)
    if state is HostState.READY and now - seen.last_contact > _SILENCE_SECONDS:
        state, reason = HostState.UNREACHABLE, _NO_RESPONSE
    last_contact_at = datetime.fromtimestamp(seen.last_contact, UTC)
    return HostStatus(name, state, reason, seen.cpus or None, seen.memory_bytes or None, seen.version, last_contact_at)
