"""What guests of QEMU's are on the host: whose their processes are, how they end, and what the probe says."""

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from doubles.runtimes import need_parts_of_guests, tell_of_kvm
from doubles.sandbox_lifecycle import MEBIBYTE, PATIENCE_SECONDS, living, read_until
from doubles.sandbox_queries import CONNECT, CONNECTED, WHO, answer, take_connection
from sandbox.agents.claude_code.binary import find_binary
from sandbox.interfaces.runtime import Command, Sandbox, TerminalSize
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.runtimes.qemu import QemuRuntime, kvm_selftest, parts
from sandbox.runtimes.qemu.kvm import KvmStatus


@pytest.fixture
def runtime(tmp_path: Path) -> QemuRuntime:
    """Where its parts are, a guest boots, so that nothing is skipped because it does not."""
    need_parts_of_guests()
    tell_of_kvm(tmp_path / "run")
    return QemuRuntime(tmp_path / "run")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk"
    disk.mkdir()
    return disk


def test_a_machine_without_its_parts_is_told_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "QEMU", "/nowhere/qemu")
    monkeypatch.setattr("os.getuid", lambda: 0)
    found = asyncio.run(QemuRuntime(tmp_path / "run").probe())
    assert not found.is_available
    assert "script/setup --with-qemu" in found.remedy


def test_an_ordinary_user_is_told_why_it_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.getuid", lambda: 1000)
    found = asyncio.run(QemuRuntime(tmp_path / "run").probe())
    assert not found.is_available
    assert "run as root" in found.remedy


def test_unasked_nothing_is_emulated(runtime: QemuRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != "/dev/kvm")
    found = asyncio.run(QemuRuntime(tmp_path / "run", only_kvm=True).probe())
    assert not found.is_available
    assert "by its name" in found.remedy


@pytest.mark.skipif(
    os.uname().machine != "x86_64" or not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="there is no KVM for x86_64"
)
@pytest.mark.parametrize(("instructions", "code"), [("ebfe", -signal.SIGPROF), ("b900100000 49 75fd f4", 0)])
def test_a_guest_that_goes_on_for_ever_is_too_slow_and_one_that_counts_to_its_end_is_not(
    tmp_path: Path, instructions: str, code: int
):
    ran = subprocess.run([sys.executable, "-ISE", kvm_selftest.__file__, instructions], timeout=60, check=False)
    assert ran.returncode == code
    assert asyncio.run(KvmStatus(tmp_path).is_too_slow(instructions)) is (code != 0)


def test_a_guest_whose_files_cannot_be_passed_on_is_told_of_and_leaves_nothing_open(
    runtime: QemuRuntime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(run_dir: Path, attempt_id: str) -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def story() -> None:
        monkeypatch.setattr("sandbox.runtimes.qemu.sandbox._connect_virtiofsd", refuse)
        with pytest.raises(AttemptError) as refused:
            async with living(runtime, disk):
                raise AssertionError("it lives")
        assert refused.value.failure.code == FailureCode.PROVISION_FAILED
        assert "Too many open files" in refused.value.failure.message

    before = find_open()
    asyncio.run(story())
    assert not [one for one in find_open() - before if one.startswith(("/dev/kvm", "socket:"))]


def find_open() -> set[str]:
    """What this process has open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(entry.readlink()))
    return found


def read_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def find_cage(uid: str) -> dict[str, int]:
    """The living processes of a sandbox's kernel uid, by their names."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == int(uid):
                fields = read_status(int(entry.name))
                found.update({fields["Name"]: int(entry.name)} if fields["State"][0] not in "ZX" else {})
    return found


@pytest.mark.timeout(300)
def test_what_a_guest_is_made_by_is_confined_and_its_death_is_told_at_once(runtime: QemuRuntime, disk: Path):
    agent = {find_binary(): "/opt/agent/claude"}

    async def story() -> None:
        async with living(runtime, disk, memory_bytes=1024 * MEBIBYTE, programs=agent) as sandbox:
            script = "touch file; /opt/agent/claude --version; echo up; sleep 300"
            output, _ = await sandbox.start(Command(["/bin/sh", "-c", script], {"PATH": "/usr/bin"}, "/workspace"))
            assert b"Claude Code" in await read_until(output, b"up")
            uid = sandbox.handle.details["kernel_uid"]
            assert (disk / "workspace" / "file").stat().st_uid == int(uid)
            cage = find_cage(uid)
            assert {"qemu-system-x86", "virtiofsd"} <= set(cage)
            networks = set()
            for name in ("qemu-system-x86", "virtiofsd"):
                fields = read_status(cage[name])
                assert {int(fields[key], 16) for key in fields if key.startswith("Cap")} == {0}
                assert (fields["NoNewPrivs"].strip(), fields["Seccomp"].strip()) == ("1", "2")
                assert (set(fields["Uid"].split()), fields["Groups"].strip()) == ({uid}, "")
                root = Path(f"/proc/{cage[name]}/root")
                assert not any((root / one).exists() for one in ("home", "root/.ssh", "etc/shadow", "mnt"))
                networks.add(Path(f"/proc/{cage[name]}/ns/net").readlink())
            assert len(networks) == 1
            assert Path("/proc/self/ns/net").readlink() not in networks
            os.kill(cage["qemu-system-x86"], signal.SIGKILL)
            async with asyncio.timeout(5):
                assert (await sandbox.wait()).code is None
                assert await output.read() == b""
            assert not find_cage(uid)

    asyncio.run(story())


_FLOOD_BYTES = 2_000_000
_STORY = f"""
exec 2>&1
ls /home/agent /tmp >/dev/null  # a place is in the table of mounts only once it was looked at
{WHO}
echo the end; head -c {_FLOOD_BYTES} /dev/zero | tr '\\0' x
exec python3 -c '
import os, time
{CONNECT}
print("asked all", flush=True)
while not os.path.exists("/tmp/more"):
    time.sleep(0.1)
x = bytearray(200 << 20)'
"""


async def ask_on_a_terminal(sandbox: Sandbox) -> str:
    command = Command(["/bin/bash", "-c", f"{WHO}\n: > /tmp/more"], {"PATH": "/usr/bin:/bin"}, "/workspace")
    terminal = await sandbox.open_terminal(command, TerminalSize(24, 80))
    async with asyncio.timeout(PATIENCE_SECONDS):
        return (await terminal.output.read()).decode().replace("\r\n", "\n")


@pytest.mark.timeout(300)
def test_one_guest_passes_on_much_has_no_route_out_confines_terminals_and_ends_for_memory(
    runtime: QemuRuntime, disk: Path
):
    """Questions of tests/contract, in one guest, because a boot takes long."""

    async def story() -> None:
        async with living(runtime, disk, memory_bytes=96 * MEBIBYTE) as sandbox:
            answering = asyncio.create_task(answer(sandbox.listeners.dns_udp))
            command = Command(["/bin/bash", "-c", _STORY], {"PATH": "/usr/bin:/bin"}, "/workspace")
            output, _ = await sandbox.start(command)
            of_the_command, _, rest = (await read_until(output, b"asked all\n")).decode().partition("the end\n")
            await answering
            assert rest.removeprefix("x" * _FLOOD_BYTES).split() == [*CONNECTED, "asked", "all"]
            take_connection(sandbox.listeners.transparent[443])
            assert "NoNewPrivs" in of_the_command
            assert "CapEff:\t0000000000000000" in of_the_command
            assert (await ask_on_a_terminal(sandbox)).splitlines() == of_the_command.splitlines()
            async with asyncio.timeout(PATIENCE_SECONDS):
                ended = await sandbox.wait()
            assert (ended.code, ended.was_oom_killed) == (128 + signal.SIGKILL, True)

    asyncio.run(story())
