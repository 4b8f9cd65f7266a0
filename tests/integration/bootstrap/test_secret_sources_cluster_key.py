"""The file with the key that the hosts of a cluster share."""

import base64
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from sandbox.bootstrap.secret_sources import ClusterKeyError, read_cluster_key

KEY_FILE_CONTENT = base64.b64encode(b"k" * 32) + b"\n"


def write_cluster_key(path, content=KEY_FILE_CONTENT, mode=0o600):
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_documented_command_creates_a_valid_key(tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "slurm.md").read_text()
    command = re.search(r"^ *(\(umask 077; .*base64 .*)$", text, re.MULTILINE)[1]
    path = tmp_path / "host.key"
    subprocess.run(["sh", "-c", command.replace("/etc/sandbox-host.key", str(path))], check=True, timeout=20)
    assert str(path) not in command
    assert len(read_cluster_key(path)) == 32


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_private_key_is_read(tmp_path, mode):
    assert read_cluster_key(write_cluster_key(tmp_path / "host.key", mode=mode)) == b"k" * 32


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o606, 0o620, 0o601])
def test_key_that_others_can_access_is_refused(tmp_path, mode):
    with pytest.raises(ClusterKeyError, match="fix it with: chmod 600"):
        read_cluster_key(write_cluster_key(tmp_path / "host.key", mode=mode))


def test_key_of_another_user_is_refused(tmp_path, monkeypatch):
    """Root and the user of the process may own the file."""
    path = write_cluster_key(tmp_path / "host.key")
    status = list(path.stat())
    status[stat.ST_UID] = 4711
    monkeypatch.setattr(os, "fstat", lambda descriptor: os.stat_result(status))
    with pytest.raises(ClusterKeyError, match="root or the user of this process must own it; fix it with: chown"):
        read_cluster_key(path)
    status[stat.ST_UID] = 0
    assert read_cluster_key(path) == b"k" * 32
    status[stat.ST_UID] = os.geteuid()
    assert read_cluster_key(path) == b"k" * 32


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"k" * 32,
        base64.b64encode(b"k" * 32)[:-4],
        base64.b64encode(b"k" * 31),
        base64.b64encode(b"k" * 33),
        base64.b64encode(b"k" * 32) * 2,
        base64.b64encode(b"k" * 32)[:-1],
        b"k\x00" * 3000,
    ],
)
def test_incomplete_key_is_refused(tmp_path, content):
    with pytest.raises(ClusterKeyError, match="does not contain 32 bytes in base64"):
        read_cluster_key(write_cluster_key(tmp_path / "host.key", content))


def test_path_without_a_regular_file_is_refused(tmp_path):
    """A FIFO must not block the server."""
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path, message in (
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "missing", "No such file"),
        (None, "cluster.host_key_file is not set"),
    ):
        with pytest.raises(ClusterKeyError, match=message):
            read_cluster_key(path)
