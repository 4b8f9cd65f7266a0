"""A sandbox's root file system: an image or the host's /usr, a separate /etc, and the directories of the disk."""

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
    """Return the synthetic files of /etc, readable by everybody."""
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
