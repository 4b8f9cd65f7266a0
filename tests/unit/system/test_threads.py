"""Work in a thread of its own is left once, however it ends."""

import asyncio
import errno
import threading

import pytest

from sandbox.system.threads import run_in_daemon_thread


def test_where_there_are_no_more_threads_the_machine_says_so_and_the_place_is_left(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    left = []
    with pytest.raises(OSError, match="no more threads") as caught:
        asyncio.run(run_in_daemon_thread(lambda: None, lambda: left.append(1)))
    assert caught.value.errno == errno.EAGAIN
    assert left == [1]


@pytest.mark.parametrize("work", [lambda: 7, lambda: int("seven")], ids=["answers", "fails"])
def test_who_is_answered_has_left(work):
    left = []

    async def ask():
        try:
            return await run_in_daemon_thread(work, lambda: left.append(1))
        except ValueError:
            return None

    assert asyncio.run(ask()) in (7, None)
    assert left == [1]
