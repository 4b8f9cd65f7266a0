"""The contract of every runtime: commands, signals, limits and removal."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from doubles.sandbox_lifecycle import (
    MEBIBYTE,
    decode_result,
    new_attempt_id,
    read_until,
    ready_sandbox,
    run_in,
    run_once,
    run_python,
    run_shell,
    sandbox_spec,
)
from sandbox.interfaces import gateway
from sandbox.interfaces.runtime import Command, Runtime, SandboxHandle
from sandbox.model.failure import AttemptError


def _skip_without_limit(enforced_limits: frozenset[str], name: str) -> None:
    if name not in enforced_limits:
        pytest.skip(f"no {name} limit on this machine")


# Commands


@pytest.mark.parametrize("code", [0, 7])
def test_output_and_exit_code_are_returned(runtime: Runtime, disk: Path, code: int):
    result = run_shell(runtime, disk, f"echo to stdout; echo to stderr >&2; exit {code}")
    assert (result.code, result.output, result.errors) == (code, "to stdout\n", "to stderr\n")


def test_exit_code_after_a_signal_is_128_plus_its_number(runtime: Runtime, disk: Path):
    assert run_shell(runtime, disk, "kill -TERM $$").code == 128 + signal.SIGTERM


def test_missing_program_has_no_exit_code(runtime: Runtime, disk: Path):
    if runtime.name == "gvisor":
        # gVisor looks for the program before it creates a process, so the start fails.
        with pytest.raises(AttemptError, match="no-such-program: no such file") as caught:
            asyncio.run(run_once(runtime, disk, ["/usr/bin/no-such-program"]))
        assert caught.value.code == "provision_failed"
    else:
        assert asyncio.run(run_once(runtime, disk, ["/usr/bin/no-such-program"])).code is None


async def test_large_stdin_arrives_complete(runtime: Runtime, disk: Path):
    text = os.urandom(512 * 1024)
    result = await run_once(runtime, disk, ["/usr/bin/sha256sum"], stdin=text)
    import hashlib

    assert result.output.split()[0] == hashlib.sha256(text).hexdigest()


async def test_environment_contains_nothing_from_the_host(
    runtime: Runtime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOST_SECRET", "of-the-host")
    environment = {"HOME": "/home/agent", "GREETING": "two words, a \u00fc and\na line"}
    result = await run_once(runtime, disk, ["/usr/bin/env", "-0"], environment)
    actual = dict(pair.split("=", 1) for pair in result.output.split("\0") if pair)
    assert actual == {**environment, "PWD": "/workspace"}


def test_sandbox_works_with_a_restrictive_umask(runtime: Runtime, disk: Path):
    before = os.umask(0o077)
    try:
        result = run_shell(
            runtime, disk, "umask; touch file; stat -c %a file; cat /etc/hostname > /dev/null && echo read"
        )
    finally:
        os.umask(before)
    assert result.output.split() == ["0022", "644", "read"]


def test_large_output_is_complete(runtime: Runtime, disk: Path):
    assert len(run_shell(runtime, disk, "head -c 5000000 /dev/zero | tr '\\0' x").output) == 5_000_000


def test_agent_has_uid_and_home_and_git_identity(runtime: Runtime, disk: Path):
    result = run_shell(runtime, disk, "id -u; id -un; id -G; cd ~agent; pwd; git var GIT_AUTHOR_IDENT; date +%Z")
    uid, name, groups, home, ident, zone = result.output.splitlines()
    assert (uid, name, groups, home, zone) == ("1000", "agent", "1000", "/home/agent", "UTC")
    assert ident.startswith("The Agent <agent@sandbox.invalid>")


def test_workspace_and_home_and_tmp_are_stored_on_the_disk(runtime: Runtime, disk: Path):
    workspace = disk / "workspace"
    workspace.mkdir()
    (workspace / "given").write_text("before")
    (workspace / "folder").mkdir()
    script = """set -e; cat given; echo after > given; stat -c %U . given
        touch folder/new ~agent/at-home /tmp/at-tmp; ln -s /etc/passwd link"""
    result = run_shell(runtime, disk, script)
    assert (result.code, result.output, result.errors) == (0, "beforeagent\nagent\n", "")
    assert (workspace / "given").read_text() == "after\n"
    names = ["workspace/folder/new", "home/agent/at-home", "tmp/at-tmp", "workspace/link"]
    assert {(disk / name).lstat().st_uid for name in names} == {os.getuid()}
    assert Path("/etc/passwd").stat().st_uid == 0


def test_git_and_node_and_python_run(runtime: Runtime, disk: Path):
    script = """set -e; export HOME=/home/agent
        git init -q . && echo text > file && git add file && git commit -q -m first && git log --format=%an
        python3 -c 'import threading; t = threading.Thread(target=print, args=("thread",)); t.start(); t.join()'
        if command -v node > /dev/null; then node -e 'console.log("node", require("os").hostname().length)'; fi"""
    result = run_shell(runtime, disk, script)
    assert (result.code, result.errors) == (0, "")
    assert result.output.splitlines()[:2] == ["The Agent", "thread"]


_JAVA = """set -e
echo 'class A { public static void main(String[] a) { System.out.println("ran"); } }' > A.java
javac -J-Xmx128m A.java && java -Xmx64m A"""


def test_host_java_compiles_and_runs(runtime: Runtime, disk: Path):
    if shutil.which("javac") is None:
        pytest.skip("the host has no Java")
    result = run_shell(runtime, disk, _JAVA)
    assert (result.code, result.output) == (0, "ran\n"), result.errors


def test_etc_is_sandbox_specific_and_read_only(runtime: Runtime, disk: Path):
    result = run_shell(
        runtime, disk, "cat /etc/resolv.conf; rm -f /etc/hosts || touch /etc/new || echo x > /run/sandbox/n"
    )
    assert result.output == "nameserver 198.18.0.1\n"
    refusals = ("Read-only file system", "Permission denied")
    assert sum(result.errors.count(refusal) for refusal in refusals) == 3


# Signals and exits


async def test_signal_is_sent_to_the_command_only(runtime: Runtime, disk: Path):
    async with ready_sandbox(runtime, disk) as sandbox:
        child = "trap 'echo child got it' TERM; echo up; sleep 30 & wait"
        script = f"trap 'echo got it; exit 3' TERM; ({child}) & wait; wait"
        output, errors = await sandbox.start(Command(["/bin/bash", "-c", script], {}, "/workspace"))
        await read_until(output, b"up")
        await sandbox.signal(signal.SIGTERM)
        result = decode_result(await sandbox.wait(), await output.read(), await errors.read())
        assert (result.code, result.output) == (3, "got it\n")
        await sandbox.signal(signal.SIGTERM)


def test_signal_right_after_start_is_delivered(runtime: Runtime, disk: Path):
    async def scenario(number: int) -> int | None:
        async with ready_sandbox(runtime, disk / str(number)) as sandbox:
            await sandbox.start(Command(["/usr/bin/sleep", "30"], {}, "/workspace"))
            await sandbox.signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                return (await sandbox.wait()).code

    assert {asyncio.run(scenario(number)) for number in range(4)} == {128 + signal.SIGTERM}


async def test_kill_ends_detached_processes(runtime: Runtime, disk: Path):
    async with ready_sandbox(runtime, disk) as sandbox:
        background = "setsid sh -c 'exec sleep 300' & nohup sleep 301 > /dev/null & (trap '' TERM; sleep 302) &"
        script = f"{background} echo up; wait"
        output, _ = await sandbox.start(Command(["/bin/bash", "-c", script], {"PATH": "/usr/bin"}, "/workspace"))
        await read_until(output, b"up")
        await sandbox.kill()
        async with asyncio.timeout(1):
            assert (await sandbox.wait()).code == 128 + signal.SIGKILL
        assert not processes_of(sandbox.handle)


def test_kill_during_start_aborts_the_start(runtime: Runtime, disk: Path):
    async def scenario(number: int) -> None:
        async with ready_sandbox(runtime, disk / str(number)) as sandbox:
            start = asyncio.create_task(sandbox.start(Command(["/usr/bin/sleep", "30"], {}, "/workspace")))
            await asyncio.sleep(number / 2000)
            await sandbox.kill()
            async with asyncio.timeout(5):
                assert (await sandbox.wait()).code == 128 + signal.SIGKILL
                await asyncio.gather(start, return_exceptions=True)

    for number in range(10):
        asyncio.run(scenario(number))


async def test_sandbox_killed_before_start_is_lost(runtime: Runtime, disk: Path):
    async with ready_sandbox(runtime, disk) as sandbox:
        for pid in processes_of(sandbox.handle):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(AttemptError) as caught:
            await sandbox.start(Command(["/usr/bin/true"], {}, "/workspace"))
        assert caught.value.code == "sandbox_lost"


def test_sandbox_killed_during_create_is_lost_without_leftovers(runtime: Runtime, disk: Path):
    async def scenario() -> None:
        handle = runtime.prepare(new_attempt_id())
        creating = asyncio.create_task(runtime.create(handle, sandbox_spec(disk, handle.attempt_id)))
        while not (actual := processes_of(handle)) and not creating.done():
            await asyncio.sleep(0)
        for pid in actual:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        [created] = await asyncio.gather(creating, return_exceptions=True)
        assert not isinstance(created, BaseException) or getattr(created, "code", created) == "sandbox_lost"
        await runtime.destroy(handle, disk)
        assert not processes_of(handle)

    for _ in range(5):
        asyncio.run(scenario())


def test_cancelled_start_leaves_no_processes(runtime: Runtime, disk: Path):
    async def scenario(number: int) -> None:
        async with ready_sandbox(runtime, disk / str(number)) as sandbox:
            start = asyncio.create_task(sandbox.start(Command(["/usr/bin/sleep", "30"], {}, "/workspace")))
            await asyncio.sleep(number / 2000)
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
        assert not processes_of(sandbox.handle)

    before = HostState.of_this_process().children
    for number in range(10):
        asyncio.run(scenario(number))
    assert HostState.of_this_process().children == before


async def test_orphans_end_with_the_command(runtime: Runtime, disk: Path):
    async with ready_sandbox(runtime, disk) as sandbox:
        await run_in(sandbox, ["/bin/bash", "-c", "setsid sleep 300 > /dev/null 2>&1 & exit 0"])
        assert not processes_of(sandbox.handle)


async def test_wait_may_be_called_repeatedly(runtime: Runtime, disk: Path):
    async with ready_sandbox(runtime, disk) as sandbox:
        await sandbox.start(Command(["/bin/sh", "-c", "exit 4"], {}, "/workspace"))
        exits = await asyncio.gather(sandbox.wait(), sandbox.wait())
        await sandbox.kill()
        assert {exit_status.code for exit_status in (*exits, await sandbox.wait())} == {4}


async def test_destroy_is_idempotent_and_works_without_create(runtime: Runtime, disk: Path):
    handle = runtime.prepare(new_attempt_id())
    await runtime.create(handle, sandbox_spec(disk, handle.attempt_id))
    for _ in range(2):
        await runtime.destroy(handle, disk)
    uncreated_handle = runtime.prepare(new_attempt_id())
    await runtime.destroy(uncreated_handle, disk)
    assert not {handle.attempt_id, uncreated_handle.attempt_id} & set(runtime.attempt_ids())


async def test_failed_create_leaves_nothing_behind(runtime: Runtime, disk: Path, tmp_path: Path):
    handle = runtime.prepare(new_attempt_id())
    spec = sandbox_spec(disk, handle.attempt_id, programs={tmp_path / "missing": "/opt/missing"})
    with pytest.raises(AttemptError, match="No such file") as caught:
        await runtime.create(handle, spec)
    assert caught.value.code == "provision_failed"
    assert not processes_of(handle)
    assert handle.attempt_id not in runtime.attempt_ids()
    await runtime.destroy(handle, disk)


async def test_cancelled_create_leaves_nothing_behind(runtime: Runtime, disk: Path):
    handle = runtime.prepare(new_attempt_id())
    creation = asyncio.create_task(runtime.create(handle, sandbox_spec(disk, handle.attempt_id)))
    await asyncio.sleep(0)
    creation.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creation
    assert not processes_of(handle)
    await runtime.destroy(handle, disk)
    assert handle.attempt_id not in runtime.attempt_ids()


_SANDBOX_CREATOR_PROGRAM = """
import asyncio, sys
from pathlib import Path
from sandbox.interfaces.runtime import Command, SandboxSpec
from sandbox.bootstrap.runtime_selection import make_runtime
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
    argv = [sys.executable, "-c", _SANDBOX_CREATOR_PROGRAM, runtime.name, str(disk), new_attempt_id()]
    creator = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert creator.stdout is not None
    return creator, msgspec.json.decode(creator.stdout.readline(), type=SandboxHandle)


def _close_creator(creator: subprocess.Popen[str]) -> None:
    creator.kill()
    creator.wait(10)
    assert creator.stdout is not None
    creator.stdout.close()


async def test_sandbox_can_be_destroyed_with_a_recovered_handle(runtime: Runtime, disk: Path):
    creator, handle = _start_creator(runtime, disk)
    try:
        recovered = runtime.recover_handle(handle.attempt_id)
        assert recovered.details == {key: handle.details[key] for key in recovered.details}
        assert ("kernel_uid" in recovered.details) == (os.getuid() == 0)
        await runtime.destroy(recovered, disk)
        assert not processes_of(handle)
        assert handle.attempt_id not in runtime.attempt_ids()
    finally:
        _close_creator(creator)


async def test_sandbox_dies_with_its_creator_within_a_second(runtime: Runtime, disk: Path):
    creator, handle = _start_creator(runtime, disk)
    try:
        assert processes_of(handle)
        creator.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 1
        while processes_of(handle):
            assert time.monotonic() < deadline, "a process has outlived its creator"
            time.sleep(0.005)
        assert handle.attempt_id in runtime.attempt_ids() or not handle.details.get("cgroups")
    finally:
        _close_creator(creator)
        await runtime.destroy(handle, disk)
    assert handle.attempt_id not in runtime.attempt_ids()
    assert {path.stat().st_uid for path in disk.iterdir()} == {os.getuid()}


def test_destroy_without_disk_keeps_file_owners(runtime: Runtime, disk: Path):
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


async def test_another_process_can_destroy_a_sandbox(runtime: Runtime, disk: Path):
    creator, handle = _start_creator(runtime, disk)
    try:
        assert processes_of(handle)
        await runtime.destroy(handle, disk)
        assert not processes_of(handle)
        assert creator.wait(10) == 0
    finally:
        _close_creator(creator)
    assert handle.attempt_id not in runtime.attempt_ids()


# Limits and stats


def test_exceeding_the_memory_limit_is_reported_as_oom(runtime: Runtime, disk: Path, enforced_limits: frozenset[str]):
    _skip_without_limit(enforced_limits, "memory")
    result = run_python(runtime, disk, "x = bytearray(300 << 20)", memory_bytes=128 * MEBIBYTE)
    # The kernel kills either gVisor or the program's stub process; in the second case the exit code is 1.
    codes = {128 + signal.SIGKILL, 1} if runtime.name == "gvisor" else {128 + signal.SIGKILL}
    assert result.was_oom_killed
    assert result.code in codes


def test_memory_below_the_limit_is_not_reported_as_oom(runtime: Runtime, disk: Path):
    result = run_python(runtime, disk, "x = bytearray(60 << 20); raise SystemExit(9)", memory_bytes=128 * MEBIBYTE)
    assert (result.code, result.was_oom_killed) == (9, False)


def test_command_survives_the_oom_kill_of_a_child(runtime: Runtime, disk: Path, enforced_limits: frozenset[str]):
    _skip_without_limit(enforced_limits, "memory")
    script = "/usr/bin/python3 -c 'x = bytearray(300 << 20)' ; echo $?; exit 0"
    result = run_shell(runtime, disk, script, memory_bytes=128 * MEBIBYTE)
    if runtime.name == "gvisor":
        # All memory of the sandbox belongs to gVisor's kernel. Either the whole sandbox is killed and the reason is
        # reported, or the child is killed and the command ends before the kill is detected.
        assert (result.code, result.was_oom_killed) in {(128 + signal.SIGKILL, True), (0, False)}
    else:
        assert (result.output, result.code, result.was_oom_killed) == ("137\n", 0, False)


def test_process_limit_is_enforced(runtime: Runtime, disk: Path, enforced_limits: frozenset[str]):
    _skip_without_limit(enforced_limits, "processes")
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
    result = run_python(runtime, disk, source, processes_max=32)
    assert result.output.startswith("stopped at ")
    assert 10 < int(result.output.split()[-1]) <= 32


async def test_fork_bomb_is_killed_within_a_second(runtime: Runtime, disk: Path, enforced_limits: frozenset[str]):
    _skip_without_limit(enforced_limits, "processes")
    async with ready_sandbox(runtime, disk, processes_max=64) as sandbox:
        script = "echo up; bomb() { bomb | bomb & }; bomb; sleep 60"
        output, _ = await sandbox.start(Command(["/bin/bash", "-c", script], {"PATH": "/usr/bin"}, "/workspace"))
        await read_until(output, b"up")
        await sandbox.kill()
        async with asyncio.timeout(1):
            await sandbox.wait()
        assert not processes_of(sandbox.handle)


async def test_stats_report_usage(runtime: Runtime, disk: Path, enforced_limits: frozenset[str]):
    _skip_without_limit(enforced_limits, "memory")
    async with ready_sandbox(runtime, disk) as sandbox:
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


# Concurrency and leaks


async def test_concurrent_sandboxes_leave_nothing_behind(runtime: Runtime, disk: Path):
    before = HostState.of_this_process()
    disks = [disk / str(number) for number in range(5)]
    script = ["/bin/bash", "-c", "cat /etc/hostname; sleep 0.2"]
    exits = await asyncio.gather(*(run_once(runtime, item, script) for item in disks))
    assert [end.code for end in exits] == [0] * 5
    attempt_ids = {end.output.strip() for end in exits}
    assert len(attempt_ids) == 5
    assert HostState.of_this_process() == before
    assert not attempt_ids & set(runtime.attempt_ids())


async def test_listeners_close_with_the_sandbox(runtime: Runtime, disk: Path):
    handle = runtime.prepare(new_attempt_id())
    sandbox = await runtime.create(handle, sandbox_spec(disk, handle.attempt_id))
    listeners = sandbox.listeners
    assert listeners.model.getsockname() == ("127.0.0.1", gateway.MODEL_PORT)
    assert listeners.proxy.getsockname() == ("127.0.0.1", gateway.PROXY_PORT)
    assert {port: item.getsockname()[1] for port, item in listeners.transparent.items()} == {80: 80, 443: 443}
    await runtime.destroy(handle, disk)
    assert listeners.model.fileno() == listeners.dns_udp.fileno() == listeners.transparent[443].fileno() == -1


class HostState(msgspec.Struct, frozen=True):
    """Resources that a sandbox could leak in this process or on this machine."""

    descriptors: int
    children: list[int]
    mounts: int

    @classmethod
    def of_this_process(cls) -> "HostState":
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        mounts = Path("/proc/self/mountinfo").read_text().count("\n")
        return cls(len(list(Path("/proc/self/fd").iterdir())), [int(pid) for pid in children], mounts)


def processes_of(handle: SandboxHandle) -> list[int]:
    """Return the running processes with the marker or uid of this attempt, found without the runtime's records."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            pids += [int(entry.name)] if _is_process_of(entry, handle) else []
    return pids


def _is_process_of(process: Path, handle: SandboxHandle) -> bool:
    try:
        status = (process / "status").read_text()
        command_line = (process / "cmdline").read_bytes()
    except OSError:
        return False
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    if fields["State"][0] in "ZX":
        return False
    uid = handle.details.get("kernel_uid")
    return f"sandbox:{handle.attempt_id}".encode() in command_line or (uid is not None and uid in fields["Uid"].split())


async def test_handle_is_serializable(runtime: Runtime, disk: Path):
    handle = runtime.prepare(new_attempt_id())
    try:
        text = msgspec.json.encode(handle)
        assert msgspec.json.decode(text, type=SandboxHandle) == handle
        assert all(isinstance(value, str) for value in json.loads(text)["details"].values())
    finally:
        await runtime.destroy(handle, disk)
