"""A sandbox cannot keep locks that all programs on the machine need."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from doubles.sandbox_lifecycle import MEBIBYTE, has_own_kernel, read_until, ready_sandbox, run_python
from sandbox.interfaces.runtime import Command, Runtime, Sandbox

pytestmark = pytest.mark.timeout(240)
ATTACK_TRIES = 4

_PRELUDE = """
import ctypes, errno, fcntl, mmap, os, signal, socket, struct, threading, time
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)

def attempt(result): return "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]
"""

_SLOW_MEMORY = """
# A program that accesses removed pages of the file waits until the kernel has removed all pages.
PAGES_BYTES = 1200 << 20
pages_file = os.memfd_create("pages"); os.ftruncate(pages_file, PAGES_BYTES)
for offset in range(0, PAGES_BYTES, 1 << 20): os.pwrite(pages_file, b"x" * (1 << 20), offset)
pages = memoryview(mmap.mmap(pages_file, PAGES_BYTES))

start = os.pipe()
running = mmap.mmap(-1, 4096)  # 1 for each busy program; the last byte starts them

def fork_to(run):
    if os.fork() == 0: run(); os._exit(0)

def become_busy(index):
    while not running[-1]: time.sleep(0.1)
    running[index] = 1
    while True: pass

def remove_pages():
    os.read(start[0], 1); running[-1] = 1
    while sum(running[:250]) < 250: time.sleep(0.01)
    libc.fallocate(pages_file, 3, ctypes.c_long(0), ctypes.c_long(PAGES_BYTES))  # punch a hole, keep the size

for index in range(250): fork_to(lambda: become_busy(index))
fork_to(remove_pages)
slow, resident = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + 4096, ctypes.c_ubyte(1)

def make_slow():
    os.write(start[1], b"x")
    while resident.value & 1:
        time.sleep(0.01)
        libc.mincore(ctypes.c_void_p(slow - 4096), ctypes.c_size_t(4096), ctypes.byref(resident))

print("held", flush=True)
"""

_LISTED_INTERFACES = """
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
make_slow()
fcntl.ioctl(one, 0x8912, struct.pack("ixxxxP", 4096, slow))  # SIOCGIFCONF
"""

_BLOCKED_LIST_OF_TERMINALS = """
# While one program lists the terminals and waits for its memory, and another one waits to create a file there, no other
# program can list them. Kernel threads that process the input of the terminals delay the runner.
terminals = [os.openpty()[0] for _ in range(20)]
for terminal in terminals: os.set_blocking(terminal, False); os.write(terminal, b"a" * 4000)
directory = os.open("/dev/pts", os.O_RDONLY)
def create_file():
    while True:
        time.sleep(0.01)
        try: os.open("/dev/pts/file", os.O_WRONLY | os.O_CREAT)
        except OSError: pass
def list_terminals():
    while resident.value & 1: time.sleep(0.01)
    libc.syscall(61 if os.uname().machine == "aarch64" else 217, directory, ctypes.c_void_p(slow + 8192), 8192)
def fill_terminals():
    while resident.value & 1: time.sleep(0.01)
    time.sleep(0.6)
    for terminal in terminals:
        try:
            while True: os.write(terminal, b"\x12" * 2000)  # each byte repeats the line
        except BlockingIOError: pass
fork_to(create_file)
for run in (list_terminals, fill_terminals): threading.Thread(target=run, daemon=True).start()
"""

_JOINED_GROUP = """
server = socket.create_server(("127.0.0.1", 0)); one = socket.create_connection(server.getsockname())
make_slow()
threading.Thread(target=libc.send, args=(one.fileno(), ctypes.c_void_p(slow), 16, 0), daemon=True).start()
while True:
    time.sleep(1)
    try: one.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("224.0.1.5") + bytes(4))
    except OSError: pass
"""

_LISTED_DIRECTORY = """
listed = os.open("/usr/lib", os.O_RDONLY)
make_slow()
libc.syscall(61 if os.uname().machine == "aarch64" else 217, listed, ctypes.c_void_p(slow), 8192)  # getdents64
"""

_DIRECT_READ = """
import sys
read = os.open(os.path.realpath(sys.executable), os.O_RDONLY | os.O_DIRECT)
assert os.path.realpath(sys.executable).startswith("/usr/")
make_slow()
libc.pread(read, ctypes.c_void_p(slow), 4096, ctypes.c_long(0))
"""

_NESTED_EPOLL = """
import select
inner, outer, event = select.epoll(), select.epoll(), os.eventfd(1)
inner.register(event, select.EPOLLIN)
def nest():
    time.sleep(0.2); outer.register(inner.fileno(), select.EPOLLIN)
make_slow()
threading.Thread(target=nest, daemon=True).start()
libc.epoll_wait(inner.fileno(), ctypes.c_void_p(slow), 1, 0)
"""

_ORDINARY_USE = """
print("held", flush=True)
for _ in range(280):
    if os.fork() == 0:
        while True: pass
server = socket.create_server(("127.0.0.1", 0)); one = socket.create_connection(server.getsockname())
group = socket.inet_aton("224.0.1.5") + socket.inet_aton("127.0.0.1")
import select
inner, event = select.epoll(), os.eventfd(1)
inner.register(event, select.EPOLLIN)
import mmap, sys
direct, page = os.open(os.path.realpath(sys.executable), os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 4096)
while True:
    with select.epoll() as outer:
        outer.register(inner.fileno(), select.EPOLLIN); outer.register(event, select.EPOLLIN)
        assert len(outer.poll(0)) == 2
    socket.if_nameindex(); os.listdir("/usr/lib")
    os.preadv(direct, [page], 0)
    names = ctypes.create_string_buffer(4096)
    fcntl.ioctl(one, 0x8912, struct.pack("ixxxxP", 4096, ctypes.addressof(names)))
    assert names.raw.startswith(b"lo")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as joined:
        joined.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
"""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (_SLOW_MEMORY + _LISTED_INTERFACES, "network devices"),
        (_SLOW_MEMORY + _BLOCKED_LIST_OF_TERMINALS + _LISTED_INTERFACES, "network devices"),
        (_SLOW_MEMORY + _JOINED_GROUP, "network devices"),
        (_SLOW_MEMORY + _LISTED_DIRECTORY, "listed or searched a directory"),
        (_SLOW_MEMORY + _DIRECT_READ, "read a file with O_DIRECT"),
        (_SLOW_MEMORY + _NESTED_EPOLL, "nested epoll instances"),
        (_ORDINARY_USE, ""),
    ],
    ids=[
        "list of interfaces",
        "blocked list of terminals",
        "multicast group",
        "list of files",
        "direct read of a host file",
        "nested epoll instances",
        "ordinary use",
    ],
)
def test_locks_of_the_machine_are_not_held_for_long(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str], source: str, reason: str
):
    """While a program waits for its own memory, the kernel can hold a lock that other programs need."""
    if has_own_kernel(runtime):
        pytest.skip("the locks belong to the sandbox's kernel")
    if "memory" not in enforced_limits or os.geteuid():
        pytest.skip("the threads of the sandbox cannot be inspected here")

    async def scenario(directory: Path) -> str:
        async with ready_sandbox(runtime, directory, memory_bytes=2048 * MEBIBYTE, processes_max=512) as sandbox:
            command = Command(["/usr/bin/python3", "-c", _PRELUDE + source], {"PATH": "/usr/bin:/bin"}, "/workspace")
            output, _ = await sandbox.start(command)
            await read_until(output, b"held")
            try:
                async with asyncio.timeout(30 if reason else 10):
                    return await sandbox.wait_for_exceeded_limit()
            except TimeoutError:
                return ""

    # The scheduler decides whether an attack gets the lock and loses the processor, so each attack has several tries.
    tries = range(ATTACK_TRIES if reason else 1)
    violation = next(filter(None, (asyncio.run(scenario(disk / str(number))) for number in tries)), "")
    assert reason in violation
    assert bool(violation) == bool(reason), violation


_WAITING_FOR_INTERFACES = """
print("held", flush=True)
def list_interfaces():
    while True: socket.if_nameindex(); time.sleep(0.01)
for _ in range(8): threading.Thread(target=list_interfaces, daemon=True).start()
time.sleep(600)
"""


def test_only_the_holder_of_a_lock_exceeds_the_limit(runtime: Runtime, disk: Path, enforced_limits: frozenset[str]):
    if has_own_kernel(runtime):
        pytest.skip("the locks belong to the sandbox's kernel")
    if "memory" not in enforced_limits or os.geteuid():
        pytest.skip("the threads of the sandbox cannot be inspected here")

    async def start(sandbox: Sandbox, source: str) -> None:
        command = Command(["/usr/bin/python3", "-c", _PRELUDE + source], {"PATH": "/usr/bin:/bin"}, "/workspace")
        output, _ = await sandbox.start(command)
        await read_until(output, b"held")

    async def scenario(directory: Path) -> tuple[str, bool]:
        async with (
            ready_sandbox(runtime, directory / "waits") as waits,
            ready_sandbox(runtime, directory / "holds", memory_bytes=2048 * MEBIBYTE, processes_max=512) as holds,
        ):
            await start(waits, _WAITING_FOR_INTERFACES)
            await start(holds, _SLOW_MEMORY + _LISTED_INTERFACES)
            waiting = asyncio.create_task(waits.wait_for_exceeded_limit())
            violation = ""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(30):
                    violation = await holds.wait_for_exceeded_limit()
            await asyncio.wait([waiting], timeout=2)
            ended = waiting.done()
            waiting.cancel()
            return violation, ended

    for number in range(ATTACK_TRIES):
        directory = disk / str(number)
        directory.mkdir()
        violation, ended = asyncio.run(scenario(directory))
        assert not ended
        if violation:
            break
    assert "network devices" in violation


_EMPTIED_CACHES = """
file = os.open("/workspace/file", os.O_RDWR | os.O_CREAT)
os.write(file, b"x" * 65536); os.fsync(file)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
resident = ctypes.c_ubyte()
mapped = mmap.mmap(file, 65536)
address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(mapped)))
libc.mincore(address, ctypes.c_size_t(4096), ctypes.byref(resident))
print(resident.value & 1, attempt(libc.madvise(address, ctypes.c_size_t(65536), 25)))  # MADV_COLLAPSE
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
room, size = ctypes.create_string_buffer(256), ctypes.c_uint(256)
for level, option in ((0, 41), (0, 48), (41, 48)):  # IP_MSFILTER, MCAST_MSFILTER
    print(attempt(libc.getsockopt(one.fileno(), level, option, room, ctypes.byref(size))))
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
netlink.setsockopt(270, 1, 1)  # NETLINK_ADD_MEMBERSHIP
netlink.setsockopt(270, 11, 1)  # NETLINK_EXT_ACK
print(attempt(libc.getsockopt(netlink.fileno(), 270, 9, room, ctypes.byref(size))))  # NETLINK_LIST_MEMBERSHIPS
print(netlink.getsockopt(270, 11))
sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
print(*(attempt(libc.fcntl(sealed, 1033, seals)) for seals in (8, 0x20, 2)), libc.fcntl(sealed, 1034))  # F_ADD_SEALS
os.sync()
print(attempt(libc.syncfs(-1)), attempt(libc.syncfs(file)), attempt(libc.fsync(-1)), attempt(libc.fsync(file)))
"""


def test_calls_that_need_locks_of_the_machine_have_no_effect(runtime: Runtime, disk: Path):
    """To empty the caches of all processors, the kernel takes a lock that mounts need too.

    To write all file systems, it takes locks of each one. To list the memberships of a netlink socket, it takes the
    lock of the host's netlink socket table.
    """
    if has_own_kernel(runtime):
        pytest.skip("the locks belong to the sandbox's kernel")
    ended = run_python(runtime, disk, _PRELUDE + _EMPTIED_CACHES)
    membership_and_seals = ["ENOPROTOOPT", "1", "EINVAL", "EINVAL", "done", "2"]
    expected = ["1", "EINVAL", *["ENOPROTOOPT"] * 3, *membership_and_seals, "done", "done", "EBADF", "done"]
    assert (ended.output.split(), ended.errors) == (expected, "")
