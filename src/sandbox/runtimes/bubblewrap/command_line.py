"""The command line of bubblewrap, the host's paths that the launcher exposes to it, and the sandbox's root directory.

The root directory is the root of the task's disk, with read-only directories mounted over it. For each `..` in a path,
the kernel checks all parents of the directory, without interruption, unless the root of the mount is the root of its
file system (`path_connected` in fs/namei.c). With separate mounts of the disk's directories, one call in a directory
that is 200,000 levels deep would take 31 s. Here, one mount of the whole disk contains all directories of the agent.

The root directory and /home belong to the host's root user, whose uid is not mapped in the sandbox. They contain only
the agent's directories, links, and empty mount points.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path, PurePosixPath

import msgspec

from sandbox.interfaces.runtime import Command, SandboxSpec
from sandbox.model.fixed_limits import SHARED_MEMORY_FILES_MAX
from sandbox.runtimes import bubblewrap_confinement
from sandbox.runtimes.launcher_client import ProgramSpec, create_memfd
from sandbox.runtimes.programs import launcher
from sandbox.runtimes.sandbox_filesystem import DISK_DIRECTORIES, RootFsSpec, describe_rootfs

_PARENTS = ("/", "/home")
"""Directories on the disk that contain directories of the agent."""

_AGENT_PATHS = {"/home", *DISK_DIRECTORIES.values()}
_KERNEL_DIRECTORIES = ("/dev", "/proc")


class DiskRoot(msgspec.Struct, frozen=True):
    """The content of the root directory and of /home, except the agent's directories.

    tmpfs_mounts: directories over which an empty tmpfs is mounted.
    image_paths: directories and files that are mounted from the image.
    directories, files: all mount points.
    links: link targets, keyed by path.
    """

    tmpfs_mounts: Sequence[str]
    image_paths: Sequence[str]
    directories: Sequence[str]
    files: Sequence[str]
    links: Mapping[str, str]

    @property
    def paths(self) -> Iterator[str]:
        """The paths of all entries."""
        return chain(self.directories, self.files, self.links)


def prepare_disk_root(spec: SandboxSpec) -> None:
    """Create the mount points and links on the disk. Does nothing if the disk is a plain directory.

    Raises OSError unless an earlier sandbox has used the disk. If such a disk is full and has an earlier layout, its
    directories are mounted separately.
    """
    root = _describe_disk_root(spec)
    if root is not None:
        try:
            create_entries(spec.disk, root)
        except OSError:
            if not spec.is_disk_reused:
                raise


def find_disk_root(spec: SandboxSpec) -> DiskRoot | None:
    """Describe the root of the disk; None if the disk is a plain directory, or was not prepared completely."""
    root = _describe_disk_root(spec)
    if root is None or not all(os.path.lexists(_on_disk(spec.disk, path)) for path in root.paths):
        return None
    return root


def _describe_disk_root(spec: SandboxSpec) -> DiskRoot | None:
    if os.geteuid() != 0 or not os.path.ismount(spec.disk):
        return None
    root = describe_rootfs(spec)
    return _describe_host_root(root) if root.image is None else _describe_image_root(root, root.image)


def create_entries(disk: Path, root: DiskRoot) -> None:
    """Create mount points and links, and remove those that an earlier sandbox left. Raises OSError."""
    for parent in _PARENTS:
        with os.scandir(_on_disk(disk, parent)) as entries:
            for entry in entries:
                path = str(PurePosixPath(parent, entry.name))
                if path not in _AGENT_PATHS and not _is_described(entry, path, root):
                    _remove(entry)
    for path in root.directories:
        _on_disk(disk, path).mkdir(exist_ok=True)
    for path in root.files:
        _on_disk(disk, path).touch()
    for path, target in root.links.items():
        if not _on_disk(disk, path).is_symlink():
            _on_disk(disk, path).symlink_to(target)


def _on_disk(disk: Path, path: str) -> Path:
    return disk / path.removeprefix("/")


def _is_described(entry: os.DirEntry[str], path: str, root: DiskRoot) -> bool:
    if entry.is_symlink():
        return root.links.get(path) == os.readlink(entry.path)  # noqa: PTH115
    return path in (root.directories if entry.is_dir() else root.files)


def _remove(entry: os.DirEntry[str]) -> None:
    """Remove a link or a mount point. A lost+found directory with files stays: only root can enter it."""
    if entry.is_dir(follow_symlinks=False):
        with suppress(OSError):
            os.rmdir(entry.path)  # noqa: PTH106
    else:
        os.unlink(entry.path)  # noqa: PTH108


def _describe_host_root(root: RootFsSpec) -> DiskRoot:
    paths = (*root.directories, *root.links, *root.host_paths, *root.files, *root.mounts.values())
    links = {path: target for path, target in root.links.items() if _is_top_level(path)}
    host_paths = list(filter(_is_top_level, root.host_paths))
    top_level = {f"/{PurePosixPath(path).parts[1]}" for path in paths}
    tmpfs_mounts = sorted(top_level - {*links, *host_paths} - _AGENT_PATHS)
    return DiskRoot(
        tmpfs_mounts=tmpfs_mounts,
        image_paths=(),
        directories=(*tmpfs_mounts, *host_paths, *_KERNEL_DIRECTORIES),
        files=(),
        links=links,
    )


def _is_top_level(path: str) -> bool:
    return str(PurePosixPath(path).parent) == "/"


def _describe_image_root(root: RootFsSpec, image: Path) -> DiskRoot:
    directories, files, links = [], [], {}
    for path, entry in _list_image(image):
        if entry.is_symlink():
            links[path] = os.readlink(entry.path)  # noqa: PTH115
        elif entry.is_dir():
            directories.append(path)
        elif entry.is_file():
            files.append(path)
    covered = {*_KERNEL_DIRECTORIES, *root.tmpfs_mounts}
    return DiskRoot(
        tmpfs_mounts=(),
        image_paths=[path for path in (*directories, *files) if path not in covered],
        directories=directories,
        files=files,
        links=links,
    )


def _list_image(image: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the entries of the image's / and /home, except the agent's directories, each with its path."""
    for parent in _PARENTS:
        with os.scandir(_on_disk(image, parent)) as entries:
            for entry in entries:
                path = str(PurePosixPath(parent, entry.name))
                if path not in _AGENT_PATHS:
                    yield path, entry


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
    return bubblewrap_confinement.build_program_spec(
        program,
        spec.attempt_id,
        lambda program_spec: (
            _bwrap_arguments(program_spec, spec, command, program_spec.add_descriptor(status_fd)),
            command.argv,
        ),
    )


def _bwrap_arguments(program_spec: ProgramSpec, spec: SandboxSpec, command: Command, status: str) -> Iterator[str]:
    yield from bubblewrap_confinement.isolation_arguments(spec.attempt_id)
    yield from ("--json-status-fd", status)
    yield from bubblewrap_confinement.seccomp_arguments(program_spec)
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
    yield from bubblewrap_confinement.PROC_ARGUMENTS
    # pid 1 is bubblewrap with the agent's uid. A process that can write its memory can forge the command's exit code.
    yield from ("--perms", "0555", "--tmpfs", "/proc/1", "--remount-ro", "/proc/1")
    yield from bubblewrap_confinement.READ_ONLY_PROC_ARGUMENTS
    yield from bubblewrap_confinement.DEVICE_ARGUMENTS
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
