"""A sandbox that nobody carries on any more is ended, whatever became of what was written down of it."""

import asyncio

import pytest

from sandbox.interfaces.layout import AttemptLayout
from sandbox.interfaces.runtime import SandboxHandle
from sandbox.runtimes.processes import SandboxLeftovers

HANDLE = b'{"runtime":"bubblewrap","attempt_id":"a","details":{"kernel_uid":"200000"}}'


class Machine:
    """Remembers that there was one, and what was ended."""

    def __init__(self):
        self.ended = []

    def recover(self, attempt_id):
        return SandboxHandle("remembered", attempt_id)

    async def destroy(self, handle, disk):
        self.ended.append(handle.runtime)


@pytest.mark.parametrize(
    ("written", "runtime"),
    [
        (HANDLE, "bubblewrap"),
        (None, "remembered"),
        (HANDLE[:-3], "remembered"),
        (HANDLE.replace(b"bubblewrap", b"bubble\xff"), "remembered"),
    ],
)
def test_a_sandbox_is_ended_by_its_handle_or_as_it_is_remembered(tmp_path, written, runtime):
    machine, files = Machine(), AttemptLayout(tmp_path)
    if written is not None:
        files.handle.write_bytes(written)
    asyncio.run(SandboxLeftovers(machine).clean_up("a" * 12, files))
    assert machine.ended == [runtime]
