"""Ways to take more than the manifest gives, one after the other, each beside a modest twin."""

from escape.attack import Attack

MEMORY_MIB, DISK_MIB, PROCESSES = 1024, 80, 512

PRELUDE = f"""
import ctypes, os, pathlib, subprocess, sys, threading, time, errno, mmap, resource
MEMORY, DISK, PROCESSES = {MEMORY_MIB} << 20, {DISK_MIB} << 20, {PROCESSES}
MIB = b"x" * (1 << 20)

def through(): print("THROUGH", flush=True)

def fill(path, size):
    written = 0
    try:
        with open(path, "wb", 0) as file:
            while written < size: written += file.write(MIB)
    finally:
        os.unlink(path)
    return written

libc = ctypes.CDLL(None, use_errno=True)

def sleeper(seconds):
    # A process with this one's memory, for half a thousand forks of it would be an attack on memory, and take long.
    stack = mmap.mmap(-1, 16384)
    top = ctypes.addressof(ctypes.c_char.from_buffer(stack)) + 16384
    clone_vm, sigchld = 0x100, 17
    child = libc.clone(libc.sleep, ctypes.c_void_p(top), clone_vm | sigchld, ctypes.c_void_p(seconds))
    if child < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return child, stack

def children(count, seconds=60):
    started = []
    try:
        for _ in range(count): started.append(sleeper(seconds))
    finally:
        for pid, _ in started: os.kill(pid, 9)
        for pid, _ in started: os.waitpid(pid, 0)
    return len(started)

def touch(directory, count):
    os.makedirs(directory)
    try:
        for number in range(count): os.symlink("x", f"{{directory}}/{{number}}")
    finally:
        subprocess.run(["rm", "-rf", directory])
    return count
"""


def resource_attacks():
    """All of them."""
    yield Attack(
        "more processes than the bound",
        "if children(PROCESSES + 50) > PROCESSES: through()",
        "if children(40) == 40: through()",
    )
    yield Attack("more threads than the bound", """
over = threading.Event()
started = []
try:
    for _ in range(PROCESSES + 50):
        started.append(threading.Thread(target=over.wait)); started[-1].start()
    through()
finally:
    over.set()""", """
threads = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(40)]
for each in threads: each.start()
for each in threads: each.join()
through()""")  # fmt: skip
    yield Attack(
        "children that are never waited for",
        "if children(PROCESSES + 50, 0) > PROCESSES: through()",
        "if children(2, 0) == 2: through()",
    )
    yield Attack("more memory than the bound", "x = bytearray(2 * MEMORY)\nfor i in range(0, len(x), 4096): x[i] = 1\nthrough()",
                 "x = bytearray(100 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\nthrough()")  # fmt: skip
    yield Attack("memory by shared memory files", "if fill('/dev/shm/filler', 2 * MEMORY) >= 2 * MEMORY: through()", "if fill('/dev/shm/filler', 20 << 20): through()")  # fmt: skip
    for name, path in (("workspace", "/workspace/filler"), ("home", "/home/agent/filler"), ("/tmp", "/tmp/filler")):
        yield Attack(f"more disk than the bound in {name}", f"if fill({path!r}, 2 * DISK) >= 2 * DISK: through()", f"if fill({path!r}, 20 << 20): through()")  # fmt: skip
    yield Attack("disk over three places together", """
paths = ["/workspace/a", "/home/agent/a", "/tmp/a"]
try:
    for path in paths:
        with open(path, "wb", 0) as file:
            for _ in range(DISK * 2 // 3 >> 20): file.write(MIB)
    through()
finally:
    for path in paths:
        if os.path.exists(path): os.unlink(path)""", "if all(fill(p, 5 << 20) for p in ('/workspace/a', '/home/agent/a', '/tmp/a')): through()")  # fmt: skip
    yield Attack(
        "files until names end",
        "if touch('/tmp/many', 300_000) == 300_000: through()",
        "if touch('/tmp/few', 2000) == 2000: through()",
    )
    yield Attack("more open files than a limit", """
resource.getrlimit(resource.RLIMIT_NOFILE)[1] <= 1 << 20 or through()
held = []
try:
    while len(held) < 1_100_000: held.append(os.open("/dev/null", os.O_RDONLY))
    through()
except OSError as error: print(error)""", "held = [os.open('/dev/null', os.O_RDONLY) for _ in range(500)]; through()")  # fmt: skip
    yield Attack("open files from many processes", """
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
told, inside = os.pipe()
children = []
for _ in range(2):
    children.append(os.fork())
    if children[-1] == 0:
        held = 0
        try:
            while held < 18_000: os.open("/dev/null", os.O_RDONLY); held += 1
        except OSError: pass
        os.write(inside, b"%6d" % held); time.sleep(600)
each = [int(os.read(told, 6)) for _ in range(2)]
for child in children: os.kill(child, 9); os.waitpid(child, 0)
print(each)
if max(each) == 18_000: through()""", "held = [os.open('/dev/null', os.O_RDONLY) for _ in range(4000)]; through()")  # fmt: skip
    yield Attack("all pseudo-terminals of the machine", """
try:
    held = [os.openpty() for _ in range(300)]
    through() if not OWN_KERNEL else print("in its own kernel")
except OSError as error: print(error)""", """
outer, inner = os.openpty()
os.write(outer, b"typed\\n")
if os.read(inner, 6) == b"typed\\n": through()""")  # fmt: skip
    yield Attack("the machine's contexts for AIO", """
import ctypes
libc, context = ctypes.CDLL(None, use_errno=True), ctypes.c_ulong(0)
made = libc.syscall(0 if os.uname().machine == "aarch64" else 206, 1, ctypes.byref(context))
if made == 0: through() if not OWN_KERNEL else print("in its own kernel")
else: print(os.strerror(ctypes.get_errno()))""", """
with open("/tmp/ordinary", "w+b", 0) as file:
    file.write(b"x" * 4096); file.seek(0)
    if file.read() == b"x" * 4096: through()""")  # fmt: skip
    yield Attack(
        "a higher priority",
        "os.setpriority(os.PRIO_PROCESS, 0, -10); through() if not OWN_KERNEL else print('in its own kernel')",
        "os.nice(1); through()",
    )
    yield Attack(
        "real-time scheduling",
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10)); through()",
        "os.sched_yield(); through()",
    )
    yield Attack("memory that cannot be taken away", """
import ctypes
memory = mmap.mmap(-1, 2 * MEMORY)
libc = ctypes.CDLL(None, use_errno=True)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(2 * MEMORY)) == 0: through()
print(os.strerror(ctypes.get_errno()))""", "mmap.mmap(-1, 1 << 20).write(b'x'); through()")  # fmt: skip
    yield Attack("a core dump on the host's disk", """
import signal
if os.fork() == 0: os.kill(os.getpid(), signal.SIGABRT)
_, status = os.wait()
if os.WCOREDUMP(status) and os.path.exists("core"): through()""", "if os.fork() == 0: os._exit(3)\nif os.wait()[1] >> 8 == 3: through()")  # fmt: skip
    # The last, for where it takes its agent along, the others have been played.
    yield Attack("memory by many children", """
source = "x = bytearray(350 << 20)\\nfor i in range(0, len(x), 4096): x[i] = 1\\nimport time; print('up', flush=True); time.sleep(5)"
started = [subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE) for _ in range(4)]
if sum(each.communicate()[0] == b"up\\n" and each.returncode == 0 for each in started) == 4: through()""", "x = bytearray(100 << 20); through()")  # fmt: skip
