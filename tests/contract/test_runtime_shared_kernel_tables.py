"""No sandbox can exhaust a kernel table that all sandboxes share with the host."""

import asyncio
import ctypes
import os
import socket
import struct
from pathlib import Path

import pytest

from doubles.network_namespace import in_namespace
from doubles.sandbox_lifecycle import (
    TIMEOUT_SECONDS,
    has_own_kernel,
    new_attempt_id,
    read_until,
    ready_sandbox,
    run_python,
    sandbox_spec,
)
from sandbox.interfaces.runtime import Command, Runtime, TerminalSize
from sandbox.runtimes.limits.cgroups import find_hierarchies
from sandbox.runtimes.programs.inherited_limits import OPEN_FILES_MAX, OPEN_FILES_SOFT_MAX
from sandbox.runtimes.programs.launcher import PTYS_MAX

_libc = ctypes.CDLL(None, use_errno=True)

_FILES = f"""
import os, resource
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
held = [os.open("/dev/null", os.O_RDONLY) for _ in range(4000)]
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
try:
    while len(held) < {OPEN_FILES_MAX} + 10: held.append(os.open("/dev/null", os.O_RDONLY))
except OSError as error:
    print(error.strerror)
try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard + 1))
except (OSError, ValueError) as error:
    print("hard limit")
"""


def test_files_in_transit_of_other_programs_do_not_prevent_a_start(runtime: Runtime, disk: Path):
    """The kernel counts files in transit for each user. Cycles of sockets in transit can be counted forever."""
    held = [socket.socketpair() for _ in range(20)]
    try:
        for one, _ in held:
            socket.send_fds(one, [b"x"], [one.fileno()] * 250)
        assert run_python(runtime, disk, "print('started')").output == "started\n"
    finally:
        for pair in held:
            for one in pair:
                one.close()


def test_open_files_per_process_are_limited(runtime: Runtime, disk: Path):
    result = run_python(runtime, disk, _FILES)
    expected = f"{OPEN_FILES_SOFT_MAX} {OPEN_FILES_MAX}\nToo many open files\nhard limit\n"
    assert (result.output, result.errors) == (expected, "")


async def test_open_files_on_a_terminal_are_limited(runtime: Runtime, disk: Path):
    async def scenario() -> str:
        async with ready_sandbox(runtime, disk) as sandbox:
            output, _ = await sandbox.start(Command(["/bin/sh", "-c", "echo up; sleep 300"], {}, "/workspace"))
            await read_until(output, b"up")
            command = Command(["/bin/bash", "-c", "ulimit -Sn; ulimit -Hn"], {}, "/workspace")
            terminal = await sandbox.open_terminal(command, TerminalSize(24, 80))
            async with asyncio.timeout(TIMEOUT_SECONDS):
                return (await terminal.output.read()).decode()

    assert (await scenario()).split() == [str(OPEN_FILES_SOFT_MAX), str(OPEN_FILES_MAX)]


_TERMINALS = f"""
import os, pty
held = [pty.openpty()]
os.write(held[0][0], b"typed\\n")
print(os.read(held[0][1], 100), os.ttyname(held[0][1]))
try:
    while len(held) < {PTYS_MAX} + 10: held.append(pty.openpty())
except OSError as error:
    print(error)
print(len(held), flush=True)
os.close(held[-1][0]), os.close(held[-1][1])
print("open" if pty.openpty() else "", flush=True)
"""


def test_number_of_terminals_is_limited(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("terminals belong to the sandbox's kernel")
    result = run_python(runtime, disk, _TERMINALS)
    echo, *_, count, reopened = result.output.splitlines()
    assert echo == "b'typed\\n' /dev/pts/0"
    assert (int(count), reopened) == (PTYS_MAX, "open"), result


_INOTIFY_INSTANCES_AND_MESSAGE_QUEUES = """
import ctypes, errno, time
libc = ctypes.CDLL(None, use_errno=True)
librt = libc if hasattr(libc, "mq_open") else ctypes.CDLL("librt.so.1", use_errno=True)
instances = queues = 0
while instances < 2000 and libc.inotify_init1(0) >= 0: instances += 1
while queues < 2000 and librt.mq_open(b"/queue-%d" % queues, 0o102, 0o600, None) >= 0: queues += 1
print(instances, queues, "held", flush=True)
time.sleep(600)
"""


async def _counts_of_two_sandboxes(runtime: Runtime, directory: Path) -> list[list[int]]:
    counts = []
    async with (
        ready_sandbox(runtime, directory / "first") as first,
        ready_sandbox(runtime, directory / "second") as second,
    ):
        for sandbox in (first, second):
            command = Command(
                ["/usr/bin/python3", "-c", _INOTIFY_INSTANCES_AND_MESSAGE_QUEUES], {"PATH": "/usr/bin"}, "/workspace"
            )
            output, _ = await sandbox.start(command)
            counts.append([int(word) for word in (await read_until(output, b"held")).split()[:2]])
        instance = _libc.inotify_init1(os.O_CLOEXEC)
        assert instance >= 0, "the host's root cannot watch files while sandboxes do"
        os.close(instance)
    return counts


def test_no_sandbox_uses_up_a_limit_that_the_kernel_enforces_per_user(runtime: Runtime, tmp_path: Path):
    if has_own_kernel(runtime):
        pytest.skip("instances and queues belong to the sandbox's kernel")
    if os.geteuid() != 0:
        pytest.skip("all sandboxes of an ordinary user count toward the same limits")
    first, second = asyncio.run(_counts_of_two_sandboxes(runtime, tmp_path))
    assert min(first) > 5, first
    assert second == first


_AIO = """
import ctypes, errno, os
libc, context = ctypes.CDLL(None, use_errno=True), ctypes.c_ulong(0)
number = {"x86_64": 206, "aarch64": 0}[os.uname().machine]
made = libc.syscall(number, 1, ctypes.byref(context))
print("made" if made == 0 else errno.errorcode[ctypes.get_errno()])
with open("file", "w+b") as file:
    os.pwritev(file.fileno(), [b"one"], 0)
    print(os.preadv(file.fileno(), [bytearray(3)], 0))
"""


def test_file_io_falls_back_without_aio_contexts(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("contexts belong to the sandbox's kernel")
    result = run_python(runtime, disk, _AIO)
    assert result.output.split() == ["ENOSYS", "3"], result


_CONNECTIONS = """
import socket, struct, time
server = socket.create_server(("", 7001))
for number in range(20):
    client = socket.create_connection((f"127.1.0.{number + 1}", 7001), source_address=(f"127.2.0.{number + 1}", 0))
    accepted = server.accept()[0]
    for _ in range(4):
        client.sendall(b"x" * 1000); assert len(accepted.recv(1000, socket.MSG_WAITALL)) == 1000
        accepted.sendall(b"y"); assert client.recv(1) == b"y"
    client.close(); accepted.close()
    with socket.socket() as client:
        try: client.sendto(b"x", socket.MSG_FASTOPEN, (f"127.1.1.{number + 1}", 7001))
        except OSError: continue  # Fast Open is not available
        server.accept()[0].close()
print("held", flush=True); time.sleep(600)
"""


def test_connections_leave_no_entries_in_the_tcp_metrics_table(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str]
):
    if runtime.name == "qemu":
        pytest.skip("sockets belong to the sandbox's kernel")
    if "processes" not in enforced_limits:
        pytest.skip("the sandbox's processes are found by its control group")
    assert asyncio.run(_count_metrics_after(runtime, disk, _CONNECTIONS)) == 0


async def _count_metrics_after(runtime: Runtime, disk: Path, source: str) -> int:
    """Count the TCP metrics of the sandbox's network namespace after the program has printed `held`."""
    attempt_id = new_attempt_id()
    handle = runtime.prepare(attempt_id)
    try:
        sandbox = await runtime.create(handle, sandbox_spec(disk, attempt_id))
        program = ["/usr/bin/python3", "-c", source]
        output, _ = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
        await read_until(output, b"held")
        pid = min(find_hierarchies().group(attempt_id).process_ids())
        with in_namespace(f"/proc/{pid}/ns/net"):
            return _count_tcp_metrics()
    finally:
        await runtime.destroy(handle, disk)


_NETLINK_GENERIC, _CTRL_CMD_GETFAMILY, _TCP_METRICS_CMD_GET = 16, 3, 1
_NLM_F_REQUEST_AND_DUMP, _NLMSG_ERROR, _NLMSG_DONE = 0x301, 2, 3


def _count_tcp_metrics() -> int:
    """Count this network namespace's entries in the machine's table of TCP metrics (as in `ip tcp_metrics show`)."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC) as netlink:
        name = b"tcp_metrics\0"
        request = struct.pack("=BBHHH", _CTRL_CMD_GETFAMILY, 1, 0, 4 + len(name), 2) + name
        netlink.send(struct.pack("=IHHII", 16 + len(request), _NETLINK_GENERIC, 1, 0, 0) + request)
        description = netlink.recv(65536)
        (family,) = struct.unpack_from("=H", description, description.index(b"\x06\x00\x01\x00") + 4)
        netlink.send(struct.pack("=IHHIIBBH", 20, family, _NLM_F_REQUEST_AND_DUMP, 0, 0, _TCP_METRICS_CMD_GET, 1, 0))
        kinds: list[int] = []
        while not {_NLMSG_ERROR, _NLMSG_DONE} & set(kinds):
            messages, at = netlink.recv(1 << 17), 0
            while at < len(messages):
                length, kind = struct.unpack_from("=IH", messages, at)
                kinds.append(kind)
                at += -(-length // 4) * 4
        assert _NLMSG_ERROR not in kinds
        return kinds.count(family)
