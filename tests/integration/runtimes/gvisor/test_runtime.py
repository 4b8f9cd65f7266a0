"""What gVisor's sandboxes are on the host: whose their processes and files are, and what its probe says."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from doubles.sandbox_lifecycle import living, read_until
from sandbox.interfaces.runtime import Command
from sandbox.model.errors import AttemptError
from sandbox.runtimes.gvisor import GvisorRuntime
from sandbox.runtimes.gvisor import runtime as gvisor_runtime
from sandbox.runtimes.gvisor import sandbox as made
from sandbox.runtimes.gvisor.sandbox import RunscState
from sandbox.runtimes.limits.kernel_uid import FILES_UIDS_OFFSET


@pytest.fixture
def runtime(tmp_path: Path) -> GvisorRuntime:
    """Skipped where it does not work."""
    runtime = GvisorRuntime(tmp_path / "run")
    found = asyncio.run(runtime.probe())
    if not found.is_available:
        pytest.skip(f"gvisor does not work here: {found.remedy}")
    return runtime


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk"
    disk.mkdir()
    return disk


def test_the_probe_says_what_holds_and_leaves_nothing(runtime: GvisorRuntime, tmp_path: Path):
    found = asyncio.run(runtime.probe())
    assert (found.runtime, found.tier, found.is_explicit_only) == ("gvisor", "gvisor", False)
    assert any("kernel of the sandbox's own" in sentence for sentence in found.isolates)
    assert any("environment" in sentence for sentence in found.gaps)
    assert not list((tmp_path / "run").iterdir())


def test_a_machine_without_runsc_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gvisor_runtime, "_PROGRAMS", (tmp_path / "no-runsc",))
    found = asyncio.run(GvisorRuntime(tmp_path / "run").probe())
    assert (found.is_available, found.remedy) == (False, "runsc is missing; install it: apt-get install runsc")


def test_an_ordinary_user_is_told_why_it_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gvisor_runtime, "_PROGRAMS", (Path("/usr/bin/true"),))
    monkeypatch.setattr("os.getuid", lambda: 1000)
    found = asyncio.run(GvisorRuntime(tmp_path / "run").probe())
    assert not found.is_available
    assert "run the server as root" in found.remedy


def test_nothing_of_it_has_a_uid_that_the_host_knows_or_a_privilege_on_the_host(runtime: GvisorRuntime, disk: Path):
    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            script = "touch file; mkdir folder; echo up; sleep 300"
            output, _ = await sandbox.start(Command(["/bin/bash", "-c", script], {"PATH": "/usr/bin"}, "/workspace"))
            await read_until(output, b"up")
            uid = int(sandbox.handle.details["kernel_uid"])
            for path in (disk / "workspace", disk / "workspace" / "file", disk / "workspace" / "folder"):
                assert path.stat().st_uid == path.stat().st_gid == uid + FILES_UIDS_OFFSET
            ids = in_group(sandbox.handle.details["cgroups"])
            assert len(ids) > 2
            for pid in ids:
                fields = read_status(pid)
                assert (set(fields["Uid"].split()), set(fields["Gid"].split())) == ({str(uid)}, {str(uid)})
                assert fields["Groups"].strip() == ""
                maps = [line.split() for line in Path(f"/proc/{pid}/uid_map").read_text().splitlines()]
                assert maps == [["0", str(uid), "1"], ["1000", str(uid + FILES_UIDS_OFFSET), "1"]]

    asyncio.run(story())


def in_group(directories: str) -> list[int]:
    if not directories:
        pytest.skip("there is no control group to find the processes by")
    return [int(pid) for pid in (Path(directories.splitlines()[0]) / "cgroup.procs").read_text().split()]


def read_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def test_the_environment_is_on_no_disk_and_in_no_file_that_the_host_sees(runtime: GvisorRuntime, disk: Path):
    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            given = {"TASK_VALUE": "a-value-that-is-secret", "PATH": "/usr/bin"}
            output, _ = await sandbox.start(
                Command(["/bin/bash", "-c", "echo $TASK_VALUE; sleep 300"], given, "/workspace")
            )
            await read_until(output, b"a-value-that-is-secret")
            (runsc,) = [pid for pid in in_group(sandbox.handle.details["cgroups"]) if is_runsc(pid)]
            laid = list(find_laid(Path(f"/proc/{runsc}/root/run")))
            holders = [path for path in laid if b"a-value-that-is-secret" in path.read_bytes()]
            assert {os.major(path.stat().st_dev) for path in holders} <= {0}  # in memory
            assert not [path for path in holders if Path("/", *path.parts[4:]).exists()]
            assert any(path.suffix == ".state" for path in laid)

    asyncio.run(story())


def is_runsc(pid: int) -> bool:
    return b"\0run\0" in Path(f"/proc/{pid}/cmdline").read_bytes()


def find_laid(stage: Path) -> Iterator[Path]:
    """Small files; the image is left out."""
    for directory, inner, names in os.walk(stage):
        inner[:] = [name for name in inner if Path(directory, name) != stage / "root"]
        for path in (Path(directory, name) for name in names):
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 20:
                yield path


def test_a_runsc_that_never_says_that_it_began_is_not_waited_for_for_ever(
    runtime: GvisorRuntime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(made, "_START_SECONDS", 0.3)
    monkeypatch.setattr(made, "read_state", lambda *_: RunscState())

    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            with pytest.raises(AttemptError, match="did not begin in time") as caught:
                await sandbox.start(Command(["/usr/bin/sleep", "300"], {}, "/workspace"))
            assert caught.value.code == "provision_failed"
            await sandbox.signal(15)

    asyncio.run(story())
    assert disk.stat().st_uid == os.getuid()


@pytest.mark.parametrize("word", ["ends with \udcff", "half \ud800"])
def test_words_that_are_no_text_do_not_break_it(runtime: GvisorRuntime, disk: Path, word: str):
    async def story() -> int | None:
        async with living(runtime, disk) as sandbox:
            await sandbox.start(Command(["/bin/bash", "-c", "exit 4", word], {}, "/workspace"))
            return (await sandbox.wait()).code

    assert asyncio.run(story()) == 4
