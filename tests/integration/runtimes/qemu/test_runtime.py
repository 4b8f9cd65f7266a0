"""QEMU guests on the host: their processes, their termination, and the probe."""

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from doubles.runtime_availability import record_slow_kvm, require_qemu_components
from doubles.sandbox_lifecycle import MEBIBYTE, TIMEOUT_SECONDS, read_until, ready_sandbox, run_once
from doubles.sandbox_scripts import CONNECT_OUTPUT, CONNECT_SCRIPT, IDENTITY_SCRIPT, accept_connection, respond_to_query
from doubles.syscall_faults import small_file_system
from sandbox.agents.claude_code.agent import find_binary
from sandbox.interfaces.runtime import Command, Sandbox, TerminalSize
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.runtimes.limits.cgroups import ControlGroup
from sandbox.runtimes.qemu import QemuRuntime, guest_components, kvm_selftest
from sandbox.runtimes.qemu import sandbox as qemu_sandbox
from sandbox.runtimes.qemu.runtime import KvmStatus


@pytest.fixture
def runtime(tmp_path: Path) -> QemuRuntime:
    """Skip the test if guest components are missing. A guest that does not boot fails the test."""
    require_qemu_components()
    record_slow_kvm(tmp_path / "run")
    return QemuRuntime(tmp_path / "run")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk"
    disk.mkdir()
    return disk


async def test_probe_reports_missing_components_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guest_components, "QEMU", "/nowhere/qemu")
    monkeypatch.setattr("os.getuid", lambda: 0)
    result = await QemuRuntime(tmp_path / "run").probe()
    assert not result.is_available
    assert "script/setup --with-qemu" in result.remedy


async def test_probe_requires_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.getuid", lambda: 1000)
    result = await QemuRuntime(tmp_path / "run").probe()
    assert not result.is_available
    assert "run the server as root" in result.remedy


async def test_emulation_requires_an_explicit_choice(
    runtime: QemuRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.access", lambda path, mode: path != "/dev/kvm")
    result = await QemuRuntime(tmp_path / "run", excludes_emulation=True).probe()
    assert not result.is_available
    assert "explicitly" in result.remedy


@pytest.mark.skipif(
    os.uname().machine != "x86_64" or not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="there is no KVM for x86_64"
)
@pytest.mark.parametrize(("instructions", "code"), [("ebfe", -signal.SIGPROF), ("b900100000 49 75fd f4", 0)])
async def test_slow_self_test_guest_disables_kvm(tmp_path: Path, instructions: str, code: int):
    completed = subprocess.run([sys.executable, "-ISE", kvm_selftest.__file__, instructions], timeout=60, check=False)
    assert completed.returncode == code
    assert (await KvmStatus(tmp_path).fails_speed_selftest(instructions)) is (code != 0)


async def test_failed_virtiofsd_connection_fails_provisioning_without_leaks(
    runtime: QemuRuntime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(run_dir: Path, attempt_id: str) -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def scenario() -> None:
        monkeypatch.setattr("sandbox.runtimes.qemu.sandbox._connect_virtiofsd", refuse)
        with pytest.raises(AttemptError) as refused:
            async with ready_sandbox(runtime, disk):
                raise AssertionError("the guest started")
        assert refused.value.failure.code == FailureCode.PROVISION_FAILED
        assert "Too many open files" in refused.value.failure.message

    before = open_files()
    await scenario()
    assert not [name for name in open_files() - before if name.startswith(("/dev/kvm", "socket:"))]


def open_files() -> set[str]:
    result = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            result.add(str(entry.readlink()))
    return result


def read_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def processes_of_uid(uid: str) -> dict[str, int]:
    """Return the live processes that run as a sandbox's kernel uid, keyed by name."""
    result = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == int(uid):
                fields = read_status(int(entry.name))
                result.update({fields["Name"]: int(entry.name)} if fields["State"][0] not in "ZX" else {})
    return result


@pytest.mark.timeout(300)
async def test_guest_processes_are_confined_and_their_death_is_detected(runtime: QemuRuntime, disk: Path):
    agent = {find_binary(): "/opt/agent/claude"}
    async with ready_sandbox(runtime, disk, memory_bytes=1024 * MEBIBYTE, programs=agent) as sandbox:
        script = "touch file; /opt/agent/claude --version; echo up; sleep 300"
        output, _ = await sandbox.start(Command(["/bin/sh", "-c", script], {"PATH": "/usr/bin"}, "/workspace"))
        assert b"Claude Code" in await read_until(output, b"up")
        uid = sandbox.handle.details["kernel_uid"]
        assert (disk / "workspace" / "file").stat().st_uid == int(uid)
        processes = processes_of_uid(uid)
        assert {"qemu-system-x86", "virtiofsd"} <= set(processes)
        networks = set()
        for name in ("qemu-system-x86", "virtiofsd"):
            fields = read_status(processes[name])
            assert {int(fields[key], 16) for key in fields if key.startswith("Cap")} == {0}
            assert (fields["NoNewPrivs"].strip(), fields["Seccomp"].strip()) == ("1", "2")
            assert (set(fields["Uid"].split()), fields["Groups"].strip()) == ({uid}, "")
            root = Path(f"/proc/{processes[name]}/root")
            assert not any((root / path).exists() for path in ("home", "root/.ssh", "etc/shadow", "mnt"))
            networks.add(Path(f"/proc/{processes[name]}/ns/net").readlink())
        assert len(networks) == 1
        assert Path("/proc/self/ns/net").readlink() not in networks
        os.kill(processes["qemu-system-x86"], signal.SIGKILL)
        async with asyncio.timeout(5):
            assert (await sandbox.wait()).code is None
            assert await output.read() == b""
        assert not processes_of_uid(uid)


_FLOOD_BYTES = 2_000_000
_SCRIPT = f"""
exec 2>&1
ls /home/agent /tmp >/dev/null  # the kernel lists a submount only after an access
{IDENTITY_SCRIPT}
echo the end; head -c {_FLOOD_BYTES} /dev/zero | tr '\\0' x
exec python3 -c '
import os, time
{CONNECT_SCRIPT}
print("requested all", flush=True)
while not os.path.exists("/tmp/more"):
    time.sleep(0.1)
x = bytearray(200 << 20)'
"""


async def run_on_a_terminal(sandbox: Sandbox) -> str:
    command = Command(["/bin/bash", "-c", f"{IDENTITY_SCRIPT}\n: > /tmp/more"], {"PATH": "/usr/bin:/bin"}, "/workspace")
    terminal = await sandbox.open_terminal(command, TerminalSize(24, 80))
    async with asyncio.timeout(TIMEOUT_SECONDS):
        return (await terminal.output.read()).decode().replace("\r\n", "\n")


async def open_refused_while_another_is_open(sandbox: Sandbox) -> bool:
    """Return whether a second terminal is refused while one is open. On return, no terminal is open."""
    command = Command(["/bin/cat"], {"PATH": "/usr/bin:/bin"}, "/workspace")
    terminal = await sandbox.open_terminal(command, TerminalSize(24, 80))
    try:
        await sandbox.open_terminal(command, TerminalSize(24, 80))
    except AttemptError as error:
        is_refused = "too many terminals" in error.failure.message
    else:
        is_refused = False
    await terminal.hang_up()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        await terminal.output.read()
        await terminal.wait()
    return is_refused


@pytest.mark.timeout(300)
async def test_guest_has_output_gateway_access_and_a_memory_limit(
    runtime: QemuRuntime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    """Combine checks from tests/contract in one guest, because booting a guest takes a long time."""
    monkeypatch.setattr(qemu_sandbox, "GUEST_TERMINALS_MAX", 1)
    drop, remaining = ControlGroup.reclaim_if_many_negative_dentries, []

    def reclaim_if_many_negative_dentries(group: ControlGroup, negative_dentries_before: int) -> None:
        remaining.append(group.process_ids())
        drop(group, negative_dentries_before)

    monkeypatch.setattr(ControlGroup, "reclaim_if_many_negative_dentries", reclaim_if_many_negative_dentries)
    async with ready_sandbox(runtime, disk, memory_bytes=96 * MEBIBYTE) as sandbox:
        dns_task = asyncio.create_task(respond_to_query(sandbox.listeners.dns_udp))
        command = Command(["/bin/bash", "-c", _SCRIPT], {"PATH": "/usr/bin:/bin"}, "/workspace")
        output, _ = await sandbox.start(command)
        command_output, _, rest = (await read_until(output, b"requested all\n")).decode().partition("the end\n")
        await dns_task
        assert rest.removeprefix("x" * _FLOOD_BYTES).split() == [*CONNECT_OUTPUT, "requested", "all"]
        accept_connection(sandbox.listeners.transparent[443])
        assert "NoNewPrivs" in command_output
        assert "CapEff:\t0000000000000000" in command_output
        assert await open_refused_while_another_is_open(sandbox)
        assert (await run_on_a_terminal(sandbox)).splitlines() == command_output.splitlines()
        async with asyncio.timeout(TIMEOUT_SECONDS):
            exit_status = await sandbox.wait()
        assert (exit_status.code, exit_status.was_oom_killed) == (128 + signal.SIGKILL, True)
        remaining.clear()  # of earlier tries to boot
    assert remaining == [frozenset()], (
        "names that the guest looked up in the host's directories are dropped when the guest ends"
    )


_DISK_SCRIPT = """
import os
for top in ("/workspace", "/home/agent", "/tmp"):
    os.makedirs(f"{top}/a/b"); os.chdir(f"{top}/a/b")
    open("../../file", "w").write("kept")
    assert os.path.samefile("../..", top) and os.getcwd() == f"{top}/a/b"
print(*sorted(os.listdir("/")), os.path.exists("/disk"))
"""


@pytest.mark.timeout(300)
async def test_directories_of_a_mounted_disk_are_writable_and_persist(runtime: QemuRuntime, tmp_path: Path):
    with small_file_system(tmp_path / "mounted", 64 * MEBIBYTE) as disk:
        result = await run_once(runtime, disk, ["/usr/bin/python3", "-c", _DISK_SCRIPT])
        names = ["bin", "dev", "etc", "home", "lib", "lib64", "opt", "proc", "run", "sbin", "tmp", "usr", "var"]
        assert (result.output.split(), result.errors) == ([*names, "workspace", "False"], "")
        assert {str(path.relative_to(disk)) for path in disk.glob("**/file")} == {
            "workspace/file", "home/agent/file", "tmp/file",
        }  # fmt: skip


_MANY_FLOWS = """
import resource, socket, sys, time
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(int(sys.argv[1]))]
for one in held: one.sendto(b"x", ("198.18.0.1", 9))
print("sent", flush=True)
for number in range(1000):
    print("alive", number, flush=True); time.sleep(0.1)
"""


@pytest.mark.parametrize(("flows", "exceeds"), [(5000, False), (9000, True)])
async def test_guest_can_open_connections_up_to_the_limit(runtime: QemuRuntime, disk: Path, flows: int, exceeds: bool):
    """QEMU has a socket for each connection, and polls all of them in one call."""
    async with ready_sandbox(runtime, disk) as sandbox:
        program = ["/usr/bin/python3", "-c", _MANY_FLOWS, str(flows)]
        output, _ = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
        if exceeds:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                assert "sockets; the limit is" in await sandbox.wait_for_exceeded_limit()
        else:
            await read_until(output, b"alive 20")
            usage = await sandbox.kernel_usage()
            assert usage.sockets is not None
            assert usage.sockets > flows
            assert usage.find_exceeded_limit() == ""
