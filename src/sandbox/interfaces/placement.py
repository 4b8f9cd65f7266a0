"""Reserves hosts, starts runners, and manages the files of attempts."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple, Protocol

import msgspec

from sandbox.interfaces.cluster_engine import JobStatus
from sandbox.interfaces.images import Image, ProfileCatalog
from sandbox.interfaces.journal import JournalWriter, LockState
from sandbox.interfaces.runner import (
    FinishAttempt,
    OpenTerminal,
    RunAttempt,
    RunDebugSession,
    RunnerHandle,
    TerminalConnection,
)
from sandbox.interfaces.runtime import RuntimeProbe
from sandbox.interfaces.task_file_layout import AttemptLayout
from sandbox.model.errors import SandboxError
from sandbox.model.events import AttemptStarted
from sandbox.model.failure import FailureCode
from sandbox.model.resources import Resources


class HostPendingError(SandboxError):
    """No host for the attempt is available yet. The message says why (human-readable)."""

    code = "host_pending"
    retryable = True


class HostNotFoundError(SandboxError):
    """The cluster has no host with this name, or there is no cluster."""

    code = "host_not_found"


class HostDrainError(OSError):
    """A host cannot be drained now. The message says why (human-readable)."""


class HostUnreachableError(OSError):
    """A host is not responding, or it belongs to no placement of this server. The state of its attempts is unknown.

    remedy: what to do (human-readable).
    """

    def __init__(self, host: str, problem: str = "is not responding", remedy: str = "try again later") -> None:
        super().__init__(f"the host {host.rpartition(':')[2]} {problem}")
        self.remedy = remedy


CANCEL_TOO_LATE = "The agent had already ended; the outcome is unchanged."
"""The response to a cancel request that came after the agent's exit, whichever process recorded that exit."""


class PreservedDisk(Protocol):
    """The preserved disk of an attempt. At most one process uses it: the one that holds the disk's lock."""

    def try_lock(self) -> AbstractAsyncContextManager[LockState]:
        """Acquire the lock for the duration of the block if it is FREE. Yields its previous state. Raises OSError.

        Yields UNKNOWN if the host does not respond within 5 s.
        """
        ...

    async def start_debug_session(self, order: RunDebugSession) -> None:
        """Start a runner that takes over the lock. Call it in a `try_lock` block that yielded FREE. Raises OSError."""
        ...

    async def open_terminal(self, request: OpenTerminal) -> TerminalConnection:
        """Open a terminal in the running session, within 5 s. Raises RunnerUnreachableError, TerminalRefusedError."""
        ...

    async def remove(self) -> None:
        """Remove everything except the runner's log. Call it in a `try_lock` block that yielded FREE. Raises OSError.

        If it is interrupted, `AttemptFiles.has_disk_or_handle` stays true.
        """
        ...


class AttemptLocation(NamedTuple):
    """An attempt, and the host that `AttemptStarted` records.

    A name without a colon always means the server's own host, whatever that host is called now: data directories can be
    moved, and hosts can be renamed. The hosts of every other placement are named `<placement>:<host>`.
    """

    task_id: str
    attempt_id: str
    host: str

    @property
    def placement(self) -> str:
        """The name of the placement; empty for the server's own host."""
        return self.host.partition(":")[0] if ":" in self.host else ""


class Leftover(NamedTuple):
    """An attempt that still has files other than its log, or other leftovers, on its host.

    kinds: the kinds of the sources that found leftovers of the attempt (`LeftoverSource.kind`).
    has_sandbox_handle: whether it has a handle, so a part of its sandbox may exist.
    """

    location: AttemptLocation
    kinds: Sequence[str]
    has_sandbox_handle: bool


class LeftoverScan(NamedTuple):
    """The attempts with leftovers, whether finished or unfinished.

    unowned: attempts without a directory, in locations that only this server uses, keyed by kind.
    failures: what could not be read (human-readable). If there are failures, `unowned` is empty.
    """

    leftovers: Sequence[Leftover]
    unowned: Mapping[str, Collection[str]]
    failures: Sequence[str] = ()


class AttemptFiles(Protocol):
    """The files of attempts, and the leftovers of killed processes, on the hosts of one placement.

    Every method can raise OSError, and HostUnreachableError if the host does not respond within 5 s. Methods that are
    not coroutines block.
    """

    def has_disk(self, location: AttemptLocation) -> bool:
        """Return whether the attempt's disk exists."""
        ...

    def has_disk_or_handle(self, location: AttemptLocation) -> bool:
        """Return whether the attempt has a disk or a handle."""
        ...

    def has_same_secrets(self, location: AttemptLocation, secrets: Mapping[str, str]) -> bool:
        """Return whether the agent that wrote the attempt's files had exactly these secret values."""
        ...

    def has_sandbox_handle(self, task_id: str) -> bool:
        """Return whether any attempt of the task has a handle.

        A part of that attempt's sandbox may exist, and only the handle identifies it.
        """
        ...

    async def scan(self) -> LeftoverScan:
        """Find all attempts with leftovers."""
        ...

    async def clean_up(self, leftover: Leftover, *, keeps_disk: bool) -> None:
        """Remove the leftovers of an attempt without a running process, and its files unless `keeps_disk`. Idempotent.

        The runner's log is kept. The caller holds the task's lock and has determined that the attempt has ended.
        Does nothing if a runner on another host still holds the lock there. Raises AttemptError.
        """
        ...

    async def clean_up_unowned(self, kind: str, attempt_id: str) -> None:
        """Remove leftovers of an attempt without a directory (`LeftoverScan.unowned`). Raises AttemptError."""
        ...


class HostIdentity(NamedTuple):
    """A host on which runners are started, and its current boot id (proc(5), random/boot_id)."""

    name: str
    boot_id: str

    def attempt_started_event(self, attempt_id: str, runtime: str, *, number: int, resumes: bool) -> AttemptStarted:
        """Return the event that records the intent to run an attempt on this host."""
        return AttemptStarted(attempt_id, runtime, self.name, self.boot_id, number=number, resumes=resumes)


class ProbeResult(msgspec.Struct, frozen=True):
    """The result of probing all runtimes of a host.

    probes: the probes of all runtimes that were tried.
    runtime: name of the runtime that attempts use.
    tier: the isolation tier of the sandboxes.
    failure: why no sandbox can be created, and what to do; None if one can.
    is_permanent: no later probe by this process can have a different result.
    """

    probes: Sequence[RuntimeProbe]
    runtime: str
    tier: str
    failure: str | None = None
    is_permanent: bool = False


class Host(Protocol):
    """The host on which a placement starts new attempts: its identity, its resources, and what it can run."""

    @property
    def identity(self) -> HostIdentity:
        """The host and the boot id that `AttemptStarted` records."""
        ...

    @property
    def capacity(self) -> Resources:
        """The total resources that tasks may reserve. Constant while the server runs."""
        ...

    @property
    def images(self) -> ProfileCatalog:
        """The profiles whose images the host has."""
        ...

    def blocked_reason(self) -> str | None:
        """Return why no attempt can start now (human-readable), for example because the host is not responding.

        Does not check the free memory, the runtimes, or the disk of the server's data directory. Does not block.
        """
        ...

    def memory_available_bytes(self) -> int | None:
        """Return the memory available for new processes; None if it is unknown. Does not block."""
        ...

    async def probe(self) -> ProbeResult:
        """Probe the runtimes. Once a runtime has worked, probe only that one: it is used until the server ends.

        Raises OSError, TimeoutError.
        """
        ...


class HostState(StrEnum):
    """The state of a host.

    READY: attempts can start on this machine, or a worker on the host is connected.
    NOT_READY: no attempt can start on this machine now, or the engine starts no worker on the host.
    IDLE: no worker runs on the host, so the server has no contact with it.
    UNREACHABLE: workers run on the host, and none of them is connected.
    """

    READY = "ready"
    NOT_READY = "not_ready"
    IDLE = "idle"
    UNREACHABLE = "unreachable"


class HostStatus(msgspec.Struct, frozen=True):
    """The state of a host of a placement.

    name: without the name of the placement.
    reason: why the host is in this state (human-readable); may be empty.
    cpus, memory_bytes: the resources for tasks; None if they are unknown.
    version: the version of Sandbox on the host; empty if it is unknown.
    last_contact_at: when a worker on the host last sent a message; None if no worker did.
    draining_since: when the drain of the host started; None if new tasks may start there.
    """

    name: str
    state: HostState
    reason: str = ""
    cpus: int | None = None
    memory_bytes: int | None = None
    version: str = ""
    last_contact_at: datetime | None = None
    draining_since: datetime | None = None


class Loss(NamedTuple):
    """How an attempt on another host was lost.

    code: `runner_lost` or `host_lost`. reason: what the engine reports about the job, as a sentence; empty if unknown.
    """

    code: FailureCode
    reason: str = ""


class ReservedHost(NamedTuple):
    """A host on which an attempt can start now.

    find_image: returns the host's image of a profile, None for the host's own /usr. Blocks; raises ImageUnusableError,
        OSError.
    """

    attempt_id: str
    identity: HostIdentity
    runtime: str
    find_image: Callable[[str], Image | None]


class HostAllocator(Protocol):
    """Finds a host for each task, if a placement has several."""

    @property
    def maximal_host_sizes(self) -> Sequence[Resources]:
        """The sizes of the largest hosts.

        A task that fits in one of them waits in the engine's queue, not in the server's.
        """
        ...

    async def reserve_host(
        self, task_id: str, last_attempt_id: str | None, resources: Resources, profile: str
    ) -> ReservedHost:
        """Return a host for the task's next attempt. Waits a few seconds at most; repeat the call until it succeeds.

        An attempt that takes over a disk gets the host of the last attempt. The host has the server's image of the
        profile.

        last_attempt_id: the last attempt in the journal. Repeating the call has no effect until the journal contains
            the attempt of the returned host. Raises HostPendingError, OSError.
        """
        ...

    def job_status(self, task_id: str) -> JobStatus | None:
        """Return the latest known status of the job that runs the task; None if there is none. Does not block."""
        ...

    def host_statuses(self) -> Sequence[HostStatus]:
        """Return the known hosts, sorted by name. Does not block."""
        ...

    async def drain_host(self, name: str) -> None:
        """Start no more tasks on a host until `undo_host_drain`, even across restarts. Idempotent.

        Tasks that run there continue, with all their attempts. Raises HostNotFoundError, OSError.
        """
        ...

    async def undo_host_drain(self, name: str) -> None:
        """Start tasks on a host again. Idempotent. Raises HostNotFoundError, OSError."""
        ...

    def find_image(self, location: AttemptLocation, profile: str) -> Image | None:
        """Return the image of the last attempt that started on the host, None for the host's own /usr. Blocks.

        Raises ImageUnusableError, OSError.
        """
        ...

    def find_loss(self, location: AttemptLocation) -> Loss | None:
        """Return how the attempt was lost if it can no longer communicate and its files are gone."""
        ...

    async def release_host(self, task_id: str) -> None:
        """Release the host of a task that has ended, once nothing is preserved on the host. Idempotent.

        Raises OSError.
        """
        ...


class Placement(Protocol):
    """Starts runners on its hosts, and finds the runners that this server or an earlier one started.

    The server reads journals and artifacts in its own data directory. A placement whose runners write elsewhere copies
    both to that directory with `interfaces.journal.TaskReplicas`, each artifact before the record that names it.
    """

    @property
    def host(self) -> Host:
        """The host of the next attempt."""
        ...

    @property
    def files(self) -> AttemptFiles:
        """The files of attempts."""
        ...

    @property
    def allocator(self) -> HostAllocator | None:
        """Finds the host of each attempt; None if all attempts run on `host`."""
        ...

    async def run(self) -> None:
        """Run the placement's background work, such as copying the files that runners write on other hosts.

        Runs until cancelled.
        """
        ...

    async def launch(self, order: RunAttempt | FinishAttempt, writer: JournalWriter) -> RunnerHandle:
        """Start a runner, detached from this process, that takes over the journal. Takes at most a minute.

        The runner gets every record of `writer`. A finisher, and an attempt that resumes another one, run on the host
        of the task's last attempt. A runner on this host also holds the lock of `writer` from then on; the caller still
        has to close `writer`. If the host does not respond after the order was sent, the runner may or may not start:
        the handle's lock state is UNKNOWN. A cancelled call may also start a runner.

        Raises OSError if no runner was started or the runner did not read its order; RunnerNotStartedError if a later
        launch may succeed. Raises JournalBusyError, and starts nothing, if the task has a runner or `writer` was
        passed to one.
        """
        ...

    def find_runner(self, location: AttemptLocation) -> RunnerHandle:
        """Return the runner of an attempt, whether or not it is alive."""
        ...

    def preserved_disk(self, location: AttemptLocation) -> PreservedDisk:
        """Return the preserved disk of an attempt."""
        ...


class LeftoverSource(Protocol):
    """Finds and removes the leftovers of one kind on the host that runs this process. `placements/local` uses it.

    The caller holds the task's lock and determines whether the attempt belongs to this server and has ended.
    """

    @property
    def kind(self) -> str:
        """A short name of the kind, for operators. Unique on a host."""
        ...

    @property
    def belongs_to_this_server(self) -> bool:
        """Whether the location guarantees that leftovers belong to this server and that nothing else uses them."""
        ...

    def attempt_ids(self) -> Collection[str]:
        """Return the ids of all attempts that have leftovers, regardless of owner. Blocks. Raises OSError."""
        ...

    async def clean_up(self, attempt_id: str, layout: AttemptLayout) -> None:
        """Remove the leftovers of an attempt without a running process. Idempotent.

        Raises AttemptError, OSError.
        """
        ...
