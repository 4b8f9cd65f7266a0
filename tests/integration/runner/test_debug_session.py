"""Shells in what a failed task left: a disk that knows no bound of its own is watched there too."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace

from doubles.attempt_dependencies import Script, ScriptedRuntime, ScriptedSandbox, scripted_equipment
from doubles.manifests import manifest
from sandbox.interfaces.agent import AgentLaunchSpec
from sandbox.interfaces.disks import DiskUsage
from sandbox.interfaces.layout import SANDBOX_HOME, AttemptLayout
from sandbox.interfaces.placement import Reply, TerminalOrder
from sandbox.interfaces.runtime import Command, ExitStatus, KernelUsage
from sandbox.interfaces.terminals import EndFrame, RoleFrame
from sandbox.placements.local.runner_client import UnixRunnerClient
from sandbox.runner.control_socket import serve_control_socket
from sandbox.runner.debug_session import DebugSession
from sandbox.runner.terminals import TerminalServer
from sandbox.system.cpu_throttle import CpuThrottle

ATTEMPT_ID = "abcdefghijkl"
GIB = 1024**3
SECONDS = 5


class FillingDisk:
    """Tells what it is told to hold."""

    def __init__(self, used_bytes=0, *, enforces_size=False):
        self.used_bytes, self.enforces_size, self.is_broken = used_bytes, enforces_size, False

    async def open(self, files, size_bytes):
        self.size_bytes = size_bytes

    async def usage(self, files):
        if self.is_broken:
            raise OSError("It cannot be told how full the disk is")
        return DiskUsage(self.used_bytes, self.size_bytes, self.used_bytes >= self.size_bytes)

    async def close(self, files):
        pass


class StillTerminal:
    """Shows nothing until it is hung up."""

    def __init__(self):
        self.output, self._over = asyncio.StreamReader(), asyncio.Event()

    async def wait(self):
        await self._over.wait()
        return ExitStatus(129)

    async def hang_up(self):
        self._over.set()


class SandboxOfShells(ScriptedSandbox):
    """sockets: the script that says at each look how many there are."""

    def __init__(self, handle, script, sockets):
        super().__init__(handle, script)
        self.listeners = self
        self._sockets = sockets

    async def kernel_usage(self):
        return self._sockets.kernel_usage

    def close(self):
        pass

    async def open_terminal(self, command, size):
        return StillTerminal()


class RuntimeOfShells(ScriptedRuntime):
    async def create(self, handle, spec):
        return SandboxOfShells(handle, Script(stays=True), self._script)


@pytest.fixture(autouse=True)
def _is_quick(monkeypatch):
    monkeypatch.setattr("sandbox.runner.resource_exhaustion.DISK_CHECK_SECONDS", 0.01)
    monkeypatch.setattr("sandbox.runner.resource_exhaustion.DISK_CHECK_SECONDS_MAX", 0.01)
    monkeypatch.setattr("sandbox.runner.debug_session.DEBUG_SESSION_IDLE_SECONDS", 0.2)


@asynccontextmanager
async def visited(tmp_path, disk, sockets=None):
    """A visit with somebody in a shell, whose line is given, and the work that ends with it."""
    files = AttemptLayout(tmp_path / "attempt")
    files.root.mkdir()
    runtime = RuntimeOfShells(sockets or Script())
    equipment = replace(scripted_equipment(Script(), None), disks=disk, runtime=runtime)
    start = AgentLaunchSpec(command=Command(("claude",), {}, SANDBOX_HOME), programs={}, session_id="")
    visit = DebugSession(ATTEMPT_ID, files, manifest(vm={"disk": "1G"}).vm, start, None, equipment)
    terminals, is_open = TerminalServer(None, CpuThrottle().queue()), asyncio.Event()

    @asynccontextmanager
    async def listen():
        async with serve_control_socket(tmp_path / f"{ATTEMPT_ID}.sock", lambda _: Reply(done=False), terminals):
            is_open.set()
            yield

    async with asyncio.timeout(SECONDS):
        work = asyncio.create_task(visit.run(terminals, listen))
        await asyncio.wait({work, asyncio.create_task(is_open.wait())}, return_when=asyncio.FIRST_COMPLETED)
        line = await UnixRunnerClient(tmp_path).open_terminal(ATTEMPT_ID, TerminalOrder(24, 80))
        assert await line.read() == RoleFrame(types=True)
        try:
            yield line, work
        finally:
            await line.close()
            await work


def test_it_ends_once_the_disk_is_full_and_says_why(tmp_path):
    async def story():
        disk = FillingDisk()
        async with visited(tmp_path, disk) as (line, work):
            disk.used_bytes = 2 * GIB
            told = await line.read()
            assert isinstance(told, EndFrame)
            assert "no room for more on the disk" in told.message
            await work

    asyncio.run(story())


def test_it_ends_once_nobody_can_tell_how_full_the_disk_is(tmp_path):
    async def story():
        disk = FillingDisk()
        async with visited(tmp_path, disk) as (line, work):
            disk.is_broken = True
            assert "cannot be told how full" in (await line.read()).message
            await work

    asyncio.run(story())


def goes_on(tmp_path, disk, used_bytes):
    async def story():
        async with visited(tmp_path, disk) as (_, work):
            disk.used_bytes = used_bytes
            await asyncio.wait({work}, timeout=0.2)
            assert not work.done()

    asyncio.run(story())


def test_it_goes_on_as_long_as_there_is_room(tmp_path):
    goes_on(tmp_path, FillingDisk(), GIB // 2)


def test_it_goes_on_where_the_disk_itself_tells_when_it_is_full(tmp_path):
    goes_on(tmp_path, FillingDisk(enforces_size=True), 2 * GIB)


def test_a_task_that_failed_because_its_disk_was_full_can_be_looked_at(tmp_path):
    goes_on(tmp_path, FillingDisk(5 * GIB), 5 * GIB + 1)


def test_what_is_looked_at_on_a_full_disk_may_not_grow_for_ever(tmp_path):
    async def story():
        disk = FillingDisk(5 * GIB)
        async with visited(tmp_path, disk) as (line, work):
            disk.used_bytes = 11 * GIB
            assert "no room for more on the disk" in (await line.read()).message
            await work

    asyncio.run(story())


def test_it_ends_once_there_are_more_sockets_than_a_sandbox_may_have(tmp_path):
    async def story():
        sockets = Script(kernel_usage=KernelUsage(10))
        async with visited(tmp_path, FillingDisk(), sockets) as (line, work):
            sockets.kernel_usage = KernelUsage(9000)
            assert "9000 sockets" in (await line.read()).message
            await work

    asyncio.run(story())
