"""What the kernel holds for confined programs is watched until they end, also when it cannot be counted."""

import asyncio
from contextlib import suppress

import pytest

from sandbox.interfaces.runtime import FileUsage, KernelUsage
from sandbox.model.limits import SOCKETS_MAX
from sandbox.runtimes import base_runtime


class PlayedLaunch:
    pid = 4711
    counter = None
    slabs = None
    epolls = None

    def __init__(self) -> None:
        self.was_killed = asyncio.Event()

    def kill(self) -> None:
        self.was_killed.set()


class PlayedGroup:
    """Gives these one after the other, the last one on and on; raises those that are errors."""

    def __init__(self, *uses: KernelUsage | Exception) -> None:
        self._uses = list(uses)
        self.looks = 0

    def kernel_usage(self, _pid: int, _memory_bytes: int, _counter: object, _slabs: object) -> KernelUsage:
        self.looks += 1
        use = self._uses.pop(0) if len(self._uses) > 1 else self._uses[0]
        if isinstance(use, Exception):
            raise use
        return use

    def file_usage(self, _epolls: object) -> FileUsage:
        return FileUsage(1)


async def was_killed(group: PlayedGroup, looks: int) -> bool:
    launch = PlayedLaunch()
    watch = asyncio.create_task(base_runtime._kill_on_excess(launch, group, 1 << 30))
    try:
        while group.looks < looks and not watch.done():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        return launch.was_killed.is_set()
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError, OSError, ValueError):
            await watch


WITHIN, PAST = KernelUsage(sockets=SOCKETS_MAX), KernelUsage(sockets=SOCKETS_MAX + 1)


@pytest.mark.parametrize(
    ("uses", "is_killed"),
    [
        ([WITHIN], False),
        ([KernelUsage()], False),
        ([WITHIN, PAST], True),
        ([WITHIN, OSError(23, "Too many open files in system")], True),
        ([ValueError("no number")], True),
    ],
)
def test_confined_programs_end_past_a_bound_and_where_nobody_can_count(
    monkeypatch: pytest.MonkeyPatch, uses: list[KernelUsage | Exception], is_killed: bool
):
    monkeypatch.setattr("sandbox.interfaces.kernel_watch.KERNEL_USAGE_CHECK_SECONDS", 0.001)
    assert asyncio.run(was_killed(PlayedGroup(*uses), looks=3)) is is_killed
