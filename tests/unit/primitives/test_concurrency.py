"""A function in a daemon thread releases its slot exactly once. The first coroutine to complete ends the others. No
accepted connection is lost."""

import asyncio
import errno
import socket
import threading

import pytest

from sandbox.primitives.concurrency import accept_connection, run_in_daemon_thread, run_until_first_complete


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


class Endless:
    """A coroutine that never completes and takes some time to end after it is cancelled."""

    def __init__(self):
        self.has_ended = False

    async def run(self):
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            self.has_ended = True


async def return_value(value):
    return value


async def fail(message):
    raise OSError(message)


async def test_first_result_is_returned_after_the_others_have_ended():
    endless = Endless()
    assert await run_until_first_complete(endless.run(), return_value(1)) == 1
    assert endless.has_ended


async def test_first_exception_is_raised_after_the_others_have_ended():
    endless = Endless()
    with pytest.raises(OSError, match="broken"):
        await run_until_first_complete(endless.run(), fail("broken"))
    assert endless.has_ended


@pytest.mark.parametrize("other", [return_value, fail])
async def test_order_of_the_arguments_decides_between_simultaneous_completions(other):
    assert await run_until_first_complete(return_value(1), other(2)) == 1


async def test_cancelling_the_caller_ends_all_coroutines():
    first, second = Endless(), Endless()
    caller = asyncio.create_task(run_until_first_complete(first.run(), second.run()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert (first.has_ended, second.has_ended) == (True, True)


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


async def test_connections_are_accepted_one_after_the_other(listener):
    for number in range(3):
        accepting = asyncio.create_task(accept_connection(listener))
        await asyncio.sleep(0)
        with socket.create_connection(listener.getsockname()) as client, await accepting as accepted:
            client.sendall(b"%d" % number)
            assert await asyncio.get_running_loop().sock_recv(accepted, 9) == b"%d" % number


async def test_connection_that_arrives_during_a_cancellation_is_accepted_by_the_next_caller(listener):
    loop = asyncio.get_running_loop()
    accepting = asyncio.create_task(accept_connection(listener))
    await asyncio.sleep(0)
    waking, waker = socket.socketpair()
    with waking, waker, socket.create_connection(listener.getsockname()) as client:
        loop.add_reader(waking, accepting.cancel)
        waker.send(b"1")  # the event loop receives both events at once
        with pytest.raises(asyncio.CancelledError):
            await accepting
        loop.remove_reader(waking)
        with await asyncio.wait_for(accept_connection(listener), 5) as accepted:
            assert accepted.getpeername() == client.getsockname()
