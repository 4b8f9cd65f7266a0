"""Locates bubblewrap and defines the arguments that all its invocations share."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from sandbox.interfaces.runtime import SANDBOX_UID
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.runtimes.descriptor_passing import create_memfd
from sandbox.runtimes.launcher_client import ProgramSpec, attempt_marker, reject_nul
from sandbox.runtimes.programs import launcher
from sandbox.runtimes.seccomp import syscall_filter

_PROGRAMS = (Path("/usr/bin/bwrap"), Path("/usr/local/bin/bwrap"), Path("/bin/bwrap"))

DEVICE_ARGUMENTS = (
    *("--dev-bind", launcher.DEVICES_DIRECTORY, "/dev"),
    *("--dev-bind", launcher.DEVPTS_DIRECTORY, "/dev/pts", "--remount-ro", "/dev"),
)
"""Mounts the launcher's device files, which are not those of the host, and its devpts, which has few terminals.

/dev is read-only, because its file system does not limit the time of one call: one read of a directory in memory lists
all of its files without interruption.
"""

DEVICE_ARGUMENTS_WITHOUT_TERMINALS = (
    *("--dev-bind", launcher.DEVICES_DIRECTORY, "/dev"),
    *("--perms", "0555", "--tmpfs", "/dev/pts", "--remount-ro", "/dev/pts", "--remount-ro", "/dev"),
)
"""For programs that need no terminals: the CPU time of the kernel threads for their input would have to be limited."""

_HIDDEN_PROC_DIRECTORIES = ("/proc/bus", "/proc/driver", "/proc/fs")  # they exist on every kernel
PROC_ARGUMENTS = (
    *("--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys"),
    *("--dev-bind", f"{launcher.DEVICES_DIRECTORY}/null", "/proc/locks"),
    *(word for path in _HIDDEN_PROC_DIRECTORIES for word in ("--perms", "0555", "--tmpfs", path, "--remount-ro", path)),
)
"""/proc without a usable /proc/locks: while a process reads that file, no process on the machine can lock a file.

/proc/bus, /proc/driver and /proc/fs are empty, because they describe devices and file systems of the host. Moreover, to
list the statistics of an ext4 file system, the kernel walks all cached inodes with a spinlock held.

/proc is made read-only with READ_ONLY_PROC_ARGUMENTS after the last mount under it.
"""

READ_ONLY_PROC_ARGUMENTS = ("--remount-ro", "/proc")
"""Prevents a process from lowering its oom_score_adj, which the launcher raised."""


def build_program_spec(
    program: str,
    attempt_id: str,
    describe: Callable[[ProgramSpec], tuple[Iterable[str], Sequence[str]]],
) -> ProgramSpec:
    """Build the argv and descriptors that start bubblewrap. bubblewrap reads its arguments from a file.

    describe: adds descriptors to the result; returns bubblewrap's arguments and the argv of the confined program.
    Raises AttemptError (provision_failed) for NUL characters.
    """
    program_spec = ProgramSpec()
    try:
        lazy_arguments, argv = describe(program_spec)
        arguments = list(lazy_arguments)
        reject_nul([*arguments, *argv])
        text = "".join(f"{word}\0" for word in arguments).encode(errors="surrogateescape")
        number = program_spec.add_descriptor(create_memfd("arguments", text))
    except BaseException:
        program_spec.close()
        raise
    program_spec.argv = [program, attempt_marker(attempt_id), "--args", number, "--", *argv]
    return program_spec


def isolation_arguments(attempt_id: str) -> Iterator[str]:
    """Yield the arguments that all confined programs share: separate namespaces, a uid and no capabilities.

    The network and IPC namespaces are the launcher's.
    """
    yield from ("--unshare-user", "--unshare-pid", "--unshare-uts", "--unshare-cgroup-try")
    yield from ("--disable-userns", "--uid", str(SANDBOX_UID), "--gid", str(SANDBOX_UID), "--hostname", attempt_id)
    yield from ("--new-session", "--die-with-parent", "--cap-drop", "ALL")


def seccomp_arguments(program_spec: ProgramSpec, filter_: bytes | None = None) -> Iterator[str]:
    """Yield the arguments that install a system call filter, by default the one for programs in a sandbox."""
    filter_ = _assemble_default_filter() if filter_ is None else filter_
    yield from ("--add-seccomp-fd", program_spec.add_descriptor(create_memfd("filter", filter_)))


@cache
def _assemble_default_filter() -> bytes:
    return syscall_filter.assemble_filter(os.uname().machine)


def find_bwrap() -> str | None:
    """Return bubblewrap's path. Looks in fixed locations, not in PATH."""
    return next((str(path) for path in _PROGRAMS if os.access(path, os.X_OK)), None)


def require_bwrap() -> str:
    """Return bubblewrap's path. Raises AttemptError (provision_failed) if it is not installed."""
    program = find_bwrap()
    if program is None:
        raise AttemptError(FailureCode.PROVISION_FAILED, "bubblewrap is missing; install it (package bubblewrap).")
    return program
