"""Abandoned sandboxes are destroyed even if their handle is damaged or missing."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sandbox.interfaces.runtime import SandboxHandle
from sandbox.interfaces.task_file_layout import AttemptLayout
from sandbox.placements.local.attempt_files import SandboxLeftovers

HANDLE = b'{"runtime":"bubblewrap","attempt_id":"a","details":{"kernel_uid":"200000"}}'


class FakeRuntime:
    """A runtime that can recover handles, and records which sandboxes were destroyed."""

    def __init__(self):
        self.destroyed = []

    def recover_handle(self, attempt_id):
        return SandboxHandle("recovered", attempt_id)

    async def destroy(self, handle, disk):
        self.destroyed.append(handle.runtime)


@pytest.mark.parametrize(
    ("stored", "runtime"),
    [
        (HANDLE, "bubblewrap"),
        (None, "recovered"),
        (HANDLE[:-3], "recovered"),
        (HANDLE.replace(b"bubblewrap", b"bubble\xff"), "recovered"),
    ],
)
async def test_sandbox_is_destroyed_with_its_handle_or_a_recovered_handle(tmp_path, stored, runtime):
    fake_runtime, files = FakeRuntime(), AttemptLayout(tmp_path)
    if stored is not None:
        files.handle.write_bytes(stored)
    await SandboxLeftovers(fake_runtime).clean_up("a" * 12, files)
    assert fake_runtime.destroyed == [runtime]


async def test_removal_delayed_by_a_sandbox_uses_no_thread_of_the_default_pool(tmp_path):
    """The runtime reads the arguments of a program in /proc. Such a read can block until the program's task ends."""
    task_has_ended = threading.Event()

    class DelayedRuntime(FakeRuntime):
        async def destroy(self, handle, disk):
            assert task_has_ended.wait(30)

    with ThreadPoolExecutor(1) as pool:
        asyncio.get_running_loop().set_default_executor(pool)
        try:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await SandboxLeftovers(DelayedRuntime()).clean_up("a" * 12, AttemptLayout(tmp_path))
            async with asyncio.timeout(5):
                await asyncio.to_thread(lambda: None)
        finally:
            task_has_ended.set()
