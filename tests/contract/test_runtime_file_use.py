"""A sandbox's open files and locks in the host's kernel are limited, but ordinary use works."""

import asyncio
import fcntl
import os
import resource
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from doubles.sandbox_lifecycle import CommandResult, has_own_kernel, read_until, ready_sandbox, run_python, run_shell
from doubles.sandbox_scripts import CLOSE_CONNECTION_IN_TRANSIT_SCRIPT
from sandbox.interfaces.runtime import Command, Runtime
from sandbox.model.fixed_limits import EPOLL_ENTRIES_MAX, OPEN_FILES_GROWTH_INTERRUPT_THRESHOLD
from sandbox.runtimes import launcher_client
from sandbox.runtimes.limits.files_without_descriptors import count_host_open_files
from sandbox.runtimes.limits.open_files import count_machine_epoll_entries
from sandbox.runtimes.limits.usage_limits import FileUsage

_PRELUDE = """
import ctypes, errno, fcntl, os, resource, shutil, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
is_x86 = os.uname().machine == "x86_64"

def report(*words): print(*words, flush=True)

def attempt(work):
    try: return work() or "done"
    except OSError as error: return errno.errorcode[error.errno]

def system_call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0: raise OSError(ctypes.get_errno(), "")
    return result

def lock_often(name, count):
    file = open(f"/dev/shm/{name}", "w")
    for place in range(count): fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * place)
    return file
"""


def output_lines(runtime: Runtime, disk: Path, source: str) -> list[str]:
    """Run a program that must succeed, and return its output lines."""
    result = run_python(runtime, disk, _PRELUDE + source)
    assert (result.code, result.errors) == (0, ""), result
    return result.output.splitlines()


async def _measure(runtime: Runtime, disk: Path, source: str) -> tuple[FileUsage, CommandResult]:
    async with ready_sandbox(runtime, disk, processes_max=512) as sandbox:
        program = ["/usr/bin/python3", "-c", _PRELUDE + source]
        output, errors = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
        text = await read_until(output, b"held")
        usage = await sandbox.detailed_file_usage()
        await sandbox.kill()
        await sandbox.wait()
        return usage, CommandResult(None, text.decode(), (await errors.read()).decode())


def measure_with_own_kernel(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str], source: str
) -> tuple[FileUsage, CommandResult]:
    """Do the same as `measure`, but also for runtimes with their own kernel.

    They open up to two files of the host for each file of the sandbox.
    """
    if "memory" not in enforced_limits:
        pytest.skip("no control group lists the sandbox's processes")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 20_000:
        pytest.skip("the machine's open-file limit is too low")
    return asyncio.run(_measure(runtime, disk, source))


def measure(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str], source: str
) -> tuple[FileUsage, CommandResult]:
    """Run the program until it has printed `held`; return its file usage and its result."""
    if has_own_kernel(runtime):
        pytest.skip("files belong to the sandbox's kernel")
    if "memory" not in enforced_limits:
        pytest.skip("no control group lists the sandbox's processes")
    return asyncio.run(_measure(runtime, disk, source))


_MANY_LOCKS = """
files = [lock_often(number, 450) for number in range(20)]
report("held"); time.sleep(600)
"""

_LOCKS_AFTER_OTHERS = """
files = [lock_often(number, 300) for number in range(200)]
shared = []
for number in range(8500):
    if number % 100 == 0: open(f"/tmp/{number}", "w").close()
    shared.append(os.open(f"/tmp/{number // 100 * 100}", os.O_RDONLY))
for half in (shared, [os.open("/proc/self/stat", os.O_RDONLY) for _ in range(7000)]):
    if os.fork() == 0:
        for one in half: fcntl.flock(one, fcntl.LOCK_SH)
        os._exit(0)
    os.wait()
report("held"); time.sleep(600)
"""

_LOCKS_WITHOUT_MAIN_THREAD = """
def hold():
    time.sleep(1)
    kept.extend(lock_often(number, 450) for number in range(20))
    report("held"); time.sleep(600)
kept = []
threading.Thread(target=hold).start()
system_call(60 if is_x86 else 93, 0)
"""


@pytest.mark.parametrize(
    "source",
    [_MANY_LOCKS, _LOCKS_AFTER_OTHERS, _LOCKS_WITHOUT_MAIN_THREAD],
    ids=["plain", "after locks of an ended process", "main thread ended"],
)
def test_file_locks_are_counted(runtime: Runtime, disk: Path, enforced_limits: frozenset[str], source: str):
    usage, result = measure(runtime, disk, enforced_limits, source)
    assert usage.posix_locks > 8192, result
    assert "locks on files" in usage.find_exceeded_limit()


_LOCKS_ON_HOST_FILES = """
library = next(path for path in ("/usr/bin/python3", "/bin/sh") if os.path.exists(path))
own = lock_often("own", 1100)
def lock(open_one, count):
    files = [open_one() for _ in range(count)]
    for one in files: fcntl.flock(one, fcntl.LOCK_SH)
    return files
paths = ("/dev/null", library, "/workspace", "/proc/sys/kernel/osrelease")
held = [lock(lambda: os.open(path, os.O_RDONLY), {count}) for path in paths]
held.append(lock(lambda: os.eventfd(0), {count}))
for place in range({count}): fcntl.lockf(held[-1][0], fcntl.LOCK_EX, 1, 2 * place)
report("held"); time.sleep(600)
"""


def test_locks_on_host_files_are_limited(runtime: Runtime, disk: Path, enforced_limits: frozenset[str]):
    """Whenever a process on the machine closes `/dev/null` or an eventfd, the kernel walks all locks on that file."""
    usage, result = measure(runtime, disk, enforced_limits, _LOCKS_ON_HOST_FILES.format(count=100))
    assert (usage.posix_locks, usage.locks_on_host_files) == (1200, 500), result
    assert "locks on devices or system files" in usage.find_exceeded_limit()


_LOCKED_FILES = """
paths = ("/usr/bin/env", "/etc/ld.so.cache", "/etc/ssl/certs", "/run/sandbox/a")
files = [os.open(path, os.O_RDONLY) for path in paths]
for file in files: fcntl.flock(file, fcntl.LOCK_EX)
report(os.read(files[1], 16), os.read(files[3], 16), len(os.listdir("/etc/ssl/certs")) > 0, "held"); time.sleep(600)
"""


async def test_locks_on_system_files_do_not_lock_files_of_the_host(runtime: Runtime, disk: Path, tmp_path: Path):
    (program := tmp_path / "a").write_text("content")
    paths = (Path("/usr/bin/env"), Path("/etc/ld.so.cache"), Path("/etc/ssl/certs"), program)

    async def scenario() -> bytes:
        async with ready_sandbox(runtime, disk, programs={program: "/run/sandbox/a"}) as sandbox:
            command = ["/usr/bin/python3", "-c", _PRELUDE + _LOCKED_FILES]
            output, _ = await sandbox.start(Command(command, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            text = await read_until(output, b"held")
            for path in paths:
                file = os.open(path, os.O_RDONLY)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.close(file)
            return text

    assert (await scenario()) == b"%a b'content' True held\n" % paths[1].read_bytes()[:16]


_WATCHED_DEVICES = """
def events():
    try: return len(os.read(instance, 65536))
    except BlockingIOError: return 0
instance = libc.inotify_init1(os.O_NONBLOCK)
for name in ("null", "zero", "full", "random", "urandom", "tty"):
    assert libc.inotify_add_watch(instance, b"/dev/" + name.encode(), 0xFFF) >= 0, name
report("watching")
while not os.path.exists("used"): time.sleep(0.01)
from_host = events()
with open("/dev/null", "w") as null: null.write("x")
report(from_host, events() > 0, "ended")
"""


async def test_watches_on_device_files_do_not_slow_down_host_programs(runtime: Runtime, disk: Path):
    """A host program adds the events itself, and waits until the task has memory for them."""
    if not has_own_kernel(runtime) and os.geteuid() != 0:
        pytest.skip("an ordinary user cannot create device files")

    async def scenario() -> bytes:
        async with ready_sandbox(runtime, disk) as sandbox:
            command = ["/usr/bin/python3", "-c", _PRELUDE + _WATCHED_DEVICES]
            output, _ = await sandbox.start(Command(command, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            await read_until(output, b"watching")
            for name in ("null", "zero", "full", "random", "urandom"):
                Path("/dev", name).open("rb").close()
            (disk / "workspace" / "used").touch()
            return await read_until(output, b"ended")

    assert (await scenario()).split() == [b"0", b"True", b"ended"]


def test_locks_on_own_files_do_not_count_as_locks_on_host_files(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str]
):
    usage, result = measure(runtime, disk, enforced_limits, _LOCKS_ON_HOST_FILES.format(count=20))
    assert (usage.locks_on_host_files, usage.find_exceeded_limit()) == (100, ""), result


_WATCH_FILES_FUNCTION = """
import select
def watch(files, count):
    "Watch each file under many descriptors, which are then closed."
    poll = select.epoll()
    held = [os.eventfd(0) for _ in range(files)]
    for file in held:
        for number in range(1000, 1000 + count):
            os.dup2(file, number)
            poll.register(number, 0)
    for number in range(1000, 1000 + count): os.close(number)
    return poll, held
"""

_SLOWLY_COUNTED_ENTRIES = f"""{_WATCH_FILES_FUNCTION}
poll = watch(12, 12000)
copies = [os.dup(poll[0].fileno()) for _ in range(400)]
file = lock_often("many", 2000)
report("held")
time.sleep(600)
"""


def test_open_files_that_take_too_long_to_count_are_a_violation(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str]
):
    started_at = time.process_time()
    usage, _ = measure(runtime, disk, enforced_limits, _SLOWLY_COUNTED_ENTRIES)
    assert "too long to count" in usage.find_exceeded_limit()
    assert time.process_time() - started_at < 10


def test_locks_are_counted_despite_thousands_of_epoll_entries(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str]
):
    lines = 'poll, file = watch(2, 4000), lock_often("many", 2000)\nreport("held")\ntime.sleep(600)'
    held = f"{_WATCH_FILES_FUNCTION}\n{lines}"
    usage, _ = measure(runtime, disk, enforced_limits, held)
    assert (usage.find_exceeded_limit(), usage.posix_locks) == ("", 2000)


_LOCKS_OF_ENDED_PROCESSES = """
shared = [os.open("/proc/self/stat", os.O_RDONLY) for _ in range(9000)]
if os.fork() == 0:
    for one in shared: fcntl.flock(one, fcntl.LOCK_SH)
    os._exit(0)
os.wait()
report("held"); time.sleep(600)
"""


async def test_locks_of_another_sandbox_do_not_count(runtime: Runtime, disk: Path, enforced_limits: frozenset[str]):
    if has_own_kernel(runtime):
        pytest.skip("files belong to the sandbox's kernel")

    async def scenario() -> FileUsage:
        async with ready_sandbox(runtime, disk.parent / "other") as other:
            program = ["/usr/bin/python3", "-c", _PRELUDE + _LOCKS_OF_ENDED_PROCESSES]
            output, _ = await other.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            await read_until(output, b"held")
            usage, _ = await _measure(runtime, disk, "kept = lock_often(1, 200)\nreport('held'); time.sleep(600)")
            return usage

    usage = await scenario()
    assert usage.find_exceeded_limit() == ""
    assert usage.posix_locks == (200 if "memory" in enforced_limits else 0)


_HALF_READ_DIRECTORIES = """
os.mkdir("/tmp/many")
for number in range(300): open(f"/tmp/many/{number}", "w").close()
room, held = ctypes.create_string_buffer(32), []
for _ in range(COUNT):
    held.append(os.open("/tmp/many", os.O_RDONLY))
    libc.syscall(217 if is_x86 else 61, held[-1], room, 32)
report("held"); time.sleep(600)
"""


def test_open_directories_are_counted(runtime: Runtime, disk: Path, enforced_limits: frozenset[str]):
    usage, result = measure(runtime, disk, enforced_limits, _HALF_READ_DIRECTORIES.replace("COUNT", "9000"))
    assert usage.directories > 8192, result
    assert "open directories" in usage.find_exceeded_limit()


def test_thousands_of_open_directories_and_files_are_allowed(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str]
):
    many = "files = [os.open('/dev/null', os.O_RDONLY) for _ in range(9000)]\n"
    usage, _ = measure(runtime, disk, enforced_limits, many + _HALF_READ_DIRECTORIES.replace("COUNT", "3000"))
    assert usage.open_files is not None
    assert usage.open_files > 12_000
    assert 2000 < usage.directories < 4500
    assert usage.find_exceeded_limit() == ""


_LISTED_DIRECTORIES = """
held = []
for number in range(COUNT):
    os.mkdir(f"/workspace/{number}")
    held.append(os.open(f"/workspace/{number}", os.O_RDONLY)); os.listdir(held[-1])
    if number >= KEPT: os.close(held.pop())
report("held"); time.sleep(600)
"""


def test_listed_directories_are_counted_while_they_are_open(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str]
):
    source = _LISTED_DIRECTORIES.replace("COUNT", "8700").replace("KEPT", "8700")
    usage, result = measure_with_own_kernel(runtime, disk, enforced_limits, source)
    assert 8192 < usage.directories < 11_000, result
    assert "open directories" in usage.find_exceeded_limit()


def test_listed_directories_are_not_counted_after_they_are_closed(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str]
):
    source = _LISTED_DIRECTORIES.replace("COUNT", "9000").replace("KEPT", "4000")
    usage, _ = measure_with_own_kernel(runtime, disk, enforced_limits, source)
    assert usage.find_exceeded_limit() == ""


_FILES_IN_MANY_PROCESSES = """
files = [os.open("/dev/null", os.O_RDONLY) for _ in range(14000)]
for _ in range(10):
    if os.fork() == 0: time.sleep(600)
report("held"); time.sleep(600)
"""


def test_open_files_of_all_processes_are_counted(runtime: Runtime, disk: Path, enforced_limits: frozenset[str]):
    usage, result = measure(runtime, disk, enforced_limits, _FILES_IN_MANY_PROCESSES)
    assert usage.open_files is not None, result
    assert usage.open_files > 131_072
    assert "open files" in usage.find_exceeded_limit()


_FILES_OF_ONE_THREAD = """
report(attempt(lambda: system_call(272 if is_x86 else 97, 0x400)))
report(attempt(lambda: system_call(436, 1000, 1000, 2)), attempt(lambda: system_call(436, 1000, 1000, 0)))
thread = threading.Thread(target=report, args=("thread",)); thread.start(); thread.join()
"""


def test_threads_cannot_unshare_open_files(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime) and runtime.name == "gvisor":
        pytest.skip("files belong to the sandbox's kernel")
    assert output_lines(runtime, disk, _FILES_OF_ONE_THREAD) == ["EPERM", "EINVAL done", "thread"]


# Pages that are charged to no control group


_ZERO_COPY = """
splice, sendfile = (275, 40) if is_x86 else (76, 71)
zero, (reads, writes), (ours, theirs) = os.open("/dev/zero", os.O_RDONLY), os.pipe(), socket.socketpair()
load = os.open("/proc/loadavg", os.O_RDONLY)
report(attempt(lambda: system_call(splice, zero, None, writes, None, 4096, 0)))
vector = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.create_string_buffer(4096)), 4096)
report(attempt(lambda: system_call(278 if is_x86 else 75, writes, vector, 1, 0)))
for target in (ours.fileno(), writes):
    report(attempt(lambda: system_call(sendfile, target, load, None, 10)))
"""


def test_zero_copy_calls_are_denied(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime) and runtime.name == "gvisor":
        pytest.skip("pipes belong to the sandbox's kernel")
    assert output_lines(runtime, disk, _ZERO_COPY) == ["EINVAL"] * 4


_ORDINARY_COPY = """
import asyncio
data = bytes(range(256)) * 4096
with open("one", "wb") as file: file.write(data)
shutil.copyfile("one", "two"); shutil.copy2("two", "/tmp/three")
report(open("/tmp/three", "rb").read() == data)
ours, theirs = socket.socketpair()
def send(): ours.sendfile(open("one", "rb")); ours.close()
sender = threading.Thread(target=send); sender.start()
got = b""
while chunk := theirs.recv(1 << 20): got += chunk
sender.join(); report(got == data)

async def serve():
    async def answer(reader, writer):
        await asyncio.get_running_loop().sendfile(writer.transport, open("one", "rb")); writer.close()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    got = await reader.read(); writer.close(); server.close()
    return got
report(asyncio.run(serve()) == data)
"""


def test_python_falls_back_from_zero_copy_calls(runtime: Runtime, disk: Path):
    assert output_lines(runtime, disk, _ORDINARY_COPY) == ["True"] * 3


def test_shell_commands_fall_back_from_zero_copy_calls(runtime: Runtime, disk: Path):
    copy = "seq 100000 > one; cp -a one two; cat two | cat > three; cp two /dev/shm/four"
    compare = "cmp one three && cmp one /dev/shm/four && echo same"
    assert run_shell(runtime, disk, f"{copy}; {compare}").output == "same\n"


_ATTRIBUTES = """
files = {"memfd": os.memfd_create("file"), **{
    top: os.open(f"{top}/file", os.O_RDWR | os.O_CREAT) for top in ("/dev/shm", "/workspace", "/home/agent", "/tmp")}}
for top, file in files.items():
    paths = [file, f"/proc/self/fd/{file}", *([] if top == "memfd" else [f"{top}/file"])]
    for name in ("user.x", "system.posix_acl_access"):
        report(*{attempt(lambda: os.setxattr(path, name, b"")) for path in paths}, os.listxattr(file))
os.symlink("/workspace/file", "/workspace/link")
report(attempt(lambda: os.setxattr("/workspace/link", "user.x", b"x", follow_symlinks=False)))
"""

_COPIES = """
set -e
cd /workspace; mkdir tree; printf hello > tree/file; chmod 640 tree/file; ln -s file tree/link
cp -a tree /dev/shm/copied; cp --preserve=all tree/file copied; tar --xattrs --acls -cf archive tree
mkdir unpacked; tar --xattrs -xf archive -C unpacked; install -m 755 tree/file installed; mv copied /dev/shm/moved
python3 -c 'import shutil; shutil.copy2("tree/file", "second"); shutil.copytree("tree", "third", symlinks=True)'
cmp /dev/shm/copied/link unpacked/tree/link; cmp second third/file; cmp second /dev/shm/moved
stat -c %a /dev/shm/copied/file unpacked/tree/file installed second
"""


def test_extended_attributes_cannot_be_set(runtime: Runtime, disk: Path):
    """A file in memory can have millions of attributes, which the kernel lists and removes without interruption."""
    if runtime.name == "gvisor":
        pytest.skip("attributes belong to the sandbox's kernel")
    *lines, link = output_lines(runtime, disk, _ATTRIBUTES)
    assert (lines, link) == (["ENOTSUP []"] * 10, "ENOTSUP")


def test_programs_copy_files_although_extended_attributes_are_refused(runtime: Runtime, disk: Path):
    ended = run_shell(runtime, disk, _COPIES)
    assert (ended.output.split(), ended.errors) == (["640", "640", "755", "640"], "")


_READ_PROC_LOCKS = """
import fcntl, os
file = os.open("/tmp/locked", os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
print(open("/proc/locks").read(), "POSIX" in open(f"/proc/self/fdinfo/{file}").read())
"""


def test_proc_locks_is_empty(runtime: Runtime, disk: Path):
    """Reading the host's `/proc/locks` would block all file locking on the machine, so sandboxes see an empty file."""
    if has_own_kernel(runtime):
        pytest.skip("locks belong to the sandbox's kernel")
    result = run_python(runtime, disk, _READ_PROC_LOCKS)
    assert (result.output, result.errors) == (" True\n", "")


_LIST_PROC_DIRECTORIES = """
import os
print([os.listdir(f"/proc/{name}") for name in ("fs", "bus", "driver")])
print(all(open(f"/proc/{name}").read() for name in ("filesystems", "mounts", "meminfo", "self/status", "net/tcp")))
"""


def test_proc_lists_no_file_systems_of_the_host(runtime: Runtime, disk: Path):
    """Reading `/proc/fs/ext4/*/es_shrinker_info` walks all cached inodes of the disk while a spinlock is held."""
    if has_own_kernel(runtime):
        pytest.skip("/proc belongs to the sandbox's kernel")
    result = run_python(runtime, disk, _LIST_PROC_DIRECTORIES)
    assert (result.output, result.errors) == ("[[], [], []]\nTrue\n", "")


# Epoll entries: one event on a file wakes all entries of the file


_WATCH_TIMER_FUNCTION = """
import array, select
timer = system_call(283 if is_x86 else 85, time.CLOCK_MONOTONIC, 0)
def watch(instances, copies):
    descriptors = [os.dup(timer) for _ in range(copies)]
    polls = [select.epoll() for _ in range(instances)]
    for poll in polls:
        for one in descriptors: poll.register(one, select.EPOLLIN | select.EPOLLET)
    return polls, descriptors
"""

_MANY_EPOLL_ENTRIES = (
    _WATCH_TIMER_FUNCTION
    + """
kept = watch(40, 1000)
report("held"); time.sleep(600)
"""
)

_EPOLL_ENTRIES_IN_TRANSIT = (
    _WATCH_TIMER_FUNCTION
    + """
polls, copies = watch(40, 1000)
left, right = socket.socketpair()
descriptors = [one.fileno() for one in polls]
left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])
for one in polls: one.close()
for one in copies: os.close(one)
report("held"); time.sleep(600)
"""
)

_EPOLL_ENTRIES_AMONG_MANY_FILES = (
    _WATCH_TIMER_FUNCTION
    + """
for _ in range(4):
    if os.fork() == 0:
        files = [os.open("/dev/null", os.O_RDONLY) for _ in range(12000)]
        time.sleep(600)
poll = select.epoll()
timers = [system_call(283 if is_x86 else 85, time.CLOCK_MONOTONIC, 0) for _ in range(40)]
for timer in timers:  # an entry exists until its file is closed, even if its descriptor was closed
    copies = [os.dup(timer) for _ in range(1000)]
    for one in copies: poll.register(one, select.EPOLLIN | select.EPOLLET)
    for one in copies: os.close(one)
report("held"); time.sleep(600)
"""
)

_FEW_EPOLL_ENTRIES = (
    _WATCH_TIMER_FUNCTION
    + """
kept = watch(2, 10000)
left, right = socket.socketpair()
left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
report("held"); time.sleep(600)
"""
)


@pytest.mark.parametrize(
    ("source", "exceeds"),
    [
        (_MANY_EPOLL_ENTRIES, True),
        (_EPOLL_ENTRIES_IN_TRANSIT, True),
        (_EPOLL_ENTRIES_AMONG_MANY_FILES, True),
        (_FEW_EPOLL_ENTRIES, False),
    ],
    ids=["of a process", "in transit in a socket", "among many files", "few"],
)
async def test_epoll_entries_are_limited(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str], source: str, exceeds: bool
):
    if has_own_kernel(runtime):
        pytest.skip("epoll instances belong to the sandbox's kernel")
    if "memory" not in enforced_limits:
        pytest.skip("no control group lists the sandbox's processes")

    async def scenario() -> list[str]:
        async with ready_sandbox(runtime, disk) as sandbox:
            program = ["/usr/bin/python3", "-c", _PRELUDE + source]
            output, _ = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            await read_until(output, b"held")
            violations = [(await sandbox.detailed_file_usage()).find_exceeded_limit() for _ in range(3)]
            await sandbox.kill()
            await sandbox.wait()
            return violations

    violations = await scenario()
    assert ("epoll entries" in violations[-1]) == exceeds, violations
    assert exceeds or not any(violations)


async def test_epoll_entries_of_other_sandboxes_do_not_count(
    runtime: Runtime, tmp_path: Path, disk: Path, enforced_limits: frozenset[str]
):
    """Two other sandboxes have 20,000 entries each. Every sandbox has files in transit, which could hide entries."""
    if has_own_kernel(runtime):
        pytest.skip("epoll instances belong to the sandbox's kernel")
    if "memory" not in enforced_limits:
        pytest.skip("no control group lists the sandbox's processes")
    sources = _FEW_EPOLL_ENTRIES.replace("watch(2, 10000)", "[]"), *[_FEW_EPOLL_ENTRIES] * 2
    async with AsyncExitStack() as stack:
        sandboxes = []
        for index, source in enumerate(sources):
            directory = disk if index == 0 else tmp_path / str(index)
            sandbox = await stack.enter_async_context(ready_sandbox(runtime, directory))
            program = ["/usr/bin/python3", "-c", _PRELUDE + source]
            output, _ = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            await read_until(output, b"held")
            sandboxes.append(sandbox)
        usages = [await one.detailed_file_usage() for one in sandboxes for _ in range(5)]
    assert not any(one.find_exceeded_limit() for one in usages), usages


_EPOLL_ENTRIES_OF_BLOCKED_THREADS = (
    _WATCH_TIMER_FUNCTION
    + """
import threading
timers = [os.dup(timer) for _ in range(1000)]
def wait(poll):
    try: poll.poll()
    except (OSError, ValueError): pass
threading.stack_size(65536)
for _ in range(40):
    poll = select.epoll()
    for one in timers: poll.register(one, select.EPOLLOUT)  # an event that never occurs
    descriptor = os.dup(poll.fileno()); poll.close(); poll = select.epoll.fromfd(descriptor)
    threading.Thread(target=wait, args=[poll], daemon=True).start()
    time.sleep(0.02)
    os.close(descriptor)
    os.open("/dev/null", os.O_RDONLY)  # reuses the descriptor number
report("held"); time.sleep(600)
"""
)


_DIRECTORIES_OF_BLOCKED_THREADS = """
import array
threading.stack_size(65536)
def send(pair, files):
    try: pair[0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    except OSError: pass
pairs = []
for _ in range(110):
    pair = socket.socketpair(); pairs.append(pair)
    pair[0].setblocking(False)
    for size in (4096, 1):
        try:
            while True: pair[0].send(bytes(size))
        except BlockingIOError: pass
    pair[0].setblocking(True)
    files = array.array("i", [os.open("/usr", os.O_RDONLY) for _ in range(253)])
    threading.Thread(target=send, args=[pair, files], daemon=True).start()
    time.sleep(0.02)
    for one in files: os.close(one)
report("held"); time.sleep(600)
"""


async def _count_freed(
    runtime: Runtime, disk: Path, source: str, count_all: Callable[[], int | None], freed_min: int
) -> int:
    """Measure the sandbox's usage repeatedly; return how many objects of its blocked threads the kernel has freed.

    Stop when the kernel has freed more than `freed_min` objects. count_all: counts the objects of the whole machine.
    """
    async with ready_sandbox(runtime, disk, processes_max=512) as sandbox:
        program = ["/usr/bin/python3", "-c", _PRELUDE + source]
        output, _ = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
        await read_until(output, b"held")
        held, freed = count_all() or 0, 0
        for _ in range(20):
            assert not (await sandbox.kernel_usage()).find_exceeded_limit()
            freed = held - (count_all() or 0)
            if freed > freed_min:
                break
            await asyncio.sleep(0.5)
        return freed


@pytest.mark.parametrize(
    ("source", "count_all", "growth_max"),
    [
        (_EPOLL_ENTRIES_OF_BLOCKED_THREADS, count_machine_epoll_entries, EPOLL_ENTRIES_MAX),
        (_DIRECTORIES_OF_BLOCKED_THREADS, count_host_open_files, OPEN_FILES_GROWTH_INTERRUPT_THRESHOLD),
    ],
    ids=["epoll entries", "directories"],
)
async def test_files_held_only_by_blocked_threads_are_freed(
    runtime: Runtime,
    disk: Path,
    enforced_limits: frozenset[str],
    source: str,
    count_all: Callable[[], int | None],
    growth_max: int,
):
    if has_own_kernel(runtime):
        pytest.skip("open files belong to the sandbox's kernel")
    if "memory" not in enforced_limits or count_all() is None:
        pytest.skip("cannot count the sandbox's processes or the host's kernel objects")
    assert (await _count_freed(runtime, disk, source, count_all, growth_max)) > growth_max


# Files that are passed to the runner


_PASS_FILE_FUNCTION = """
import array, struct, threading
def pass_file(file):
    output = socket.socket(fileno=os.dup(1))
    files = array.array("i", [file.fileno()])
    return attempt(lambda: output.sendmsg([b"passed"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)]) and "passed")
"""

_CLOSED_CONNECTIONS = (
    CLOSE_CONNECTION_IN_TRANSIT_SCRIPT
    + """
print("closed" if poll.poll(10_000) else "open", flush=True)

client = socket.create_connection(server.getsockname()); peer, _ = server.accept()
client.send(b"sent before the end"); client.close()
print(peer.recv(100).decode(), peer.recv(100))
"""
)


def test_connections_do_not_delay_the_kernel_thread_that_closes_files(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("the thread belongs to the sandbox's kernel")
    ended = run_python(runtime, disk, _CLOSED_CONNECTIONS)
    assert ended.output.splitlines() == ["closed", "sent before the end b''"], ended.errors


_PASS_AMONG_PROGRAMS = (
    _PASS_FILE_FUNCTION
    + """
left, right = socket.socketpair()
if os.fork() == 0:
    with open("/tmp/shared", "w+") as file:
        file.write("content"); file.flush()
        socket.send_fds(left, [b"x"], [file.fileno()])
    os._exit(0)
_, (received,), _, _ = socket.recv_fds(right, 1, 1)
os.wait()
print(os.pread(received, 100, 0).decode(), file=sys.stderr, flush=True)
for number in range(256): os.write(1, b"%d" % (number % 10) * 16384)
"""
)


@pytest.mark.parametrize("kernel", ["refuses files", "passes files"])
def test_files_are_passed_between_programs_and_the_output_is_complete(
    runtime: Runtime, disk: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
):
    if kernel == "passes files":
        monkeypatch.setattr(launcher_client, "refuse_passed_descriptors", lambda _: False)
    result = run_python(runtime, disk, _PRELUDE + _PASS_AMONG_PROGRAMS)
    assert (result.code, result.errors) == (0, "content\n")
    assert result.output == "".join(str(number % 10) * 16384 for number in range(256))
