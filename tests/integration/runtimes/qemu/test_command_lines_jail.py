"""The sandbox around QEMU and virtiofsd is effective even if an attacker's code replaces these programs."""

import asyncio
import json
import resource
from pathlib import Path

import pytest

from doubles.runtime_availability import require_qemu_components
from doubles.sandbox_lifecycle import MEBIBYTE, TIMEOUT_SECONDS, ready_sandbox
from doubles.syscall_faults import small_file_system
from sandbox.interfaces.runtime import Runtime
from sandbox.runtimes.programs.inherited_limits import HOST_PROGRAM_FILES_MAX
from sandbox.runtimes.qemu import QemuRuntime, command_lines
from sandbox.runtimes.qemu.command_lines import QEMU_FILES_MAX
from sandbox.runtimes.qemu.sandbox import QemuSandbox
from sandbox.runtimes.sandbox_filesystem import DISK_DIRECTORIES

_PROGRAM = """
import ctypes, errno, json, os, resource, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
found = {}

def system_call(name, number, *arguments):
    result = libc.syscall(number, *arguments)
    if result == 0 and name.endswith("fork"): os._exit(0)
    found[name] = errno.errorcode[ctypes.get_errno()] if result < 0 else "done"

system_call("clone fork", 56, 17, 0, 0, 0, 0)
system_call("fork", 57)
system_call("clone3", 435, 0, 0)
try: found["spawn"] = "done" if os.posix_spawn("/usr/bin/true", ["true"], {}) else ""
except OSError as error: found["spawn"] = errno.errorcode[error.errno]
thread = threading.Thread(target=found.update, args=[{"thread": "done"}])
thread.start(); thread.join()
try: os.openpty(); found["terminal"] = "opened"
except OSError as error: found["terminal"] = errno.errorcode[error.errno]
found["terminals"] = os.listdir("/dev/pts")
found["open files"] = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
mounts = [line.split() for line in open("/proc/self/mountinfo")]
found["disk"] = {fields[4]: fields[3] for fields in mounts if fields[4].startswith("/share/disk")}
path = "/share/disk/workspace/" + sys.argv[1]
with open(path + ".part", "w") as file: json.dump(found, file)
os.rename(path + ".part", path)
threading.Event().wait()
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk"
    disk.mkdir()
    return disk


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """A runtime whose jails run _PROGRAM in place of QEMU and virtiofsd."""
    require_qemu_components()

    def command(name: str) -> list[str]:
        return ["/usr/bin/python3", "-c", _PROGRAM, name]

    async def boot(sandbox: QemuSandbox, timeout_seconds: float) -> None:
        await sandbox._open_init_pidfd(await sandbox._execute())

    monkeypatch.setattr(command_lines, "qemu_arguments", lambda *_: command("qemu"))
    monkeypatch.setattr(command_lines, "virtiofsd_arguments", lambda *_: command("virtiofsd"))
    monkeypatch.setattr(QemuSandbox, "boot", boot)
    return QemuRuntime(tmp_path / "run")


async def read_report(path: Path) -> dict[str, object]:
    """Wait for the report of a program, and return it."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not path.exists():
            await asyncio.sleep(0.05)
    report: dict[str, object] = json.loads(path.read_text())
    return report


@pytest.mark.parametrize("name", ["qemu", "virtiofsd"])
async def test_programs_of_the_jail_can_start_threads_but_not_processes_or_terminals(
    runtime: Runtime, disk: Path, name: str
):
    async with ready_sandbox(runtime, disk):
        report = await read_report(disk / "workspace" / name)
    assert {report.pop(kind) for kind in ("fork", "clone fork", "spawn")} == {"EPERM"}
    assert (report.pop("clone3"), report.pop("thread")) == ("ENOSYS", "done")
    assert (report.pop("terminal"), report.pop("terminals")) == ("ENOENT", [])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files_max = HOST_PROGRAM_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, HOST_PROGRAM_FILES_MAX)
    report.pop("disk")
    assert report == {"open files": min(files_max, QEMU_FILES_MAX) if name == "qemu" else files_max}


async def test_mounted_disk_is_a_single_mount_of_the_whole_file_system(runtime: Runtime, tmp_path: Path):
    """Then the kernel does not check all parents of a directory at each `..` in a path."""
    with small_file_system(tmp_path / "disk", 64 * MEBIBYTE) as disk:
        async with ready_sandbox(runtime, disk):
            report = await read_report(disk / "workspace" / "virtiofsd")
    assert report["disk"] == {"/share/disk": "/"}


async def test_only_the_directories_of_the_agent_in_a_plain_directory_are_mounted(runtime: Runtime, disk: Path):
    async with ready_sandbox(runtime, disk):
        report = await read_report(disk / "workspace" / "virtiofsd")
    expected = {f"/share/disk/{name}": str(disk / name) for name in DISK_DIRECTORIES}
    mounts = report["disk"]
    assert isinstance(mounts, dict)
    assert set(mounts) == set(expected)
    assert all(expected[point].endswith(root) for point, root in mounts.items())
