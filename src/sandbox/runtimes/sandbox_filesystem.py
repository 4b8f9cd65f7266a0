"""The file system of a sandbox: the specification of its root, and the owner of the files on its disk.

The root is an image or the host's /usr, a separate /etc, and the directories of the disk. The files on the disk belong
to the sandbox's uid while the sandbox exists; afterwards the previous owner is restored.
"""

import os
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from sandbox.interfaces.images import MOUNT_POINT_FILES
from sandbox.interfaces.runtime import (
    DEFAULT_GIT_AUTHOR,
    SANDBOX_HOME,
    SANDBOX_UID,
    SANDBOX_USER,
    SANDBOX_WORKSPACE,
    SandboxSpec,
)
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.runtimes import nodejs

DIRECTORIES = ("/etc", "/etc/ssl", "/home", "/run", "/run/sandbox", "/var")
HOST_LINKS = {"/bin": "usr/bin", "/sbin": "usr/sbin", "/lib": "usr/lib", "/lib64": "usr/lib64", "/var/tmp": "../tmp"}  # noqa: S108
HOST_PATHS = ("/etc/ssl/certs", "/etc/alternatives", "/etc/ld.so.cache")
"""Paths in the host's /etc that programs need and that contain no secrets."""

_JAVA_SETTINGS = "java-*-openjdk"
"""Directories in /etc to which Debian's Java packages link. The Java compiler needs them."""

_ETC_LINKS = {"/etc/localtime": "/usr/share/zoneinfo/Etc/UTC", "/etc/os-release": "../usr/lib/os-release"}
LINKS = {**HOST_LINKS, **_ETC_LINKS}


class RootFsSpec(msgspec.Struct, frozen=True):
    """The content of /, which is read-only. A runtime mounts it in the order of the fields.

    image: the host directory that becomes /. It contains every path that a runtime mounts over
        (`MOUNT_POINT_DIRECTORIES`, `MOUNT_POINT_FILES` of interfaces/images.py). If None, / starts empty, and paths are
        created as needed.
    tmpfs_mounts: directories of the image over which an empty tmpfs is mounted, so that files can be created in them.
    directories: directories to create, readable by everybody.
    links: link targets, keyed by path.
    host_paths: host paths that are mounted at the same path if they exist.
    files: file contents, keyed by path; readable by everybody.
    mounts: paths in the sandbox, keyed by host path.
    """

    image: Path | None
    tmpfs_mounts: Sequence[str]
    directories: Sequence[str]
    links: Mapping[str, str]
    host_paths: Sequence[str]
    files: Mapping[str, bytes]
    mounts: Mapping[Path, str] = {}


def describe_rootfs(spec: SandboxSpec) -> RootFsSpec:
    """Describe a sandbox's root file system. If it is an image, the sandbox's programs must be mounted under /run."""
    files = etc_files(spec.attempt_id, spec.git_author)
    if spec.image is None:
        return RootFsSpec(
            image=None,
            tmpfs_mounts=(),
            directories=(*DIRECTORIES, *nodejs.DIRECTORIES),
            links={**LINKS, **nodejs.LINKS},
            host_paths=("/usr", *HOST_PATHS, *sorted(map(str, Path("/etc").glob(_JAVA_SETTINGS)))),
            files=files,
            mounts={**spec.programs, **nodejs.find_mounts()},
        )
    parents = {str(one) for inside in spec.programs.values() for one in PurePosixPath(inside).parents}
    return RootFsSpec(
        image=spec.image,
        tmpfs_mounts=("/run",),
        directories=sorted(parents - {"/", "/run"}),
        links={},
        host_paths=(),
        files={path: files[path] for path in MOUNT_POINT_FILES},
        mounts=spec.programs,
    )


def etc_files(host_name: str, git_author: str = DEFAULT_GIT_AUTHOR) -> Mapping[str, bytes]:
    """Return the synthetic files of /etc and npm's configuration, readable by everybody."""
    texts = {
        "/etc/passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\n"
        f"{SANDBOX_USER}:x:{SANDBOX_UID}:{SANDBOX_UID}:{SANDBOX_USER}:{SANDBOX_HOME}:/bin/bash\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        "/etc/group": f"root:x:0:\n{SANDBOX_USER}:x:{SANDBOX_UID}:\nnogroup:x:65534:\n",
        "/etc/hosts": f"127.0.0.1 localhost\n::1 localhost ip6-localhost\n127.0.1.1 {host_name}\n",
        "/etc/hostname": f"{host_name}\n",
        "/etc/resolv.conf": "nameserver 198.18.0.1\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
        "/etc/gitconfig": f'[user]\n\tname = "{git_author}"\n\temail = agent@sandbox.invalid\n'
        f"[safe]\n\tdirectory = {SANDBOX_WORKSPACE}\n",
        nodejs.NPM_CONFIGURATION: f"prefix={SANDBOX_HOME}/.local\nupdate-notifier=false\n"
        "fetch-retry-mintimeout=500\nfetch-retry-maxtimeout=2000\n",
    }
    return {path: text.encode() for path, text in texts.items()}


DISK_DIRECTORIES = {path.removeprefix("/"): path for path in (SANDBOX_WORKSPACE, SANDBOX_HOME, "/tmp")}  # noqa: S108
"""The agent's directories: paths in the sandbox, keyed by paths on the disk."""


_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_ERROR_BYTES_MAX = 500
_CHOWN_COMMAND = ("setpriv", "--pdeathsig", "KILL", "--", "chown", "--recursive", "--no-dereference")


def chown_tree(path: str, uid: int) -> None:
    """Make a sandbox's uid the owner of a tree that no sandbox has used yet.

    Raises OSError, and AttemptError for a hard-linked file.
    """
    _walk(path, uid, uid)


def restore_ownership(*paths: str) -> None:
    """Chown trees back to this process's user. Raises OSError."""
    if paths:
        _chown_used_trees(paths, os.getuid(), os.getgid())


def _chown_used_trees(paths: Sequence[str], uid: int, gid: int) -> None:
    """Chown trees that a sandbox has used. Files in them have hard links only in the other trees of the same disk.

    An agent can create millions of directories in a tree. chown(1) handles any number and depth of directories in
    bounded memory and does not follow links. Raises OSError.
    """
    for path in paths:
        os.close(os.open(path, _DIRECTORY_FLAGS))
    command = (*_CHOWN_COMMAND, "--", f"+{uid}:+{gid}", *paths)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_ENVIRONMENT
    ) as process:
        assert process.stderr is not None
        errors = process.stderr.read(_ERROR_BYTES_MAX)  # there may be one error per file
    if process.returncode != 0:
        reason = " ".join(errors.decode(errors="replace").split())
        raise OSError(reason or "the owner of the disk's files cannot be changed")


def _walk(path: str, uid: int, gid: int) -> None:
    directory_fd = os.open(path, _DIRECTORY_FLAGS)
    try:
        os.fchown(directory_fd, uid, gid)
        pending = [_chown_entries(directory_fd, uid, gid)]
        while pending:
            if pending[-1]:
                directory_fd = _open_child(directory_fd, pending[-1].pop())
                pending.append(_chown_entries(directory_fd, uid, gid))
            else:
                pending.pop()
                if pending:
                    directory_fd = _open_child(directory_fd, "..")
    finally:
        os.close(directory_fd)


def _open_child(directory_fd: int, name: str) -> int:
    child = os.open(name, _DIRECTORY_FLAGS, dir_fd=directory_fd)
    os.close(directory_fd)
    return child


def _chown_entries(directory_fd: int, uid: int, gid: int) -> list[str]:
    """Chown every entry of one directory. Returns the names of its subdirectories."""
    directories = []
    with os.scandir(directory_fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.name)
            else:
                _reject_hard_link(entry)
            os.chown(entry.name, uid, gid, dir_fd=directory_fd, follow_symlinks=False)
    return directories


def _reject_hard_link(entry: os.DirEntry[str]) -> None:
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        raise AttemptError(
            FailureCode.PROVISION_FAILED,
            f"'{entry.name}' in the workspace has several hard links, so the sandbox could change a file "
            "outside the workspace; clone without hard links.",
        )


def create_disk_directories(disk: Path) -> None:
    """Create the missing directories. Raises OSError."""
    for name in DISK_DIRECTORIES:
        (disk / name).mkdir(parents=True, exist_ok=True)
    (disk / SANDBOX_HOME.removeprefix("/")).parent.chmod(0o755)
    (disk / "tmp").chmod(0o1777)


def chown_disk(disk: Path, uid: int, *, was_used: bool = False) -> None:
    """Chown the disk's directories to `uid`. was_used: an earlier sandbox used them. Raises AttemptError, OSError."""
    paths = [str(disk / name) for name in DISK_DIRECTORIES]
    if was_used:
        _chown_used_trees(paths, uid, uid)
        return
    for path in paths:
        chown_tree(path, uid)


def restore_disk_ownership(disk: Path) -> None:
    """Chown the disk's directories back to this process's user. Raises OSError."""
    names = (Path(name).parts[0] for name in DISK_DIRECTORIES)  # earlier versions: `home` is the home directory
    restore_ownership(*(str(disk / name) for name in names if (disk / name).exists()))
