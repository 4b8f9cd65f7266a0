"""Confines programs with bubblewrap: the arguments that all invocations share, and confined host programs.

The launcher starts bubblewrap for each confined host program. These programs use a sandbox's kernel uid and control
group but do not run in a sandbox. Each gets its own namespaces, the host's /usr, a few directories of the attempt, and
the launcher's network namespace, which contains a single listener.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from socket import socket

from sandbox.interfaces.images import MOUNT_POINT_FILES
from sandbox.interfaces.runtime import CERTIFICATE_DIRECTORIES, SANDBOX_UID, ConfinedCommand, ConfinementSpec
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.runtimes import sandbox_filesystem, seccomp_filter
from sandbox.runtimes.launcher_client import LauncherProcess, ProgramSpec, attempt_marker, create_memfd, reject_nul
from sandbox.runtimes.limits.cgroups import ControlGroup
from sandbox.runtimes.programs import launcher

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
"""For programs that need no terminals. Terminals would need a limit on the CPU time of the kernel threads for input."""

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
    return seccomp_filter.assemble_filter(os.uname().machine)


def find_bwrap() -> str | None:
    """Return bubblewrap's path. Looks in fixed locations, not in PATH."""
    return next((str(path) for path in _PROGRAMS if os.access(path, os.X_OK)), None)


def require_bwrap() -> str:
    """Return bubblewrap's path. Raises AttemptError (provision_failed) if it is not installed."""
    program = find_bwrap()
    if program is None:
        raise AttemptError(FailureCode.PROVISION_FAILED, "bubblewrap is missing; install it (package bubblewrap).")
    return program


_ATTEMPT_ROOT = PurePosixPath("/attempt")
"""Directory in the confinement that contains the attempt's directories by name, so their host paths are hidden."""

_HOST_PATHS = dict.fromkeys((*sandbox_filesystem.HOST_PATHS, *CERTIFICATE_DIRECTORIES, "/etc/crypto-policies"))
_TMPFS_BYTES_MAX = 64 * 1024 * 1024


class BubblewrapConfinement:
    """Implements `interfaces.runtime.Confinement`.

    program: bubblewrap's path. proxy: the listener of the proxy. uid: the kernel uid of the programs; None if it is
    this process's uid.
    """

    def __init__(
        self,
        attempt_id: str,
        program: str,
        launcher: LauncherProcess,
        proxy: socket,
        spec: ConfinementSpec,
        group: ControlGroup,
        uid: int | None,
    ) -> None:
        self.proxy_listener: socket | None = proxy
        self.memory_bytes = spec.memory_bytes if "memory" in group.limits() else None
        self._group = group
        self._initial_oom_kills = group.oom_kills()
        self._attempt_id = attempt_id
        self._program = program
        self._launcher = launcher
        self._spec = spec
        self._uid = uid

    def was_oom_killed(self) -> bool:
        """Return whether the kernel has killed a process since this confinement started.

        The control group may have belonged to a sandbox before; earlier kills in it do not count.
        """
        return self._group.oom_kills() > self._initial_oom_kills

    async def run(self, command: ConfinedCommand) -> int:
        """Run the command and return its exit code, 128+n after signal n.

        Raises OSError, and AttemptError (provision_failed) for NUL characters.
        """
        program_spec = build_program_spec(
            self._program,
            self._attempt_id,
            lambda program_spec: (self._arguments(program_spec, command), command.argv),
        )
        try:
            low_fds = (command.stdin, command.stdout, command.stderr, *command.descriptors)
            code = await self._launcher.run_command(program_spec.argv, low_fds, program_spec.descriptors)
        finally:
            program_spec.close()
        return code if code >= 0 else 128 - code

    async def transfer_ownership(self, directory: Path) -> None:
        """Implements `Confinement.transfer_ownership`."""
        if self._uid is not None:
            await asyncio.to_thread(sandbox_filesystem.chown_tree, str(directory), self._uid)

    def _arguments(self, program_spec: ProgramSpec, command: ConfinedCommand) -> Iterator[str]:
        yield from isolation_arguments(self._attempt_id)
        yield from seccomp_arguments(program_spec)
        yield from self._root_arguments(command.directory)
        etc = sandbox_filesystem.etc_files(self._attempt_id)
        files = {**{path: etc[path] for path in MOUNT_POINT_FILES}, **command.files}
        for path, content in files.items():
            yield from (
                "--perms",
                "0444",
                "--file",
                program_spec.add_descriptor(create_memfd("file", content)),
                path,
            )
        yield from ("--remount-ro", "/", "--chdir", self._path_inside(command.directory), "--clearenv")
        for name, value in command.environment.items():
            yield from ("--setenv", name, value)

    def _root_arguments(self, working_directory: Path) -> Iterator[str]:
        for directory in sandbox_filesystem.DIRECTORIES:
            yield from ("--perms", "0755", "--dir", directory)
        yield from ("--ro-bind", "/usr", "/usr")
        for link, target in sandbox_filesystem.LINKS.items():
            yield from ("--symlink", target, link)
        for path in _HOST_PATHS:
            yield from ("--ro-bind-try", path, path)
        yield from (
            *PROC_ARGUMENTS,
            *READ_ONLY_PROC_ARGUMENTS,
            *DEVICE_ARGUMENTS_WITHOUT_TERMINALS,
        )
        yield from ("--size", str(_TMPFS_BYTES_MAX), "--perms", "1777", "--tmpfs", "/tmp")  # noqa: S108
        own = [one for one in self._spec.directories if working_directory.is_relative_to(one)]
        visible = {*(own or self._spec.directories), *self._spec.read_only_directories}
        for number, confined_directory in enumerate(_confined_directories(self._spec)):
            if confined_directory not in visible:
                continue
            option = "--ro-bind" if confined_directory in self._spec.read_only_directories else "--bind"
            yield from (
                option,
                f"{launcher.EXPOSED_DIRECTORY}/{_exposed_name(number)}",
                str(_ATTEMPT_ROOT / confined_directory.name),
            )

    def _path_inside(self, directory: Path) -> str:
        for one in _confined_directories(self._spec):
            if directory.is_relative_to(one):
                return str(_ATTEMPT_ROOT / one.name / directory.relative_to(one))
        raise ValueError(f"{directory} is not visible to the confined program")


def exposed_paths(spec: ConfinementSpec) -> dict[str, Path]:
    """Return the host paths to expose, keyed by their names under the launcher's EXPOSED_DIRECTORY."""
    return {_exposed_name(number): path for number, path in enumerate(_confined_directories(spec))}


def _confined_directories(spec: ConfinementSpec) -> Sequence[Path]:
    return (*spec.directories, *spec.read_only_directories)


def _exposed_name(number: int) -> str:
    return f"place-{number}"
