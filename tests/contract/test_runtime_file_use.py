"""What open files make the host's kernel hold for a sandbox is bounded, and programs that use them go on working."""

import asyncio
import resource
import time
from pathlib import Path

import pytest

from doubles.sandbox_lifecycle import Ended, has_own_kernel, living, read_until, run_python, run_story
from sandbox.interfaces.runtime import Command, FileUsage, Runtime

_PRELUDE = """
import ctypes, errno, fcntl, os, resource, shutil, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
is_x86 = os.uname().machine == "x86_64"

def tell(*words): print(*words, flush=True)

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


def told(runtime: Runtime, disk: Path, source: str) -> list[str]:
    """The lines of a program that ended well."""
    ended = run_python(runtime, disk, _PRELUDE + source)
    assert (ended.code, ended.errors) == (0, ""), ended
    return ended.output.splitlines()


async def _count(runtime: Runtime, disk: Path, source: str) -> tuple[FileUsage, Ended]:
    async with living(runtime, disk, processes_max=512) as sandbox:
        program = ["/usr/bin/python3", "-c", _PRELUDE + source]
        output, errors = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
        said = await read_until(output, b"held")
        use = await sandbox.file_usage()
        await sandbox.kill()
        await sandbox.wait()
        return use, Ended(None, said.decode(), (await errors.read()).decode())


def counted_if_there_is_room(
    runtime: Runtime, disk: Path, limits: frozenset[str], source: str
) -> tuple[FileUsage, Ended]:
    """The same, also of a kernel of the sandbox's own, which opens up to two files of the host for each inside."""
    if "memory" not in limits:
        pytest.skip("no control group tells which processes are the sandbox's")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 20_000:
        pytest.skip("so many files cannot be open on this machine")
    return asyncio.run(_count(runtime, disk, source))


def counted(runtime: Runtime, disk: Path, limits: frozenset[str], source: str) -> tuple[FileUsage, Ended]:
    """The sandbox's open files once the program has said `held`, and its whole story."""
    if has_own_kernel(runtime):
        pytest.skip("its files are its own kernel's")
    if "memory" not in limits:
        pytest.skip("no control group tells which processes are the sandbox's")
    return asyncio.run(_count(runtime, disk, source))


_MANY_LOCKS = """
files = [lock_often(number, 450) for number in range(20)]
tell("held"); time.sleep(600)
"""

_LOCKS_BEHIND_OTHERS = """
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
tell("held"); time.sleep(600)
"""

_LOCKS_WITHOUT_FIRST_THREAD = """
def hold():
    time.sleep(1)
    kept.extend(lock_often(number, 450) for number in range(20))
    tell("held"); time.sleep(600)
kept = []
threading.Thread(target=hold).start()
system_call(60 if is_x86 else 93, 0)
"""


@pytest.mark.parametrize(
    "source",
    [_MANY_LOCKS, _LOCKS_BEHIND_OTHERS, _LOCKS_WITHOUT_FIRST_THREAD],
    ids=["plain", "behind locks of an ended process", "without the first thread"],
)
def test_locks_on_files_count(runtime: Runtime, disk: Path, limits: frozenset[str], source: str):
    use, ended = counted(runtime, disk, limits, source)
    assert use.locks > 8192, ended
    assert "locks on files" in use.find_violation()


_WATCHED = """
import select
def watch(files, count):
    "Each file is watched under many numbers, which are closed again."
    poll = select.epoll()
    held = [os.eventfd(0) for _ in range(files)]
    for file in held:
        for number in range(1000, 1000 + count):
            os.dup2(file, number)
            poll.register(number, 0)
    for number in range(1000, 1000 + count): os.close(number)
    return poll, held
"""

_MANY_WATCHED = f"""{_WATCHED}
poll = watch(12, 12000)
copies = [os.dup(poll[0].fileno()) for _ in range(400)]
file = lock_often("many", 2000)
tell("held")
time.sleep(600)
"""


def test_a_sandbox_whose_open_files_take_too_long_to_count_ends(runtime: Runtime, disk: Path, limits: frozenset[str]):
    began = time.process_time()
    use, _ = counted(runtime, disk, limits, _MANY_WATCHED)
    assert "too long to count" in use.find_violation()
    assert time.process_time() - began < 10


def test_programs_with_locks_watch_thousands_of_files(runtime: Runtime, disk: Path, limits: frozenset[str]):
    held = f'{_WATCHED}\npoll, file = watch(2, 4000), lock_often("many", 2000)\ntell("held")\ntime.sleep(600)'
    use, _ = counted(runtime, disk, limits, held)
    assert (use.find_violation(), use.locks) == ("", 2000)


_LOCKS_OF_ENDED_PROCESSES = """
shared = [os.open("/proc/self/stat", os.O_RDONLY) for _ in range(9000)]
if os.fork() == 0:
    for one in shared: fcntl.flock(one, fcntl.LOCK_SH)
    os._exit(0)
os.wait()
tell("held"); time.sleep(600)
"""


def test_a_sandbox_with_few_locks_is_within_bounds_while_another_one_has_many(
    runtime: Runtime, disk: Path, limits: frozenset[str]
):
    if has_own_kernel(runtime):
        pytest.skip("its files are its own kernel's")

    async def story() -> FileUsage:
        async with living(runtime, disk.parent / "other") as other:
            program = ["/usr/bin/python3", "-c", _PRELUDE + _LOCKS_OF_ENDED_PROCESSES]
            output, _ = await other.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            await read_until(output, b"held")
            use, _ = await _count(runtime, disk, "kept = lock_often(1, 200)\ntell('held'); time.sleep(600)")
            return use

    use = asyncio.run(story())
    assert use.find_violation() == ""
    assert use.locks == (200 if "memory" in limits else 0)


_HALF_READ_DIRECTORIES = """
os.mkdir("/tmp/many")
for number in range(300): open(f"/tmp/many/{number}", "w").close()
room, held = ctypes.create_string_buffer(32), []
for _ in range(COUNT):
    held.append(os.open("/tmp/many", os.O_RDONLY))
    libc.syscall(217 if is_x86 else 61, held[-1], room, 32)
tell("held"); time.sleep(600)
"""


def test_open_directories_count(runtime: Runtime, disk: Path, limits: frozenset[str]):
    use, ended = counted(runtime, disk, limits, _HALF_READ_DIRECTORIES.replace("COUNT", "9000"))
    assert use.directories > 8192, ended
    assert "open directories" in use.find_violation()


def test_thousands_of_open_directories_and_files_are_within_bounds(
    runtime: Runtime, disk: Path, limits: frozenset[str]
):
    many = "files = [os.open('/dev/null', os.O_RDONLY) for _ in range(9000)]\n"
    use, _ = counted(runtime, disk, limits, many + _HALF_READ_DIRECTORIES.replace("COUNT", "3000"))
    assert use.open_files is not None
    assert use.open_files > 12_000
    assert 2000 < use.directories < 4500
    assert use.find_violation() == ""


_LISTED_DIRECTORIES = """
held = []
for number in range(COUNT):
    os.mkdir(f"/workspace/{number}")
    held.append(os.open(f"/workspace/{number}", os.O_RDONLY)); os.listdir(held[-1])
    if number >= KEPT: os.close(held.pop())
tell("held"); time.sleep(600)
"""


def test_directories_that_are_listed_and_kept_open_count_whoever_opens_them_on_the_host(
    runtime: Runtime, disk: Path, limits: frozenset[str]
):
    source = _LISTED_DIRECTORIES.replace("COUNT", "8700").replace("KEPT", "8700")
    use, ended = counted_if_there_is_room(runtime, disk, limits, source)
    assert 8192 < use.directories < 11_000, ended
    assert "open directories" in use.find_violation()


def test_many_directories_that_are_listed_and_closed_are_within_bounds(
    runtime: Runtime, disk: Path, limits: frozenset[str]
):
    source = _LISTED_DIRECTORIES.replace("COUNT", "9000").replace("KEPT", "4000")
    use, _ = counted_if_there_is_room(runtime, disk, limits, source)
    assert use.find_violation() == ""


_FILES_IN_MANY_PROCESSES = """
files = [os.open("/dev/null", os.O_RDONLY) for _ in range(14000)]
for _ in range(10):
    if os.fork() == 0: time.sleep(600)
tell("held"); time.sleep(600)
"""


def test_open_files_of_all_processes_together_count(runtime: Runtime, disk: Path, limits: frozenset[str]):
    use, ended = counted(runtime, disk, limits, _FILES_IN_MANY_PROCESSES)
    assert use.open_files is not None, ended
    assert use.open_files > 131_072
    assert "open files" in use.find_violation()


_FILES_OF_ONE_THREAD = """
tell(attempt(lambda: system_call(272 if is_x86 else 97, 0x400)))
tell(attempt(lambda: system_call(436, 1000, 1000, 2)), attempt(lambda: system_call(436, 1000, 1000, 0)))
thread = threading.Thread(target=tell, args=("thread",)); thread.start(); thread.join()
"""


def test_no_thread_has_open_files_of_its_own(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime) and runtime.name == "gvisor":
        pytest.skip("its files are its own kernel's")
    assert told(runtime, disk, _FILES_OF_ONE_THREAD) == ["EPERM", "EINVAL done", "thread"]


# Pages that nobody is charged for


_NOT_COPIED = """
splice, sendfile = (275, 40) if is_x86 else (76, 71)
zero, (reads, writes), (ours, theirs) = os.open("/dev/zero", os.O_RDONLY), os.pipe(), socket.socketpair()
load = os.open("/proc/loadavg", os.O_RDONLY)
tell(attempt(lambda: system_call(splice, zero, None, writes, None, 4096, 0)))
vector = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.create_string_buffer(4096)), 4096)
tell(attempt(lambda: system_call(278 if is_x86 else 75, writes, vector, 1, 0)))
for target in (ours.fileno(), writes):
    tell(attempt(lambda: system_call(sendfile, target, load, None, 10)))
"""


def test_no_page_gets_into_a_pipe_or_socket_without_being_copied(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime) and runtime.name == "gvisor":
        pytest.skip("its pipes are its own kernel's")
    assert told(runtime, disk, _NOT_COPIED) == ["EINVAL"] * 4


_COPIED = """
import asyncio
data = bytes(range(256)) * 4096
with open("one", "wb") as file: file.write(data)
shutil.copyfile("one", "two"); shutil.copy2("two", "/tmp/three")
tell(open("/tmp/three", "rb").read() == data)
ours, theirs = socket.socketpair()
def send(): ours.sendfile(open("one", "rb")); ours.close()
sender = threading.Thread(target=send); sender.start()
got = b""
while chunk := theirs.recv(1 << 20): got += chunk
sender.join(); tell(got == data)

async def serve():
    async def answer(reader, writer):
        await asyncio.get_running_loop().sendfile(writer.transport, open("one", "rb")); writer.close()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    got = await reader.read(); writer.close(); server.close()
    return got
tell(asyncio.run(serve()) == data)
"""


def test_programs_copy_instead(runtime: Runtime, disk: Path):
    assert told(runtime, disk, _COPIED) == ["True"] * 3


def test_commands_copy_instead(runtime: Runtime, disk: Path):
    copy = "seq 100000 > one; cp -a one two; cat two | cat > three; cp two /dev/shm/four"
    compare = "cmp one three && cmp one /dev/shm/four && echo same"
    assert run_story(runtime, disk, f"{copy}; {compare}").output == "same\n"


_ATTRIBUTES = """
open("/dev/shm/file", "w").close()
entry = lambda tag, who: tag.to_bytes(2, "little") + b"\\7\\0" + who.to_bytes(4, "little")
nobody = 0xFFFFFFFF
access = lambda users: (2).to_bytes(4, "little") + entry(1, nobody) + entry(2, 1000) * users + b"".join(
    entry(tag, nobody) for tag in (4, 16, 32))
for users in (7000, 100, 5):
    tell(attempt(lambda: os.setxattr("/dev/shm/file", "system.posix_acl_access", access(users))))
"""


def test_lists_of_who_may_use_a_file_are_short(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime) and runtime.name == "gvisor":
        pytest.skip("its attributes are its own kernel's")
    long, still_long, short = told(runtime, disk, _ATTRIBUTES)
    assert (long, still_long) == ("ENOTSUP", "ENOTSUP")
    assert short in {"done", "ENOTSUP"}  # a kernel without such lists


_LOCKED = """
import fcntl, os
file = os.open("/tmp/locked", os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
print(open("/proc/locks").read(), "POSIX" in open(f"/proc/self/fdinfo/{file}").read())
"""


def test_nobody_inside_lists_the_locks_of_the_machine(runtime: Runtime, disk: Path):
    """While it is listed, nobody can lock a file; readers that do nothing else make everybody wait."""
    if has_own_kernel(runtime):
        pytest.skip("its locks are its own kernel's")
    ended = run_python(runtime, disk, _LOCKED)
    assert (ended.output, ended.errors) == (" True\n", "")
