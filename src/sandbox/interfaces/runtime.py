"""What makes sandboxes: a life in verbs around one serialisable handle."""

from asyncio import StreamReader
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from socket import socket
from typing import Protocol

import msgspec

from sandbox.model.limits import (
    FILE_LOCKS_MAX,
    IDLE_SLAB_BYTES_MAX,
    NETLINK_BYTES_MAX,
    OPEN_DIRECTORIES_MAX,
    OPEN_FILES_OF_SANDBOX_MAX,
    SOCKETS_MAX,
    UDP_SOCKETS_ON_PORT_MAX,
)


class ConfinedCommand(msgspec.Struct, frozen=True):
    """A program to run to its end.

    directory: of the host, one of the confinement's or below one. stdin, stdout, stderr: descriptors, which stay the
    caller's. descriptors: further ones, numbered from FIRST_DESCRIPTOR on. files: path to content, to be read only.
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
"""Directories of the host that programs in a confinement see by their own names, beside /usr."""

FIRST_EXTRA_DESCRIPTOR = 3
"""The number that the first of a command's further descriptors has; small, because shells know no others."""


class ConfinementLostError(OSError):
    """Somebody ended the confinement from outside, and what ran in it."""


class Confinement(Protocol):
    """Programs in it see the host's /usr, the directories that it was made with, side by side under their own names,
    and no network."""

    @property
    def proxy_listener(self) -> socket | None:
        """Listens at 127.0.0.1:PROXY_PORT (of `inside`), which is all that can be connected to; None: the host's own
        network is in sight, because nothing is confined."""
        ...

    @property
    def memory_bytes(self) -> int | None:
        """What its programs may have together; None: as much as there is."""
        ...

    def was_oom_killed(self) -> bool:
        """The kernel ended one of its programs because that was used up."""
        ...

    async def run(self, command: ConfinedCommand) -> int:
        """Gives the exit code, 128+n after signal n. Cancelled, it kills the program and all that it started.

        Raises OSError, and ConfinementLostError where it has gone meanwhile.
        """
        ...


Confine = Callable[[Sequence[Path], Sequence[Path]], AbstractAsyncContextManager[Confinement]]
"""Makes one for an attempt, with directories that it may write to and others that it may read; they must exist.

What stands in the former afterwards is hostile: whoever reads or writes there follows no link.
Raises AttemptError (provision_failed). All is gone at the end of the block.
"""


class RuntimeProbe(msgspec.Struct, frozen=True):
    """What a runtime can do on this machine, found out by trying.

    strength: more is stronger; isolates, gaps: sentences for people; mend: what to do when it does not work.
    limits: those that hold here, of memory, cpus, processes and sockets (their buffers).
    only_by_name: it works but so slowly that `auto` does not take it, however strong it is.
    is_final: it does not work, and no later probe by this process can find anything else.
    """

    runtime: str
    is_available: bool
    tier: str
    strength: int
    isolates: Sequence[str] = ()
    gaps: Sequence[str] = ()
    limits: frozenset[str] = frozenset()
    remedy: str = ""
    is_explicit_only: bool = False
    is_final: bool = False


HANDLE_VERSION = 1
"""The newest shape of handles that this program knows."""


class SandboxHandle(msgspec.Struct, frozen=True, omit_defaults=True):
    """Enough to end a sandbox from another process, written down before anything of it is created.

    details: the runtime's own (text to text): kernel uid, cgroup directories, process ids with start times.
    """

    runtime: str
    attempt_id: str
    details: dict[str, str] = {}
    version: int = HANDLE_VERSION


TRANSPARENT_PORTS = (443, 80)
"""At which programs that know no proxy reach hosts, in every sandbox."""


class SandboxSpec(msgspec.Struct, frozen=True):
    """What to make.

    disk: directory of the attempt that holds `workspace`, `home` and `tmp`, which become WORKSPACE, HOME (of
        `inside`) and /tmp; the runtime gives it to the sandbox's kernel uid and on destroy back to the caller's.
    disk_was_used: by an earlier sandbox, which is destroyed; hard links in it are its own.
    programs: host file to absolute path inside, executable and not readable where the runtime can.
    image: host directory that becomes / (read-only), as a profile's build left it; None: the host's own /usr.
    transparent_ports: where the gateway listens for programs that know no proxy, at most 100, each of them once.
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


class ConfinementSpec(msgspec.Struct, frozen=True):
    """What programs of the host's may use that run for an attempt, and what they see.

    directories: to write to, which become theirs; read_only: to read, as far as everybody may.
    """

    cpus: int
    memory_bytes: int
    processes_max: int
    directories: Sequence[Path]
    read_only: Sequence[Path] = ()


class Command(msgspec.Struct, frozen=True):
    """A process to start inside as uid 1000. `stdin` is given whole, then closed."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    directory: str
    stdin: bytes = b""


class ExitStatus(msgspec.Struct, frozen=True):
    """How the process ended. `code` is 128+n after signal n, None when the sandbox went without saying."""

    code: int | None
    was_oom_killed: bool = False


class Stats(msgspec.Struct, frozen=True):
    """What the sandbox uses now; None where the machine does not tell.

    memory_kills, forks_refused: how often, until now, a process was ended for want of memory or could not be born
    for the limit of processes.
    """

    cpu_seconds: float | None
    memory_bytes: int | None
    processes: int | None
    oom_kills: int = 0
    fork_failures: int = 0


class KernelUsage(msgspec.Struct, frozen=True):
    """What the host's kernel holds for a sandbox beyond its memory; None where the machine does not count it.

    sockets: of all kinds and states. buffer_bytes: in TCP and UDP sockets; buffer_bytes_max: the bound on that where
    the kernel keeps none. netlink_bytes: what waits in netlink sockets. received_bytes: what waits in TCP and UDP
    sockets, errors and time stamps included; received_bytes_max: the bound on that. idle_slab_bytes: of freed
    objects of the kernel whose memory is still taken. udp_sockets_on_port: of the port that has the most.
    """

    sockets: int | None = None
    buffer_bytes: int | None = None
    buffer_bytes_max: int | None = None
    netlink_bytes: int | None = None
    received_bytes: int | None = None
    received_bytes_max: int | None = None
    idle_slab_bytes: int | None = None
    udp_sockets_on_port: int | None = None

    def find_violation(self) -> str:
        """Why the sandbox must end, for people; empty while all is within bounds."""
        if self.sockets is not None and self.sockets > SOCKETS_MAX:
            return (
                f"The sandbox had {self.sockets} sockets, and the limit is {SOCKETS_MAX}; close connections that are "
                "not used, and accept those that come in."
            )
        if self.buffer_bytes and self.buffer_bytes_max is not None and self.buffer_bytes > self.buffer_bytes_max:
            return (
                f"The sandbox's sockets held {self.buffer_bytes >> 20} MiB in their buffers, and the limit for its "
                f"vm.memory is {self.buffer_bytes_max >> 20} MiB; read what arrives, or raise vm.memory."
            )
        if self.netlink_bytes is not None and self.netlink_bytes > NETLINK_BYTES_MAX:
            return f"The sandbox left {self.netlink_bytes >> 20} MiB unread in netlink sockets; read or close them."
        received, received_max = self.received_bytes, self.received_bytes_max
        if received is not None and received_max is not None and received > received_max:
            return (
                f"The sandbox left {received >> 20} MiB unread in TCP and UDP sockets, errors and time stamps of what "
                f"it sent included, and the limit is {received_max >> 20} MiB; read or close them."
            )
        if self.idle_slab_bytes is not None and self.idle_slab_bytes > IDLE_SLAB_BYTES_MAX:
            return (
                f"The sandbox left {self.idle_slab_bytes >> 20} MiB of the kernel's memory taken by few objects; "
                "close what it opened together with most of the rest."
            )
        if self.udp_sockets_on_port is not None and self.udp_sockets_on_port > UDP_SOCKETS_ON_PORT_MAX:
            return (
                f"The sandbox had {self.udp_sockets_on_port} UDP sockets on one port, and the limit is "
                f"{UDP_SOCKETS_ON_PORT_MAX}; bind them to ports of their own."
            )
        return ""


class FileUsage(msgspec.Struct, frozen=True):
    """The open files of a sandbox; None where the machine does not count them.

    open_files: descriptors of all its processes. directories: those of them that are directories; locks: those of
    POSIX on files. Both are 0 while they cannot be over their bounds.
    """

    open_files: int | None = None
    directories: int = 0
    locks: int = 0

    def find_violation(self) -> str:
        """Why the sandbox must end, for people; empty while all is within bounds."""
        if self.open_files is not None and self.open_files > OPEN_FILES_OF_SANDBOX_MAX:
            return (
                f"The sandbox's processes had {self.open_files} open files, and {OPEN_FILES_OF_SANDBOX_MAX} is the "
                "most; close those that are not needed."
            )
        if self.directories > OPEN_DIRECTORIES_MAX:
            return f"The sandbox had more than {OPEN_DIRECTORIES_MAX} open directories; close those that are unused."
        if self.locks > FILE_LOCKS_MAX:
            return f"The sandbox had more than {FILE_LOCKS_MAX} locks on files; release those that are not needed."
        return ""


class Listeners(msgspec.Struct, frozen=True):
    """Listening sockets inside the sandbox's own network namespace; nothing else listens there.

    model, proxy: TCP on 127.0.0.1, ports as in `inside` · names_udp, names_tcp: port 53 on every address
    transparent: port to TCP socket on every address of 198.18.0.0/15.
    """

    model: socket
    proxy: socket
    dns_udp: socket
    dns_tcp: socket
    transparent: Mapping[int, socket]

    def close(self) -> None:
        """Nobody answers any more; again is fine."""
        for one in (self.model, self.proxy, self.dns_udp, self.dns_tcp, *self.transparent.values()):
            one.close()


class TerminalSize(msgspec.Struct, frozen=True):
    """In characters, each 1 to 1000."""

    rows: int
    columns: int


class Terminal(Protocol):
    """A process inside that has a pseudo-terminal of its own, made inside: no terminal of the host's."""

    @property
    def output(self) -> StreamReader:
        """What it shows; at its end when nobody holds the terminal any more."""
        ...

    async def write(self, data: bytes) -> None:
        """Type; returns when there is room for more. Nothing happens once it has ended."""
        ...

    async def resize(self, size: TerminalSize) -> None:
        """Tell it a new size (SIGWINCH)."""
        ...

    async def hang_up(self) -> None:
        """Take the terminal away (SIGHUP); what does not mind is killed with the sandbox."""
        ...

    async def wait(self) -> ExitStatus:
        """How the process ended. May be called many times."""
        ...


class Sandbox(Protocol):
    """One sandbox. It never outlives the process that created it."""

    @property
    def handle(self) -> SandboxHandle:
        """Everything `Runtime.destroy` needs."""
        ...

    @property
    def listeners(self) -> Listeners:
        """The only door."""
        ...

    @property
    def slow_reason(self) -> str | None:
        """Why it is slower than such a sandbox has to be, for people; None where it is not."""
        ...

    async def start(self, command: Command) -> tuple[StreamReader, StreamReader]:
        """Run the sandbox's one command; gives its stdout and stderr.

        Raises AttemptError (provision_failed), or (sandbox_lost) where the sandbox has gone meanwhile.
        """
        ...

    async def open_terminal(self, command: Command, size: TerminalSize) -> Terminal:
        """Run a further process inside, confined as the sandbox's command is and counted with it; `stdin` is unused.

        Only after `start` and before its end. Raises AttemptError (sandbox_lost).
        """
        ...

    async def signal(self, signal_number: int) -> None:
        """Send a signal to the command's process; nothing happens when it is gone."""
        ...

    async def kill(self) -> None:
        """KILL everything inside, at once and whole."""
        ...

    async def wait(self) -> ExitStatus:
        """How the command ended, once nothing is left inside, or 10 s later. May be called many times.

        Processes that are left then have been sent KILL and run no further instruction; `destroy` reports them.
        """
        ...

    async def stats(self) -> Stats:
        """What it uses now."""
        ...

    async def kernel_usage(self) -> KernelUsage:
        """What the host's kernel holds for it. Cheap enough to be called ten times a second."""
        ...

    async def file_usage(self) -> FileUsage:
        """Its open files; only the directories that the host has open for it where it has a kernel of its own.

        Takes long where there are many.
        """
        ...


class Runtime(Protocol):
    """Makes and ends sandboxes of one kind."""

    @property
    def name(self) -> str:
        """`bubblewrap`, `gvisor` or `qemu`."""
        ...

    @property
    def tier(self) -> str:
        """How strongly it isolates, in the word of its probe."""
        ...

    async def probe(self) -> RuntimeProbe:
        """Try it, within 10 s; where all is emulated, which is tried only when it is asked for by name, 60 s."""
        ...

    def prepare(self, attempt_id: str) -> SandboxHandle:
        """Claim what a sandbox of this attempt needs (a kernel uid, names), creating nothing that could leak."""
        ...

    async def create(self, handle: SandboxHandle, spec: SandboxSpec) -> Sandbox:
        """Make a planned sandbox. Leaves nothing behind where it fails.

        Raises AttemptError (provision_failed), or (sandbox_lost) where somebody killed it as it began.
        """
        ...

    def confine(self, handle: SandboxHandle, spec: ConfinementSpec) -> AbstractAsyncContextManager[Confinement]:
        """For programs of the host's, in the kernel uid and the control group of a planned sandbox that does not run.

        Nothing of it is left at the end of the block; `destroy` ends it as well. Raises AttemptError
        (provision_failed).
        """
        ...

    async def destroy(self, handle: SandboxHandle, disk: Path | None) -> None:
        """End whatever there is of it; again is fine, from any process, also after a crash or a reboot.

        On return no process, mount, namespace or cgroup of it is left, and `disk` belongs to the caller; None: it is
        removed next, whoever has it, and a million files need no new owner for that.
        Raises AttemptError (sandbox_lost) when something will not go within 10 s.
        """
        ...

    def recover(self, attempt_id: str) -> SandboxHandle:
        """A handle without what only the one on disk tells, for `destroy` where that one is lost. Claims nothing."""
        ...

    def attempt_ids(self) -> Sequence[str]:
        """Attempt ids of which something (process, cgroup) is on this machine."""
        ...
