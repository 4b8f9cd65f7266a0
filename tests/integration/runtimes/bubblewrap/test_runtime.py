"""The bubblewrap runtime: the probe, failures, use by an ordinary user, and the real agent's binary."""

import asyncio
import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from doubles.sandbox_lifecycle import new_attempt_id, ready_sandbox, run_in, run_shell, sandbox_spec
from sandbox.interfaces.runtime import SandboxHandle
from sandbox.model.failure import AttemptError
from sandbox.runtimes import bubblewrap_confinement, seccomp_filter
from sandbox.runtimes.bubblewrap import BubblewrapRuntime
from sandbox.runtimes.kernel_uid_pool import SANDBOX_UIDS
from sandbox.runtimes.launcher_client import LauncherProcess, start_launcher
from sandbox.runtimes.limits.cgroups import ControlGroup

NOBODY = 65534


@pytest.fixture
def runtime(tmp_path: Path) -> BubblewrapRuntime:
    runtime = BubblewrapRuntime(tmp_path / "run")
    result = asyncio.run(runtime.probe())
    if not result.is_available:
        pytest.skip(result.remedy)
    return runtime


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk"
    disk.mkdir()
    return disk


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """A directory that every user can access; `tmp_path` is accessible to its owner only."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


async def test_probe_reports_properties_and_leaves_no_files(runtime: BubblewrapRuntime, tmp_path: Path):
    result = await runtime.probe()
    assert (result.runtime, result.is_available, result.remedy) == ("bubblewrap", True, "")
    assert result.tier == runtime.tier
    assert result.isolation_notes
    assert any("kernel is shared" in gap for gap in result.gaps)
    assert result.enforced_limits <= {"memory", "cpus", "processes", "sockets"}
    assert "disk" not in result.enforced_limits
    assert list((tmp_path / "run").iterdir()) == []


def test_probe_reports_missing_bubblewrap_with_a_remedy(
    runtime: BubblewrapRuntime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bubblewrap_confinement, "_PROGRAMS", (Path("/nowhere/bwrap"),))
    result = asyncio.run(runtime.probe())
    assert not result.is_available
    assert "apt-get install bubblewrap" in result.remedy
    with pytest.raises(AttemptError, match="bubblewrap is missing"):
        run_shell(runtime, disk, "true")


def test_launcher_ends_if_its_control_group_cannot_be_created(
    runtime: BubblewrapRuntime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    """The launcher is started before its control group is created."""
    started: list[LauncherProcess] = []

    def start(*arguments: object, **options: object) -> LauncherProcess:
        started.append(start_launcher(*arguments, **options))
        return started[0]

    def fail(*_: object, **_limits: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sandbox.runtimes.bubblewrap.runtime.start_launcher", start)
    monkeypatch.setattr(ControlGroup, "create", fail)
    with pytest.raises(AttemptError, match="No space left on device"):
        run_shell(runtime, disk, "true")
    assert started[0].exit_code is not None


async def test_probe_reports_the_bubblewrap_error(
    runtime: BubblewrapRuntime, shared_directory: Path, monkeypatch: pytest.MonkeyPatch
):
    broken = shared_directory / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(bubblewrap_confinement, "_PROGRAMS", (broken,))
    result = await runtime.probe()
    assert not result.is_available
    assert "setting up uid map: Permission denied" in result.remedy
    assert "namespaces" in result.remedy


async def test_missing_seccomp_architecture_makes_the_runtime_unavailable(
    runtime: BubblewrapRuntime, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(seccomp_filter, "ARCHITECTURES", {})
    result = await runtime.probe()
    assert not result.is_available
    assert "filter" in result.remedy


async def test_each_sandbox_created_by_root_has_its_own_unprivileged_kernel_uid(runtime: BubblewrapRuntime, disk: Path):
    if os.getuid() != 0:
        pytest.skip("an ordinary user has one uid")

    async def scenario() -> list[int]:
        async with ready_sandbox(runtime, disk / "a") as one, ready_sandbox(runtime, disk / "b") as other:
            for sandbox in (one, other):
                await run_in(sandbox, ["/usr/bin/touch", "file"])
            return [(disk / name / "workspace" / "file").stat().st_uid for name in "ab"]

    first, second = await scenario()
    assert first != second
    assert {first, second} <= set(SANDBOX_UIDS)


async def test_destroying_a_handle_from_before_a_reboot_kills_no_other_sandbox(runtime: BubblewrapRuntime, disk: Path):
    if os.getuid() != 0:
        pytest.skip("an ordinary user has one uid")
    async with ready_sandbox(runtime, disk / "new") as sandbox:
        details = {"kernel_uid": sandbox.handle.details["kernel_uid"], "cgroups": ""}
        old = SandboxHandle("bubblewrap", new_attempt_id(), details)
        (disk / "old").mkdir()
        await BubblewrapRuntime(disk).destroy(old, disk / "old")
        assert (await run_in(sandbox, ["/bin/echo", "alive"])).output == "alive\n"


async def test_destroying_a_handle_with_a_uid_outside_the_range_kills_nothing(runtime: BubblewrapRuntime, disk: Path):
    process = subprocess.Popen(["/usr/bin/sleep", "60"])
    try:
        handle = SandboxHandle("bubblewrap", new_attempt_id(), {"kernel_uid": str(os.getuid()), "cgroups": ""})
        await runtime.destroy(handle, disk)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("details", [{}, {"kernel_uid": "0"}, {"kernel_uid": "200001"}])
async def test_root_creates_no_sandbox_without_an_allocated_uid(
    runtime: BubblewrapRuntime, disk: Path, details: dict[str, str]
):
    if os.getuid() != 0:
        pytest.skip("an ordinary user has one uid")
    handle = SandboxHandle("bubblewrap", new_attempt_id(), details)
    with pytest.raises(AttemptError, match="prepare"):
        await runtime.create(handle, sandbox_spec(disk, handle.attempt_id))


@pytest.mark.parametrize("uid", [None, 0])
async def test_launcher_refuses_to_remain_root(uid: int | None):
    if os.getuid() != 0:
        pytest.skip("an ordinary user cannot stay root")
    launch = start_launcher(new_attempt_id(), uid, {})
    with pytest.raises(AttemptError, match="separate kernel uid"):
        await launch.wait_ready()
    await launch.wait()
    launch.close()


def test_invalid_attempt_ids_are_refused(runtime: BubblewrapRuntime):
    for attempt_id in ("", "../up", "with space", "a" * 33, "\u00fcber"):
        with pytest.raises(AttemptError):
            runtime.prepare(attempt_id)


def list_children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


async def test_first_process_of_a_dead_sandbox_is_reaped(runtime: BubblewrapRuntime, disk: Path):
    others = list_children()  # children of earlier tests in this process

    async def scenario() -> None:
        for number in range(5):
            async with ready_sandbox(runtime, disk / str(number)) as sandbox:
                await run_in(sandbox, ["/bin/sh", "-c", "sleep 30 & exit 0"])

    await scenario()
    assert list_children() <= others


async def test_agent_binary_runs_under_the_seccomp_filter(runtime: BubblewrapRuntime, disk: Path):
    spec = importlib.util.find_spec("claude_agent_sdk")
    assert spec is not None
    assert spec.origin is not None
    binary = Path(spec.origin).parent / "_bundled" / "claude"
    async with ready_sandbox(runtime, disk, memory_bytes=2 << 30, programs={binary: "/opt/agent/claude"}) as sandbox:
        environment = {"HOME": "/home/agent", "PATH": "/usr/bin"}
        completed = await run_in(sandbox, ["/opt/agent/claude", "--version"], environment)
        assert (completed.code, "Claude Code" in completed.output) == (0, True), completed


_AS_ORDINARY_USER = """
import asyncio, concurrent.futures.thread, ctypes, os, sys
from pathlib import Path
import msgspec, shutil
import sandbox.runtimes.exec_terminal, sandbox.runtimes.launcher_client, sandbox.runtimes.bubblewrap.runtime
from doubles.sandbox_lifecycle import ready_sandbox, run_in
from sandbox.interfaces.runtime import Command, TerminalSize
from sandbox.runtimes.bubblewrap import BubblewrapRuntime

directory, interpreter, module = sys.argv[1:]
OPEN_PTYS = "import pty\\nfor count in range(300):\\n try: pty.openpty()\\n except OSError: break\\nprint(count)"
sandbox.runtimes.launcher_client.__file__ = sandbox.runtimes.exec_terminal.__file__ = module
sys.executable = interpreter
os.setgroups([]), os.setgid(65534), os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, lost by the change of uid

async def scenario():
    runtime = BubblewrapRuntime(Path(directory, "run"))
    disk = Path(directory, "disk")
    probe = await runtime.probe()
    if not probe.is_available:
        return {"skip": probe.remedy}
    report = {"gaps": " ".join(probe.gaps)}
    async with ready_sandbox(runtime, disk) as first:
        script = "id -u; touch file; (: < /dev/tcp/127.0.0.1/8123) && echo reached; : > /proc/sys/kernel/core_pattern"
        script += f"; ulimit -Sn; ulimit -Hn; /usr/bin/python3 -c '{OPEN_PTYS}'"
        script += "; echo 0 > /proc/self/oom_score_adj; cat /proc/self/oom_score_adj"
        report["output"] = (await run_in(first, ["/bin/bash", "-c", script])).output
    async with ready_sandbox(runtime, disk) as second:
        await second.start(Command(["/usr/bin/sleep", "60"], {}, "/"))
        script = "tty; id -u; grep -h -E '^(CapBnd|CapEff|NoNewPrivs|Seccomp):' /proc/self/status | cut -f 2; exit 5"
        terminal = await second.open_terminal(Command(["/bin/bash", "-c", script], {}, "/"), TerminalSize(24, 80))
        report["terminal"] = (await terminal.output.read()).decode().split()
        report["terminal_code"] = (await terminal.wait()).code
        report["listed"] = second.handle.attempt_id in runtime.attempt_ids() or bool(second.handle.details["cgroups"])
        await BubblewrapRuntime(Path(directory, "run")).destroy(second.handle, disk)
        report["code"] = (await second.wait()).code
    report["remaining"] = second.handle.attempt_id in runtime.attempt_ids()
    return report

print(msgspec.json.encode(asyncio.run(scenario())).decode())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests cover an ordinary user")
def test_ordinary_user_can_create_and_destroy_sandboxes(shared_directory: Path):
    # Another user may not be able to read the interpreter and this checkout, so the launcher is copied.
    (programs := shared_directory / "programs").mkdir()
    for name in ("launcher", "namespace_exec", "inherited_limits"):
        shutil.copy(importlib.util.find_spec(f"sandbox.runtimes.programs.{name}").origin, programs)
    os.chown(shared_directory, NOBODY, NOBODY)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    argv = [
        sys.executable,
        "-c",
        _AS_ORDINARY_USER,
        str(shared_directory),
        "/usr/bin/python3",
        str(shared_directory / "module.py"),
    ]
    completed = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert completed.returncode == 0, completed.stderr
    report = msgspec.json.decode(completed.stdout)
    if "skip" in report:
        pytest.skip(report["skip"])
    assert "that user's kernel uid" in report.pop("gaps")
    none = "0" * 16
    assert report.pop("terminal") == ["/dev/pts/0", "1000", none, none, "1", "2"]
    assert report.pop("terminal_code") == 5
    # If bubblewrap is killed before the command, it cannot report the command's exit code.
    assert report.pop("code") in (None, 137)
    assert report == {"output": "1000\nreached\n4096\n16384\n40\n500\n", "listed": True, "remaining": False}
    assert (shared_directory / "disk" / "workspace" / "file").stat().st_uid == NOBODY


async def test_destroyed_sandbox_can_be_created_again(runtime: BubblewrapRuntime, disk: Path):
    handle = runtime.prepare(new_attempt_id())
    await runtime.create(handle, sandbox_spec(disk, handle.attempt_id))
    await runtime.destroy(handle, disk)
    second_handle = runtime.prepare(handle.attempt_id)
    sandbox = await runtime.create(second_handle, sandbox_spec(disk, handle.attempt_id))
    assert (await run_in(sandbox, ["/bin/echo", "again"])).output == "again\n"
    await runtime.destroy(second_handle, disk)
