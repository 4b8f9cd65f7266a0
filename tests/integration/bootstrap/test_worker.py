"""What a worker requires from its host before it connects."""

import base64
import errno
import fcntl
import os
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sandbox.bootstrap import worker
from sandbox.bootstrap.data_dir_lock import lock_data_dir
from sandbox.bootstrap.worker import (
    SharedHostKeyError,
    WorkerUnusableError,
    lock_task,
    packages_digest,
    read_shared_host_key,
)


def test_only_one_worker_can_lock_a_task(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_LOCK_SECONDS", 0.2)
    with lock_task(tmp_path / "task-1"):
        with lock_task(tmp_path / "task-2"):
            pass
        with pytest.raises(BlockingIOError), lock_task(tmp_path / "task-1"):
            pass
    with lock_task(tmp_path / "task-1"):
        pass


def test_locking_a_task_that_has_a_worker_fails_immediately(tmp_path):
    with lock_task(tmp_path / "task-1"):
        started_at = time.monotonic()
        with pytest.raises(BlockingIOError), lock_task(tmp_path / "task-1", waits=False):
            pass
        assert time.monotonic() - started_at < worker._LOCK_SECONDS / 2


def test_worker_waits_for_the_end_of_an_earlier_worker(tmp_path):
    descriptor = os.open(tmp_path / "task-1", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    ending = threading.Timer(0.3, os.close, (descriptor,))
    ending.start()
    with lock_task(tmp_path / "task-1"):
        ending.join()


def test_workers_share_a_data_directory_that_no_server_uses(tmp_path):
    with worker._shared_lock(tmp_path), worker._shared_lock(tmp_path):
        pass
    with (
        lock_data_dir(tmp_path),
        pytest.raises(WorkerUnusableError, match="A server uses"),
        worker._shared_lock(tmp_path),
    ):
        pass


RECEIVING_WORKER = """
import sys
from pathlib import Path
from sandbox.images.image_transfer import HostImageCopies
from sandbox.interfaces.images import ImageReference

def read():
    print("started", flush=True)
    sys.stdin.read()
    return b""

HostImageCopies(Path(sys.argv[1])).receive(ImageReference("tools", "sha256:" + "0" * 64, 1), read)
"""


def test_parts_of_killed_transfers_are_removed_but_not_those_of_running_ones(tmp_path):
    argv = [sys.executable, "-c", RECEIVING_WORKER, str(tmp_path)]
    receiving = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    part = tmp_path / "profiles/tools/part"
    try:
        assert receiving.stdout.readline() == b"started\n"
        worker.remove_stale_images(tmp_path)
        assert (part / "root").is_dir()
    finally:
        receiving.kill()
        receiving.communicate()
    assert (part / "root").is_dir()
    worker.remove_stale_images(tmp_path)
    assert not part.exists()


def test_worker_continues_if_parts_of_images_cannot_be_removed(tmp_path, monkeypatch, caplog):
    def fail(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("sandbox.images.image_store.ImageStore.remove_stale_build", fail)
    (tmp_path / "profiles/tools/part").mkdir(parents=True)
    worker.remove_stale_images(tmp_path)
    assert f"Parts of images are not removed yet; check {tmp_path}/profiles: [Errno 13]" in caplog.text


KEY_FILE_CONTENT = base64.b64encode(b"k" * 32) + b"\n"


def write_host_key(path, content=KEY_FILE_CONTENT, mode=0o600):
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_documented_command_creates_a_valid_key(tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "slurm.md").read_text()
    command = re.search(r"^ *(\(umask 077; .*base64 .*)$", text, re.MULTILINE)[1]
    path = tmp_path / "host.key"
    subprocess.run(["sh", "-c", command.replace("/etc/sandbox-host.key", str(path))], check=True, timeout=20)
    assert str(path) not in command
    assert len(read_shared_host_key(path)) == 32


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_private_key_is_read(tmp_path, mode):
    assert read_shared_host_key(write_host_key(tmp_path / "host.key", mode=mode)) == b"k" * 32


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o606, 0o620, 0o601])
def test_key_that_others_can_access_is_refused(tmp_path, mode):
    with pytest.raises(SharedHostKeyError, match="fix it with: chmod 600"):
        read_shared_host_key(write_host_key(tmp_path / "host.key", mode=mode))


def test_key_of_another_user_is_refused(tmp_path, monkeypatch):
    """Root and the user of the process may own the file."""
    path = write_host_key(tmp_path / "host.key")
    status = list(path.stat())
    status[stat.ST_UID] = 4711
    monkeypatch.setattr(worker.os, "fstat", lambda descriptor: os.stat_result(status))
    with pytest.raises(SharedHostKeyError, match="root or the user of this process must own it; fix it with: chown"):
        read_shared_host_key(path)
    status[stat.ST_UID] = 0
    assert read_shared_host_key(path) == b"k" * 32
    status[stat.ST_UID] = os.geteuid()
    assert read_shared_host_key(path) == b"k" * 32


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
    with pytest.raises(SharedHostKeyError, match="does not contain 32 bytes in base64"):
        read_shared_host_key(write_host_key(tmp_path / "host.key", content))


def test_path_without_a_regular_file_is_refused(tmp_path):
    """A FIFO must not block the server."""
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path, message in (
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "missing", "No such file"),
        (None, "cluster.host_key_file is not set"),
    ):
        with pytest.raises(SharedHostKeyError, match=message):
            read_shared_host_key(path)


@pytest.mark.parametrize("token", ["", "zz", "00" * 31])
def test_worker_without_a_join_token_does_not_start(tmp_path, token):
    arguments = ["abcdefghijkl", "--server", "127.0.0.1:9", "--fingerprint", "0" * 64]
    completed = subprocess.run(
        [sys.executable, "-m", "sandbox", "worker", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), worker.TOKEN_VARIABLE: token},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert completed.returncode != 0
    assert "contains no join token" in completed.stderr


STATUS = """\
Package: bash
Status: install ok installed
Version: 5.2-1

Package: git
Status: install ok installed
Version: 1:2.47-1
"""


def packages_digest_of(directory, status):
    (directory / "var/lib/dpkg").mkdir(parents=True, exist_ok=True)
    (directory / "var/lib/dpkg/status").write_text(status)
    return packages_digest(directory)


def test_hosts_with_the_same_packages_and_versions_report_the_same(tmp_path):
    found = packages_digest_of(tmp_path, STATUS)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", found)
    first, second = STATUS.split("\n\n")
    assert packages_digest_of(tmp_path, f"{second}\n{first}\n") == found
    assert packages_digest_of(tmp_path, STATUS.replace("5.2-1", "5.2-2")) != found


@pytest.mark.parametrize("status", ["", "no fields", "Package: bash\n"])
def test_packages_without_a_valid_database_are_unknown(tmp_path, status):
    assert packages_digest_of(tmp_path, status) == ""


def test_packages_of_a_host_without_dpkg_are_unknown(tmp_path):
    assert packages_digest(tmp_path) == ""
