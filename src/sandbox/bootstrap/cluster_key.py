"""The secret key that the hosts of a cluster share: reads its file."""

import binascii
import errno
import os
import shlex
import stat
from pathlib import Path

from sandbox.model.errors import SandboxError


class ClusterKeyError(SandboxError):
    """The file with the key of the hosts is missing, damaged or accessible to other users."""

    code = "host_key_unusable"


CLUSTER_KEY_BYTES = 32
_CLUSTER_KEY_FILE_BYTES_MAX = 4096
_UNREADABLE_REMEDY = "create it or copy it, and let the user of this process own it."


def read_cluster_key(path: Path | None) -> bytes:
    """Return the key of the hosts. path: None if the settings name no file.

    Raises ClusterKeyError.
    """
    if path is None:
        raise ClusterKeyError("cluster.host_key_file is not set.")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            content = os.read(descriptor, _CLUSTER_KEY_FILE_BYTES_MAX)
        finally:
            os.close(descriptor)
    except OSError as error:
        message = f"The key of the hosts, {path}, cannot be read: {error.strerror}"
        raise ClusterKeyError(f"{message}; {_UNREADABLE_REMEDY}") from error
    if status.st_uid not in {0, os.geteuid()}:
        message = f"{path} contains the key of the hosts, so root or the user of this process must own it"
        raise ClusterKeyError(f"{message}; fix it with: chown {os.geteuid()} {shlex.quote(str(path))}")
    if status.st_mode & 0o077:
        message = f"{path} contains the key of the hosts, but other users have access to it"
        raise ClusterKeyError(f"{message}; fix it with: chmod 600 {shlex.quote(str(path))}")
    try:
        key = binascii.a2b_base64(content.strip(), strict_mode=True)
    except binascii.Error:
        key = b""
    if len(key) != CLUSTER_KEY_BYTES:
        raise ClusterKeyError(
            f"{path} does not contain {CLUSTER_KEY_BYTES} bytes in base64; copy the complete key file again."
        )
    return key
