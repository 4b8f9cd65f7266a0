"""The thread in which the server communicates with workers."""

import asyncio
import threading

import pytest

from sandbox.interfaces.placement import HostUnreachableError
from sandbox.placements.cluster.worker_session import LoopThread


async def test_closed_thread_does_not_run_coroutines():
    thread = LoopThread()
    started = threading.Event()

    async def wait():
        started.set()
        await asyncio.Event().wait()

    waiting = asyncio.create_task(thread.run(wait()))
    await asyncio.to_thread(started.wait)
    await asyncio.to_thread(thread.close)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(HostUnreachableError):
        await thread.run(wait())
    with pytest.raises(HostUnreachableError):
        thread.run_blocking(wait())
    thread.close()
