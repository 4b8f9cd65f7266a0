"""What is bubblewrap's own: its probe, its traps, an ordinary user, the real agent's binary."""

import asyncio
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

from doubles.sandbox_lifecycle import describe, living, new_attempt_id, run_in, run_story
from sandbox.interfaces.runtime import SandboxHandle
from sandbox.model.errors import AttemptError
from sandbox.runtimes import bwrap
from sandbox.runtimes.bubblewrap import BubblewrapRuntime
from sandbox.runtimes.launcher_client import start_launcher
from sandbox.runtimes.limits import seccomp
from sandbox.runtimes.limits.kernel_uid import SANDBOX_UIDS

NOBODY = 65534


@pytest.fixture
def runtime(tmp_path: Path) -> BubblewrapRuntime:
    runtime = BubblewrapRuntime(tmp_path / "run")
    found = asyncio.run(runtime.probe())
    if not found.is_available:
        pytest.skip(found.remedy)
    return runtime


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk"
    disk.mkdir()
    return disk


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can walk to; `tmp_path` is its owner's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_the_probe_says_what_holds_and_leaves_nothing(runtime: BubblewrapRuntime, tmp_path: Path):
    found = asyncio.run(runtime.probe())
    assert (found.runtime, found.is_available, found.remedy) == ("bubblewrap", True, "")
    assert found.tier == runtime.tier
    assert found.isolates
    assert any("kernel is shared" in gap for gap in found.gaps)
    assert found.limits <= {"memory", "cpus", "processes", "sockets"}
    assert "disk" not in found.limits
    assert list((tmp_path / "run").iterdir()) == []


def test_without_bubblewrap_the_probe_says_what_to_install(
    runtime: BubblewrapRuntime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bwrap, "_PROGRAMS", (Path("/nowhere/bwrap"),))
    found = asyncio.run(runtime.probe())
    assert not found.is_available
    assert "apt-get install bubblewrap" in found.remedy
    with pytest.raises(AttemptError, match="bubblewrap is missing"):
        run_story(runtime, disk, "true")


def test_where_bubblewrap_fails_the_probe_tells_its_words(
    runtime: BubblewrapRuntime, open_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    broken = open_folder / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(bwrap, "_PROGRAMS", (broken,))
    found = asyncio.run(runtime.probe())
    assert not found.is_available
    assert "setting up uid map: Permission denied" in found.remedy
    assert "namespaces" in found.remedy


def test_without_a_filter_for_the_processor_it_does_not_run(
    runtime: BubblewrapRuntime, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(seccomp, "ARCHITECTURES", {})
    found = asyncio.run(runtime.probe())
    assert not found.is_available
    assert "filter" in found.remedy


def test_as_root_each_sandbox_has_an_unprivileged_kernel_uid_of_its_own(runtime: BubblewrapRuntime, disk: Path):
    if os.getuid() != 0:
        pytest.skip("an ordinary user has one uid")

    async def story() -> list[int]:
        async with living(runtime, disk / "a") as one, living(runtime, disk / "b") as other:
            for sandbox in (one, other):
                await run_in(sandbox, ["/usr/bin/touch", "file"])
            return [(disk / name / "workspace" / "file").stat().st_uid for name in "ab"]

    first, second = asyncio.run(story())
    assert first != second
    assert {first, second} <= set(SANDBOX_UIDS)


def test_a_handle_of_a_rebooted_machine_kills_nothing_of_others(runtime: BubblewrapRuntime, disk: Path):
    if os.getuid() != 0:
        pytest.skip("an ordinary user has one uid")

    async def story() -> None:
        async with living(runtime, disk / "new") as sandbox:
            details = {"kernel_uid": sandbox.handle.details["kernel_uid"], "cgroups": ""}
            old = SandboxHandle("bubblewrap", new_attempt_id(), details)
            (disk / "old").mkdir()
            await BubblewrapRuntime(disk).destroy(old, disk / "old")
            assert (await run_in(sandbox, ["/bin/echo", "alive"])).output == "alive\n"

    asyncio.run(story())


def test_a_handle_that_names_a_uid_outside_the_range_kills_nothing(runtime: BubblewrapRuntime, disk: Path):
    process = subprocess.Popen(["/usr/bin/sleep", "60"])
    try:
        handle = SandboxHandle("bubblewrap", new_attempt_id(), {"kernel_uid": str(os.getuid()), "cgroups": ""})
        asyncio.run(runtime.destroy(handle, disk))
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("details", [{}, {"kernel_uid": "0"}, {"kernel_uid": "200001"}])
def test_root_makes_no_sandbox_without_a_claimed_uid(runtime: BubblewrapRuntime, disk: Path, details: dict[str, str]):
    if os.getuid() != 0:
        pytest.skip("an ordinary user has one uid")
    handle = SandboxHandle("bubblewrap", new_attempt_id(), details)
    with pytest.raises(AttemptError, match="plan"):
        asyncio.run(runtime.create(handle, describe(disk, handle.attempt_id)))


@pytest.mark.parametrize("uid", [None, 0])
def test_the_launcher_itself_refuses_to_stay_root(uid: int | None):
    if os.getuid() != 0:
        pytest.skip("an ordinary user cannot stay root")

    async def story() -> None:
        launch = start_launcher(new_attempt_id(), uid, {})
        with pytest.raises(AttemptError, match="kernel uid of its own"):
            await launch.wait_ready()
        await launch.wait()
        launch.close()

    asyncio.run(story())


def test_odd_attempt_ids_are_refused(runtime: BubblewrapRuntime):
    for odd in ("", "../up", "with space", "a" * 33, "\u00fcber"):
        with pytest.raises(AttemptError):
            runtime.prepare(odd)


def list_children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_the_first_process_of_a_dead_sandbox_is_collected(runtime: BubblewrapRuntime, disk: Path):
    others = list_children()  # of tests before this one, in the same process

    async def story() -> None:
        for number in range(5):
            async with living(runtime, disk / str(number)) as sandbox:
                await run_in(sandbox, ["/bin/sh", "-c", "sleep 30 & exit 0"])

    asyncio.run(story())
    assert list_children() <= others


def test_the_agents_binary_runs_under_the_filter(runtime: BubblewrapRuntime, disk: Path):
    found = importlib.util.find_spec("claude_agent_sdk")
    assert found is not None
    assert found.origin is not None
    binary = Path(found.origin).parent / "_bundled" / "claude"

    async def story() -> None:
        async with living(runtime, disk, memory_bytes=2 << 30, programs={binary: "/opt/agent/claude"}) as sandbox:
            environment = {"HOME": "/home/agent", "PATH": "/usr/bin"}
            ended = await run_in(sandbox, ["/opt/agent/claude", "--version"], environment)
            assert (ended.code, "Claude Code" in ended.output) == (0, True), ended

    asyncio.run(story())


_AS_ORDINARY_USER = """
import asyncio, concurrent.futures.thread, ctypes, os, sys
from pathlib import Path
import msgspec, shutil
import sandbox.runtimes.exec_client, sandbox.runtimes.launcher_client, sandbox.runtimes.bubblewrap.runtime
from doubles.sandbox_lifecycle import living, run_in
from sandbox.interfaces.runtime import Command, TerminalSize
from sandbox.runtimes.bubblewrap import BubblewrapRuntime

folder, interpreter, module = sys.argv[1:]
OPENING = "import pty\\nfor count in range(300):\\n try: pty.openpty()\\n except OSError: break\\nprint(count)"
sandbox.runtimes.launcher_client.__file__ = sandbox.runtimes.exec_client.__file__ = module
sys.executable = interpreter
os.setgroups([]), os.setgid(65534), os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, lost by the change of uid

async def story():
    runtime = BubblewrapRuntime(Path(folder, "run"))
    disk = Path(folder, "disk")
    found = await runtime.probe()
    if not found.is_available:
        return {"skip": found.remedy}
    told = {"gaps": " ".join(found.gaps)}
    async with living(runtime, disk) as one:
        script = "id -u; touch file; (: < /dev/tcp/127.0.0.1/8123) && echo reached; : > /proc/sys/kernel/core_pattern"
        script += f"; ulimit -Sn; ulimit -Hn; /usr/bin/python3 -c '{OPENING}'"
        script += "; echo 0 > /proc/self/oom_score_adj; cat /proc/self/oom_score_adj"
        told["said"] = (await run_in(one, ["/bin/bash", "-c", script])).output
    async with living(runtime, disk) as other:
        await other.start(Command(["/usr/bin/sleep", "60"], {}, "/"))
        script = "tty; id -u; grep -h -E '^(CapBnd|CapEff|NoNewPrivs|Seccomp):' /proc/self/status | cut -f 2; exit 5"
        terminal = await other.open_terminal(Command(["/bin/bash", "-c", script], {}, "/"), TerminalSize(24, 80))
        told["terminal"] = (await terminal.output.read()).decode().split()
        told["terminal_code"] = (await terminal.wait()).code
        told["listed"] = other.handle.attempt_id in runtime.attempt_ids() or bool(other.handle.details["cgroups"])
        await BubblewrapRuntime(Path(folder, "run")).destroy(other.handle, disk)
        told["code"] = (await other.wait()).code
    told["left"] = other.handle.attempt_id in runtime.attempt_ids()
    return told

print(msgspec.json.encode(asyncio.run(story())).decode())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="as an ordinary user every other test here says the same")
def test_an_ordinary_user_can_make_and_end_sandboxes_too(open_folder: Path):
    # The interpreter and this checkout may lie where another user cannot walk, so the launcher is copied.
    (programs := open_folder / "programs").mkdir()
    for name in ("launcher", "exec_command", "process_limits"):
        shutil.copy(importlib.util.find_spec(f"sandbox.runtimes.programs.{name}").origin, programs)
    os.chown(open_folder, NOBODY, NOBODY)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    argv = [
        sys.executable,
        "-c",
        _AS_ORDINARY_USER,
        str(open_folder),
        "/usr/bin/python3",
        str(open_folder / "module.py"),
    ]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    told = msgspec.json.decode(ran.stdout)
    if "skip" in told:
        pytest.skip(told["skip"])
    assert "that user's kernel uid" in told.pop("gaps")
    nothing = "0" * 16
    assert told.pop("terminal") == ["/dev/pts/0", "1000", nothing, nothing, "1", "2"]
    assert told.pop("terminal_code") == 5
    # bubblewrap reports the command's end where it is killed after it.
    assert told.pop("code") in (None, 137)
    assert told == {"said": "1000\nreached\n4096\n16384\n256\n500\n", "listed": True, "left": False}
    assert (open_folder / "disk" / "workspace" / "file").stat().st_uid == NOBODY


def test_a_second_create_with_the_same_handle_after_destroy_is_another_plan(runtime: BubblewrapRuntime, disk: Path):
    async def story() -> None:
        handle = runtime.prepare(new_attempt_id())
        await runtime.create(handle, describe(disk, handle.attempt_id))
        await runtime.destroy(handle, disk)
        again = runtime.prepare(handle.attempt_id)
        sandbox = await runtime.create(again, describe(disk, handle.attempt_id))
        assert (await run_in(sandbox, ["/bin/echo", "again"])).output == "again\n"
        await runtime.destroy(again, disk)

    asyncio.run(story())
