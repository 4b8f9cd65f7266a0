"""Git and a thread at the two ends of a pipe."""

import asyncio
import os
import select
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar

from sandbox.workspace.stoppable import Stop, run_in_thread

T = TypeVar("T")
_ECHO_SECONDS = 5.0


@contextmanager
def pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The reading and the writing end, unbuffered, closed at the end of the block if they are not by then."""
    reading, writing = (os.fdopen(fd, mode, buffering=0) for fd, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    with reading, writing:
        yield reading, writing


def write_all(stream: IO[bytes], data: bytes) -> None:
    """Write everything; one write to a pipe may take less."""
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]


def read_exactly(stream: IO[bytes], size: int) -> bytes:
    """Read so many bytes. Raises BrokenPipeError when the stream ends before."""
    read = bytearray()
    while len(read) < size:
        chunk = stream.read(size - len(read))
        if not chunk:
            raise BrokenPipeError("git ended early")
        read += chunk
    return bytes(read)


async def is_written_to(reading: IO[bytes]) -> bool:
    """Wait until there is something to read from a pipe, or its writing end is closed without a word."""
    loop, seen = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(reading, seen.set)
    try:
        await seen.wait()
    finally:
        loop.remove_reader(reading)
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


async def run_with_thread(work: Callable[[Stop], T], *gits: Coroutine[Any, Any, bytes]) -> T:
    """Run a thread's work and, beside it, git at the other ends of its pipes; gives what the work gives.

    When one of them fails, or the caller is cancelled, the others are ended before the error goes on. If git failed
    that is the error: a broken pipe in the thread is only its echo.
    """
    running = [asyncio.ensure_future(git) for git in gits]
    thread = asyncio.ensure_future(run_in_thread(work))
    try:
        await asyncio.wait([*running, thread], return_when=asyncio.FIRST_EXCEPTION)
        if thread.done() and isinstance(thread.exception(), BrokenPipeError) and running:
            await asyncio.wait(running, timeout=_ECHO_SECONDS)
    finally:
        for task in (*running, thread):
            task.cancel()
        results = await asyncio.gather(*running, thread, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return thread.result()
