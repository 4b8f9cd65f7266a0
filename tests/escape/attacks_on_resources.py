"""Attacks that try to use more resources than the manifest allows, each with a control that uses less.

The attacks run sequentially.
"""

from escape import attacks_on_kernel_memory
from escape.attack import OWN_KERNEL, Attack
from escape.host_watch import AIO_EVENTS

MEMORY_MIB, DISK_MIB, PROCESSES = 1024, 80, 512
DISK_FULL_ERRORS, KILLED_WORDS = ("ENOSPC",), ("SIGKILL", "out_of_memory")

PRELUDE = f"""{attacks_on_kernel_memory.PRELUDE}
import ctypes, os, pathlib, subprocess, sys, threading, time, errno, mmap, resource
MEMORY, DISK, PROCESSES = {MEMORY_MIB} << 20, {DISK_MIB} << 20, {PROCESSES}
MIB = b"x" * (1 << 20)
AIO_EVENTS = {AIO_EVENTS}

def fill(path, size):
    written = 0
    try:
        with open(path, "wb", 0) as file:
            while written < size: written += file.write(MIB)
    finally:
        os.unlink(path)
    return written

libc = ctypes.CDLL(None, use_errno=True)

def start_sleeping_child(seconds):
    # The child shares this process's memory: 500 forks would be slow, and would exceed the memory limit before the
    # process limit.
    stack = mmap.mmap(-1, 16384)
    top = ctypes.addressof(ctypes.c_char.from_buffer(stack)) + 16384
    clone_vm, sigchld = 0x100, 17
    child = libc.clone(libc.sleep, ctypes.c_void_p(top), clone_vm | sigchld, ctypes.c_void_p(seconds))
    if child < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return child, stack

def count_started_children(count, seconds=60):
    started = []
    try:
        for _ in range(count): started.append(start_sleeping_child(seconds))
    finally:
        for pid, _ in started: os.kill(pid, 9)
        for pid, _ in started: os.waitpid(pid, 0)
    return len(started)

def create_symlinks(directory, count):
    os.makedirs(directory)
    try:
        for number in range(count): os.symlink("x", f"{{directory}}/{{number}}")
    finally:
        subprocess.run(["rm", "-rf", directory])
    return count
"""


def resource_attacks():
    """Yield all resource attacks."""
    yield from attacks_on_kernel_memory.kernel_memory_attacks()
    yield Attack(
        "more processes than the limit",
        "if count_started_children(PROCESSES + 50) > PROCESSES: succeeded()",
        "if count_started_children(40) == 40: succeeded()",
        ("EAGAIN",),
    )
    yield Attack("more threads than the limit", """
over = threading.Event()
started = []
try:
    for _ in range(PROCESSES + 50):
        started.append(threading.Thread(target=over.wait)); started[-1].start()
    succeeded()
except RuntimeError as error:
    if "can't start new thread" not in str(error): raise
    refused("EAGAIN")
finally:
    over.set()""", """
threads = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(40)]
for each in threads: each.start()
for each in threads: each.join()
succeeded()""", ("EAGAIN",))  # fmt: skip
    yield Attack(
        "zombie processes",
        "if count_started_children(PROCESSES + 50, 0) > PROCESSES: succeeded()",
        "if count_started_children(2, 0) == 2: succeeded()",
        ("EAGAIN",),
    )
    yield Attack("more memory than the limit", "x = bytearray(2 * MEMORY)\nfor i in range(0, len(x), 4096): x[i] = 1\nsucceeded()",
                 "x = bytearray(100 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\nsucceeded()", KILLED_WORDS)  # fmt: skip
    yield Attack("more memory than the limit, in shared memory files", "if fill('/dev/shm/filler', 2 * MEMORY) >= 2 * MEMORY: succeeded()", "if fill('/dev/shm/filler', 20 << 20): succeeded()", DISK_FULL_ERRORS)  # fmt: skip
    for name, path in (("workspace", "/workspace/filler"), ("home", "/home/agent/filler"), ("/tmp", "/tmp/filler")):
        yield Attack(f"more disk space than the limit in {name}", f"if fill({path!r}, 2 * DISK) >= 2 * DISK: succeeded()", f"if fill({path!r}, 20 << 20): succeeded()", DISK_FULL_ERRORS)  # fmt: skip
    yield Attack("more disk space than the limit in three directories", """
paths = ["/workspace/a", "/home/agent/a", "/tmp/a"]
try:
    for path in paths:
        with open(path, "wb", 0) as file:
            for _ in range(DISK * 2 // 3 >> 20): file.write(MIB)
    succeeded()
finally:
    for path in paths:
        if os.path.exists(path): os.unlink(path)""", "if all(fill(p, 5 << 20) for p in ('/workspace/a', '/home/agent/a', '/tmp/a')): succeeded()", DISK_FULL_ERRORS)  # fmt: skip
    yield Attack(
        "inode exhaustion",
        "if create_symlinks('/tmp/many', 300_000) == 300_000: succeeded()",
        "if create_symlinks('/tmp/few', 2000) == 2000: succeeded()",
        DISK_FULL_ERRORS,
    )
    yield Attack("more open files than the limit", """
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
held = []
while len(held) < 1_100_000: held.append(os.open("/dev/null", os.O_RDONLY))
succeeded()""", "held = [os.open('/dev/null', os.O_RDONLY) for _ in range(500)]; succeeded()", ("EMFILE",))  # fmt: skip
    yield Attack("more open files than the limit, in several processes", """
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
reader, writer = os.pipe()
children = []
for _ in range(2):
    children.append(os.fork())
    if children[-1] == 0:
        held = 0
        try:
            while held < 18_000: os.open("/dev/null", os.O_RDONLY); held += 1
        except OSError: pass
        os.write(writer, b"%6d" % held); time.sleep(600)
each = [int(os.read(reader, 6)) for _ in range(2)]
for child in children: os.kill(child, 9); os.waitpid(child, 0)
print(each)
if max(each) == 18_000: succeeded()
else: refused("EMFILE")""", "held = [os.open('/dev/null', os.O_RDONLY) for _ in range(4000)]; succeeded()", ("EMFILE",))  # fmt: skip
    yield Attack("all pseudo-terminals of the machine", """
held = [os.openpty() for _ in range(300)]
succeeded()""", """
outer, inner = os.openpty()
os.write(outer, b"typed\\n")
if os.read(inner, 6) == b"typed\\n": succeeded()""", DISK_FULL_ERRORS, allowed_inside=OWN_KERNEL, unchanged_observers=("terminals",))  # fmt: skip
    yield Attack("all AIO contexts of the machine", """
context = ctypes.c_ulong(0)
made = libc.syscall(0 if os.uname().machine == "aarch64" else 206, AIO_EVENTS, ctypes.byref(context))
if made != 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
succeeded()""", """
with open("/tmp/ordinary", "w+b", 0) as file:
    file.write(b"x" * 4096); file.seek(0)
    if file.read() == b"x" * 4096: succeeded()""", ("ENOSYS",), allowed_inside=("gvisor",), unchanged_observers=("AIO contexts",))  # fmt: skip
    yield Attack(
        "a higher priority",
        "os.setpriority(os.PRIO_PROCESS, 0, -10)\nif os.getpriority(os.PRIO_PROCESS, 0) == -10: succeeded()",
        "os.nice(1); succeeded()",
        allowed_inside=("gvisor",),
        unchanged_observers=("priorities",),
    )
    yield Attack(
        "real-time scheduling",
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10)); succeeded()",
        "os.sched_yield(); succeeded()",
        ("EPERM", "EINVAL"),
        unchanged_observers=("priorities",),
    )
    # The guest of qemu has only one processor here.
    yield Attack("selecting a processor (sched_setaffinity)", """
before = os.sched_getaffinity(0)
os.sched_setaffinity(0, {min(before)})
if os.sched_getaffinity(0) != before: succeeded()
else: refused("no effect")""", "os.sched_setaffinity(0, os.sched_getaffinity(0)); succeeded()", ("no effect",), allowed_inside=("gvisor",), unchanged_observers=("priorities",))  # fmt: skip
    yield Attack("locked memory (mlock)", """
with setup(): memory = mmap.mmap(-1, 2 * MEMORY)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(2 * MEMORY)) == 0: succeeded()
else: refused(errno.errorcode[ctypes.get_errno()])""", "mmap.mmap(-1, 1 << 20).write(b'x'); succeeded()", ("ENOMEM", "EPERM", "EAGAIN"))  # fmt: skip
    yield Attack("a core dump on the host's disk", """
import signal
with setup(): os.chdir("/tmp")
before = set(os.listdir())
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
if os.fork() == 0: os.kill(os.getpid(), signal.SIGABRT)
_, status = os.wait()
dumped = os.WCOREDUMP(status) or any(name.startswith("core") for name in set(os.listdir()) - before)
succeeded() if dumped else refused("no dump")""", "if os.fork() == 0: os._exit(3)\nif os.wait()[1] >> 8 == 3: succeeded()", ("no dump",))  # fmt: skip
    # The last attacks kill the agent.
    yield from attacks_on_kernel_memory.long_call_attacks()
    yield Attack("more memory than the limit, in several processes", """
source = "x = bytearray(350 << 20)\\nfor i in range(0, len(x), 4096): x[i] = 1\\nimport time; print('up', flush=True); time.sleep(5)"
started = [subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE) for _ in range(4)]
ended = [(each.communicate()[0], each.returncode) for each in started]
if all(said == b"up\\n" and code == 0 for said, code in ended): succeeded()
elif any(code == -9 for _, code in ended): refused("SIGKILL")""", "x = bytearray(100 << 20); succeeded()", KILLED_WORDS)  # fmt: skip
