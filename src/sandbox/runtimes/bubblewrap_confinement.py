"""Runs confined host programs. The launcher starts bubblewrap for each program.

The programs use a sandbox's kernel uid and control group but do not run in a sandbox. Each gets its own namespaces, the
host's /usr, a few directories of the attempt, and the launcher's network namespace, which contains a single listener.
"""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from socket import socket

from sandbox.interfaces.images import MOUNT_POINT_FILES
from sandbox.interfaces.runtime import CERTIFICATE_DIRECTORIES, ConfinedCommand, ConfinementSpec
from sandbox.runtimes import bubblewrap_command, disk_ownership, rootfs_spec
from sandbox.runtimes.descriptor_passing import create_memfd
from sandbox.runtimes.launcher_client import LauncherProcess, ProgramSpec
from sandbox.runtimes.limits.cgroups import ControlGroup
from sandbox.runtimes.programs import launcher

_ATTEMPT_ROOT = PurePosixPath("/attempt")
"""Directory in the confinement that contains the attempt's directories by name, so their host paths are hidden."""

_HOST_PATHS = dict.fromkeys((*rootfs_spec.HOST_PATHS, *CERTIFICATE_DIRECTORIES, "/etc/crypto-policies"))
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
        program_spec = bubblewrap_command.build_program_spec(
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
            await asyncio.to_thread(disk_ownership.chown_tree, str(directory), self._uid)

    def _arguments(self, program_spec: ProgramSpec, command: ConfinedCommand) -> Iterator[str]:
        yield from bubblewrap_command.isolation_arguments(self._attempt_id)
        yield from bubblewrap_command.seccomp_arguments(program_spec)
        yield from self._root_arguments(command.directory)
        etc = rootfs_spec.etc_files(self._attempt_id)
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
        for directory in rootfs_spec.DIRECTORIES:
            yield from ("--perms", "0755", "--dir", directory)
        yield from ("--ro-bind", "/usr", "/usr")
        for link, target in rootfs_spec.LINKS.items():
            yield from ("--symlink", target, link)
        for path in _HOST_PATHS:
            yield from ("--ro-bind-try", path, path)
        yield from (
            *bubblewrap_command.PROC_ARGUMENTS,
            *bubblewrap_command.READ_ONLY_PROC_ARGUMENTS,
            *bubblewrap_command.DEVICE_ARGUMENTS_WITHOUT_TERMINALS,
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
