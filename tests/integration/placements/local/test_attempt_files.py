"""The cleanup of an attempt removes the sockets of its killed runner and no other files.

The release of a preserved sandbox also removes the leftovers of a debug session whose runner was killed.
"""

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sandbox.disks.commands import remove_trees
from sandbox.interfaces.task_file_layout import AttemptLayout, TaskLayout, probe_directory
from sandbox.placements.local.attempt_files import LocalAttemptFiles, SocketLeftovers


@pytest.fixture
def bind_socket(tmp_path):
    """Bind a socket to this file name, as a runner or another program does; return the socket's path."""
    opened = []

    def bind(name):
        path = tmp_path / name
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        opened.append(listener)
        return path

    yield bind
    for listener in opened:
        listener.close()


def clean_up(run_dir, attempt_id):
    asyncio.run(SocketLeftovers(run_dir).clean_up(attempt_id, AttemptLayout(run_dir / attempt_id)))


def test_only_sockets_of_the_dead_attempt_are_removed(bind_socket, tmp_path):
    dead = [bind_socket("aaaaaaaaaaaa.sock"), bind_socket("aaaaaaaaaaaa.files")]
    live_socket = bind_socket("bbbbbbbbbbbb.sock")
    assert SocketLeftovers(tmp_path).attempt_ids() == {"aaaaaaaaaaaa", "bbbbbbbbbbbb"}
    clean_up(tmp_path, "aaaaaaaaaaaa")
    clean_up(tmp_path, "aaaaaaaaaaaa")
    assert [path.exists() for path in (*dead, live_socket)] == [False, False, True]


def test_files_that_are_not_attempt_sockets_are_kept(bind_socket, tmp_path):
    others = [bind_socket("something-else.sock"), tmp_path / "cccccccccccc.sock", tmp_path / "dddddddddddd.sock"]
    others[1].write_text("a file")
    others[2].symlink_to(others[1])
    assert not SocketLeftovers(tmp_path).attempt_ids()
    clean_up(tmp_path, "cccccccccccc")
    assert all(path.exists() for path in others)


def test_probe_sockets_are_not_listed(bind_socket, tmp_path):
    probe_directory(tmp_path, "aaaaaaaaaaaa").mkdir()
    bind_socket("aaaaaaaaaaaa.files")
    assert not SocketLeftovers(tmp_path).attempt_ids()


def test_missing_run_directory_has_no_leftovers(tmp_path):
    assert not SocketLeftovers(tmp_path / "none").attempt_ids()
    clean_up(tmp_path / "none", "aaaaaaaaaaaa")


class RecordingSource:
    """A source of leftovers that records, for each call, the attempt and whether the sandbox handle existed."""

    kind = "sandbox"
    belongs_to_this_server = False

    def __init__(self):
        self.calls = []

    def attempt_ids(self):
        return ()

    async def clean_up(self, attempt_id, layout):
        self.calls.append((attempt_id, layout.handle.exists()))


@pytest.mark.parametrize("has_session_died", [True, False], ids=["killed session", "no session"])
def test_release_destroys_the_sandbox_of_a_killed_debug_session(tmp_path, has_session_died):
    layout = TaskLayout(tmp_path, "task-1").attempt("aaaaaaaaaaaa")
    layout.disk.mkdir(parents=True)
    layout.preserved_disk_lock.touch()
    layout.runner_log.touch()
    if has_session_died:
        layout.handle.write_text("{}")
    source = RecordingSource()
    asyncio.run(LocalAttemptFiles(tmp_path, [source], remove_trees).remove_preserved(layout))
    assert source.calls == ([("aaaaaaaaaaaa", True)] if has_session_died else [])
    assert list(layout.root.iterdir()) == [layout.runner_log]


class BlockingSource(RecordingSource):
    """A source whose scan waits until the task ends, like a read of a program's arguments in /proc."""

    def __init__(self):
        super().__init__()
        self.task_has_ended = threading.Event()

    def attempt_ids(self):
        assert self.task_has_ended.wait(30)
        return {"aaaaaaaaaaaa"}


async def test_scan_that_a_sandbox_delays_does_not_occupy_a_thread_of_the_pool(tmp_path):
    """If each delayed scan used a thread of the pool, a few of them could block the server until their tasks end."""
    source = BlockingSource()
    files = LocalAttemptFiles(tmp_path, [source], remove_trees)
    with ThreadPoolExecutor(1) as pool:
        asyncio.get_running_loop().set_default_executor(pool)
        try:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await files.scan()
            async with asyncio.timeout(5):
                await asyncio.to_thread(lambda: None)
        finally:
            source.task_has_ended.set()
        assert (await files.scan()).unowned == {}
