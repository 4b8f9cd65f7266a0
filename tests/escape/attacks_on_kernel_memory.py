"""Attacks that evade the OOM killer, or use kernel memory that is not charged to the sandbox."""

from escape.attack import OWN_KERNEL, Attack
from escape.host_watch import COMPILED_FILTERS_BYTES, SOCKET_BUFFERS_BYTES

PRELUDE = f"""
import ctypes, errno, mmap, os, pathlib, resource, socket, struct, threading, time
BUFFERS = {SOCKET_BUFFERS_BYTES}
FILTERS = {COMPILED_FILTERS_BYTES}
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
    """All attacks on kernel memory."""
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
        while sent < BUFFERS: sent += client.send(bytes(65536))
    except BlockingIOError: pass
print(sent >> 20, "MiB")
if sent < BUFFERS: refused("held back")
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
        while sent < BUFFERS: sent += client.send(bytes(65536))
    except BlockingIOError: pass
print(sent >> 20, "MiB")
if sent < BUFFERS: refused("held back")
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
if held < BUFFERS: refused("held back")
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
for _ in range(FILTERS // 8192):
    with setup():
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); keep_alive.append(one)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1); one.bind(("127.0.0.1", 0))
    one.setsockopt(socket.SOL_SOCKET, {option}, program(instruction(6, 1)))
succeeded()""", ordinary, ("ENOPROTOOPT",), allowed_inside=("gvisor",), unchanged_observers=("compiled filters",))  # fmt: skip
    yield Attack("large seccomp filters in many processes", """
code = instruction(0x20, 0) + instruction(0x45, 0x12345678) * 4094 + instruction(0x06, 0x7FFF0000)
reader, writer = os.pipe()
children = []
for _ in range(FILTERS // (7 * 4096 * 15) + 10):
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
