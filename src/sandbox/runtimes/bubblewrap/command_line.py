"""The command line of bubblewrap, and the host's paths that the launcher exposes to it."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from sandbox.interfaces.runtime import Command, SandboxSpec
from sandbox.model.fixed_limits import SHARED_MEMORY_FILES_MAX
from sandbox.runtimes import bubblewrap_command
from sandbox.runtimes.bubblewrap.disk_root import DiskRoot, find_disk_root
from sandbox.runtimes.descriptor_passing import create_memfd
from sandbox.runtimes.launcher_client import ProgramSpec
from sandbox.runtimes.programs import launcher
from sandbox.runtimes.rootfs_spec import DISK_DIRECTORIES, RootFsSpec, describe_rootfs

_SHARED_MEMORY, _DISK = "shared-memory", "disk"


def exposed_paths(spec: SandboxSpec) -> dict[str, Path]:
    """Return the disk or its directories, keyed by their names under the launcher's EXPOSED_DIRECTORY."""
    if find_disk_root(spec) is not None:
        return {_DISK: spec.disk}
    return {name: spec.disk / name for name in DISK_DIRECTORIES}


def exposed_entries(spec: SandboxSpec) -> Iterator[tuple[str, str, str]]:
    """Yield entries for the launcher to expose: the host's files that are read-only inside, and /dev/shm."""
    root = describe_rootfs(spec)
    if root.image is not None:
        yield ("overlay", "image", str(root.image))
    for path in filter(os.path.exists, root.host_paths):
        yield ("overlay", f"host{path}", path)
    for index, program in enumerate(root.mounts):
        yield ("overlay", f"program-{index}", str(program))
    size = f"size={spec.memory_bytes // 2},nr_inodes={SHARED_MEMORY_FILES_MAX}"
    yield ("memory", _SHARED_MEMORY, f"mode=1777,{size}")


def build_program_spec(program: str, spec: SandboxSpec, command: Command, status_fd: int) -> ProgramSpec:
    """Build the argv and the descriptors for starting one sandbox.

    status_fd: descriptor for bubblewrap's reports; ownership passes to the result. Raises AttemptError
    (provision_failed) for NUL characters.
    """
    return bubblewrap_command.build_program_spec(
        program,
        spec.attempt_id,
        lambda program_spec: (
            _bwrap_arguments(program_spec, spec, command, program_spec.add_descriptor(status_fd)),
            command.argv,
        ),
    )


def _bwrap_arguments(program_spec: ProgramSpec, spec: SandboxSpec, command: Command, status: str) -> Iterator[str]:
    yield from bubblewrap_command.isolation_arguments(spec.attempt_id)
    yield from ("--json-status-fd", status)
    yield from bubblewrap_command.seccomp_arguments(program_spec)
    root = describe_rootfs(spec)
    disk_root = find_disk_root(spec)
    yield from _root_arguments(root) if disk_root is None else _disk_root_arguments(root, disk_root)
    yield from _system_arguments()
    if disk_root is None:
        yield from _disk_arguments()
    yield from _file_arguments(program_spec, root)
    for index, sandbox_path in enumerate(root.mounts.values()):
        yield from ("--ro-bind", f"{launcher.EXPOSED_DIRECTORY}/program-{index}", sandbox_path)
    for target in (*root.tmpfs_mounts, *(("/",) if disk_root is None else disk_root.tmpfs_mounts)):
        yield from ("--remount-ro", target)
    yield from ("--chdir", command.directory, "--clearenv")
    for name, value in command.environment.items():
        yield from ("--setenv", name, value)


def _root_arguments(root: RootFsSpec) -> Iterator[str]:
    if root.image is not None:
        yield from ("--ro-bind", f"{launcher.EXPOSED_DIRECTORY}/image", "/")
    yield from _content_arguments(root, root.tmpfs_mounts, root.links)


def _disk_root_arguments(root: RootFsSpec, disk_root: DiskRoot) -> Iterator[str]:
    """Yield bubblewrap's arguments that first mount the disk, and then the rest of the root directory over it.

    The mount points must exist, because bubblewrap cannot create them on the disk.
    """
    yield from ("--bind", f"{launcher.EXPOSED_DIRECTORY}/{_DISK}", "/")
    for path in disk_root.image_paths:
        yield from ("--ro-bind", f"{launcher.EXPOSED_DIRECTORY}/image{path}", path)
    links = {link: target for link, target in root.links.items() if link not in disk_root.links}
    yield from _content_arguments(root, (*disk_root.tmpfs_mounts, *root.tmpfs_mounts), links)


def _content_arguments(root: RootFsSpec, tmpfs_mounts: Iterable[str], links: Mapping[str, str]) -> Iterator[str]:
    for mount_path in tmpfs_mounts:
        yield from ("--perms", "0755", "--tmpfs", mount_path)
    for directory in root.directories:
        yield from ("--perms", "0755", "--dir", directory)
    for link, target in links.items():
        yield from ("--symlink", target, link)
    for path in root.host_paths:
        yield from ("--ro-bind-try", f"{launcher.EXPOSED_DIRECTORY}/host{path}", path)


def _system_arguments() -> Iterator[str]:
    # /proc/sys is read-only as a second barrier: uid 0 could write to it without capabilities, but the uid is never 0.
    yield from bubblewrap_command.PROC_ARGUMENTS
    # pid 1 is bubblewrap with the agent's uid. A process that can write its memory can forge the command's exit code.
    yield from ("--perms", "0555", "--tmpfs", "/proc/1", "--remount-ro", "/proc/1")
    yield from bubblewrap_command.READ_ONLY_PROC_ARGUMENTS
    yield from bubblewrap_command.DEVICE_ARGUMENTS
    yield from ("--bind", f"{launcher.EXPOSED_DIRECTORY}/{_SHARED_MEMORY}", "/dev/shm")  # noqa: S108


def _disk_arguments() -> Iterator[str]:
    for name, sandbox_path in DISK_DIRECTORIES.items():
        yield from ("--bind", f"{launcher.EXPOSED_DIRECTORY}/{name}", sandbox_path)


def _file_arguments(program_spec: ProgramSpec, root: RootFsSpec) -> Iterator[str]:
    """Write the synthetic files. They are mounted over the image's files, because an image is read-only."""
    option = "--file" if root.image is None else "--ro-bind-data"
    for path, content in root.files.items():
        number = program_spec.add_descriptor(create_memfd(PurePosixPath(path).name, content))
        yield from ("--perms", "0644", option, number, path)
