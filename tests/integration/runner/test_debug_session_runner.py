"""Debug shells on a failed task's preserved disk, which is monitored unless the disk enforces its size."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from doubles.attempt_harness import AttemptScript, ScriptedImages, ScriptedRuntime, ScriptedSandbox
from doubles.manifests import manifest
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.agent import AgentLaunchSpec
from sandbox.interfaces.disks import DiskUsage
from sandbox.interfaces.runner import EndFrame, OpenTerminal, Reply, WriteAccessFrame
from sandbox.interfaces.runtime import SANDBOX_HOME, Command, ExitStatus
from sandbox.interfaces.task_file_layout import AttemptLayout
from sandbox.placements.runner_client import LocalRunnerClient
from sandbox.primitives.runner_cpu_throttle import CpuThrottle
from sandbox.runner.control_socket import serve_control_socket
from sandbox.runner.debug_session_runner import DebugSessionRunner, launch_spec_without_agent
from sandbox.runner.terminals import TerminalServer

ATTEMPT_ID = "abcdefghijkl"
GIB = 1024**3
TIMEOUT_SECONDS = 5


class FillingDisk:
    """A disk whose reported usage is set by the test."""

    def __init__(self, used_bytes=0, *, enforces_size=False):
        self.used_bytes, self.enforces_size, self.is_broken = used_bytes, enforces_size, False

    async def open(self, size_bytes):
        self.size_bytes = size_bytes

    async def measure_and_trim(self):
        if self.is_broken:
            raise OSError("The disk usage cannot be measured")
        return DiskUsage(self.used_bytes, self.size_bytes, self.used_bytes >= self.size_bytes)

    async def close(self):
        pass


class SilentTerminal:
    """A terminal that prints nothing and ends when it is hung up."""

    def __init__(self):
        self.output, self._ended = asyncio.StreamReader(), asyncio.Event()

    async def wait(self):
        await self._ended.wait()
        return ExitStatus(129)

    async def hang_up(self):
        self._ended.set()


class ShellSandbox(ScriptedSandbox):
    """A sandbox in which shells can be opened. shared: the script whose exceeded limit this sandbox reports."""

    def __init__(self, handle, script, shared):
        super().__init__(handle, script)
        self.listeners = self
        self._shared = shared

    async def wait_for_exceeded_limit(self):
        while not self._shared.exceeded_limit:
            await asyncio.sleep(0.005)
        return self._shared.exceeded_limit

    def close(self):
        pass

    async def open_terminal(self, command, size):
        return SilentTerminal()


class ShellRuntime(ScriptedRuntime):
    async def create(self, handle, spec):
        return ShellSandbox(handle, AttemptScript(runs_until_signal=True), self._script)


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch):
    monkeypatch.setattr("sandbox.runner.task_limits.DISK_CHECK_INTERVAL_SECONDS_MIN", 0.01)
    monkeypatch.setattr("sandbox.runner.task_limits.DISK_CHECK_INTERVAL_SECONDS_MAX", 0.01)
    monkeypatch.setattr("sandbox.runner.debug_session_runner.DEBUG_SESSION_IDLE_TIMEOUT_SECONDS", 0.2)


@asynccontextmanager
async def open_session(tmp_path, disk, script=None):
    """Open a debug session with one shell. Yield the connection and the task that runs the session."""
    files = AttemptLayout(tmp_path / "attempt")
    files.root.mkdir()
    runtime = ShellRuntime(script or AttemptScript())
    start = AgentLaunchSpec(Command(("claude",), {}, SANDBOX_HOME), session_id="", programs={}, git_author="Author")
    vm, images = manifest(vm={"disk": "1G"}).vm, ScriptedImages(AttemptScript())
    session = DebugSessionRunner(ATTEMPT_ID, files, vm, start, None, runtime, disk, images, SystemClock())
    terminals, is_open = TerminalServer(None, CpuThrottle().queue()), asyncio.Event()

    @asynccontextmanager
    async def listen():
        async with serve_control_socket(tmp_path / f"{ATTEMPT_ID}.sock", lambda _: Reply(done=False), terminals):
            is_open.set()
            yield

    async with asyncio.timeout(TIMEOUT_SECONDS):
        running = asyncio.create_task(session.run(terminals, listen))
        await asyncio.wait({running, asyncio.create_task(is_open.wait())}, return_when=asyncio.FIRST_COMPLETED)
        connection = await LocalRunnerClient(tmp_path / f"{ATTEMPT_ID}.sock").open_terminal(OpenTerminal(24, 80))
        assert await connection.read() == WriteAccessFrame(may_write=True)
        try:
            yield connection, running
        finally:
            await connection.close()
            await running


def test_shell_without_the_agent_starts_in_the_directory_of_the_task():
    task = manifest()
    spec = launch_spec_without_agent(task.replace(repository=replace(task.repository, subpath="tools")))
    assert (spec.command.directory, spec.command.environment["HOME"]) == ("/workspace/tools", "/home/agent")
    assert "/usr/bin" in spec.command.environment["PATH"].split(":")


async def test_full_disk_ends_the_session_with_a_reason(tmp_path):
    disk = FillingDisk()
    async with open_session(tmp_path, disk) as (connection, running):
        disk.used_bytes = 2 * GIB
        frame = await connection.read()
        assert isinstance(frame, EndFrame)
        assert "The disk of this shell is full" in frame.message
        await running


async def test_disk_usage_error_ends_the_session(tmp_path):
    disk = FillingDisk()
    async with open_session(tmp_path, disk) as (connection, running):
        disk.is_broken = True
        assert "cannot be measured" in (await connection.read()).message
        await running


def assert_session_continues(tmp_path, disk, used_bytes):
    async def scenario():
        async with open_session(tmp_path, disk) as (_, running):
            disk.used_bytes = used_bytes
            await asyncio.wait({running}, timeout=0.2)
            assert not running.done()

    asyncio.run(scenario())


def test_session_continues_while_the_disk_has_space(tmp_path):
    assert_session_continues(tmp_path, FillingDisk(), GIB // 2)


def test_session_continues_on_a_full_disk_that_enforces_its_size(tmp_path):
    assert_session_continues(tmp_path, FillingDisk(enforces_size=True), 2 * GIB)


def test_session_opens_on_a_disk_that_is_already_full(tmp_path):
    assert_session_continues(tmp_path, FillingDisk(5 * GIB), 5 * GIB + 1)


async def test_session_ends_when_its_full_disk_grows_further(tmp_path):
    disk = FillingDisk(5 * GIB)
    async with open_session(tmp_path, disk) as (connection, running):
        disk.used_bytes = 11 * GIB
        assert "The disk of this shell is full" in (await connection.read()).message
        await running


async def test_too_many_sockets_end_the_session(tmp_path):
    script = AttemptScript()
    async with open_session(tmp_path, FillingDisk(), script) as (connection, running):
        script.exceeded_limit = "The sandbox had 9000 sockets."
        assert "9000 sockets" in (await connection.read()).message
        await running
