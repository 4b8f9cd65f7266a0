"""gVisor sandboxes on the host: the owner of their processes and files, and the probe."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from doubles.sandbox_lifecycle import read_until, ready_sandbox
from sandbox.interfaces.runtime import Command
from sandbox.model.failure import AttemptError
from sandbox.runtimes.gvisor import GvisorRuntime
from sandbox.runtimes.gvisor import runtime as gvisor_runtime
from sandbox.runtimes.gvisor import runtime as gvisor_sandbox
from sandbox.runtimes.gvisor.runtime import GvisorSandbox, RunscState
from sandbox.runtimes.kernel_uid_pool import FILES_UIDS_OFFSET
from sandbox.runtimes.limits.cgroups import ControlGroup


@pytest.fixture
def runtime(tmp_path: Path) -> GvisorRuntime:
    """Skip the test if gVisor does not work."""
    runtime = GvisorRuntime(tmp_path / "run")
    result = asyncio.run(runtime.probe())
    if not result.is_available:
        pytest.skip(f"gvisor does not work here: {result.remedy}")
    return runtime


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk"
    disk.mkdir()
    return disk


async def test_probe_reports_properties_and_leaves_no_files(runtime: GvisorRuntime, tmp_path: Path):
    result = await runtime.probe()
    assert (result.runtime, result.tier, result.is_explicit_only) == ("gvisor", "gvisor", False)
    assert any("gVisor's kernel" in sentence for sentence in result.isolation_notes)
    assert any("environment" in sentence for sentence in result.gaps)
    assert not list((tmp_path / "run").iterdir())


async def test_probe_reports_missing_runsc_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gvisor_runtime, "_PROGRAMS", (tmp_path / "no-runsc",))
    result = await GvisorRuntime(tmp_path / "run").probe()
    assert (result.is_available, result.remedy) == (False, "runsc is missing; install it: apt-get install runsc")


async def test_probe_requires_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gvisor_runtime, "_PROGRAMS", (Path("/usr/bin/true"),))
    monkeypatch.setattr("os.getuid", lambda: 1000)
    result = await GvisorRuntime(tmp_path / "run").probe()
    assert not result.is_available
    assert "run the server as root" in result.remedy


async def test_processes_and_files_have_different_unprivileged_uids_on_the_host(runtime: GvisorRuntime, disk: Path):
    async with ready_sandbox(runtime, disk) as sandbox:
        script = "touch file; mkdir folder; echo up; sleep 300"
        output, _ = await sandbox.start(Command(["/bin/bash", "-c", script], {"PATH": "/usr/bin"}, "/workspace"))
        await read_until(output, b"up")
        uid = int(sandbox.handle.details["kernel_uid"])
        for path in (disk / "workspace", disk / "workspace" / "file", disk / "workspace" / "folder"):
            assert path.stat().st_uid == path.stat().st_gid == uid + FILES_UIDS_OFFSET
        ids = processes_in_group(sandbox.handle.details["cgroups"])
        assert len(ids) > 2
        for pid in ids:
            fields = read_status(pid)
            assert (set(fields["Uid"].split()), set(fields["Gid"].split())) == ({str(uid)}, {str(uid)})
            assert fields["Groups"].strip() == ""
            maps = [line.split() for line in Path(f"/proc/{pid}/uid_map").read_text().splitlines()]
            assert maps == [["0", str(uid), "1"], ["1000", str(uid + FILES_UIDS_OFFSET), "1"]]


async def test_nothing_is_killed_later_than_the_kill_timeout(
    runtime: GvisorRuntime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    """After the timeout, the runner starts programs that collect the results in the same control group."""
    wait_for_runsc, kill_group, killed_at = GvisorSandbox._wait_for_runsc, ControlGroup.kill, list[float]()

    async def wait_late(sandbox: GvisorSandbox) -> None:
        await wait_for_runsc(sandbox)
        await asyncio.sleep(1.9)

    def kill(group: ControlGroup) -> None:
        killed_at.append(asyncio.get_running_loop().time())
        kill_group(group)

    monkeypatch.setattr(GvisorSandbox, "_wait_for_runsc", wait_late)
    async with ready_sandbox(runtime, disk) as sandbox:
        await sandbox.start(Command(["/bin/sleep", "300"], {"PATH": "/usr/bin"}, "/workspace"))
        with monkeypatch.context() as patches:
            patches.setattr(gvisor_sandbox, "KILL_TIMEOUT_SECONDS", 2.0)
            patches.setattr(GvisorSandbox, "_has_processes", lambda sandbox: True)
            patches.setattr(ControlGroup, "kill", kill)
            await sandbox.kill()
            await sandbox.wait()
    assert killed_at[-1] - killed_at[0] < 3.5


def processes_in_group(directories: str) -> list[int]:
    if not directories:
        pytest.skip("there is no control group to find the processes by")
    return [int(pid) for pid in (Path(directories.splitlines()[0]) / "cgroup.procs").read_text().split()]


def read_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


async def test_environment_is_in_no_file_visible_to_the_host(runtime: GvisorRuntime, disk: Path):
    async with ready_sandbox(runtime, disk) as sandbox:
        environment = {"TASK_VALUE": "a-value-that-is-secret", "PATH": "/usr/bin"}
        output, _ = await sandbox.start(
            Command(["/bin/bash", "-c", "echo $TASK_VALUE; sleep 300"], environment, "/workspace")
        )
        await read_until(output, b"a-value-that-is-secret")
        (runsc,) = [pid for pid in processes_in_group(sandbox.handle.details["cgroups"]) if is_runsc(pid)]
        small_files = list(find_small_files(Path(f"/proc/{runsc}/root/run")))
        holders = [path for path in small_files if b"a-value-that-is-secret" in path.read_bytes()]
        assert {os.major(path.stat().st_dev) for path in holders} <= {0}  # in memory
        assert not [path for path in holders if Path("/", *path.parts[4:]).exists()]
        assert any(path.suffix == ".state" for path in small_files)


def is_runsc(pid: int) -> bool:
    return b"\0run\0" in Path(f"/proc/{pid}/cmdline").read_bytes()


def find_small_files(exposed: Path) -> Iterator[Path]:
    """Yield small files outside the image."""
    for directory, directories, names in os.walk(exposed):
        directories[:] = [name for name in directories if Path(directory, name) != exposed / "root"]
        for path in (Path(directory, name) for name in names):
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 20:
                yield path


async def test_runsc_without_a_start_report_times_out(
    runtime: GvisorRuntime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gvisor_sandbox, "_START_SECONDS", 0.3)
    monkeypatch.setattr(gvisor_sandbox, "read_state", lambda *_: RunscState())

    async def scenario() -> None:
        async with ready_sandbox(runtime, disk) as sandbox:
            with pytest.raises(AttemptError, match="did not start in time") as caught:
                await sandbox.start(Command(["/usr/bin/sleep", "300"], {}, "/workspace"))
            assert caught.value.code == "provision_failed"
            await sandbox.signal(15)

    await scenario()
    assert disk.stat().st_uid == os.getuid()


@pytest.mark.parametrize("argument", ["ends with \udcff", "half \ud800"])
async def test_arguments_that_are_not_utf8_are_passed(runtime: GvisorRuntime, disk: Path, argument: str):
    async def scenario() -> int | None:
        async with ready_sandbox(runtime, disk) as sandbox:
            await sandbox.start(Command(["/bin/bash", "-c", "exit 4", argument], {}, "/workspace"))
            return (await sandbox.wait()).code

    assert (await scenario()) == 4
