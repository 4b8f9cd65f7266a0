"""A function in a daemon thread releases its slot once, however it ends."""

import errno
import threading

import pytest

from sandbox.system.daemon_thread import run_in_daemon_thread


async def test_thread_limit_raises_eagain_and_releases_the_slot(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    released = []
    with pytest.raises(OSError, match="cannot start another thread") as caught:
        await run_in_daemon_thread(lambda: None, lambda: released.append(1))
    assert caught.value.errno == errno.EAGAIN
    assert released == [1]


@pytest.mark.parametrize("work", [lambda: 7, lambda: int("seven")], ids=["returns", "raises"])
async def test_slot_is_released_when_work_ends(work):
    released = []

    async def run_work():
        try:
            return await run_in_daemon_thread(work, lambda: released.append(1))
        except ValueError:
            return None

    assert (await run_work()) in (7, None)
    assert released == [1]
