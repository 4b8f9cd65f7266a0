"""The time that one system call can spend in the kernel without preemption is limited."""

import asyncio
import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from doubles.sandbox_lifecycle import (
    MEBIBYTE,
    TIMEOUT_SECONDS,
    has_own_kernel,
    read_until,
    ready_sandbox,
    run_once,
    run_python,
    run_shell,
)
from sandbox.interfaces.runtime import Command, Runtime
from sandbox.model.fixed_limits import FILE_LOCKS_MAX, SHARED_MEMORY_FILES_MAX, UDP_SOCKETS_ON_PORT_MAX
from sandbox.runtimes.limits import cgroups, usage_limits
from sandbox.runtimes.limits.cgroups import ControlGroup
from sandbox.runtimes.limits.kernel_memory import SLAB_INTERVAL_SECONDS, count_used_objects
from sandbox.runtimes.limits.usage_limits import KernelUsage
from sandbox.runtimes.programs.launcher import INOTIFY_WATCHES_MAX

_BOUND_SOCKETS = """
import socket, time
def bound(port):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind(("0.0.0.0", port))
    return one
held = [bound(9999) for _ in range({shared})] + [bound(0) for _ in range({alone})]
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
sender.sendto(b"hello", ("127.255.255.255", 9999))
print(held[0].recv(100), "held", flush=True)
time.sleep(600)
"""


def measure(runtime: Runtime, disk: Path, source: str) -> KernelUsage:
    """Run the program until it has printed `held`; return its usage of kernel resources."""

    async def scenario() -> KernelUsage:
        async with ready_sandbox(runtime, disk) as sandbox:
            program = ["/usr/bin/python3", "-c", source]
            output, _ = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            assert b"hello" in await read_until(output, b"held")
            return await sandbox.kernel_usage()

    return asyncio.run(scenario())


def test_sockets_on_one_port_are_limited(runtime: Runtime, disk: Path):
    if runtime.name == "qemu":
        pytest.skip("sockets belong to the sandbox's kernel")
    usage = measure(runtime, disk, _BOUND_SOCKETS.format(shared=UDP_SOCKETS_ON_PORT_MAX + 1, alone=0))
    assert "UDP sockets on one port" in usage.find_exceeded_limit()


def test_ordinary_port_sharing_is_within_limits(runtime: Runtime, disk: Path):
    usage = measure(runtime, disk, _BOUND_SOCKETS.format(shared=100, alone=400))
    assert usage.find_exceeded_limit() == ""


_SIGNALS_OF_FILES = """
import errno, fcntl, os, signal, struct
came = []
signal.signal(signal.SIGIO, lambda *_: came.append("signal"))
def attempt(call, *arguments):
    try: call(*arguments); print("done")
    except OSError as error: print(errno.errorcode[error.errno])
for directory in ("/usr/lib", "/workspace"):
    attempt(fcntl.fcntl, os.open(directory, os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_ACCESS | fcntl.DN_MULTISHOT)
open("file", "w").close()
attempt(fcntl.fcntl, os.open("file", os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)
outer, inner = os.openpty()
attempt(fcntl.fcntl, inner, fcntl.F_SETOWN, os.getpid())
attempt(fcntl.fcntl, inner, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
attempt(fcntl.ioctl, inner, 0x5452, struct.pack("i", 1))  # FIOASYNC, which nginx uses for the channels of its workers
os.write(outer, b"typed\\n")
attempt(fcntl.fcntl, inner, fcntl.F_SETFL, os.O_NONBLOCK)
print(os.read(inner, 100), came)
"""


def test_file_events_send_no_signals(runtime: Runtime, disk: Path):
    if runtime.name == "gvisor":
        pytest.skip("signals belong to the sandbox's kernel")
    ended = run_python(runtime, disk, _SIGNALS_OF_FILES)
    expected = ["EINVAL", "EINVAL", "EINVAL", "done", "EINVAL", "done", "done", "b'typed\\n'", "[]"]
    assert (ended.output.split(), ended.errors) == (expected, "")


_ORDINARY_WATCH = """
import ctypes, os, select
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(os.O_NONBLOCK)
libc.inotify_add_watch(watch, b"/workspace", 0x100)
open("/workspace/new", "w").close()
poll = select.poll(); poll.register(watch, select.POLLIN)
print(b"new" in os.read(watch, 4096) if poll.poll(5000) else "nothing")
"""


def test_inotify_watches_directories(runtime: Runtime, disk: Path):
    assert run_python(runtime, disk, _ORDINARY_WATCH).output.split() == ["True"]


_PRIORITIES = """
import ctypes, os
libc, arm = ctypes.CDLL(None), os.uname().machine == "aarch64"
def priority():
    return os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0), libc.syscall(31 if arm else 252, 1, 0)
before = priority()
attributes = (ctypes.c_uint32 * 12)(48, 5)
print(libc.syscall(274 if arm else 314, 0, attributes, 0))  # sched_setattr
os.setpriority(os.PRIO_PROCESS, 0, 19)
libc.syscall(30 if arm else 251, 1, 0, 3 << 13)  # ioprio_set: the idle class
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
os.sched_setscheduler(0, os.SCHED_IDLE | os.SCHED_RESET_ON_FORK, os.sched_param(0))
print(priority() == before)
"""


def test_lower_priorities_have_no_effect(runtime: Runtime, disk: Path):
    if runtime.name == "gvisor":
        pytest.skip("priorities belong to the sandbox's kernel")
    ended = run_python(runtime, disk, _PRIORITIES)
    assert (ended.output.split(), ended.errors) == (["-1", "True"], "")


def test_nice_ionice_and_chrt_succeed(runtime: Runtime, disk: Path):
    if runtime.name == "gvisor":
        pytest.skip("gVisor has no I/O priorities")
    ended = run_shell(runtime, disk, "nice -n 10 echo nice; ionice -c 3 echo idle; chrt -i 0 echo chrt")
    assert (ended.output.split(), ended.errors) == (["nice", "idle", "chrt"], "")


_MOVING_PROCESSES = """
import os, time
processors = sorted(os.sched_getaffinity(0))
def move():
    ends_at = time.monotonic() + 2
    while time.monotonic() < ends_at:
        for processor in processors: os.sched_setaffinity(0, {processor})
    os._exit(os.EX_OK if sorted(os.sched_getaffinity(0)) == processors else 1)
for _ in range(20):
    if os.fork() == 0: move()
print({os.wait()[1] for _ in range(20)} == {0})
"""


def read_migration_seconds() -> float:
    """Return the CPU time of the host's kernel threads that move running threads to another processor."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended
            name, _, fields = stat.read_text(errors="replace").partition("(")[2].rpartition(")")
            ticks += int(fields.split()[12]) if name.startswith("migration/") else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def test_processes_cannot_move_themselves_between_processors(runtime: Runtime, disk: Path):
    """A kernel thread with the highest priority moves a running thread, at the expense of all other programs."""
    if has_own_kernel(runtime):
        pytest.skip("threads belong to the sandbox's kernel")
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("there is only one processor")
    before = read_migration_seconds()
    ended = run_python(runtime, disk, _MOVING_PROCESSES)
    assert read_migration_seconds() - before < 0.3
    assert (ended.output.split(), ended.errors) == (["True"], "")


def test_taskset_succeeds(runtime: Runtime, disk: Path):
    ended = run_shell(runtime, disk, "taskset -c 0 echo done; taskset -cp 0 $$ > /dev/null && echo done")
    assert (ended.output.split(), ended.errors) == (["done", "done"], "")


_MULTICAST_GROUPS = """
import errno, socket, struct
loopback = socket.inet_aton("127.0.0.1")
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.bind(("", 5353))
one.settimeout(10)
for number in (251, 252, 253):
    group = bytes([224, 0, 0, number]) + loopback
    try: one.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group); print("joined")
    except OSError as error: print(errno.errorcode[error.errno])
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, loopback)
sender.sendto(b"hello", ("224.0.0.251", 5353))
print(one.recv(100))
"""


def test_multicast_memberships_are_limited(runtime: Runtime, disk: Path):
    if runtime.name == "qemu":
        pytest.skip("sockets belong to the sandbox's kernel")
    ended = run_python(runtime, disk, _MULTICAST_GROUPS)
    assert ended.output.split() == ["joined", "joined", "ENOBUFS", "b'hello'"], ended


_LANDLOCK_CALLS = """
import ctypes, errno, os, struct
libc = ctypes.CDLL(None, use_errno=True)
def attempt(number, *arguments):
    return libc.syscall(number, *arguments) >= 0 or errno.errorcode[ctypes.get_errno()]
handled = struct.pack("Q", 1 << 2)  # LANDLOCK_ACCESS_FS_READ_FILE
print(attempt(444, handled, 8, 0), attempt(444, None, 0, 1), attempt(446, 0, 0))
"""


def test_landlock_is_not_available(runtime: Runtime, disk: Path):
    assert run_python(runtime, disk, _LANDLOCK_CALLS).output.split() == ["ENOSYS"] * 3


def test_programs_that_use_landlock_run_without_it(runtime: Runtime, disk: Path):
    ended = run_shell(runtime, disk, "echo packed | xz | xz --decompress")
    assert (ended.output, ended.errors) == ("packed\n", "")


_SEMAPHORES = """
import ctypes, errno, struct
libc = ctypes.CDLL(None, use_errno=True)
semaphores = libc.semget(0, 2, 0o1600)
def operate(count):
    operations = struct.pack("Hhh", 0, 1, 0) + struct.pack("Hhh", 1, 0, 0) * (count - 1)
    return "done" if libc.semop(semaphores, operations, count) == 0 else errno.errorcode[ctypes.get_errno()]
print(operate(1), operate(10), operate(500), libc.semctl(semaphores, 0, 12))  # GETVAL
libc.semctl(semaphores, 0, 0)  # IPC_RMID
"""


def test_semaphore_operations_per_call_are_limited(runtime: Runtime, disk: Path):
    if runtime.name == "gvisor":
        pytest.skip("semaphores belong to the sandbox's kernel")
    assert run_python(runtime, disk, _SEMAPHORES).output.split() == ["done", "done", "E2BIG", "2"]


_FUTEX_TABLE = """
import ctypes, errno, threading
libc = ctypes.CDLL(None, use_errno=True)
slots = ctypes.c_long(4096)
print(libc.prctl(78, 1, slots, 0, 0) >= 0 or errno.errorcode[ctypes.get_errno()])  # PR_FUTEX_HASH
counted, lock = [], threading.Lock()
def count():
    for _ in range(100):
        with lock: counted.append(1)
threads = [threading.Thread(target=count) for _ in range(50)]
for one in threads: one.start()
for one in threads: one.join()
print(len(counted))
"""


def test_size_of_the_futex_table_cannot_be_set(runtime: Runtime, disk: Path):
    assert run_python(runtime, disk, _FUTEX_TABLE).output.split() == ["EINVAL", "5000"]


_GUARD_REGIONS = """
import ctypes, errno, mmap, os, struct, threading
libc = ctypes.CDLL(None, use_errno=True)
pages = mmap.mmap(-1, 65536)
address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
def outcome(result):
    return result >= 0 or errno.errorcode[ctypes.get_errno()]
def advise(advice):
    return outcome(libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(4096), advice))
process = libc.syscall(434, os.getpid(), 0)  # pidfd_open
def advise_process(advice):
    vector = struct.pack("QQ", address, 4096)
    return outcome(libc.syscall(440, process, vector, ctypes.c_long(1), advice, 0))
print(*(advise(one) for one in (102, 103, 4)))  # MADV_GUARD_INSTALL, MADV_GUARD_REMOVE, MADV_DONTNEED
print(*(advise_process(one) for one in (102, 103)))
threads = [threading.Thread(target=print, args=("ran",)) for _ in range(3)]
for one in threads: one.start()
for one in threads: one.join()
"""


def test_guard_regions_are_not_available(runtime: Runtime, disk: Path):
    install_and_free, of_process, *threads = run_python(runtime, disk, _GUARD_REGIONS).output.splitlines()
    assert install_and_free == "EINVAL EINVAL True"
    assert set(of_process.split()) <= {"EINVAL", "EBADF", "ENOSYS"}
    assert threads == ["ran"] * 3


_PAGE_TABLES = """
import ctypes, errno, os, struct
libc = ctypes.CDLL(None, use_errno=True)
pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
scan = struct.pack("12Q", 96, 0, 0, 0x7FFFFFFFF000, 0, 0, 0, 0, 0, 1 << 3, 0, 0)
print(libc.ioctl(pagemap, ctypes.c_ulong(0xC0606610), scan) >= 0 or errno.errorcode[ctypes.get_errno()])  # PAGEMAP_SCAN
page = id(libc) // os.sysconf("SC_PAGE_SIZE")
print(struct.unpack("Q", os.pread(pagemap, 8, page * 8))[0] >> 63)
"""


def test_page_tables_cannot_be_scanned_in_one_call(runtime: Runtime, disk: Path):
    if runtime.name == "gvisor":
        pytest.skip("gVisor has no /proc/self/pagemap")
    assert run_python(runtime, disk, _PAGE_TABLES).output.split() == ["ENOTTY", "1"]


_RESIDENT_PAGES = """
import ctypes, errno, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
file = os.memfd_create("sparse")
os.truncate(file, 64 << 30)
os.pwrite(file, b"x", 4096)
address = libc.mmap(None, ctypes.c_size_t(64 << 30), 1, 1, file, ctypes.c_long(0))  # PROT_READ, MAP_SHARED
found = ctypes.create_string_buffer((64 << 30) // 4096)
def look_up(size):
    result = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found)
    return "done" if result == 0 else errno.errorcode[ctypes.get_errno()]
print(look_up(64 << 30), look_up(16384), found.raw[:4].hex())
"""


def test_pages_of_a_large_mapping_cannot_be_looked_up_in_one_call(runtime: Runtime, disk: Path):
    if runtime.name == "gvisor":
        pytest.skip("mappings belong to the sandbox's kernel")
    assert run_python(runtime, disk, _RESIDENT_PAGES).output.split() == ["ENOMEM", "done", "00010000"]


_EXTENTS = """
import ctypes, errno, fcntl, os, struct
libc = ctypes.CDLL(None, use_errno=True)
file = os.open("extents", os.O_RDWR | os.O_CREAT)
for number in range(5): os.pwrite(file, bytes(4096), number << 22)
def outcome(call, *arguments):
    try: call(*arguments); return "done"
    except OSError as error: return errno.errorcode[error.errno]
def allocate(mode, size):
    if libc.fallocate(file, mode, ctypes.c_long(0), ctypes.c_long(size)): raise OSError(ctypes.get_errno(), "")
flags = struct.pack("l", 0)  # without EXT4_EXTENTS_FL
print(outcome(fcntl.ioctl, file, 0x40086602, flags))  # FS_IOC_SETFLAGS
print(outcome(fcntl.ioctl, file, 0xC020660B, struct.pack("QQIIII", 0, 1 << 63, 0, 0, 0, 0)))  # FS_IOC_FIEMAP
print(outcome(fcntl.ioctl, file, 0x6612))  # EXT4_IOC_PRECACHE_EXTENTS
print(outcome(os.lseek, file, 0, os.SEEK_DATA), outcome(os.lseek, file, 0, os.SEEK_HOLE))
print(*(outcome(allocate, mode, 4096) for mode in (0x08, 0x20)))  # FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE
"""

_LARGE_ALLOCATIONS = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
file = os.open("large", os.O_RDWR | os.O_CREAT)
def allocate(mode, size):
    result = libc.fallocate(file, mode, ctypes.c_long(0), ctypes.c_long(size))
    return "done" if result == 0 else errno.errorcode[ctypes.get_errno()]
print(allocate(0, (1 << 30) + 4096), allocate(0, 1 << 20), os.fstat(file).st_size)
"""

_SPARSE_FILES = """
set -e
truncate -s 100M sparse; printf end | dd of=sparse bs=1 seek=50M conv=notrunc status=none
cp --sparse=always sparse copied; cmp sparse copied; cp sparse plain; cmp sparse plain
tar --sparse -cf archive sparse; rm sparse; tar -xf archive; cmp sparse copied
python3 -c 'import os; os.posix_fallocate(os.open("made", os.O_RDWR | os.O_CREAT), 0, 1 << 20)'
stat -c %s made
"""


def test_extents_of_a_file_cannot_be_walked_in_one_call(runtime: Runtime, disk: Path):
    if runtime.name == "gvisor":
        pytest.skip("gVisor does not pass these calls to the host's file system")
    results = run_python(runtime, disk, _EXTENTS).output.split()
    assert results == [*["ENOTTY"] * 3, *["EINVAL"] * 2, *["ENOTSUP"] * 2]


def test_length_of_one_allocation_is_limited(runtime: Runtime, disk: Path):
    ended = run_python(runtime, disk, _LARGE_ALLOCATIONS)
    assert ended.output.split() == ["ENOTSUP", "done", str(1 << 20)], ended


def test_sparse_files_are_copied_and_allocated(runtime: Runtime, disk: Path):
    ended = run_shell(runtime, disk, _SPARSE_FILES)
    assert (ended.output.split(), ended.errors) == ([str(1 << 20)], "")


_ADD_WATCHES = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
wanted, files = int(sys.argv[1]), int(sys.argv[2])
for number in range(files): open(f"/tmp/{number}", "w").close()
names = [b"/tmp/%d" % number for number in range(files)]
added = 0
for _ in range(wanted // files):
    instance = libc.inotify_init1(0)
    for name in names:
        if libc.inotify_add_watch(instance, name, 2) < 0:
            print(added, errno.errorcode[ctypes.get_errno()])
            raise SystemExit
        added += 1
print(added, "done")
"""


def _add_watches(runtime: Runtime, disk: Path, wanted: int, files: int) -> tuple[int, str]:
    program = ["/usr/bin/python3", "-c", _ADD_WATCHES, str(wanted), str(files)]
    count, result = asyncio.run(run_once(runtime, disk, program)).output.split()
    return int(count), result


def test_inotify_watches_are_limited(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("watches belong to the sandbox's kernel")
    count, result = _add_watches(runtime, disk, INOTIFY_WATCHES_MAX + 4000, 2000)
    assert (count <= INOTIFY_WATCHES_MAX, result) == (True, "ENOSPC")


def test_thousands_of_files_can_be_watched(runtime: Runtime, disk: Path):
    assert _add_watches(runtime, disk, 6000, 3000) == (6000, "done")


_DENTRIES_MAX = 40_000
_CREATED_DENTRIES = {
    "negative dentries": """
import itertools, os
for number in itertools.count(): os.access(f"/workspace/absent-{number}", os.F_OK)
""",
    "negative dentries of the host": """
import itertools, os
for number in itertools.count(): os.access(f"/usr/lib/absent-{number}", os.F_OK)
""",
    "hard links": """
import itertools, os
for number in itertools.count():
    if number % 20_000 == 0: open(f"/workspace/{number}", "w").close(); target = f"/workspace/{number}"
    else: os.link(target, f"/workspace/{number}")
""",
}
_FEW_DENTRIES = """
import os, time
for number in range(5000): os.access(f"/workspace/absent-{number}", os.F_OK)
for number in range(500): open(f"/workspace/{number}", "w").close()
print("hello held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("kind", _CREATED_DENTRIES)
def test_dentries_are_limited(runtime: Runtime, disk: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    if has_own_kernel(runtime):
        pytest.skip("programs cannot watch the host's directories")
    monkeypatch.setattr(usage_limits, "DENTRIES_MAX", _DENTRIES_MAX)

    async def scenario() -> str:
        async with ready_sandbox(runtime, disk) as sandbox:
            program = ["/usr/bin/python3", "-c", _CREATED_DENTRIES[kind]]
            await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            async with asyncio.timeout(TIMEOUT_SECONDS):
                return await sandbox.wait_for_exceeded_limit()

    assert "file names" in asyncio.run(scenario())


_NEGATIVE_DENTRIES_OF_THE_HOST = """
import os
unique = os.urandom(8).hex()
for number in range(60_000): os.access(f"/usr/lib/{unique}-{number}", os.F_OK)
"""


def test_negative_dentries_in_host_directories_are_dropped_when_the_sandbox_ends(
    runtime: Runtime, disk: Path, monkeypatch: pytest.MonkeyPatch
):
    if os.geteuid() != 0:
        pytest.skip("an ordinary user may have no control group")
    # other programs may free names in the meantime
    monkeypatch.setattr(cgroups, "_NEGATIVE_DENTRIES_GROWTH_MAX", -(1 << 40))
    drop, charged = ControlGroup.reclaim_if_many_negative_dentries, []

    def reclaim_if_many_negative_dentries(group: ControlGroup, negative_dentries_before: int) -> None:
        drop(group, negative_dentries_before)
        deadline = time.monotonic() + 5  # the kernel frees names after a grace period
        while (group.stats().memory_bytes or 0) >= 5 * MEBIBYTE and time.monotonic() < deadline:
            time.sleep(0.01)
        charged.append(group.stats().memory_bytes or 0)

    monkeypatch.setattr(ControlGroup, "reclaim_if_many_negative_dentries", reclaim_if_many_negative_dentries)
    ended = run_python(runtime, disk, _NEGATIVE_DENTRIES_OF_THE_HOST)
    assert ended.code == 0, ended
    assert charged[0] < 5 * MEBIBYTE, "the names are still charged, with 192 bytes each"


def test_ordinary_number_of_dentries_is_within_the_limit(runtime: Runtime, disk: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(usage_limits, "DENTRIES_MAX", _DENTRIES_MAX)
    assert measure(runtime, disk, _FEW_DENTRIES).find_exceeded_limit() == ""


_LOCK_MAPPED_FILES = """
import ctypes, fcntl, os, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, (*[ctypes.c_size_t] * 2, *[ctypes.c_int] * 3, ctypes.c_long)
def lock_mapped(number):
    file = os.open(f"/dev/shm/{number // 50}", os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_SH)
    assert libc.mmap(0, 4096, 1, 1, file, 0) != 2**64 - 1
    os.close(file)
"""
_FILE_LOCKS = {
    "of mapped files": """
for number in range(COUNT): lock_mapped(number)
""",
    "of mapped files whose processes have ended": """
if os.fork() == 0:
    for number in range(COUNT): lock_mapped(number)
    if os.fork() == 0: time.sleep(600)
    os._exit(0)
os.wait()
""",
    "of open files": """
import resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
for first in range(0, COUNT, 1000):
    if os.fork() == 0:
        files = [os.open(f"/dev/shm/{first // 50}", os.O_RDWR | os.O_CREAT) for _ in range(1000)]
        for file in files: fcntl.flock(file, fcntl.LOCK_SH)
        print("locked", flush=True); time.sleep(600)
""",
}


def _run_lock_program(runtime: Runtime, disk: Path, kind: str, count: int) -> str:
    """Return which limit the program exceeds within 20 s; empty if it exceeds none within 3 s after its start."""
    source = _LOCK_MAPPED_FILES + _FILE_LOCKS[kind].replace("COUNT", str(count))

    async def scenario() -> str:
        async with ready_sandbox(runtime, disk) as sandbox:
            await sandbox.kernel_usage()
            program = ["/usr/bin/python3", "-c", source + 'print("held", flush=True); time.sleep(600)']
            output, _ = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            await read_until(output, b"held")
            exceeded, deadline = "", time.monotonic() + (3 if count < FILE_LOCKS_MAX else TIMEOUT_SECONDS)
            while not exceeded and time.monotonic() < deadline:
                exceeded = (await sandbox.kernel_usage()).find_exceeded_limit()
                await asyncio.sleep(0.1)
            return exceeded

    return asyncio.run(scenario())


@pytest.mark.parametrize("kind", _FILE_LOCKS)
def test_file_locks_are_limited(runtime: Runtime, disk: Path, enforced_limits: frozenset[str], kind: str):
    """When a process ends, the kernel walks all locks of each locked file, for each lock, without interruption."""
    if has_own_kernel(runtime):
        pytest.skip("locks belong to the sandbox's kernel")
    if "memory" not in enforced_limits or os.geteuid():
        pytest.skip("kernel memory cannot be measured here")
    if count_used_objects("file_lock_cache") is None:
        pytest.skip("the kernel does not count file locks")
    assert "locks on files" in _run_lock_program(runtime, disk, kind, FILE_LOCKS_MAX + 1500)


@pytest.mark.parametrize("kind", _FILE_LOCKS)
def test_thousands_of_file_locks_are_within_the_limit(runtime: Runtime, disk: Path, kind: str):
    assert _run_lock_program(runtime, disk, kind, 3000) == ""


async def test_file_locks_of_host_programs_are_not_attributed_to_a_sandbox(
    runtime: Runtime, disk: Path, tmp_path: Path
):
    async with ready_sandbox(runtime, disk) as sandbox:
        await sandbox.kernel_usage()
        with (tmp_path / "locked").open("w") as file:
            for place in range(FILE_LOCKS_MAX + 1500):
                fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * place)
            await asyncio.sleep(SLAB_INTERVAL_SECONDS + 0.1)
            assert (await sandbox.kernel_usage()).find_exceeded_limit() == ""


_SHARED_MEMORY_FILES = """
import os
shared = os.statvfs("/dev/shm")
print(shared.f_files, shared.f_blocks * shared.f_frsize >> 20, oct(os.stat("/dev/shm").st_mode))
with open("/dev/shm/block", "wb") as block: block.write(b"hello")
print(open("/dev/shm/block").read())
"""


def test_number_of_files_in_shared_memory_is_limited(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("the file system belongs to the sandbox's kernel")
    ended = run_python(runtime, disk, _SHARED_MEMORY_FILES)
    assert ended.output.split() == [str(SHARED_MEMORY_FILES_MAX), "256", "0o41777", "hello"], ended


_WRITABLE_MOUNTS = """
import os
points = {line.split()[4] for line in open("/proc/self/mountinfo")}
def accepts_files(directory):
    try: os.mkdir(directory + "/made")
    except OSError: return False
    return True
print(*sorted(filter(accepts_files, points)))
"""


def test_files_can_be_created_only_where_their_number_is_limited(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("the file systems belong to the sandbox's kernel")
    ended = run_python(runtime, disk, _WRITABLE_MOUNTS)
    assert ended.output.split() == ["/dev/shm", "/home/agent", "/tmp", "/workspace"], ended


_DEVICES = """
import multiprocessing, os
with open("/dev/null", "w") as null: null.write("x")
with multiprocessing.Lock(): pass
controller, terminal = os.openpty()
os.write(terminal, b"hello")
print(os.read(controller, 5).decode(), len(open("/dev/urandom", "rb").read(8)), os.readlink("/dev/fd"))
"""


def test_devices_are_usable(runtime: Runtime, disk: Path):
    ended = run_python(runtime, disk, _DEVICES)
    assert ended.output.split() == ["hello", "8", "/proc/self/fd"], ended


_DENIED_IOCTLS = """
import ctypes, errno, os, select, socket
libc = ctypes.CDLL(None, use_errno=True)
def attempt(file, request):
    buffer = ctypes.create_string_buffer(4096)
    return libc.ioctl(file, ctypes.c_ulong(request), buffer) >= 0 or errno.errorcode[ctypes.get_errno()]
file, directory = os.open("file", os.O_RDWR | os.O_CREAT), os.open(".", os.O_RDONLY)
maps = os.open("/proc/self/maps", os.O_RDONLY)
# FS_IOC_FSSETXATTR, FS_IOC_SETVERSION, FICLONE, FS_IOC_ENABLE_VERITY
print(*(attempt(file, one) for one in (0x401C5820, 0x40087602, 0x40049409, 0x40806685)))
print(attempt(directory, 0x5000940E))  # BTRFS_IOC_SUBVOL_CREATE
print(attempt(maps, 0xC0686611), attempt(select.epoll().fileno(), 0x80088A02))  # PROCMAP_QUERY, EPIOCGPARAMS
print(attempt(socket.socket().fileno(), 0x8946))  # SIOCETHTOOL
"""

_PROGRAMS_THAT_USE_IOCTLS = """
set -e
script -qec 'stty rows 30 cols 90; stty size; stty -echo; stty sane; tty > /dev/null' /dev/null
python3 -c '
import array, fcntl, os, socket
os.set_blocking(0, False); os.set_inheritable(1, True)
print(socket.if_nameindex()[0][1], fcntl.ioctl(socket.socket(), 0x8913, b"lo" + bytes(38))[:2].decode())
inner, outer = os.pipe(); os.write(outer, b"hello")
size = array.array("i", [0]); fcntl.ioctl(inner, 0x541B, size); print(size[0])
'
echo hello > one; cp --reflink=auto one two; cmp one two; cp -a one three
git init -q copied; tar -cf archive one; tar -xOf archive one
"""


def test_denied_ioctls_fail_as_on_a_kernel_without_them(runtime: Runtime, disk: Path):
    if runtime.name == "gvisor":
        pytest.skip("gVisor's kernel handles the requests")
    assert run_python(runtime, disk, _DENIED_IOCTLS).output.split() == ["ENOTTY"] * 8


def test_programs_can_make_the_ioctl_requests_that_they_need(runtime: Runtime, disk: Path):
    ended = run_shell(runtime, disk, _PROGRAMS_THAT_USE_IOCTLS)
    assert (ended.output.split(), ended.errors) == (["30", "90", "lo", "lo", "5", "hello"], "")


_MESSAGE_QUEUES = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
queues = []
while len(queues) < 65:
    queues.append(libc.msgget(0, 0o1600))
    if queues[-1] < 0: break
print(len(queues) - 1, errno.errorcode[ctypes.get_errno()])
message, received = ctypes.create_string_buffer(b"\\x01\\0\\0\\0\\0\\0\\0\\0hello"), ctypes.create_string_buffer(13)
print(libc.msgsnd(queues[0], message, 5, 0), libc.msgrcv(queues[0], received, 5, 0, 0), received.raw[8:].decode())
"""


def test_message_queues_are_limited(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("message queues belong to the sandbox's kernel")
    assert run_python(runtime, disk, _MESSAGE_QUEUES).output.split() == ["64", "ENOSPC", "0", "5", "hello"]


_MANY_SEMAPHORES = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
arrays = []
while len(arrays) < 40:
    arrays.append(libc.semget(0, 32000, 0o1600))
    if arrays[-1] < 0: break
print(len(arrays) - 1, errno.errorcode[ctypes.get_errno()])
raised = ctypes.create_string_buffer(b"\\0\\0\\x01\\0\\0\\0")  # semaphore 0, +1
print(libc.semop(arrays[0], raised, 1), libc.semctl(arrays[0], 0, 12))  # GETVAL
"""


def test_semaphores_are_limited(runtime: Runtime, disk: Path):
    """When a sandbox ends, the kernel frees all semaphores without interruption: 0.08 s for each GiB."""
    if has_own_kernel(runtime):
        pytest.skip("semaphores belong to the sandbox's kernel")
    assert run_python(runtime, disk, _MANY_SEMAPHORES).output.split() == ["32", "ENOSPC", "0", "1"]
