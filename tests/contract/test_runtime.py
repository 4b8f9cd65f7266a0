"""What every runtime keeps: a command's life in a sandbox, its limits, its end."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from doubles.sandbox_lifecycle import (
    MEBIBYTE,
    as_ended,
    describe,
    living,
    new_attempt_id,
    read_until,
    run_in,
    run_once,
    run_python,
    run_story,
)
from sandbox.interfaces import layout
from sandbox.interfaces.runtime import Command, Runtime, SandboxHandle
from sandbox.model.errors import AttemptError


def _need_limit(limits: frozenset[str], name: str) -> None:
    if name not in limits:
        pytest.skip(f"no {name} limit on this machine")


# A command runs


@pytest.mark.parametrize("code", [0, 7])
def test_output_and_exit_code_come_back(runtime: Runtime, disk: Path, code: int):
    ended = run_story(runtime, disk, f"echo to stdout; echo to stderr >&2; exit {code}")
    assert (ended.code, ended.output, ended.errors) == (code, "to stdout\n", "to stderr\n")


def test_death_by_signal_comes_back_as_128_and_its_number(runtime: Runtime, disk: Path):
    assert run_story(runtime, disk, "kill -TERM $$").code == 128 + signal.SIGTERM


def test_a_program_that_is_not_there_has_no_exit_code(runtime: Runtime, disk: Path):
    if runtime.name == "gvisor":
        # It looks for the program before it makes a process, so there is no start.
        with pytest.raises(AttemptError, match="no-such-program: no such file") as caught:
            asyncio.run(run_once(runtime, disk, ["/usr/bin/no-such-program"]))
        assert caught.value.code == "provision_failed"
    else:
        assert asyncio.run(run_once(runtime, disk, ["/usr/bin/no-such-program"])).code is None


def test_stdin_of_half_a_mebibyte_arrives_whole_and_ends(runtime: Runtime, disk: Path):
    text = os.urandom(512 * 1024)
    ended = asyncio.run(run_once(runtime, disk, ["/usr/bin/sha256sum"], stdin=text))
    import hashlib

    assert ended.output.split()[0] == hashlib.sha256(text).hexdigest()


def test_environment_is_what_was_given_and_nothing_of_the_host(
    runtime: Runtime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOST_SECRET", "of-the-host")
    given = {"HOME": "/home/agent", "GREETING": "two words, a \u00fc and\na line"}
    ended = asyncio.run(run_once(runtime, disk, ["/usr/bin/env", "-0"], given))
    found = dict(pair.split("=", 1) for pair in ended.output.split("\0") if pair)
    assert found == {**given, "PWD": "/workspace"}


def test_it_runs_for_a_creator_who_shows_new_files_to_nobody(runtime: Runtime, disk: Path):
    before = os.umask(0o077)
    try:
        ended = run_story(
            runtime, disk, "umask; touch file; stat -c %a file; cat /etc/hostname > /dev/null && echo read"
        )
    finally:
        os.umask(before)
    assert ended.output.split() == ["0022", "644", "read"]


def test_megabytes_of_output_come_through(runtime: Runtime, disk: Path):
    assert len(run_story(runtime, disk, "head -c 5000000 /dev/zero | tr '\\0' x").output) == 5_000_000


def test_the_agent_is_uid_1000_at_home_with_a_name_for_git(runtime: Runtime, disk: Path):
    ended = run_story(runtime, disk, "id -u; id -un; id -G; cd ~agent; pwd; git var GIT_AUTHOR_IDENT; date +%Z")
    uid, name, groups, home, ident, zone = ended.output.splitlines()
    assert (uid, name, groups, home, zone) == ("1000", "agent", "1000", "/home/agent", "UTC")
    assert ident.startswith("Claude Code (Sandbox) <agent@sandbox.invalid>")


def test_workspace_home_and_tmp_are_writable_and_survive_on_the_disk(runtime: Runtime, disk: Path):
    workspace = disk / "workspace"
    workspace.mkdir()
    (workspace / "given").write_text("before")
    (workspace / "folder").mkdir()
    script = """set -e; cat given; echo after > given; stat -c %U . given
        touch folder/new ~agent/at-home /tmp/at-tmp; ln -s /etc/passwd link"""
    ended = run_story(runtime, disk, script)
    assert (ended.code, ended.output, ended.errors) == (0, "beforeagent\nagent\n", "")
    assert (workspace / "given").read_text() == "after\n"
    names = ["workspace/folder/new", "home/at-home", "tmp/at-tmp", "workspace/link"]
    assert {(disk / name).lstat().st_uid for name in names} == {os.getuid()}
    assert Path("/etc/passwd").stat().st_uid == 0


def test_git_node_and_python_work(runtime: Runtime, disk: Path):
    script = """set -e; export HOME=/home/agent
        git init -q . && echo text > file && git add file && git commit -q -m first && git log --format=%an
        python3 -c 'import threading; t = threading.Thread(target=print, args=("thread",)); t.start(); t.join()'
        if command -v node > /dev/null; then node -e 'console.log("node", require("os").hostname().length)'; fi"""
    ended = run_story(runtime, disk, script)
    assert (ended.code, ended.errors) == (0, "")
    assert ended.output.splitlines()[:2] == ["Claude Code (Sandbox)", "thread"]


def test_etc_is_the_sandboxs_own_and_read_only(runtime: Runtime, disk: Path):
    ended = run_story(
        runtime, disk, "cat /etc/resolv.conf; rm -f /etc/hosts || touch /etc/new || echo x > /run/sandbox/n"
    )
    assert ended.output == "nameserver 198.18.0.1\n"
    refusals = ("Read-only file system", "Permission denied")
    assert sum(ended.errors.count(refusal) for refusal in refusals) == 3


# Signals and ends


def test_a_signal_reaches_the_command_and_not_its_children(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            child = "trap 'echo child got it' TERM; echo up; sleep 30 & wait"
            script = f"trap 'echo got it; exit 3' TERM; ({child}) & wait; wait"
            output, errors = await sandbox.start(Command(["/bin/bash", "-c", script], {}, "/workspace"))
            await read_until(output, b"up")
            await sandbox.signal(signal.SIGTERM)
            ended = as_ended(await sandbox.wait(), await output.read(), await errors.read())
            assert (ended.code, ended.output) == (3, "got it\n")
            await sandbox.signal(signal.SIGTERM)

    asyncio.run(story())


def test_a_signal_at_once_after_the_start_is_not_lost(runtime: Runtime, disk: Path):
    async def story(number: int) -> int | None:
        async with living(runtime, disk / str(number)) as sandbox:
            await sandbox.start(Command(["/usr/bin/sleep", "30"], {}, "/workspace"))
            await sandbox.signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                return (await sandbox.wait()).code

    assert {asyncio.run(story(number)) for number in range(4)} == {128 + signal.SIGTERM}


def test_kill_ends_what_hides_from_it(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            hidden = "setsid sh -c 'exec sleep 300' & nohup sleep 301 > /dev/null & (trap '' TERM; sleep 302) &"
            script = f"{hidden} echo up; wait"
            output, _ = await sandbox.start(Command(["/bin/bash", "-c", script], {"PATH": "/usr/bin"}, "/workspace"))
            await read_until(output, b"up")
            await sandbox.kill()
            async with asyncio.timeout(1):
                assert (await sandbox.wait()).code == 128 + signal.SIGKILL
            assert not processes_of(sandbox.handle)

    asyncio.run(story())


def test_kill_while_it_starts_ends_the_start(runtime: Runtime, disk: Path):
    async def story(number: int) -> None:
        async with living(runtime, disk / str(number)) as sandbox:
            start = asyncio.create_task(sandbox.start(Command(["/usr/bin/sleep", "30"], {}, "/workspace")))
            await asyncio.sleep(number / 2000)
            await sandbox.kill()
            async with asyncio.timeout(5):
                assert (await sandbox.wait()).code == 128 + signal.SIGKILL
                await asyncio.gather(start, return_exceptions=True)

    for number in range(10):
        asyncio.run(story(number))


def test_a_sandbox_that_somebody_kills_before_the_start_is_lost_and_was_not_refused(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            for pid in processes_of(sandbox.handle):
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(AttemptError) as caught:
                await sandbox.start(Command(["/usr/bin/true"], {}, "/workspace"))
            assert caught.value.code == "sandbox_lost"

    asyncio.run(story())


def test_a_sandbox_that_somebody_kills_while_it_is_made_is_lost_and_leaves_nothing(runtime: Runtime, disk: Path):
    async def story() -> None:
        handle = runtime.prepare(new_attempt_id())
        creating = asyncio.create_task(runtime.create(handle, describe(disk, handle.attempt_id)))
        while not (found := processes_of(handle)) and not creating.done():
            await asyncio.sleep(0)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        [made] = await asyncio.gather(creating, return_exceptions=True)
        assert not isinstance(made, BaseException) or getattr(made, "code", made) == "sandbox_lost"
        await runtime.destroy(handle, disk)
        assert not processes_of(handle)

    for _ in range(5):
        asyncio.run(story())


def test_a_cancelled_start_leaves_nothing(runtime: Runtime, disk: Path):
    async def story(number: int) -> None:
        async with living(runtime, disk / str(number)) as sandbox:
            start = asyncio.create_task(sandbox.start(Command(["/usr/bin/sleep", "30"], {}, "/workspace")))
            await asyncio.sleep(number / 2000)
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
        assert not processes_of(sandbox.handle)

    before = Traces.of_this_process().children
    for number in range(10):
        asyncio.run(story(number))
    assert Traces.of_this_process().children == before


def test_orphans_end_with_the_command(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            await run_in(sandbox, ["/bin/bash", "-c", "setsid sleep 300 > /dev/null 2>&1 & exit 0"])
            assert not processes_of(sandbox.handle)

    asyncio.run(story())


def test_the_end_can_be_asked_for_many_times(runtime: Runtime, disk: Path):
    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            await sandbox.start(Command(["/bin/sh", "-c", "exit 4"], {}, "/workspace"))
            ends = await asyncio.gather(sandbox.wait(), sandbox.wait())
            await sandbox.kill()
            assert {exit_.code for exit_ in (*ends, await sandbox.wait())} == {4}

    asyncio.run(story())


def test_destroy_before_the_start_twice_and_without_any_create(runtime: Runtime, disk: Path):
    async def story() -> None:
        handle = runtime.prepare(new_attempt_id())
        await runtime.create(handle, describe(disk, handle.attempt_id))
        for _ in range(2):
            await runtime.destroy(handle, disk)
        only_planned = runtime.prepare(new_attempt_id())
        await runtime.destroy(only_planned, disk)
        assert not {handle.attempt_id, only_planned.attempt_id} & set(runtime.attempt_ids())

    asyncio.run(story())


def test_a_failed_create_leaves_nothing(runtime: Runtime, disk: Path, tmp_path: Path):
    async def story() -> None:
        handle = runtime.prepare(new_attempt_id())
        spec = describe(disk, handle.attempt_id, programs={tmp_path / "missing": "/opt/missing"})
        with pytest.raises(AttemptError, match="No such file") as caught:
            await runtime.create(handle, spec)
        assert caught.value.code == "provision_failed"
        assert not processes_of(handle)
        assert handle.attempt_id not in runtime.attempt_ids()
        await runtime.destroy(handle, disk)

    asyncio.run(story())


def test_a_cancelled_create_leaves_nothing(runtime: Runtime, disk: Path):
    async def story() -> None:
        handle = runtime.prepare(new_attempt_id())
        creation = asyncio.create_task(runtime.create(handle, describe(disk, handle.attempt_id)))
        await asyncio.sleep(0)
        creation.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creation
        assert not processes_of(handle)
        await runtime.destroy(handle, disk)
        assert handle.attempt_id not in runtime.attempt_ids()

    asyncio.run(story())


_CREATOR = """
import asyncio, sys
from pathlib import Path
from sandbox.interfaces.runtime import Command, SandboxSpec
from sandbox.bootstrap.runtime import make_runtime
import msgspec
async def main():
    name, disk, attempt_id = sys.argv[1:]
    runtime = make_runtime(name, Path(disk))
    handle = runtime.prepare(attempt_id)
    sandbox = await runtime.create(handle, SandboxSpec(attempt_id, Path(disk), 1, 1 << 28, 64))
    script = "setsid sleep 300 & echo up; wait"
    output, _ = await sandbox.start(Command(["/bin/bash", "-c", script], {"PATH": "/usr/bin"}, "/workspace"))
    await output.readline()
    print(msgspec.json.encode(sandbox.handle).decode(), flush=True)
    await sandbox.wait()
asyncio.run(main())
"""


def _start_creator(runtime: Runtime, disk: Path) -> tuple[subprocess.Popen[str], SandboxHandle]:
    argv = [sys.executable, "-c", _CREATOR, runtime.name, str(disk), new_attempt_id()]
    creator = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert creator.stdout is not None
    return creator, msgspec.json.decode(creator.stdout.readline(), type=SandboxHandle)


def _close_creator(creator: subprocess.Popen[str]) -> None:
    creator.kill()
    creator.wait(10)
    assert creator.stdout is not None
    creator.stdout.close()


def test_a_living_sandbox_is_ended_by_its_attempts_id_where_its_handle_is_lost(runtime: Runtime, disk: Path):
    creator, handle = _start_creator(runtime, disk)
    try:
        recalled = runtime.recover(handle.attempt_id)
        assert recalled.details == {key: handle.details[key] for key in recalled.details}
        assert ("kernel_uid" in recalled.details) == (os.getuid() == 0)
        asyncio.run(runtime.destroy(recalled, disk))
        assert not processes_of(handle)
        assert handle.attempt_id not in runtime.attempt_ids()
    finally:
        _close_creator(creator)


def test_everything_inside_dies_within_a_second_when_its_creator_is_killed(runtime: Runtime, disk: Path):
    creator, handle = _start_creator(runtime, disk)
    try:
        assert processes_of(handle)
        creator.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 1
        while processes_of(handle):
            assert time.monotonic() < deadline, "something outlives its creator"
            time.sleep(0.005)
        assert handle.attempt_id in runtime.attempt_ids() or not handle.details.get("cgroups")
    finally:
        _close_creator(creator)
        asyncio.run(runtime.destroy(handle, disk))
    assert handle.attempt_id not in runtime.attempt_ids()
    assert {path.stat().st_uid for path in disk.iterdir()} == {os.getuid()}


def test_a_disk_that_is_removed_next_is_left_as_it_is(runtime: Runtime, disk: Path):
    creator, handle = _start_creator(runtime, disk)
    try:
        owners = {path.lstat().st_uid for path in disk.iterdir()}
        asyncio.run(runtime.destroy(handle, None))
        assert not processes_of(handle)
        assert handle.attempt_id not in runtime.attempt_ids()
        assert {path.lstat().st_uid for path in disk.iterdir()} == owners
        asyncio.run(runtime.destroy(handle, disk))
        assert {path.lstat().st_uid for path in disk.iterdir()} == {os.getuid()}
    finally:
        _close_creator(creator)


def test_another_process_can_destroy_a_living_sandbox(runtime: Runtime, disk: Path):
    creator, handle = _start_creator(runtime, disk)
    try:
        assert processes_of(handle)
        asyncio.run(runtime.destroy(handle, disk))
        assert not processes_of(handle)
        assert creator.wait(10) == 0
    finally:
        _close_creator(creator)
    assert handle.attempt_id not in runtime.attempt_ids()


# Limits and figures


def test_memory_over_the_limit_is_told_as_such(runtime: Runtime, disk: Path, limits: frozenset[str]):
    _need_limit(limits, "memory")
    ended = run_python(runtime, disk, "x = bytearray(300 << 20)", memory_bytes=128 * MEBIBYTE)
    # Whose memory the kernel takes is gVisor's or what stands for the program, which then ends with 1.
    codes = {128 + signal.SIGKILL, 1} if runtime.name == "gvisor" else {128 + signal.SIGKILL}
    assert ended.was_oom_killed
    assert ended.code in codes


def test_memory_below_the_limit_is_no_such_thing(runtime: Runtime, disk: Path):
    ended = run_python(runtime, disk, "x = bytearray(60 << 20); raise SystemExit(9)", memory_bytes=128 * MEBIBYTE)
    assert (ended.code, ended.was_oom_killed) == (9, False)


def test_a_command_that_survives_its_childs_death_succeeds(runtime: Runtime, disk: Path, limits: frozenset[str]):
    _need_limit(limits, "memory")
    script = "/usr/bin/python3 -c 'x = bytearray(300 << 20)' ; echo $?; exit 0"
    ended = run_story(runtime, disk, script, memory_bytes=128 * MEBIBYTE)
    if runtime.name == "gvisor":
        # All memory inside is that of gVisor's kernel, so the whole sandbox ends, and it is told why; or the child did
        # and the command has ended before that was seen.
        assert (ended.code, ended.was_oom_killed) in {(128 + signal.SIGKILL, True), (0, False)}
    else:
        assert (ended.output, ended.code, ended.was_oom_killed) == ("137\n", 0, False)


def test_processes_over_the_limit_cannot_be_made(runtime: Runtime, disk: Path, limits: frozenset[str]):
    _need_limit(limits, "processes")
    source = """
import os, time
children = 0
try:
    while children < 100:
        if os.fork() == 0:
            time.sleep(60)
        children += 1
except BlockingIOError:
    print("stopped at", children)
"""
    ended = run_python(runtime, disk, source, processes_max=32)
    assert ended.output.startswith("stopped at ")
    assert 10 < int(ended.output.split()[-1]) <= 32


def test_a_fork_bomb_is_killed_within_a_second(runtime: Runtime, disk: Path, limits: frozenset[str]):
    _need_limit(limits, "processes")

    async def story() -> None:
        async with living(runtime, disk, processes_max=64) as sandbox:
            script = "echo up; bomb() { bomb | bomb & }; bomb; sleep 60"
            output, _ = await sandbox.start(Command(["/bin/bash", "-c", script], {"PATH": "/usr/bin"}, "/workspace"))
            await read_until(output, b"up")
            await sandbox.kill()
            async with asyncio.timeout(1):
                await sandbox.wait()
            assert not processes_of(sandbox.handle)

    asyncio.run(story())


def test_figures_tell_what_it_uses(runtime: Runtime, disk: Path, limits: frozenset[str]):
    _need_limit(limits, "memory")

    async def story() -> None:
        async with living(runtime, disk) as sandbox:
            source = "x = bytearray(80 << 20); [i * i for i in range(2_000_000)]; print('up', flush=True); input()"
            output, _ = await sandbox.start(
                Command(["/bin/sh", "-c", f'exec /usr/bin/python3 -c "{source}; " < /dev/zero'], {}, "/workspace")
            )
            await read_until(output, b"up")
            stats = await sandbox.stats()
            assert stats.memory_bytes is not None
            assert 80 * MEBIBYTE < stats.memory_bytes < 512 * MEBIBYTE
            assert stats.cpu_seconds is not None
            assert 0.02 < stats.cpu_seconds < 30
            assert stats.processes is None if runtime.name == "gvisor" else 1 <= (stats.processes or 0) <= 16

    asyncio.run(story())


# Many, and nothing left


def test_five_at_once_and_then_nothing_is_left(runtime: Runtime, disk: Path):
    async def story() -> None:
        before = Traces.of_this_process()
        disks = [disk / str(number) for number in range(5)]
        script = ["/bin/bash", "-c", "cat /etc/hostname; sleep 0.2"]
        ends = await asyncio.gather(*(run_once(runtime, one, script) for one in disks))
        assert [end.code for end in ends] == [0] * 5
        attempt_ids = {end.output.strip() for end in ends}
        assert len(attempt_ids) == 5
        assert Traces.of_this_process() == before
        assert not attempt_ids & set(runtime.attempt_ids())

    asyncio.run(story())


def test_the_network_namespace_goes_with_the_sandbox(runtime: Runtime, disk: Path):
    async def story() -> None:
        handle = runtime.prepare(new_attempt_id())
        sandbox = await runtime.create(handle, describe(disk, handle.attempt_id))
        doors = sandbox.listeners
        assert doors.model.getsockname() == ("127.0.0.1", layout.MODEL_PORT)
        assert doors.proxy.getsockname() == ("127.0.0.1", layout.PROXY_PORT)
        assert {port: one.getsockname()[1] for port, one in doors.transparent.items()} == {80: 80, 443: 443}
        await runtime.destroy(handle, disk)
        assert doors.model.fileno() == doors.dns_udp.fileno() == doors.transparent[443].fileno() == -1

    asyncio.run(story())


class Traces(msgspec.Struct, frozen=True):
    """What a process and the machine have that sandboxes could leave behind."""

    descriptors: int
    children: list[int]
    mounts: int

    @classmethod
    def of_this_process(cls) -> "Traces":
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        mounts = Path("/proc/self/mountinfo").read_text().count("\n")
        return cls(len(list(Path("/proc/self/fd").iterdir())), [int(one) for one in children], mounts)


def processes_of(handle: SandboxHandle) -> list[int]:
    """Living processes whose host name space or marker is this attempt's: no runtime's own book is asked."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            found += [int(entry.name)] if _belongs(entry, handle) else []
    return found


def _belongs(process: Path, handle: SandboxHandle) -> bool:
    try:
        status = (process / "status").read_text()
        words = (process / "cmdline").read_bytes()
    except OSError:
        return False
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    if fields["State"][0] in "ZX":
        return False
    uid = handle.details.get("kernel_uid")
    return f"sandbox:{handle.attempt_id}".encode() in words or (uid is not None and uid in fields["Uid"].split())


def test_the_handle_is_text_that_another_process_can_read(runtime: Runtime, disk: Path):
    handle = runtime.prepare(new_attempt_id())
    try:
        text = msgspec.json.encode(handle)
        assert msgspec.json.decode(text, type=SandboxHandle) == handle
        assert all(isinstance(value, str) for value in json.loads(text)["details"].values())
    finally:
        asyncio.run(runtime.destroy(handle, disk))
