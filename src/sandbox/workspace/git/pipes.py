"""Pipes to git: reads and writes them, and runs threads at their other ends."""

import asyncio
import os
import select
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar

from sandbox.primitives.concurrency import wait_readable
from sandbox.workspace.cancellable_thread import StopFlag, run_in_thread

T = TypeVar("T")
_BROKEN_PIPE_SECONDS = 5.0


@contextmanager
def pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Yield the read and the write end of a pipe, unbuffered. Both are closed at the end of the block."""
    reader, writer = (os.fdopen(fd, mode, buffering=0) for fd, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    with reader, writer:
        yield reader, writer


def write_all(stream: IO[bytes], data: bytes) -> None:
    """Write everything; a single write to a pipe may be partial."""
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[stream.write(remaining) :]


def read_exactly(stream: IO[bytes], size: int) -> bytes:
    """Read exactly `size` bytes. Raises BrokenPipeError if the stream ends earlier."""
    read = bytearray()
    while len(read) < size:
        chunk = stream.read(size - len(read))
        if not chunk:
            raise BrokenPipeError("git ended early")
        read += chunk
    return bytes(read)


async def wait_for_data(reader: IO[bytes]) -> bool:
    """Wait until a pipe has data or its write end is closed. Returns whether there is data."""
    await wait_readable(reader)
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


async def run_thread_with_git(work: Callable[[StopFlag], T], *git_runs: Coroutine[Any, Any, bytes]) -> T:
    """Run `work` in a thread, and git at the other ends of its pipes. Returns the result of `work`.

    If one of them fails or the caller is cancelled, the others are stopped before the error propagates. If git failed,
    its error is raised: a broken pipe in the thread is only a consequence.
    """
    running = [asyncio.ensure_future(git) for git in git_runs]
    thread = asyncio.ensure_future(run_in_thread(work))
    try:
        await asyncio.wait([*running, thread], return_when=asyncio.FIRST_EXCEPTION)
        if thread.done() and isinstance(thread.exception(), BrokenPipeError) and running:
            await asyncio.wait(running, timeout=_BROKEN_PIPE_SECONDS)
    finally:
        for task in (*running, thread):
            task.cancel()
        results = await asyncio.gather(*running, thread, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return thread.result()
