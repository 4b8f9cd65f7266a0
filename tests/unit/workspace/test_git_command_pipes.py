"""When git and a thread are connected by a pipe, both end, even if git fails early."""

import asyncio
import errno
import os
from pathlib import Path

import pytest

from sandbox.workspace.git_command import Git, capture_output, pipe, run_thread_with_git


class EndlessConfinement:
    """A confinement in which programs never exit."""

    proxy_listener = None
    memory_bytes = None

    def was_oom_killed(self):
        return False

    async def run(self, _command):
        await asyncio.Event().wait()


def start(directory, reader, writer):
    """Start a thread that reads all output of git."""
    listing = Git(os.defpath, confinement=EndlessConfinement()).run("ls-tree", directory=directory, stdout=writer)
    return asyncio.ensure_future(run_thread_with_git(lambda _stop: reader.read(), listing))


async def ends_in_time(work, writer):
    """Return whether the work ends in time. Close the pipe afterwards, so that a failed test does not hang."""
    done, _ = await asyncio.wait([work], timeout=3)
    writer.close()
    await asyncio.wait([work])
    return bool(done)


@pytest.mark.parametrize("turns", range(1, 9))
async def test_cancel_at_any_time_ends_git_and_the_thread_and_leaks_no_descriptor(turns, tmp_path):
    before = set(Path("/proc/self/fd").iterdir())
    with pipe() as (reader, writer):
        work = start(tmp_path, reader, writer)
        for _ in range(turns):
            await asyncio.sleep(0)
        work.cancel()
        assert await ends_in_time(work, writer)
        assert work.cancelled()
    assert before.issuperset(Path("/proc/self/fd").iterdir())


async def test_descriptor_exhaustion_ends_git_and_the_thread_with_emfile(tmp_path, monkeypatch):
    def refuse():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with pipe() as (reader, writer):
        monkeypatch.setattr(os, "pipe", refuse)
        work = start(tmp_path, reader, writer)
        assert await ends_in_time(work, writer)
        assert work.exception().errno == errno.EMFILE


async def test_cancel_while_the_rest_of_the_output_is_read_closes_the_transport():
    """A background process holds the write end, so the end of the output does not arrive."""
    loop, transports = asyncio.get_running_loop(), []
    connect = loop.connect_read_pipe

    async def record(*arguments):
        connected = await connect(*arguments)
        transports.append(connected[0])
        return connected

    loop.connect_read_pipe = record
    background = []

    async def capture():
        async with capture_output() as (writer, _output):
            background.append(os.dup(writer.fileno()))

    work = asyncio.ensure_future(capture())
    while not background:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    work.cancel()
    await asyncio.wait([work])
    os.close(background[0])
    assert work.cancelled()
    assert [transport.is_closing() for transport in transports] == [True]
