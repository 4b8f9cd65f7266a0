"""Waiting for the launcher to be ready."""

import contextlib
import os
import resource
import socket
from pathlib import Path

import pytest

from sandbox.model.failure import AttemptError
from sandbox.runtimes.launcher_client import start_launcher

KERNEL_UID = 269_999 if os.geteuid() == 0 else None


async def end(launcher):
    launcher.kill()
    await launcher.wait()
    launcher.close()


async def test_failure_after_the_launcher_has_sent_the_listeners_is_reported():
    launcher = start_launcher("abcdefghijkl", KERNEL_UID, {}, seccomp_filter=b"\xff" * 8)
    try:
        with pytest.raises(AttemptError, match=r"could not be created: .*seccomp"):
            await launcher.wait_ready()
    finally:
        await end(launcher)


async def test_ready_launcher_is_confined():
    launcher = start_launcher("abcdefghijkl", KERNEL_UID, {})
    try:
        listeners = await launcher.wait_ready()
        status = Path(f"/proc/{launcher.pid}/status").read_text().splitlines()
        uids = next(line.split()[1:] for line in status if line.startswith("Uid:"))
        assert set(uids) == {str(os.getuid() if KERNEL_UID is None else KERNEL_UID)}
        listeners.close()
    finally:
        await end(launcher)


_IN_TRANSIT_MAX = 20_000
"""More files would take too long to send. On a machine with a higher limit on open files, the test proves less."""


@contextlib.contextmanager
def files_of_root_in_transit(count: int):
    """Have at least this many files in transit that root has sent. They are regular files, which the kernel frees."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(Path(__file__).open())
        while count > 0:
            _, sender = (stack.enter_context(end) for end in socket.socketpair())
            for _ in range(8):
                socket.send_fds(sender, [b"x"], [file.fileno()] * 200)
                count -= 200
        yield


@pytest.mark.skipif(KERNEL_UID is None, reason="only root may exceed its limit on files in transit")
async def test_files_that_other_programs_of_root_have_in_transit_do_not_prevent_the_start():
    _, open_files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    with files_of_root_in_transit(min(open_files_max, _IN_TRANSIT_MAX) + 1):
        launcher = start_launcher("abcdefghijkl", KERNEL_UID, {})
        try:
            (await launcher.wait_ready()).close()
        finally:
            await end(launcher)
