"""Memory that the kernel holds for a sandbox beyond what its programs allocate is bounded."""

import asyncio
import os
from pathlib import Path

import pytest

from doubles.sandbox_lifecycle import MEBIBYTE, Ended, has_own_kernel, living, read_until, run_in, run_python
from sandbox.interfaces.runtime import Command, KernelUsage, Runtime
from sandbox.runtimes.limits.cgroups import socket_buffer_bytes

MEMORY_BYTES = 512 * MEBIBYTE
BUFFERS_MAX = socket_buffer_bytes(MEMORY_BYTES)

_PRELUDE = """
import ctypes, errno, mmap, os, resource, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

def tell(*words): print(*words, flush=True)

def attempt(work):
    try: return work() or "done"
    except OSError as error: return errno.errorcode[error.errno]

def system_call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0: raise OSError(ctypes.get_errno(), "")
    return result

def listener(backlog=4096):
    made = socket.socket(); made.bind(("127.0.0.1", 0)); made.listen(backlog); return made

def send_all_it_takes(connection):
    connection.setblocking(False); sent = 0
    try:
        while sent < 64 << 20: sent += connection.send(bytes(65536))
    except BlockingIOError: return sent
    return sent
"""


def told(runtime: Runtime, disk: Path, source: str) -> list[str]:
    """The lines of a program that ended well."""
    ended = run_python(runtime, disk, _PRELUDE + source)
    assert (ended.code, ended.errors) == (0, ""), ended
    return ended.output.splitlines()


def held_at_most(runtime: Runtime, disk: Path, source: str) -> tuple[KernelUsage, Ended]:
    """What the host's kernel counts for the sandbox once the program has said `held`, and its whole story."""

    async def story() -> tuple[KernelUsage, Ended]:
        async with living(runtime, disk, memory_bytes=MEMORY_BYTES) as sandbox:
            program = ["/usr/bin/python3", "-c", _PRELUDE + source]
            output, errors = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            said = await read_until(output, b"held")
            use = await sandbox.kernel_usage()
            await sandbox.kill()
            await sandbox.wait()
            return use, Ended(None, said.decode(), (await errors.read()).decode())

    return asyncio.run(story())


# Buffers


_TCP_NEVER_READ = """
door, held = listener(), []
total = 0
for _ in range(150):
    client = socket.create_connection(door.getsockname())
    held += [client, door.accept()[0]]
    total += send_all_it_takes(client)
tell("sent", total >> 20, "held"); time.sleep(600)
"""

_UDP_NEVER_READ = """
sender, held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), []
for _ in range(2000):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    one.bind(("127.0.0.1", 0)); held.append(one)
    for _ in range(3): sender.sendto(bytes(60000), one.getsockname())
tell("held"); time.sleep(600)
"""


@pytest.mark.parametrize("source", [_TCP_NEVER_READ, _UDP_NEVER_READ], ids=["TCP", "UDP"])
def test_sockets_that_are_never_read_hold_no_more_than_their_share(
    runtime: Runtime, disk: Path, limits: frozenset[str], source: str
):
    if has_own_kernel(runtime) and runtime.name != "gvisor":
        pytest.skip("its sockets are in its own memory")
    if "sockets" not in limits:
        pytest.skip("no limit on buffers of sockets on this machine")
    use, ended = held_at_most(runtime, disk, source)
    assert use.buffer_bytes is not None, ended
    # The kernel charges the last packet of each connection also past the limit.
    assert MEBIBYTE < use.buffer_bytes <= BUFFERS_MAX + 16 * MEBIBYTE, ended
    assert use.received_bytes is None or use.received_bytes_max is None or use.received_bytes < use.received_bytes_max


_TRANSFER = """
door, total = listener(), 256 << 20
def receive():
    connection, _ = door.accept(); got = 0
    while chunk := connection.recv(1 << 20): got += len(chunk)
    tell("received", got == total)
receiver = threading.Thread(target=receive); receiver.start()
client = socket.create_connection(door.getsockname())
for _ in range(total >> 20): client.sendall(bytes(1 << 20))
client.close(); receiver.join()

receiver, sender = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
receiver.bind(("127.0.0.1", 0))
for number in range(2000):
    sender.sendto(b"%d" % number, receiver.getsockname())
    assert receiver.recv(100) == b"%d" % number
pairs = [(socket.create_connection(door.getsockname()), door.accept()[0]) for _ in range(400)]
for ours, theirs in pairs: ours.sendall(b"x" * 10000)
tell("pairs", all(len(theirs.recv(10000, socket.MSG_WAITALL)) == 10000 for ours, theirs in pairs))
"""


def test_data_that_is_read_passes_whole(runtime: Runtime, disk: Path):
    assert told(runtime, disk, _TRANSFER) == ["received True", "pairs True"]


_NEVER_ACCEPTED = """
door = socket.socket()
door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
try: door.setsockopt(socket.SOL_SOCKET, 18, 4 << 20)  # SO_RCVLOWAT makes room too
except OSError: pass
door.bind(("127.0.0.1", 0)); door.listen(100)
client = socket.socket()
client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
client.connect(door.getsockname())
tell(send_all_it_takes(client))
"""


def test_a_connection_that_nobody_accepts_takes_little(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime) and runtime.name != "gvisor":
        pytest.skip("its sockets are in its own memory")
    (sent,) = told(runtime, disk, _NEVER_ACCEPTED)
    assert 0 < int(sent) < 256 * 1024


_CLOSED_AND_NEVER_ACCEPTED = """
door = listener()
for _ in range(1000):
    client = socket.create_connection(door.getsockname())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
tell("held"); time.sleep(600)
"""


def test_connections_that_were_reset_before_anybody_accepted_them_count(runtime: Runtime, disk: Path):
    if runtime.name == "qemu":
        pytest.skip("its sockets are in its own memory")
    use, ended = held_at_most(runtime, disk, _CLOSED_AND_NEVER_ACCEPTED)
    assert use.sockets is not None, ended
    assert 1000 <= use.sockets < 1100


_TIMES_NEVER_READ = """
beside = [(socket.SOL_SOCKET, 37, struct.pack("I", 2 | 256))]  # SO_TIMESTAMPING: when it was queued, and sent
receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); receiver.bind(("127.0.0.1", 0))
held = []
for _ in range(1500):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.connect(receiver.getsockname()); held.append(one)
    for _ in range(4):
        one.sendmsg([bytes(50000)], beside); receiver.recv(65536)
tell("held"); time.sleep(600)
"""


def test_what_was_sent_does_not_wait_with_its_time_or_counts(runtime: Runtime, disk: Path):
    """The request comes beside the message, where no filter on system calls sees it."""
    if has_own_kernel(runtime):
        pytest.skip("it takes no such message, or has its sockets in its own memory")
    use, ended = held_at_most(runtime, disk, _TIMES_NEVER_READ)
    assert use.received_bytes is not None, ended
    # Older kernels have that setting for the machine only.
    assert use.received_bytes < MEBIBYTE or "time stamps" in use.find_violation()


_NETLINK_NEVER_READ = """
request, held = struct.pack("=IHHIIBxHiII", 32, 18, 1, 1, 0, 0, 0, 1, 0, 0), []
for _ in range(200):
    one = socket.socket(16, 3, 0); one.setblocking(False); held.append(one)
    try:
        for _ in range(300): one.send(request)
    except OSError: pass
tell("held"); time.sleep(600)
"""


def test_answers_that_nobody_reads_in_netlink_sockets_count(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("its netlink is its own kernel's")
    use, ended = held_at_most(runtime, disk, _NETLINK_NEVER_READ)
    assert use.netlink_bytes is not None, ended
    assert use.netlink_bytes > 20 * MEBIBYTE
    assert "netlink" in use.find_violation()


_ORDINARY_USE = """
import fcntl
files = [open(f"/dev/shm/{number}", "w") for number in range(20)]
for file in files: fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
held = [socket.if_nameindex()] + [listener() for _ in range(200)]
held += [socket.create_connection(one.getsockname()) for one in held[1:]]
tell("held"); time.sleep(600)
"""


def test_what_ordinary_programs_have_is_within_all_bounds(runtime: Runtime, disk: Path):
    use, ended = held_at_most(runtime, disk, _ORDINARY_USE)
    assert "held" in ended.output, ended
    assert use.find_violation() == ""


_MUCH_IN_NETLINK_AT_ONCE = """
echoed = struct.pack("=IHHII", 200016, 0xFFF, 5, 1, 0) + bytes(200000)
held = [socket.socket(16, 3, 0) for _ in range(200)]
for one in held: one.send(echoed)
tell("held"); time.sleep(600)
"""


def test_requests_that_come_back_whole_count_as_answers(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("its netlink is its own kernel's")
    use, ended = held_at_most(runtime, disk, _MUCH_IN_NETLINK_AT_ONCE)
    assert "netlink" in use.find_violation(), ended


_ERRORS_NEVER_READ = """
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.setsockopt(socket.IPPROTO_IP, 11, 1)
for _ in range(20):
    try: one.sendto(bytes(500), ("127.0.0.1", 9))
    except OSError: pass
one.setblocking(False)
tell(attempt(lambda: str(one.recvmsg(1000, 1000, 0x2000))))
name = socket.getaddrinfo("localhost", 80)[0][4][0]
tell(name)
"""


def test_errors_of_a_socket_are_not_queued_and_names_are_found(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("its errors are its own kernel's")
    assert told(runtime, disk, _ERRORS_NEVER_READ) in (["EAGAIN", "127.0.0.1"], ["EAGAIN", "::1"])


_WAITING = """
import select
reads, writes = os.pipe(); os.write(writes, b"x")
many = (ctypes.c_int * 2 * 5000)(*((reads, 1),) * 5000)
poll, select_ = {"x86_64": (7, 23), "aarch64": (None, None)}[os.uname().machine]
if poll:
    tell(attempt(lambda: str(system_call(poll, many, 5000, 0))), system_call(poll, many, 4000, 0))
    tell(attempt(lambda: str(system_call(select_, 5000, None, None, None, many))))
waiting = select.epoll()
copies = [os.dup(reads) for _ in range(5000)]
for one in copies: waiting.register(one, select.EPOLLIN)
tell(len(waiting.poll(0, 6000)))
"""


def test_thousands_of_files_are_waited_for_by_epoll_only(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("its waiting is its own kernel's")
    assert told(runtime, disk, _WAITING) == ["EINVAL 4000", "EINVAL", "5000"]


# What the kernel holds for one socket


_OPTIONS = """
tcp, udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 1))
program = struct.pack("HxxxxxxP", 1, ctypes.addressof(code))
group = struct.pack("16sI", bytes([255, 1]) + bytes(14), 1)
for name, one, level, option, value in (
    ("SO_ATTACH_FILTER", tcp, 1, 26, program), ("SO_ATTACH_BPF", tcp, 1, 50, 0),
    ("SO_ATTACH_REUSEPORT_CBPF", udp, 1, 51, program), ("SO_ATTACH_REUSEPORT_EBPF", udp, 1, 52, 0),
    ("SO_RESERVE_MEM", tcp, 1, 73, 1 << 20), ("TCP_ULP", tcp, 6, 31, b"tls"), ("TCP_MD5SIG", tcp, 6, 14, bytes(216)),
    ("UDP_CORK", udp, 17, 1, 1), ("UDP_ENCAP", udp, 17, 100, 3), ("IPV6_ADD_MEMBERSHIP", six, 41, 20, group),
    ("MCAST_JOIN_SOURCE_GROUP", udp, 0, 46, bytes(264)), ("IPV6_FLOWLABEL_MGR", six, 41, 32, bytes(32)),
    ("SO_ZEROCOPY", tcp, 1, 60, 1), ("IP_MINTTL", tcp, 0, 21, 255), ("IPV6_MINHOPCOUNT", six, 41, 73, 255),
):
    tell(name, attempt(lambda: one.setsockopt(level, option, value)))
tell("TCP_ZEROCOPY_RECEIVE", attempt(lambda: tcp.getsockopt(6, 35, 40)))
"""


def test_options_that_take_memory_for_a_socket_are_not_there(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("its options are its own kernel's")
    lines = told(runtime, disk, _OPTIONS)
    assert len(lines) == 16
    assert {line.split()[1] for line in lines} == {"ENOPROTOOPT"}, lines


_HELD_BACK = """
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.connect(("127.0.0.1", 9))
tell(attempt(lambda: udp.send(bytes(60000), socket.MSG_MORE)))
tell(attempt(lambda: udp.sendmsg([bytes(60000)], [], socket.MSG_MORE)))
source, target = os.pipe(); os.write(target, bytes(60000))
splice = {"x86_64": 275, "aarch64": 76}[os.uname().machine]
tell(attempt(lambda: system_call(splice, source, None, udp.fileno(), None, 60000, 4)))
"""


def test_no_datagram_is_held_back(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("what is held back is in its own memory")
    assert told(runtime, disk, _HELD_BACK) == ["ENOTSUP", "ENOTSUP", "EINVAL"]


_ORDINARY_OPTIONS = """
from socket import *
tcp, udp, six, unix = socket(), socket(AF_INET, SOCK_DGRAM), socket(AF_INET6), socket(AF_UNIX)
for one, level, option, value in (
    (tcp, SOL_SOCKET, SO_REUSEADDR, 1), (tcp, SOL_SOCKET, SO_KEEPALIVE, 1),
    (tcp, SOL_SOCKET, SO_SNDBUF, 65536), (tcp, SOL_SOCKET, SO_RCVBUF, 65536),
    (tcp, SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 5)), (tcp, IPPROTO_TCP, TCP_NODELAY, 1),
    (tcp, SOL_SOCKET, SO_RCVTIMEO, struct.pack("ll", 5, 0)), (udp, SOL_SOCKET, SO_BROADCAST, 1),
    (tcp, IPPROTO_TCP, TCP_CORK, 1), (tcp, IPPROTO_TCP, TCP_DEFER_ACCEPT, 5), (tcp, IPPROTO_TCP, TCP_KEEPIDLE, 60),
    (udp, IPPROTO_IP, IP_TTL, 5), (six, IPPROTO_IPV6, IPV6_V6ONLY, 1),
    (unix, SOL_SOCKET, SO_PASSCRED, 1),
):
    one.setsockopt(level, option, value)
assert tcp.getsockopt(IPPROTO_TCP, TCP_NODELAY) and len(tcp.getsockopt(IPPROTO_TCP, TCP_INFO, 100)) == 100
pair = socketpair(); pair[0].sendall(b"both ways"); tell(pair[1].recv(100).decode())
tell(len(if_nameindex()) > 0)
"""


def test_options_of_ordinary_programs_work(runtime: Runtime, disk: Path):
    assert told(runtime, disk, _ORDINARY_OPTIONS) == ["both ways", "True"]


_SILENT_CLIENTS = """
door = listener(); door.setsockopt(6, socket.TCP_DEFER_ACCEPT, 1000000)
clients = [socket.create_connection(door.getsockname()) for _ in range(20)]
door.settimeout(10)
tell(len([door.accept() for _ in clients]))
"""


def test_no_connection_waits_half_open_for_a_client_that_says_nothing(runtime: Runtime, disk: Path):
    if runtime.name == "qemu":
        pytest.skip("its connections are in its own memory")
    assert told(runtime, disk, _SILENT_CLIENTS) == ["20"]


_LINE_DISCIPLINES = """
import fcntl
outer, inner = os.openpty()
for discipline in (1, 3, 13, 27): tell(attempt(lambda: fcntl.ioctl(inner, 0x5423, struct.pack("i", discipline))))
tell(os.isatty(inner), len(fcntl.ioctl(inner, 0x5401, bytes(60))))
"""


def test_no_terminal_gets_another_line_discipline(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("its modules are its own kernel's")
    assert told(runtime, disk, _LINE_DISCIPLINES) == ["EPERM"] * 4 + ["True 60"]


# Families and protocols that would have the kernel load a module of the host


_ODD_SOCKETS = """
numbers = {"x86_64": (41, 53), "aarch64": (198, 199)}[os.uname().machine]
ends = ctypes.create_string_buffer(8)
for family, kind, protocol in (
    (40, 1, 0), (17, 3, 0), (44, 3, 0), (38, 5, 0), (21, 5, 0), (2, 10, 0), (10, 10, 0), (2, 5, 132), (2, 1, 132),
    (2, 1, 262), (2, 2, 136), (10, 2, 115), (2, 6, 33), (16, 3, 12),
):
    for number, *rest in ((numbers[0],), (numbers[1], ends)):
        answer = attempt(lambda: str(system_call(number, family, kind, protocol, *rest)))
        tell(family, kind, protocol, "pair" if rest else "one", answer)
"""


def test_no_socket_of_another_family_type_or_protocol_is_made_alone_or_as_a_pair(runtime: Runtime, disk: Path):
    lines = told(runtime, disk, _ODD_SOCKETS)
    answers = {line.rpartition(" ")[2] for line in lines}
    assert len(lines) == 28
    if has_own_kernel(runtime):
        assert answers.isdisjoint({"done"}), lines
        return
    assert answers <= {"EAFNOSUPPORT", "EPERM", "EPROTONOSUPPORT"}, lines


# Freed objects of the kernel


_MESSAGES = """
libc.msgsnd.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
message = struct.pack("l", 1) + bytes(4096)
def send(queues, size):
    while not queues or libc.msgsnd(queues[-1], message, size - 48, 0o4000):
        queues.append(libc.msgget(0, 0o1600))
        assert queues[-1] >= 0, ctypes.get_errno()
kept = []
def fill_and_free(size, every):
    freed = []
    for number in range((320 << 20) // size): send(freed if number % every else kept, size)
    time.sleep(1.2); tell("full")
    for queue in freed: libc.msgctl(queue, 0, 0)
    time.sleep(1.2)
"""

_FEW_LEFT_OF_MANY = (
    _MESSAGES
    + """
fill_and_free(4096, 8); fill_and_free(2048, 16); tell("held"); time.sleep(600)
"""
)

_NONE_LEFT_OF_MANY = (
    _MESSAGES
    + """
fill_and_free(4096, 1 << 40); fill_and_free(2048, 1 << 40); tell("held"); time.sleep(600)
"""
)


@pytest.mark.parametrize(("source", "is_held"), [(_FEW_LEFT_OF_MANY, True), (_NONE_LEFT_OF_MANY, False)])
def test_memory_that_few_objects_keep_from_the_machine_is_put_down_to_the_sandbox(
    runtime: Runtime, disk: Path, limits: frozenset[str], source: str, is_held: bool
):
    if has_own_kernel(runtime):
        pytest.skip("its objects are its own kernel's")
    if "memory" not in limits or os.geteuid():
        pytest.skip("what is taken cannot be counted here")

    async def story() -> list[KernelUsage]:
        async with living(runtime, disk, memory_bytes=MEMORY_BYTES) as sandbox:
            program = ["/usr/bin/python3", "-c", _PRELUDE + source]
            await sandbox.kernel_usage()
            output, _ = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            uses = []
            for word in (b"full", b"full", b"held"):
                await read_until(output, word)
                uses.append(await sandbox.kernel_usage())
            await sandbox.kill()
            await sandbox.wait()
            return uses

    held = [use.idle_slab_bytes for use in asyncio.run(story())][-1]
    assert held is not None
    assert (held > 128 * MEBIBYTE) == is_held, held


# Other pools of the machine


_FILTERS = """
code = struct.pack("HBBI", 0x06, 0, 0, 0x7FFC0000)  # SECCOMP_RET_LOG
kept = ctypes.create_string_buffer(code, len(code))
program = struct.pack("HxxxxxxP", 1, ctypes.addressof(kept))
seccomp = {"x86_64": 317, "aarch64": 277}[os.uname().machine]
def confine(mode):
    if libc.prctl(22, mode, program, 0, 0) != 0: raise OSError(ctypes.get_errno(), "")
for mode in (1, 2): tell(attempt(lambda: confine(mode)))
for flags in (0, 1, 2, 8): tell(attempt(lambda: system_call(seccomp, 1, flags, program)))
"""

_FILTERS_THAT_ARE_THERE = """
seccomp = {"x86_64": 317, "aarch64": 277}[os.uname().machine]
tell(attempt(lambda: system_call(seccomp, 2, 0, struct.pack("I", 0x7FFF0000))), libc.prctl(39, 0, 0, 0, 0))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
tell(status["Seccomp"].strip())
"""


def test_no_program_has_its_calls_written_to_the_machines_log(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("its filters are its own kernel's")
    assert told(runtime, disk, _FILTERS) == ["EINVAL"] * 6
    assert told(runtime, disk, _FILTERS_THAT_ARE_THERE) == ["done 1", "2"]


_NOTIFICATION_PIPES = """
tell(attempt(lambda: os.pipe2(os.O_EXCL) and "made"))
tell(attempt(lambda: os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT) and "made"))
"""


def test_no_pipe_holds_notes_that_nobody_is_charged_for(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("its pipes are its own kernel's")
    assert told(runtime, disk, _NOTIFICATION_PIPES) == ["ENOPKG", "made"]


_HUGE_PAGES = """
tell(attempt(lambda: str(mmap.mmap(-1, 2 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000))))
tell(attempt(lambda: str(os.memfd_create("huge", 4))))
shmget, secret = {"x86_64": 29, "aarch64": 194}[os.uname().machine], 447
tell(attempt(lambda: str(system_call(shmget, 0, 2 << 20, 0o4000 | 0o1600))))
tell(attempt(lambda: str(system_call(secret, 0))))
"""

_ORDINARY_PAGES = """
memory = mmap.mmap(-1, 4 << 20)
memory.madvise(mmap.MADV_HUGEPAGE); memory.write(bytes(4 << 20))
file = os.memfd_create("ordinary"); os.write(file, b"x")
shmget = {"x86_64": 29, "aarch64": 194}[os.uname().machine]
tell(attempt(lambda: system_call(shmget, 0, 4096, 0o1600) and "shared"))
"""


def test_no_huge_page_is_taken_of_the_machines(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("its pages are its own kernel's")
    assert told(runtime, disk, _HUGE_PAGES) == ["ENOMEM", "ENOMEM", "ENOMEM", "ENOSYS"]


def test_no_pages_are_offered_to_be_merged(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("its pages are its own kernel's")
    source = """
memory = mmap.mmap(-1, 1 << 20)
tell(attempt(lambda: memory.madvise(mmap.MADV_MERGEABLE)), libc.prctl(67, 1, 0, 0, 0))
memory.madvise(mmap.MADV_DONTNEED); memory.madvise(mmap.MADV_WILLNEED); tell(libc.prctl(15, b"name", 0, 0, 0))
"""
    assert told(runtime, disk, source) == ["EINVAL -1", "0"]


def test_ordinary_memory_of_all_kinds_is_there(runtime: Runtime, disk: Path):
    assert told(runtime, disk, _ORDINARY_PAGES)[-1] in {"shared", "done"}


_OUT_OF_MEMORY_SCORE = """
tell(open("/proc/self/oom_score_adj").read().strip())
for value in ("0", "-1", "499", "-1000"):
    for name in ("oom_score_adj", "oom_adj", f"task/{os.getpid()}/oom_score_adj"):
        def write():
            with open(f"/proc/self/{name}", "w") as file: file.write(value)
        tell(attempt(write))
tell(open("/proc/self/oom_score_adj").read().strip())
if os.fork() == 0: tell(open("/proc/self/oom_score_adj").read().strip()); os._exit(0)
os.wait()
threading.Thread(target=lambda: libc.prctl(15, b"renamed")).start()
"""


def test_no_process_becomes_less_of_a_victim_when_memory_runs_out(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("its scores are its own kernel's")
    before, *attempts, after, childs = told(runtime, disk, _OUT_OF_MEMORY_SCORE)
    assert (before, after, childs) == ("500", "500", "500")
    assert set(attempts) <= {"EROFS", "EACCES", "ENOENT"}, attempts
    assert len(attempts) == 12


def test_a_shell_on_a_terminal_cannot_either(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("its scores are its own kernel's")

    async def story() -> str:
        from sandbox.interfaces.runtime import TerminalSize

        async with living(runtime, disk) as sandbox:
            output, _ = await sandbox.start(Command(["/bin/sh", "-c", "echo up; sleep 300"], {}, "/workspace"))
            await read_until(output, b"up")
            script = "echo 0 > /proc/self/oom_score_adj; cat /proc/self/oom_score_adj"
            terminal = await sandbox.open_terminal(
                Command(["/bin/bash", "-c", script], {}, "/workspace"), TerminalSize(24, 80)
            )
            async with asyncio.timeout(60):
                return (await terminal.output.read()).decode()

    assert asyncio.run(story()).splitlines()[-1] == "500"


def test_timers_message_queues_and_priorities_are_bounded(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("its timers are its own kernel's")
    source = """
for kind in (11, 12, resource.RLIMIT_NICE, resource.RLIMIT_RTPRIO): tell(*resource.getrlimit(kind))
"""
    lines = told(runtime, disk, source)
    assert lines == ["8192 8192", "819200 819200", "0 0", "0 0"]


def test_a_command_on_a_full_share_of_buffers_still_ends(runtime: Runtime, disk: Path):
    async def story() -> Ended:
        async with living(runtime, disk, memory_bytes=MEMORY_BYTES) as sandbox:
            return await run_in(sandbox, ["/usr/bin/python3", "-c", _PRELUDE + _TCP_NEVER_READ.replace("600", "0")])

    ended = asyncio.run(story())
    assert ended.code == 0, ended
