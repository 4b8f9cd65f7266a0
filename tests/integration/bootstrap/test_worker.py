"""What a worker requires from its host before it connects."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time

import pytest

from sandbox.bootstrap import worker
from sandbox.bootstrap.private_directories import lock_data_dir
from sandbox.bootstrap.worker import WorkerUnusableError, lock_task


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


def test_incomplete_images_are_removed_unless_their_transfer_is_running(tmp_path):
    argv = [sys.executable, "-c", RECEIVING_WORKER, str(tmp_path)]
    receiving = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    part = tmp_path / "profiles/tools/part"
    try:
        assert receiving.stdout.readline() == b"started\n"
        worker.remove_incomplete_images(tmp_path)
        assert (part / "root").is_dir()
    finally:
        receiving.kill()
        receiving.communicate()
    assert (part / "root").is_dir()
    worker.remove_incomplete_images(tmp_path)
    assert not part.exists()


def test_worker_continues_if_incomplete_images_cannot_be_removed(tmp_path, monkeypatch, caplog):
    def fail(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("sandbox.images.image_store.ImageStore.remove_stale_build", fail)
    (tmp_path / "profiles/tools/part").mkdir(parents=True)
    worker.remove_incomplete_images(tmp_path)
    assert f"Incomplete images could not be removed; check {tmp_path}/profiles: [Errno 13]" in caplog.text


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
