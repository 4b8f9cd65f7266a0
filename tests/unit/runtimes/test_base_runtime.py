"""Confined programs are killed if their kernel usage exceeds a limit or cannot be measured."""

import asyncio
from contextlib import suppress

import pytest

from sandbox.model.fixed_limits import SOCKETS_MAX
from sandbox.runtimes import base_runtime
from sandbox.runtimes.limits.usage_limits import FileUsage, KernelUsage


class FakeLauncher:
    epoll_counter = None

    def __init__(self) -> None:
        self.was_killed = asyncio.Event()

    def kill(self) -> None:
        self.was_killed.set()

    def kernel_usage(self, group: "FakeGroup", memory_bytes: int, *_meters: object) -> KernelUsage:
        return group.kernel_usage(memory_bytes)


class FakeGroup:
    """Returns these usages in order, and then repeats the last one. A usage that is an exception is raised instead."""

    def __init__(self, *usages: KernelUsage | Exception) -> None:
        self._usages = list(usages)
        self.checks = 0

    def kernel_usage(self, _memory_bytes: int) -> KernelUsage:
        self.checks += 1
        usage = self._usages.pop(0) if len(self._usages) > 1 else self._usages[0]
        if isinstance(usage, Exception):
            raise usage
        return usage

    def basic_file_usage(self) -> FileUsage:
        return FileUsage(1)

    def detailed_file_usage(self, _epolls: object) -> FileUsage:
        return FileUsage(1)


async def is_killed_after(group: FakeGroup, check_count: int) -> bool:
    launcher = FakeLauncher()
    watcher = asyncio.create_task(base_runtime._kill_on_excess(launcher, group, 1 << 30))
    try:
        while group.checks < check_count and not watcher.done():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        return launcher.was_killed.is_set()
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError, OSError, ValueError):
            await watcher


WITHIN_LIMIT, OVER_LIMIT = KernelUsage(sockets=SOCKETS_MAX), KernelUsage(sockets=SOCKETS_MAX + 1)


@pytest.mark.parametrize(
    ("usages", "expected"),
    [
        ([WITHIN_LIMIT], False),
        ([KernelUsage()], False),
        ([WITHIN_LIMIT, OVER_LIMIT], True),
        ([WITHIN_LIMIT, OSError(23, "Too many open files in system")], True),
        ([ValueError("no number")], True),
    ],
)
async def test_confined_programs_are_killed_if_usage_exceeds_a_limit_or_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch, usages: list[KernelUsage | Exception], expected: bool
):
    monkeypatch.setattr("sandbox.runtimes.limits.measurement_scheduling.KERNEL_USAGE_CHECK_INTERVAL_SECONDS", 0.001)
    monkeypatch.setattr("sandbox.runtimes.base_runtime.count_kernel_bytes_outside_cgroup", lambda _group: None)
    assert (await is_killed_after(FakeGroup(*usages), check_count=3)) is expected
