"""Runtimes with their isolation tiers, sandboxes, and the fixed paths in a sandbox.

A serializable handle identifies a sandbox from its preparation to its removal.
"""

from asyncio import StreamReader
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from socket import socket
from typing import Protocol

import msgspec

SANDBOX_UID = 1000
SANDBOX_USER = "agent"
SANDBOX_HOME = "/home/agent"
SANDBOX_WORKSPACE = "/workspace"
NODE_DIRECTORY = "/opt/node"
"""The directory of Node.js in the sandbox; `bin` in it contains the programs."""


class ConfinedCommand(msgspec.Struct, frozen=True):
    """A confined program that runs to completion.

    directory: working directory; a host path in one of the confinement's directories. If this is a directory to write
        to, the program sees no other directory to write to.
    stdin, stdout, stderr: file descriptors; the caller closes them.
    descriptors: additional file descriptors, passed with numbers from FIRST_EXTRA_DESCRIPTOR on.
    files: contents, keyed by path; read-only.
    """

    argv: Sequence[str]
    environment: Mapping[str, str]
    directory: Path
    stdin: int
    stdout: int
    stderr: int
    descriptors: Sequence[int] = ()
    files: Mapping[str, bytes] = {}


CERTIFICATE_DIRECTORIES = ("/etc/ssl/certs", "/etc/pki/ca-trust", "/etc/pki/tls/certs")
"""Directories of the host that confined programs see at the same paths, in addition to /usr."""

FIRST_EXTRA_DESCRIPTOR = 3
"""The number of a command's first extra descriptor; small, because shells support only small numbers."""


class ConfinementLostError(OSError):
    """The confinement and its programs were killed from the outside."""


class Confinement(Protocol):
    """An isolated environment for host programs.

    Programs in it can access only the host's /usr and certificates, and the directories in its spec, possibly at other
    paths. Programs that run in different directories to write to are isolated from each other. They have no network
    except `proxy_listener`.
    """

    @property
    def proxy_listener(self) -> socket | None:
        """The listener at 127.0.0.1:PROXY_PORT (`interfaces.gateway`), the only reachable address.

        None means that nothing is confined and programs use the host's network.
        """
        ...

    @property
    def memory_bytes(self) -> int | None:
        """The total memory limit for all programs in the confinement; None means no limit."""
        ...

    def was_oom_killed(self) -> bool:
        """Return whether the kernel killed a program in the confinement because of the memory limit."""
        ...

    async def run(self, command: ConfinedCommand) -> int:
        """Run the program and return its exit code, which is 128+n after signal n.

        Cancellation kills the program and all its descendants.

        Raises OSError, or ConfinementLostError if the confinement is gone.
        """
        ...

    async def transfer_ownership(self, directory: Path) -> None:
        """Make the programs' uid the owner of the files that this process has written to a directory. Raises OSError.

        No confined program may have written to the directory before.
        """
        ...


Confine = Callable[[Sequence[Path], Sequence[Path]], AbstractAsyncContextManager[Confinement]]
"""Creates a confinement for an attempt. The directories that its programs may write to or read must exist.

Afterwards, the content of the writable directories is untrusted: code that accesses it must not follow links. Raises
AttemptError (provision_failed). The confinement is removed at the end of the block.
"""


class RuntimeProbe(msgspec.Struct, frozen=True):
    """What a runtime can do on this host, determined by running it.

    strength: a larger number means stronger isolation.
    isolation_notes, gaps: what is isolated and what is not; human-readable sentences.
    enforced_limits: the limits that are enforced here: memory, cpus, processes and sockets (their buffers).
    remedy: why the runtime does not work, and what to do if that is known; empty if it works.
    is_explicit_only: `auto` never selects the runtime because it is too slow. A probe for `auto` may skip such a
    runtime; then `is_available` is false.
    is_permanent: the runtime does not work, and no later probe by this process can have a different result.
    """

    runtime: str
    is_available: bool
    tier: str
    strength: int
    isolation_notes: Sequence[str] = ()
    gaps: Sequence[str] = ()
    enforced_limits: frozenset[str] = frozenset()
    remedy: str = ""
    is_explicit_only: bool = False
    is_permanent: bool = False


HANDLE_VERSION = 1
"""The newest handle format that this program supports."""


class SandboxHandle(msgspec.Struct, frozen=True, omit_defaults=True):
    """Enough data to end a sandbox from another process; stored before any part of the sandbox is created.

    details: runtime-specific data: kernel uid, cgroup directories, process ids with start times.
    """

    runtime: str
    attempt_id: str
    details: dict[str, str] = {}
    version: int = HANDLE_VERSION


TRANSPARENT_PORTS = (443, 80)
"""Ports on which programs without proxy support can reach hosts from every sandbox."""


DEFAULT_GIT_AUTHOR = "Sandbox"
"""Author name of git commits in a sandbox without an agent."""


class SandboxSpec(msgspec.Struct, frozen=True):
    """The sandbox to create.

    disk: directory of the attempt with `workspace`, `home` and `tmp`, which become SANDBOX_WORKSPACE, SANDBOX_HOME and
        /tmp. The runtime makes the sandbox's kernel uid its owner; `destroy` makes the caller its owner again.
    programs: absolute paths in the sandbox, keyed by host file; executable, and not readable if the runtime supports
    that.
    image: host directory that becomes / (read-only), created by a profile's build; None means the host's own /usr.
    transparent_ports: ports on which programs without proxy support reach the gateway; at most 100, without duplicates.
    is_disk_reused: an earlier, destroyed sandbox used the disk. It may have created hard links, which are accepted.
    git_author: the author name of git commits, unless the repository or the user's settings specify another one.
    """

    attempt_id: str
    disk: Path
    cpus: int
    memory_bytes: int
    processes_max: int
    programs: Mapping[Path, str] = {}
    image: Path | None = None
    transparent_ports: Sequence[int] = TRANSPARENT_PORTS
    is_disk_reused: bool = False
    git_author: str = DEFAULT_GIT_AUTHOR


class ConfinementSpec(msgspec.Struct, frozen=True):
    """Resources and directories for host programs that run on behalf of an attempt.

    directories: writable; the confinement's uid becomes their owner.
    read_only_directories: readable; only files that all users may read are accessible.
    """

    cpus: int
    memory_bytes: int
    processes_max: int
    directories: Sequence[Path]
    read_only_directories: Sequence[Path] = ()


class Command(msgspec.Struct, frozen=True):
    """A process to start in the sandbox as uid 1000. Its stdin is closed after all of `stdin` is written."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    directory: str
    stdin: bytes = b""


class ExitStatus(msgspec.Struct, frozen=True):
    """How a process ended. `code` is 128+n after signal n, None if the sandbox ended without reporting it."""

    code: int | None
    was_oom_killed: bool = False


class Stats(msgspec.Struct, frozen=True):
    """Current resource usage of the sandbox; None if it is unknown.

    oom_kills, fork_failures: how many times a process was killed for lack of memory, and how many times the process
        limit prevented a new one.
    """

    cpu_seconds: float | None
    memory_bytes: int | None
    processes: int | None
    oom_kills: int = 0
    fork_failures: int = 0


class Listeners(msgspec.Struct, frozen=True):
    """Listening sockets in the sandbox's own network namespace, which has no others.

    model, proxy: TCP on 127.0.0.1, ports as in `interfaces.gateway`.
    dns_udp, dns_tcp: port 53 on every address.
    transparent: TCP sockets, keyed by port, on every address of 198.18.0.0/15.
    """

    model: socket
    proxy: socket
    dns_udp: socket
    dns_tcp: socket
    transparent: Mapping[int, socket]

    def close(self) -> None:
        """Close all sockets. Idempotent."""
        for one in (self.model, self.proxy, self.dns_udp, self.dns_tcp, *self.transparent.values()):
            one.close()


class TerminalSize(msgspec.Struct, frozen=True):
    """Width and height in characters, each 1 to 1000."""

    rows: int
    columns: int


class Terminal(Protocol):
    """A process in the sandbox. Its pseudo-terminal was created there and is not a terminal of the host."""

    @property
    def output(self) -> StreamReader:
        """The terminal's output; ends when no process has the terminal open."""
        ...

    async def write(self, data: bytes) -> None:
        """Write input; returns when there is room for more. Does nothing once the terminal has ended."""
        ...

    async def resize(self, size: TerminalSize) -> None:
        """Set a new size (SIGWINCH)."""
        ...

    async def hang_up(self) -> None:
        """Close the terminal (SIGHUP). Processes that ignore the signal are killed with the sandbox."""
        ...

    async def wait(self) -> ExitStatus:
        """Wait until the process has ended; return how it ended. Can be called several times."""
        ...


class Sandbox(Protocol):
    """One sandbox. It never outlives the process that created it."""

    @property
    def handle(self) -> SandboxHandle:
        """Everything that `Runtime.destroy` needs."""
        ...

    @property
    def listeners(self) -> Listeners:
        """The sockets through which the sandbox communicates; there is no other network access."""
        ...

    @property
    def slow_reason(self) -> str | None:
        """Why the sandbox is slower than necessary (human-readable); None if it is not."""
        ...

    async def start(self, command: Command) -> tuple[StreamReader, StreamReader]:
        """Run the sandbox's only command; return its stdout and stderr.

        Raises AttemptError (provision_failed), or (sandbox_lost) if the sandbox is gone.
        """
        ...

    async def open_terminal(self, command: Command, size: TerminalSize) -> Terminal:
        """Run an additional process in the sandbox, with the same confinement and limits as the command.

        `command.stdin` is ignored. Call it only while the command runs. Raises AttemptError (sandbox_lost).
        """
        ...

    async def signal(self, signal_number: int) -> None:
        """Send a signal to the command's process; does nothing if the process is gone."""
        ...

    async def kill(self) -> None:
        """Send SIGKILL to every process in the sandbox."""
        ...

    async def wait(self) -> ExitStatus:
        """Wait until the command has ended; return how it ended. Can be called several times.

        Once the command has ended, waits up to 10 s for all other processes in the sandbox to end. Processes that still
        exist after that have received SIGKILL and execute no further instructions; `destroy` reports them.
        """
        ...

    async def stats(self) -> Stats:
        """Return the current resource usage."""
        ...

    async def wait_for_exceeded_limit(self) -> str:
        """Wait until the sandbox exceeds a limit that the kernel does not enforce; return why it must end.

        The reason is human-readable: the sandbox has too many kernel objects, such as sockets, open files or locks; it
        uses too much of the host kernel's memory or time; too many of its processes were killed for lack of memory; or
        its usage cannot be measured within 5 s. Uses a bounded share of CPU time. Raises OSError.
        """
        ...


class Runtime(Protocol):
    """Creates and ends sandboxes of one kind."""

    @property
    def name(self) -> str:
        """The value of `server.runtime` that selects this runtime."""
        ...

    @property
    def tier(self) -> str:
        """The isolation tier, as in the runtime's probes."""
        ...

    async def probe(self) -> RuntimeProbe:
        """Try the runtime for at most 10 s, or 60 s with emulation, which is tried only if requested by name.

        On a busy machine, a second try may take four times as long. QEMU also tests the speed of the machine first.
        """
        ...

    def prepare(self, attempt_id: str) -> SandboxHandle:
        """Reserve what a sandbox of this attempt needs (kernel uid, names); create nothing that could leak."""
        ...

    async def create(self, handle: SandboxHandle, spec: SandboxSpec) -> Sandbox:
        """Create a prepared sandbox. Leaves nothing behind on failure.

        Raises AttemptError (provision_failed), or (sandbox_lost) if the sandbox is killed while it starts.
        """
        ...

    def confine(self, handle: SandboxHandle, spec: ConfinementSpec) -> AbstractAsyncContextManager[Confinement]:
        """Confine host programs with the kernel uid and control group of a prepared sandbox that is not running.

        The confinement is removed at the end of the block; `destroy` removes it too. Raises AttemptError
        (provision_failed).
        """
        ...

    async def destroy(self, handle: SandboxHandle, disk: Path | None) -> None:
        """Remove every part of the sandbox. Idempotent. Works from any process, even after a crash or a reboot.

        On return, none of the sandbox's processes, mounts, namespaces and cgroups exist, and `disk` belongs to the
        caller. Pass None for `disk` if the disk is removed next; this saves changing the owner of every file. Raises
        AttemptError (sandbox_lost) if a part cannot be removed within 10 s.
        """
        ...

    def unfreed_bytes(self, attempt_id: str) -> int:
        """Return the memory in bytes that the kernel keeps although this object ended the attempt's sandbox.

        The memory becomes free when the host restarts.
        """
        ...

    def recover_handle(self, attempt_id: str) -> SandboxHandle:
        """Return a handle for `destroy` if the stored one is lost. It lacks details that only the stored one contained.

        Reserves nothing.
        """
        ...

    def attempt_ids(self) -> Sequence[str]:
        """Return the ids of attempts with a process or cgroup on this host."""
        ...


TIERS = ("namespaces", "gvisor", "vm")
"""All tiers, weakest first."""

TIER_DESCRIPTIONS = {
    "namespaces": "namespaces and a system call filter, on the host's kernel",
    "gvisor": "a separate kernel in a host program that may use only a few system calls",
    "vm": "a virtual machine with a separate kernel",
}
"""What separates the agent from the host in each tier."""


def is_strong_enough(tier: str, minimum: str) -> bool:
    """Return whether a runtime of this tier satisfies a minimum tier.

    An empty minimum accepts every tier; an unknown minimum accepts none.
    """
    if not minimum:
        return True
    return tier in TIERS and minimum in TIERS and TIERS.index(tier) >= TIERS.index(minimum)
