"""The placements of attempts: selects the placement of an attempt, and probes the runtimes of the placements' hosts.

An attempt has the placement of its host, or the one for new attempts. Runtimes are probed when a server starts, with
backoff while none works, and again on request.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from random import SystemRandom

from sandbox import __version__
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.cluster_engine import JobStatus
from sandbox.interfaces.images import Image, ProfileCatalog
from sandbox.interfaces.journal import JournalWriter, LockState
from sandbox.interfaces.placement import (
    AttemptFiles,
    AttemptLocation,
    Host,
    HostAllocator,
    HostIdentity,
    HostState,
    HostStatus,
    HostUnreachableError,
    Loss,
    Placement,
    PreservedDisk,
    ProbeResult,
    ReservedHost,
)
from sandbox.interfaces.runner import (
    CancelAttempt,
    FinishAttempt,
    OpenTerminal,
    Reply,
    RunAttempt,
    RunDebugSession,
    RunnerHandle,
    RunnerNotStartedError,
    RunnerUnreachableError,
    TerminalConnection,
)
from sandbox.interfaces.task_file_layout import new_attempt_id
from sandbox.model.display_text import format_timestamp
from sandbox.model.errors import error_reason
from sandbox.model.fixed_limits import (
    PROBE_INTERVAL_SECONDS_MIN,
    PROBE_JITTER,
    PROBE_PAUSE_SECONDS,
    PROBE_PAUSE_SECONDS_MAX,
)
from sandbox.model.resources import Resources
from sandbox.model.task import Attempt, Task

_log = logging.getLogger(__name__)
_RANDOM = SystemRandom()


class ProbedHost:
    """A host, and what it can run according to the last probe.

    A runtime that has worked is used until the server ends, so a task's tier never changes. `request_probe` starts a
    probe that detects whether the runtime still works.

    While no runtime works, the pause before a probe doubles from PROBE_PAUSE_SECONDS to PROBE_PAUSE_SECONDS_MAX,
    and is shortened at random by up to PROBE_JITTER.
    """

    def __init__(self, initial_result: ProbeResult, host: Host, clock: Clock) -> None:
        self.result = initial_result
        self._host = host
        self._clock = clock
        self._pause_seconds = PROBE_PAUSE_SECONDS
        self._due_at: float | None = None
        self._probed_at = clock.monotonic()
        self._probe_requested = asyncio.Event()
        self._schedule_next()

    @property
    def identity(self) -> HostIdentity:
        """See `Host.identity`."""
        return self._host.identity

    @property
    def capacity(self) -> Resources:
        """See `Host.capacity`."""
        return self._host.capacity

    @property
    def images(self) -> ProfileCatalog:
        """See `Host.images`."""
        return self._host.images

    def memory_available_bytes(self) -> int | None:
        """See `Host.memory_available_bytes`."""
        return self._host.memory_available_bytes()

    @property
    def blocked_reason(self) -> str | None:
        """Why no task can start, and when the next probe is (human-readable); None if tasks can start."""
        return self._failure_reason or self._host.blocked_reason()

    @property
    def _failure_reason(self) -> str | None:
        if self.result.failure is None or self.result.is_permanent:
            return self.result.failure
        at = self.next_probe_at
        next_probe = "a probe is running" if at is None else f"the next probe is at {format_timestamp(at)}"
        return f"No sandbox can be created; {next_probe}. {self.result.failure}"

    @property
    def next_probe_at(self) -> datetime | None:
        """When the next probe starts; None during a probe, if none is planned, or while a runtime works."""
        seconds = self._seconds_until_probe
        return None if seconds is None else self._clock.now() + timedelta(seconds=seconds)

    @property
    def retry_after_seconds(self) -> int | None:
        """Whole seconds until the next probe; None during a probe, if none is planned, or while a runtime works."""
        seconds = self._seconds_until_probe
        return None if seconds is None else max(1, math.ceil(seconds))

    @property
    def _seconds_until_probe(self) -> float | None:
        due_at = None if self.result.failure is None else self._due_at
        return None if due_at is None else due_at - self._clock.monotonic()

    def find_image(self, profile: str) -> Image | None:
        """Return the host's image of a profile, None for the host's own /usr. Raises ImageUnusableError."""
        return self.images.find_image(profile, self.result.tier)

    def request_probe(self) -> None:
        """Probe a working runtime again, because a sandbox could not be created.

        Requested probes start at least PROBE_INTERVAL_SECONDS_MIN apart, because a task itself may be the cause.
        """
        if self.result.failure is None and self._due_at is None:
            self._due_at = max(self._clock.monotonic(), self._probed_at + PROBE_INTERVAL_SECONDS_MIN)
            self._probe_requested.set()

    async def run(self) -> None:
        """Probe while no runtime works, unless this is permanent, and after `request_probe`, until cancelled.

        Never raises for a failed probe.
        """
        while True:
            self._probe_requested.clear()
            if self._due_at is None:
                await self._probe_requested.wait()
            else:
                await asyncio.sleep(self._due_at - self._clock.monotonic())
                self._due_at = None
                has_worked = self.result.failure is None
                self.result = await (self._probe_twice() if has_worked else self._probe())
                self._probed_at = self._clock.monotonic()
                self._schedule_next()
                self._log_result(has_worked=has_worked)

    async def _probe_twice(self) -> ProbeResult:
        """Return a failure only if two probes fail, because the machine may be busy."""
        result = await self._probe()
        if result.failure is None:
            return result
        await asyncio.sleep(PROBE_PAUSE_SECONDS)
        return await self._probe()

    async def _probe(self) -> ProbeResult:
        """Return the result of a probe, or the last result if the probe was not possible."""
        try:
            return await self._host.probe()
        except Exception as error:
            _log.warning("The runtimes could not be probed: %s", error_reason(error))
            return self.result

    def _schedule_next(self) -> None:
        if self.result.failure is None:
            self._pause_seconds = PROBE_PAUSE_SECONDS
            return
        if self.result.is_permanent:
            return
        pause = self._pause_seconds * _RANDOM.uniform(1 - PROBE_JITTER, 1)
        self._due_at = self._clock.monotonic() + pause
        self._pause_seconds = min(self._pause_seconds * 2, PROBE_PAUSE_SECONDS_MAX)

    def _log_result(self, *, has_worked: bool) -> None:
        if self.result.failure is not None:
            _log.warning("The server does not accept tasks. %s", self._failure_reason)
        elif not has_worked:
            _log.info("The runtime %s works now, and the server accepts tasks.", self.result.runtime)


def takes_over_disk(task: Task) -> bool:
    """Return whether the task's next attempt takes over the disk of the last attempt."""
    previous = task.attempt
    return previous is not None and previous.follow_up is not None and previous.hands_over_disk(previous.follow_up)


def attempt_location(task: Task, attempt: Attempt) -> AttemptLocation:
    """Return the location of one of the task's attempts."""
    return AttemptLocation(task.id, attempt.id, attempt.host)


class Placements:
    """The server's placements, including the one for its own host. Attempts of other placements are unreachable.

    by_name: all placements, keyed by name; the name of the server's own placement is empty.
    hosts: the placements' hosts, keyed by the same names.
    selected: name of the placement that runs new attempts.
    """

    def __init__(self, by_name: Mapping[str, Placement], hosts: Mapping[str, ProbedHost], selected: str = "") -> None:
        self._by_name = by_name
        self._hosts = hosts
        self._selected = selected

    def __iter__(self) -> Iterator[Placement]:
        return iter(self._by_name.values())

    @property
    def hosts(self) -> Collection[ProbedHost]:
        """The hosts of all placements."""
        return self._hosts.values()

    @property
    def selected_host(self) -> ProbedHost:
        """The host of new attempts."""
        return self._hosts[self._selected]

    @property
    def allocator(self) -> HostAllocator | None:
        """Finds hosts for new attempts if a cluster's engine queues the tasks; None if the server queues the tasks."""
        return self._by_name[self._selected].allocator

    def host_for_next_attempt(self, task: Task) -> ProbedHost:
        """Return the host of the task's next attempt. Raises HostUnreachableError.

        A disk does not move: an attempt that takes it over runs where the last attempt ran.
        """
        return self._hosts[self._placement_of_next_attempt(task)]

    def _placement_of_next_attempt(self, task: Task) -> str:
        if task.attempt is None or not takes_over_disk(task):
            return self._selected
        location = attempt_location(task, task.attempt)
        self._find(location)
        return location.placement

    async def reserve_host(self, task: Task) -> ReservedHost:
        """Return a host for the task's next attempt; see `HostAllocator.reserve_host`.

        Raises HostPendingError, OSError.
        """
        name = self._placement_of_next_attempt(task)
        allocator, host = self._by_name[name].allocator, self._hosts[name]
        if allocator is None:
            return ReservedHost(new_attempt_id(), host.identity, host.result.runtime, host.find_image)
        last_attempt_id = None if task.attempt is None else task.attempt.id
        vm = task.manifest.vm
        return await allocator.reserve_host(task.id, last_attempt_id, Resources.requested_by(vm), vm.profile)

    def job_status(self, task_id: str) -> JobStatus | None:
        """Return the status of the task's job, or None if there is no job. See `HostAllocator.job_status`."""
        allocators = [placement.allocator for placement in self._by_name.values() if placement.allocator is not None]
        return next(filter(None, (allocator.job_status(task_id) for allocator in allocators)), None)

    def host_statuses(self) -> Mapping[str, HostStatus]:
        """Return the hosts of all placements, keyed by `AttemptLocation.host`.

        The server's own host has an empty key.
        """
        statuses: dict[str, HostStatus] = {}
        for name, placement in self._by_name.items():
            if placement.allocator is not None:
                statuses |= {f"{name}:{status.name}": status for status in placement.allocator.host_statuses()}
            else:
                statuses[self._hosts[name].identity.name if name else ""] = _host_status(self._hosts[name])
        return statuses

    def find_image(self, location: AttemptLocation, profile: str) -> Image | None:
        """Return the image of a profile on the host of an attempt, None for the host's own /usr. Blocks.

        Raises ImageUnusableError, HostUnreachableError, OSError.
        """
        allocator = self._find(location).allocator
        if allocator is None:
            return self.host_of(location).find_image(profile)
        return allocator.find_image(location, profile)

    def find_loss(self, location: AttemptLocation) -> Loss | None:
        """Return how an attempt was lost, otherwise None. See `HostAllocator.find_loss`."""
        placement = self._by_name.get(location.placement)
        return None if placement is None or placement.allocator is None else placement.allocator.find_loss(location)

    async def release_host(self, task_id: str) -> None:
        """Release the hosts of a task that has ended; see `HostAllocator.release_host`. Raises OSError."""
        for placement in self._by_name.values():
            if placement.allocator is not None:
                await placement.allocator.release_host(task_id)

    def host_of(self, location: AttemptLocation) -> ProbedHost:
        """Return the host of an attempt. Raises HostUnreachableError."""
        self._find(location)
        return self._hosts[location.placement]

    async def launch(self, order: RunAttempt | FinishAttempt, host: str, writer: JournalWriter) -> RunnerHandle:
        """Start a runner on the placement of an attempt's host; see `Placement.launch`."""
        try:
            placement = self._find(AttemptLocation(order.task_id, order.attempt_id, host))
        except HostUnreachableError as error:
            raise RunnerNotStartedError(*error.args) from error
        return await placement.launch(order, writer)

    def find_runner(self, location: AttemptLocation) -> RunnerHandle:
        """Return the runner of an attempt; its lock state is UNKNOWN if this server lacks the attempt's placement."""
        placement = self._by_name.get(location.placement)
        return UnreachableRunner(location.attempt_id) if placement is None else placement.find_runner(location)

    def preserved_disk(self, location: AttemptLocation) -> PreservedDisk:
        """Return the preserved disk of an attempt; its lock state may be UNKNOWN, like that of a runner."""
        placement = self._by_name.get(location.placement)
        return UnreachableDisk(location.host) if placement is None else placement.preserved_disk(location)

    def files(self, location: AttemptLocation) -> AttemptFiles:
        """Return the files of an attempt's placement. Raises HostUnreachableError."""
        return self._find(location).files

    def _find(self, location: AttemptLocation) -> Placement:
        placement = self._by_name.get(location.placement)
        if placement is None:
            raise HostUnreachableError(location.host, *_NOT_CONFIGURED)
        return placement


def _host_status(host: ProbedHost) -> HostStatus:
    reason, name = host.blocked_reason, host.identity.name
    state = HostState.READY if reason is None else HostState.NOT_READY
    version = "" if ":" in name else __version__
    capacity = host.capacity
    return HostStatus(name.rpartition(":")[2], state, reason or "", capacity.cpus, capacity.memory_bytes, version)


_NOT_CONFIGURED = ("cannot be reached with this server's settings", "check cluster.engine")


class UnreachableRunner:
    """Implements `RunnerHandle` for a runner on a host that this server cannot reach."""

    def __init__(self, attempt_id: str) -> None:
        self.attempt_id = attempt_id

    def lock_state(self) -> LockState:
        """Return UNKNOWN."""
        return LockState.UNKNOWN

    async def may_be_responsive(self) -> bool:
        """Return True, because only a proven lack of response counts as unresponsive."""
        return True

    async def cancel(self, request: CancelAttempt) -> Reply:
        """Raise RunnerUnreachableError."""
        raise RunnerUnreachableError(f"The host of attempt {self.attempt_id} {'; '.join(_NOT_CONFIGURED)}.")

    async def open_terminal(self, request: OpenTerminal) -> TerminalConnection:
        """Raise RunnerUnreachableError."""
        raise RunnerUnreachableError(f"The host of attempt {self.attempt_id} {'; '.join(_NOT_CONFIGURED)}.")

    async def kill(self) -> bool:
        """Return False: no runner was killed."""
        return False


class UnreachableDisk:
    """Implements `PreservedDisk` for a disk on a host that this server cannot reach."""

    def __init__(self, host: str) -> None:
        self._host = host

    @asynccontextmanager
    async def try_lock(self) -> AsyncIterator[LockState]:
        """Yield UNKNOWN."""
        yield LockState.UNKNOWN

    async def start_debug_session(self, order: RunDebugSession) -> None:
        """Raise HostUnreachableError."""
        raise HostUnreachableError(self._host, *_NOT_CONFIGURED)

    async def open_terminal(self, request: OpenTerminal) -> TerminalConnection:
        """Raise RunnerUnreachableError."""
        raise RunnerUnreachableError(f"The preserved sandbox's host {'; '.join(_NOT_CONFIGURED)}.")

    async def remove(self) -> None:
        """Raise HostUnreachableError."""
        raise HostUnreachableError(self._host, *_NOT_CONFIGURED)
