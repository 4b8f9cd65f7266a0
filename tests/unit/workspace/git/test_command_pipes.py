"""Git and a thread at the two ends of a pipe: both end, however soon git breaks."""

import asyncio
import errno
import os
from pathlib import Path

import pytest

from sandbox.workspace.git.command import Git, pipe, run_with_thread


class EndlessGit:
    """A confinement in which no program ends by itself."""

    proxy_listener = None
    memory_bytes = None

    def was_oom_killed(self):
        return False

    async def run(self, _command):
        await asyncio.Event().wait()


def begin(directory, told, telling):
    """A thread that reads all that git tells."""
    listing = Git(os.defpath, confinement=EndlessGit()).run("ls-tree", directory=directory, stdout=telling)
    return asyncio.ensure_future(run_with_thread(lambda _stop: told.read(), listing))


async def has_ended(work, telling):
    """Within a bound; afterwards nobody waits any more in any case, so that a failure is no hang."""
    done, _ = await asyncio.wait([work], timeout=3)
    telling.close()
    await asyncio.wait([work])
    return bool(done)


@pytest.mark.parametrize("turns", range(1, 9))
def test_a_cancel_at_any_moment_ends_both_and_leaves_no_descriptor(turns, tmp_path):
    async def cancel():
        before = set(Path("/proc/self/fd").iterdir())
        with pipe() as (told, telling):
            work = begin(tmp_path, told, telling)
            for _ in range(turns):
                await asyncio.sleep(0)
            work.cancel()
            assert await has_ended(work, telling)
            assert work.cancelled()
        assert before.issuperset(Path("/proc/self/fd").iterdir())

    asyncio.run(cancel())


def test_a_machine_without_descriptors_ends_both_and_says_so(tmp_path, monkeypatch):
    def refuse():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def run_out():
        with pipe() as (told, telling):
            monkeypatch.setattr(os, "pipe", refuse)
            work = begin(tmp_path, told, telling)
            assert await has_ended(work, telling)
            assert work.exception().errno == errno.EMFILE

    asyncio.run(run_out())
