"""The kernel memory that a sandbox uses, in addition to its programs' own memory, is limited."""

import asyncio
import itertools
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec.structs import replace

from doubles.sandbox_lifecycle import (
    MEBIBYTE,
    CommandResult,
    has_own_kernel,
    read_until,
    ready_sandbox,
    run_in,
    run_python,
)
from sandbox.interfaces.runtime import Command, Runtime, Sandbox
from sandbox.runtimes import bubblewrap_confinement, seccomp_filter
from sandbox.runtimes.limits.cgroups import socket_buffer_bytes_max
from sandbox.runtimes.limits.files_without_descriptors import ClosingFilesMeter
from sandbox.runtimes.limits.usage_limits import KernelUsage

MEMORY_BYTES = 512 * MEBIBYTE
BUFFERS_MAX = socket_buffer_bytes_max(MEMORY_BYTES)

_PRELUDE = """
import ctypes, errno, fcntl, mmap, os, resource, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

def report(*words): print(*words, flush=True)

def attempt(work):
    try: return work() or "done"
    except OSError as error: return errno.errorcode[error.errno]

def system_call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0: raise OSError(ctypes.get_errno(), "")
    return result

def listener(backlog=4096):
    made = socket.socket(); made.bind(("127.0.0.1", 0)); made.listen(backlog); return made

def fill_send_buffer(connection):
    connection.setblocking(False); sent = 0
    try:
        while sent < 64 << 20: sent += connection.send(bytes(65536))
    except BlockingIOError: return sent
    return sent
"""


def output_lines(runtime: Runtime, disk: Path, source: str) -> list[str]:
    """Run a program that must succeed, and return its output lines."""
    result = run_python(runtime, disk, _PRELUDE + source)
    assert (result.code, result.errors) == (0, ""), result
    return result.output.splitlines()


def measure(runtime: Runtime, disk: Path, source: str) -> tuple[KernelUsage, CommandResult]:
    """Run the program until it has printed `held`; return its usage of kernel resources and its result."""

    async def scenario() -> tuple[KernelUsage, CommandResult]:
        async with ready_sandbox(runtime, disk, memory_bytes=MEMORY_BYTES) as sandbox:
            program = ["/usr/bin/python3", "-c", _PRELUDE + source]
            output, errors = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            text = await read_until(output, b"held")
            usage = await sandbox.kernel_usage()
            await sandbox.kill()
            await sandbox.wait()
            return usage, CommandResult(None, text.decode(), (await errors.read()).decode())

    return asyncio.run(scenario())


# Socket buffers


_TCP_NEVER_READ = """
server, held = listener(), []
total = 0
for _ in range(150):
    client = socket.create_connection(server.getsockname())
    held += [client, server.accept()[0]]
    total += fill_send_buffer(client)
report("sent", total >> 20, "held"); time.sleep(600)
"""

_UDP_NEVER_READ = """
sender, held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), []
for _ in range(2000):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    one.bind(("127.0.0.1", 0)); held.append(one)
    for _ in range(3): sender.sendto(bytes(60000), one.getsockname())
report("held"); time.sleep(600)
"""


@pytest.mark.parametrize("source", [_TCP_NEVER_READ, _UDP_NEVER_READ], ids=["TCP", "UDP"])
def test_unread_socket_buffers_are_limited(runtime: Runtime, disk: Path, enforced_limits: frozenset[str], source: str):
    if has_own_kernel(runtime) and runtime.name != "gvisor":
        pytest.skip("socket buffers use the guest's memory")
    if "sockets" not in enforced_limits:
        pytest.skip("this machine has no socket buffer limit")
    usage, result = measure(runtime, disk, source)
    assert usage.buffer_bytes is not None, result
    # The kernel still accepts one packet per connection when the limit is reached.
    assert MEBIBYTE < usage.buffer_bytes <= BUFFERS_MAX + 16 * MEBIBYTE, result
    assert (
        usage.received_bytes is None
        or usage.received_bytes_max is None
        or usage.received_bytes < usage.received_bytes_max
    )


_SMALL_PACKETS = """
server, held, block = listener(), [], bytes(32767)
drained_from = socket.create_connection(server.getsockname()); drained_to = server.accept()[0]

def fill_block():
    drained_from.sendall(block); left = len(block)
    while left: left -= len(drained_to.recv(left))

def connect():
    client = socket.create_connection(server.getsockname()); client.setblocking(False)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1); held.append(client)
    return client

def keep_blocks(clients):
    # Alternate: the kernel would copy bytes of one connection that it acknowledges together into one packet.
    for _ in range((4 << 30) // (32 << 10) // len(clients)):
        for client in clients:
            try: client.send(b"x")
            except BlockingIOError: continue
            fill_block()

clients = [connect() for _ in range(200)]
report("held")
"""

_UNREAD_PACKETS = """
held += [server.accept()[0] for _ in clients]
keep_blocks(clients); time.sleep(600)
"""

_UNSENT_PACKETS = """
held += [server.accept()[0] for _ in clients]
for client in clients: client.send(bytes(100_000))
keep_blocks(clients); time.sleep(600)
"""

_RESET_CONNECTIONS = """
while True:
    for number in range(0, len(clients), 40):
        for _ in range(400):
            for client in clients[number:][:40]:
                try: client.send(b"x")
                except BlockingIOError: continue
                fill_block()
        for client in clients[number:][:40]: libc.connect(client.fileno(), bytes(16), 16)  # AF_UNSPEC resets it
    time.sleep(600)
"""

_ORDINARY_CONNECTIONS = """
for number, client in enumerate(clients):
    accepted, _ = server.accept(); held.append(accepted); client.send(bytes(100))
    if number % 20 == 0: accepted.close()
receivers = []
for _ in range(4):
    client = connect(); client.setblocking(True); accepted, _ = server.accept()
    threading.Thread(target=client.sendall, args=(bytes(256 << 20),), daemon=True).start()
    def receive(accepted=accepted):
        left = 256 << 20
        while left: left -= len(accepted.recv(min(left, 100_000)))
    receivers.append(threading.Thread(target=receive)); receivers[-1].start()
for one in receivers: one.join()
report("received"); time.sleep(600)
"""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (_UNREAD_PACKETS, "Small packets"),
        (_UNSENT_PACKETS, "Small packets"),
        (_RESET_CONNECTIONS, "Small packets"),
        (_ORDINARY_CONNECTIONS, ""),
    ],
    ids=["unread", "unsent", "reset", "ordinary"],
)
def test_memory_that_small_packets_keep_is_limited(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str], source: str, reason: str
):
    """One byte keeps a block of 32 KiB, whose other bytes were sent over another connection."""
    if has_own_kernel(runtime) and runtime.name != "gvisor":
        pytest.skip("the packets are in the guest's memory")
    if "sockets" not in enforced_limits:
        pytest.skip("this machine does not count socket buffers")

    async def scenario() -> str:
        async with ready_sandbox(runtime, disk, memory_bytes=MEMORY_BYTES) as sandbox:
            program = ["/usr/bin/python3", "-c", _PRELUDE + _SMALL_PACKETS + source]
            output, _ = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            await read_until(output, b"held")
            try:
                async with asyncio.timeout(60 if reason else 10):
                    return await sandbox.wait_for_exceeded_limit()
            except TimeoutError:
                return ""

    violation = asyncio.run(scenario())
    assert reason in violation
    assert bool(violation) == bool(reason), violation


_TRANSFER = """
server, total = listener(), 256 << 20
def receive():
    connection, _ = server.accept(); got = 0
    while chunk := connection.recv(1 << 20): got += len(chunk)
    report("received", got == total)
receiver = threading.Thread(target=receive); receiver.start()
client = socket.create_connection(server.getsockname())
for _ in range(total >> 20): client.sendall(bytes(1 << 20))
client.close(); receiver.join()

receiver, sender = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
receiver.bind(("127.0.0.1", 0))
for number in range(2000):
    sender.sendto(b"%d" % number, receiver.getsockname())
    assert receiver.recv(100) == b"%d" % number
pairs = [(socket.create_connection(server.getsockname()), server.accept()[0]) for _ in range(400)]
for ours, theirs in pairs: ours.sendall(b"x" * 10000)
report("pairs", all(len(theirs.recv(10000, socket.MSG_WAITALL)) == 10000 for ours, theirs in pairs))
"""


def test_data_sent_through_sockets_arrives_completely(runtime: Runtime, disk: Path):
    assert output_lines(runtime, disk, _TRANSFER) == ["received True", "pairs True"]


_PACED_CONNECTIONS = """
server, pairs = listener(), []
def read_all(connection):
    try:
        while connection.recv(1 << 20): pass
    except BlockingIOError: pass
for _ in range(100):
    client = socket.create_connection(server.getsockname()); accepted, _ = server.accept()
    for _ in range(14): client.send(b"x"); accepted.recv(1)  # the kernel sends the first packets at once
    client.setsockopt(socket.SOL_SOCKET, 47, 1)  # SO_MAX_PACING_RATE: one byte per second
    client.setblocking(False); accepted.setblocking(False); pairs.append((client, accepted))
    for _ in range(3): client.send(bytes(60_000)); read_all(accepted)
for client, accepted in pairs: client.close()
for client, accepted in pairs: read_all(accepted); accepted.close()
report("closed")
"""


def test_closed_connections_end_with_the_sandbox(runtime: Runtime, disk: Path):
    """Unsent data that waits for a pacing rate would keep its connection for two minutes."""
    if has_own_kernel(runtime) and runtime.name != "gvisor":
        pytest.skip("connections use the guest's memory")
    before = _count_orphans()
    assert output_lines(runtime, disk, _PACED_CONNECTIONS) == ["closed"]
    deadline = time.monotonic() + 10
    while (after := _count_orphans()) >= before + 50 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert after < before + 50


def _count_orphans() -> int:
    """Return the number of the machine's TCP connections that no process has open."""
    found = re.search(r"^TCP:.* orphan (\d+)", Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


_NEVER_ACCEPTED = """
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
try: server.setsockopt(socket.SOL_SOCKET, 18, 4 << 20)  # SO_RCVLOWAT enlarges the buffer too
except OSError: pass
server.bind(("127.0.0.1", 0)); server.listen(100)
client = socket.create_connection(server.getsockname())
sent = fill_send_buffer(client)
time.sleep(0.5)
report(sent - struct.unpack("i", fcntl.ioctl(client, 0x5411, bytes(4)))[0])  # SIOCOUTQ: what is not acknowledged
"""


def test_unaccepted_connection_has_a_small_buffer(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime) and runtime.name != "gvisor":
        pytest.skip("socket buffers use the guest's memory")
    (received,) = output_lines(runtime, disk, _NEVER_ACCEPTED)
    assert 0 < int(received) < 256 * 1024


_CLOSED_AND_NEVER_ACCEPTED = """
server = listener()
for _ in range(1000):
    client = socket.create_connection(server.getsockname())
    libc.connect(client.fileno(), bytes(16), 16)  # AF_UNSPEC: resets the connection
    client.close()
report("held"); time.sleep(600)
"""


def test_reset_unaccepted_connections_are_counted(runtime: Runtime, disk: Path):
    if runtime.name == "qemu":
        pytest.skip("socket buffers use the guest's memory")
    usage, result = measure(runtime, disk, _CLOSED_AND_NEVER_ACCEPTED)
    assert usage.sockets is not None, result
    assert 1000 <= usage.sockets < 1100


_TIMESTAMPS_NEVER_READ = """
ancillary = [(socket.SOL_SOCKET, 37, struct.pack("I", 2 | 256))]  # SO_TIMESTAMPING: time of queueing and sending
receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); receiver.bind(("127.0.0.1", 0))
held = []
for _ in range(1500):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); one.connect(receiver.getsockname()); held.append(one)
    for _ in range(4):
        one.sendmsg([bytes(50000)], ancillary); receiver.recv(65536)
report("held"); time.sleep(600)
"""


def test_unread_timestamps_are_bounded_or_counted(runtime: Runtime, disk: Path):
    """Timestamps are requested in ancillary data, which a seccomp filter cannot inspect."""
    if has_own_kernel(runtime):
        pytest.skip("the message is unsupported or uses the guest's memory")
    usage, result = measure(runtime, disk, _TIMESTAMPS_NEVER_READ)
    assert usage.received_bytes is not None, result
    # On older kernels, the sysctl that limits timestamps is global, so timestamps are counted instead.
    assert usage.received_bytes < MEBIBYTE or "time stamps" in usage.find_exceeded_limit()


_NETLINK_NEVER_READ = """
request, held = struct.pack("=IHHIIBxHiII", 32, 18, 1, 1, 0, 0, 0, 1, 0, 0), []
for _ in range(200):
    one = socket.socket(16, 3, 0); one.setblocking(False); held.append(one)
    try:
        for _ in range(300): one.send(request)
    except OSError: pass
report("held"); time.sleep(600)
"""


def test_unread_netlink_responses_are_counted(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("netlink belongs to the sandbox's kernel")
    usage, result = measure(runtime, disk, _NETLINK_NEVER_READ)
    assert usage.netlink_bytes is not None, result
    assert usage.netlink_bytes > 20 * MEBIBYTE
    assert "netlink" in usage.find_exceeded_limit()


_ORDINARY_USE = """
import fcntl
files = [open(f"/dev/shm/{number}", "w") for number in range(20)]
for file in files: fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)
held = [socket.if_nameindex()] + [listener() for _ in range(200)]
held += [socket.create_connection(one.getsockname()) for one in held[1:]]
report("held"); time.sleep(600)
"""


def test_ordinary_use_is_within_limits(runtime: Runtime, disk: Path):
    usage, result = measure(runtime, disk, _ORDINARY_USE)
    assert "held" in result.output, result
    assert usage.find_exceeded_limit() == ""


_LARGE_NETLINK_REQUESTS = """
echoed = struct.pack("=IHHII", 200016, 0xFFF, 5, 1, 0) + bytes(200000)
held = [socket.socket(16, 3, 0) for _ in range(200)]
for one in held: one.send(echoed)
report("held"); time.sleep(600)
"""


def test_echoed_netlink_requests_are_counted(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("netlink belongs to the sandbox's kernel")
    usage, result = measure(runtime, disk, _LARGE_NETLINK_REQUESTS)
    assert "netlink" in usage.find_exceeded_limit(), result


_ERRORS_NEVER_READ = """
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.setsockopt(socket.IPPROTO_IP, 11, 1)
for _ in range(20):
    try: one.sendto(bytes(500), ("127.0.0.1", 9))
    except OSError: pass
one.setblocking(False)
report(attempt(lambda: str(one.recvmsg(1000, 1000, 0x2000))))
name = socket.getaddrinfo("localhost", 80)[0][4][0]
report(name)
"""


def test_socket_errors_are_not_queued(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("errors belong to the sandbox's kernel")
    assert output_lines(runtime, disk, _ERRORS_NEVER_READ) in (["EAGAIN", "127.0.0.1"], ["EAGAIN", "::1"])


_POLL_AND_SELECT = """
import select
reads, writes = os.pipe(); os.write(writes, b"x")
many = (ctypes.c_int * 2 * 5000)(*((reads, 1),) * 5000)
poll, select_ = {"x86_64": (7, 23), "aarch64": (None, None)}[os.uname().machine]
if poll:
    report(attempt(lambda: str(system_call(poll, many, 5000, 0))), system_call(poll, many, 1000, 0))
    report(attempt(lambda: str(system_call(select_, 5000, None, None, None, many))))
waiting = select.epoll()
copies = [os.dup(reads) for _ in range(5000)]
for one in copies: waiting.register(one, select.EPOLLIN)
report(len(waiting.poll(0, 6000)))
"""


def test_poll_and_select_are_limited_but_epoll_is_not(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("polling belongs to the sandbox's kernel")
    assert output_lines(runtime, disk, _POLL_AND_SELECT) == ["EINVAL 1000", "EINVAL", "5000"]


# Memory per socket


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
    report(name, attempt(lambda: one.setsockopt(level, option, value)))
report("TCP_ZEROCOPY_RECEIVE", attempt(lambda: tcp.getsockopt(6, 35, 40)))
"""


def test_memory_consuming_socket_options_are_denied(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("options belong to the sandbox's kernel")
    lines = output_lines(runtime, disk, _OPTIONS)
    assert len(lines) == 16
    assert {line.split()[1] for line in lines} == {"ENOPROTOOPT"}, lines


_CORKED = """
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.connect(("127.0.0.1", 9))
report(attempt(lambda: udp.send(bytes(60000), socket.MSG_MORE)))
report(attempt(lambda: udp.sendmsg([bytes(60000)], [], socket.MSG_MORE)))
source, target = os.pipe(); os.write(target, bytes(60000))
splice = {"x86_64": 275, "aarch64": 76}[os.uname().machine]
report(attempt(lambda: system_call(splice, source, None, udp.fileno(), None, 60000, 4)))
"""


def test_datagrams_cannot_be_corked(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("corked data uses the guest's memory")
    assert output_lines(runtime, disk, _CORKED) == ["ENOTSUP", "ENOTSUP", "EINVAL"]


_ORDINARY_OPTIONS = """
from socket import *
tcp, udp, six, unix = socket(), socket(AF_INET, SOCK_DGRAM), socket(AF_INET6), socket(AF_UNIX)
for one, level, option, value in (
    (tcp, SOL_SOCKET, SO_REUSEADDR, 1), (tcp, SOL_SOCKET, SO_KEEPALIVE, 1),
    (tcp, SOL_SOCKET, SO_SNDBUF, 65536), (tcp, SOL_SOCKET, SO_RCVBUF, 65536),
    (tcp, SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 5)), (tcp, IPPROTO_TCP, TCP_NODELAY, 1),
    (tcp, SOL_SOCKET, 47, 1 << 20),
    (tcp, SOL_SOCKET, SO_RCVTIMEO, struct.pack("ll", 5, 0)), (udp, SOL_SOCKET, SO_BROADCAST, 1),
    (tcp, IPPROTO_TCP, TCP_CORK, 1), (tcp, IPPROTO_TCP, TCP_DEFER_ACCEPT, 5), (tcp, IPPROTO_TCP, TCP_KEEPIDLE, 60),
    (udp, IPPROTO_IP, IP_TTL, 5), (six, IPPROTO_IPV6, IPV6_V6ONLY, 1),
    (unix, SOL_SOCKET, SO_PASSCRED, 1),
):
    one.setsockopt(level, option, value)
assert tcp.getsockopt(IPPROTO_TCP, TCP_NODELAY) and len(tcp.getsockopt(IPPROTO_TCP, TCP_INFO, 100)) == 100
pair = socketpair(); pair[0].sendall(b"both ways"); report(pair[1].recv(100).decode())
report(len(if_nameindex()) > 0)
"""


def test_ordinary_socket_options_are_accepted(runtime: Runtime, disk: Path):
    assert output_lines(runtime, disk, _ORDINARY_OPTIONS) == ["both ways", "True"]


_LARGE_REQUESTS = """
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
size = netlink.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
netlink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * size)
request = struct.pack("IHHIIBxHiII", 32, 18, 1, 0, 0, 0, 0, 1, 0, 0)  # RTM_GETLINK for the loopback interface
def send(count): return struct.unpack_from("IH", netlink.recv(65536))[1] if netlink.send(request * count) else None
report(send(1), send(50), attempt(lambda: send(size // 32 + 1)))
unix = socket.socketpair(type=socket.SOCK_DGRAM)
unix[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
unix[0].send(bytes(size * 3 // 4)); report(len(unix[1].recv(size)) == size * 3 // 4)
"""


def test_netlink_requests_above_the_default_size_are_refused(runtime: Runtime, disk: Path):
    # The kernel handles all messages of one request without interruption: 0.9 s for 8 MiB, 54 ms for 400 kB.
    if has_own_kernel(runtime):
        pytest.skip("the sandbox's kernel handles the request")
    assert output_lines(runtime, disk, _LARGE_REQUESTS) == ["16 16 EMSGSIZE", "True"]


_DATAGRAM_OPTIONS = """
receiver, sender = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
receiver.settimeout(10); receiver.bind(("127.0.0.1", 0))
receiver.setsockopt(17, 104, 1)
for word in (b"first", b"second"): sender.sendto(word, receiver.getsockname())
report(receiver.recv(100).decode(), receiver.recv(100).decode())
receiver.setsockopt(socket.SOL_SOCKET, 29, 1)
sender.sendto(b"third", receiver.getsockname())
_, ancillary, _, _ = receiver.recvmsg(100, 1000)
report([(level, kind) for level, kind, _ in ancillary])
"""


def test_datagrams_arrive_separately_and_with_timestamps(runtime: Runtime, disk: Path):
    assert output_lines(runtime, disk, _DATAGRAM_OPTIONS) == ["first second", "[(1, 29)]"]


_SILENT_CLIENTS = """
server = listener(); server.setsockopt(6, socket.TCP_DEFER_ACCEPT, 1000000)
clients = [socket.create_connection(server.getsockname()) for _ in range(20)]
server.settimeout(10)
report(len([server.accept() for _ in clients]))
"""


def test_connections_of_silent_clients_are_accepted(runtime: Runtime, disk: Path):
    if runtime.name == "qemu":
        pytest.skip("connections use the guest's memory")
    assert output_lines(runtime, disk, _SILENT_CLIENTS) == ["20"]


_LINE_DISCIPLINES = """
import fcntl
outer, inner = os.openpty()
for discipline in (1, 3, 13, 27): report(attempt(lambda: fcntl.ioctl(inner, 0x5423, struct.pack("i", discipline))))
report(os.isatty(inner), len(fcntl.ioctl(inner, 0x5401, bytes(60))))
"""


def test_line_disciplines_cannot_be_changed(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("modules belong to the sandbox's kernel")
    assert output_lines(runtime, disk, _LINE_DISCIPLINES) == ["EPERM"] * 4 + ["True 60"]


# Socket families and protocols for which the host would load a kernel module


_ODD_SOCKETS = """
numbers = {"x86_64": (41, 53), "aarch64": (198, 199)}[os.uname().machine]
ends = ctypes.create_string_buffer(8)
for family, kind, protocol in (
    (40, 1, 0), (17, 3, 0), (44, 3, 0), (38, 5, 0), (21, 5, 0), (2, 10, 0), (10, 10, 0), (2, 5, 132), (2, 1, 132),
    (2, 1, 262), (2, 2, 136), (10, 2, 115), (2, 6, 33), (16, 3, 12),
):
    for number, *rest in ((numbers[0],), (numbers[1], ends)):
        answer = attempt(lambda: str(system_call(number, family, kind, protocol, *rest)))
        report(family, kind, protocol, "pair" if rest else "one", answer)
"""


def test_uncommon_socket_families_types_and_protocols_are_denied(runtime: Runtime, disk: Path):
    lines = output_lines(runtime, disk, _ODD_SOCKETS)
    results = {line.rpartition(" ")[2] for line in lines}
    assert len(lines) == 28
    if has_own_kernel(runtime):
        assert results.isdisjoint({"done"}), lines
        return
    assert results <= {"EAFNOSUPPORT", "EPERM", "EPROTONOSUPPORT"}, lines


# Freed kernel objects


_SEND_AND_FREE_MESSAGES = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def send(pairs, size):
    while True:
        try: return pairs[-1][0].send(bytes(size - 320), socket.MSG_DONTWAIT)
        except (IndexError, BlockingIOError): pairs.append(socket.socketpair())
kept = []
def fill_and_free(size, every):
    freed = []
    for number in range((320 << 20) // size): send(freed if number % every else kept, size)
    time.sleep(1.2); report("full")
    for pair in freed: pair[0].close(); pair[1].close()
    time.sleep(1.2)
"""

_FEW_MESSAGES_LEFT_OF_MANY = (
    _SEND_AND_FREE_MESSAGES
    + """
fill_and_free(4096, 8); fill_and_free(2048, 16); report("held"); time.sleep(600)
"""
)

_NO_MESSAGES_LEFT_OF_MANY = (
    _SEND_AND_FREE_MESSAGES
    + """
fill_and_free(4096, 1 << 40); fill_and_free(2048, 1 << 40); report("held"); time.sleep(600)
"""
)

_OPEN_AND_FREE_INODES = """
import signal
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
FILES = 15000
ready, ready_inside = os.pipe()
child = os.fork()
if not child:
    file = os.open("/dev/null", os.O_RDONLY)
    while file < FILES: file = os.dup(file)
    threading.stack_size(1 << 16)
    for _ in range(24): threading.Thread(target=time.sleep, args=[600]).start()
    os.write(ready_inside, b"x"); time.sleep(600)
os.read(ready, 1)
report("full")
def list_files_of_threads(every):
    for thread in os.listdir(f"/proc/{child}/task"):
        directory = os.open(f"/proc/{child}/task/{thread}/fd", os.O_RDONLY)
        os.listdir(directory)
        for number in range(100, FILES, every): os.open(str(number), os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)
        os.close(directory)
    time.sleep(1.2); report("full"); time.sleep(1.2)
    os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
    time.sleep(2.4); report("held"); time.sleep(600)
"""

_FEW_INODES_LEFT_OF_MANY = _OPEN_AND_FREE_INODES + "list_files_of_threads(30)"
_NO_INODES_LEFT_OF_MANY = _OPEN_AND_FREE_INODES + "list_files_of_threads(1 << 40)"


@pytest.mark.parametrize(
    ("source", "kind", "exceeds"),
    [
        (_FEW_MESSAGES_LEFT_OF_MANY, "unreclaimable_free_slab_bytes", True),
        (_NO_MESSAGES_LEFT_OF_MANY, "unreclaimable_free_slab_bytes", False),
        (_FEW_INODES_LEFT_OF_MANY, "reclaimable_free_slab_bytes", True),
        (_NO_INODES_LEFT_OF_MANY, "reclaimable_free_slab_bytes", False),
    ],
)
def test_free_slab_memory_is_attributed_to_the_sandbox(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str], source: str, kind: str, exceeds: bool
):
    if has_own_kernel(runtime):
        pytest.skip("objects belong to the sandbox's kernel")
    if "memory" not in enforced_limits or os.geteuid():
        pytest.skip("kernel memory cannot be measured here")

    async def scenario() -> list[KernelUsage]:
        async with ready_sandbox(runtime, disk, memory_bytes=MEMORY_BYTES) as sandbox:
            program = ["/usr/bin/python3", "-c", _PRELUDE + source]
            await sandbox.kernel_usage()
            output, _ = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            usages = []
            for word in (b"full", b"full", b"held"):
                await read_until(output, word)
                usages.append(await sandbox.kernel_usage())
            await sandbox.kill()
            await sandbox.wait()
            return usages

    free_bytes = [getattr(usage, kind) for usage in asyncio.run(scenario())][-1]
    assert free_bytes is not None
    assert (free_bytes > 128 * MEBIBYTE) == exceeds, free_bytes


def test_free_slab_memory_is_measured(runtime: Runtime, disk: Path, enforced_limits: frozenset[str]):
    if "memory" not in enforced_limits or os.geteuid():
        pytest.skip("kernel memory cannot be measured here")

    async def scenario() -> KernelUsage:
        async with ready_sandbox(runtime, disk, memory_bytes=MEMORY_BYTES) as sandbox:
            return await sandbox.kernel_usage()

    usage = asyncio.run(scenario())
    assert usage.unreclaimable_free_slab_bytes is not None
    assert usage.reclaimable_free_slab_bytes is not None


# Links between mappings


_MAPPINGS = """
pages = mmap.mmap(-1, 60000 * 4096, flags=mmap.MAP_PRIVATE)
address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
for generation in range({generations}):
    pages[0] = 1
    if os.fork(): time.sleep(600)
pages[0] = 1
for page in range(0, {splits} * 2, 2): assert not libc.mprotect(ctypes.c_void_p(address + page * 4096), 4096, 1)
report("held"); time.sleep(600)
"""


def measure_held(runtime: Runtime, disk: Path, source: str, memory_bytes: int, *, exceeds: bool) -> KernelUsage:
    """Run the program until it has printed `held`, and return the result of `poll_usage`."""

    async def scenario() -> KernelUsage:
        async with ready_sandbox(runtime, disk, memory_bytes=memory_bytes, processes_max=512) as sandbox:
            program = ["/usr/bin/python3", "-c", _PRELUDE + source]
            await sandbox.kernel_usage()
            output, _ = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            await read_until(output, b"held")
            return await poll_usage(sandbox, exceeds=exceeds)

    return asyncio.run(scenario())


async def poll_usage(sandbox: Sandbox, *, exceeds: bool) -> KernelUsage:
    """Measure the usage until it exceeds a limit; return the last measurement.

    The polling stops after 60 s if `exceeds` is set, otherwise after 3 s.
    """
    ends_at = time.monotonic() + (60 if exceeds else 3)
    while time.monotonic() < ends_at:
        usage = await sandbox.kernel_usage()
        if usage.find_exceeded_limit():
            break
        await asyncio.sleep(0.1)
    return usage


@pytest.mark.parametrize(("generations", "splits", "exceeds"), [(60, 30000, True), (60, 300, False), (3, 30000, False)])
def test_links_between_mappings_are_limited(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str], generations: int, splits: int, exceeds: bool
):
    if has_own_kernel(runtime):
        pytest.skip("mappings belong to the sandbox's kernel")
    if "memory" not in enforced_limits or os.geteuid():
        pytest.skip("kernel memory cannot be measured here")
    source = _MAPPINGS.replace("{generations}", str(generations)).replace("{splits}", str(splits))
    violation = measure_held(runtime, disk, source, MEMORY_BYTES, exceeds=exceeds).find_exceeded_limit()
    assert ("link mappings" in violation) == exceeds, violation
    assert exceeds or not violation


_MAPPINGS_OF_ONE_FILE = """
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
file = os.memfd_create("mapped"); os.ftruncate(file, 4096)
for page in range(60000):  # with gaps, so that the kernel does not merge them. 0x11: MAP_SHARED, MAP_FIXED
    address = (1 << 40) + page * 8192
    assert libc.mmap(address, 4096, 1, 0x11, file, 0) == address
for _ in range({processes}):
    if os.fork() == 0: time.sleep(600)
report("held"); time.sleep(600)
"""


@pytest.mark.parametrize(("processes", "exceeds"), [(28, True), (10, False)])
def test_mappings_of_a_file_are_limited(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str], processes: int, exceeds: bool
):
    if has_own_kernel(runtime):
        pytest.skip("mappings belong to the sandbox's kernel")
    if "memory" not in enforced_limits or os.geteuid():
        pytest.skip("kernel memory cannot be measured here")
    source = _MAPPINGS_OF_ONE_FILE.replace("{processes}", str(processes))
    violation = measure_held(runtime, disk, source, 2 * MEMORY_BYTES, exceeds=exceeds).find_exceeded_limit()
    assert ("memory mappings" in violation) == exceeds, violation
    assert exceeds or not violation


_BUSY_WITH_PAGE_TABLES = """
memory = mmap.mmap(-1, 140 << 30, flags=mmap.MAP_PRIVATE | 0x4000, prot=1)  # MAP_NORESERVE, PROT_READ
for offset in range(0, 140 << 30, 2 << 20): memory[offset]  # 4 KiB of page table for each 2 MiB
report("held")
while True: pass
"""


def test_mappings_are_limited_only_in_the_sandbox_that_has_them(
    runtime: Runtime, tmp_path: Path, disk: Path, enforced_limits: frozenset[str]
):
    """One sandbox creates mappings slowly. The other sandbox is busy and uses kernel memory for page tables."""
    if has_own_kernel(runtime):
        pytest.skip("mappings belong to the sandbox's kernel")
    if "memory" not in enforced_limits or os.geteuid():
        pytest.skip("kernel memory cannot be measured here")
    other_disk = tmp_path / "other"
    other_disk.mkdir()
    fork = "if os.fork() == 0: time.sleep(600)"
    slow_source = _MAPPINGS_OF_ONE_FILE.replace("{processes}", "36").replace(fork, f"{fork}\n    time.sleep(0.3)")

    async def scenario() -> list[str]:
        async with (
            ready_sandbox(runtime, disk, memory_bytes=MEMORY_BYTES) as busy,
            ready_sandbox(runtime, other_disk, memory_bytes=2 * MEMORY_BYTES) as slow,
        ):
            for sandbox in (busy, slow):
                await sandbox.kernel_usage()
            for sandbox, source in ((busy, _BUSY_WITH_PAGE_TABLES), (slow, slow_source)):
                program = ["/usr/bin/python3", "-c", _PRELUDE + source]
                output, _ = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
                await read_until(output, b"held")
            usages = [await poll_usage(busy, exceeds=False), await poll_usage(slow, exceeds=True)]
            return [usage.find_exceeded_limit() for usage in usages]

    busy_violation, slow_violation = asyncio.run(scenario())
    assert not busy_violation
    assert "memory mappings" in slow_violation


@pytest.fixture
def selectable_processors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Allow programs in the sandbox to select a processor and keep it busy. In production, they cannot select one."""
    machine = os.uname().machine
    if machine in seccomp_filter.ARCHITECTURES:
        numbers = seccomp_filter.ARCHITECTURES[machine]
        monkeypatch.setitem(seccomp_filter.ARCHITECTURES, machine, replace(numbers, sched_setaffinity=numbers.io_setup))
    bubblewrap_confinement._assemble_default_filter.cache_clear()
    yield
    bubblewrap_confinement._assemble_default_filter.cache_clear()


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
"""Functions for programs that start child processes. `use_processor` keeps one processor busy."""

_SLOW_PAGE_REMOVAL = """
PAGES_BYTES = 800 << 20
pages_file = os.memfd_create("pages")
for offset in range(0, PAGES_BYTES, 1 << 20): os.pwrite(pages_file, b"x" * (1 << 20), offset)
pages = memoryview(mmap.mmap(pages_file, PAGES_BYTES))

start = os.pipe()
running = mmap.mmap(-1, 4096)  # 1 for each busy program; the last byte starts them

def become_busy(index):
    while not running[-1]: time.sleep(0.1)
    os.sched_setaffinity(0, {processor}); running[index] = 1
    while True: pass

def remove_pages():
    # A thread that accesses the file in the meantime waits. Without other programs on the processor, this takes 0.2 s.
    for index in range(250): fork_to(lambda: become_busy(index))
    os.read(start[0], 1); running[-1] = 1
    while sum(running[:250]) < 250: time.sleep(0.01)
    os.sched_setaffinity(0, {processor})
    libc.fallocate(pages_file, 3, ctypes.c_long(0), ctypes.c_long(PAGES_BYTES))  # punch a hole, keep the size

def start_to_remove_pages():
    os.write(start[1], b"x")
    first, resident = ctypes.addressof(ctypes.c_char.from_buffer(pages)), ctypes.c_ubyte(1)
    while resident.value & 1: libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(4096), ctypes.byref(resident))

fork_to(remove_pages)
"""

_HIDDEN_MAPPINGS = (
    _BUSY_PROCESSOR
    + _SLOW_PAGE_REMOVAL
    + """
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
pids, opened = os.pipe(), os.pipe()

def hold(index, file):
    os.preadv(file, [pages[PAGES_BYTES - (index + 1) * 4096:][:8]], (1 << 40) // 4096 * 8)

def hold_all():
    threading.stack_size(1 << 16)
    for index in range({processes}):
        pid, = struct.unpack("i", os.read(pids[0], 4))
        file = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
        threading.Thread(target=hold, args=[index, file], daemon=True).start()
        os.write(opened[1], b"x")
    time.sleep(600)

fork_to(hold_all)
file = os.memfd_create("mapped"); os.ftruncate(file, 4096)
for page in range(60000): libc.mmap((1 << 40) + page * 8192, 4096, 1, 0x11, file, 0)
start_to_remove_pages()
for _ in range({processes}):
    pid = fork_to(lambda: time.sleep(600))
    os.write(pids[1], struct.pack("i", pid)); os.read(opened[0], 1); time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
report("held"); time.sleep(600)
"""
)


@pytest.mark.usefixtures("selectable_processors")
@pytest.mark.parametrize(("processes", "exceeds"), [(8, True), (1, False)])
def test_mappings_of_ended_processes_are_limited(
    runtime: Runtime,
    disk: Path,
    enforced_limits: frozenset[str],
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    exceeds: bool,
):
    """A blocked reader of /proc/PID/pagemap keeps the mappings of an ended process. No file in /proc lists them."""
    if has_own_kernel(runtime):
        pytest.skip("mappings belong to the sandbox's kernel")
    if "memory" not in enforced_limits or os.geteuid():
        pytest.skip("kernel memory cannot be measured here")
    for module in ("memory_mappings", "usage_limits"):
        monkeypatch.setattr(f"sandbox.runtimes.limits.{module}.VMA_BYTES_MAX", 32 * MEBIBYTE)
    source = _HIDDEN_MAPPINGS.replace("{processes}", str(processes))
    violation = measure_held(runtime, disk, source, 4 * MEMORY_BYTES, exceeds=exceeds).find_exceeded_limit()
    assert ("memory mappings" in violation) == exceeds, violation
    assert exceeds or not violation


# Files of ending processes


_ENDING_PROCESSES = (
    _BUSY_PROCESSOR
    + """
def end():
    for _ in range({files}): libc.memfd_create(b"", 0)
    os.sched_setaffinity(0, {processor})
    os._exit(0)

for _ in range(150): fork_to(use_processor)
for _ in range(4): fork_to(end)
report("held"); time.sleep(600)
"""
)


@pytest.mark.usefixtures("selectable_processors")
@pytest.mark.parametrize(("files", "counts"), [(16000, True), (20, False)])
def test_files_of_processes_that_take_a_long_time_to_end_are_counted(
    runtime: Runtime,
    disk: Path,
    enforced_limits: frozenset[str],
    monkeypatch: pytest.MonkeyPatch,
    files: int,
    counts: bool,
):
    """An ending process no longer has a descriptor table, but keeps its files until it gets a processor."""
    if has_own_kernel(runtime):
        pytest.skip("files belong to the sandbox's kernel")
    if "memory" not in enforced_limits or os.geteuid():
        pytest.skip("the threads cannot be inspected here")
    kernel_bytes = itertools.chain([0], itertools.repeat(4 << 30))
    monkeypatch.setattr(
        "sandbox.runtimes.bubblewrap.runtime.ClosingFilesMeter",
        lambda: ClosingFilesMeter(kernel_bytes.__next__),
    )

    async def scenario() -> int:
        async with ready_sandbox(runtime, disk, memory_bytes=4 * MEMORY_BYTES, processes_max=512) as sandbox:
            source = _PRELUDE + _ENDING_PROCESSES.replace("{files}", str(files))
            await sandbox.kernel_usage()
            command = Command(["/usr/bin/python3", "-c", source], {"PATH": "/usr/bin:/bin"}, "/workspace")
            output, _ = await sandbox.start(command)
            await read_until(output, b"held")
            most, ends_at = 0, time.monotonic() + 10
            while not most and time.monotonic() < ends_at:
                most = (await sandbox.kernel_usage()).closing_files_bytes or 0
                await asyncio.sleep(0.1)
            return most

    assert (asyncio.run(scenario()) > 0) == counts


# Terminals


_TERMINAL_INPUT = """
import pty, select, termios
terminals = [os.openpty() for _ in range({terminals})]
for master, _ in terminals:
    os.set_blocking(master, False)
    os.write(master, b"a" * 500)
report("held")
while True:
    for master, peer in terminals:
        try: os.write(master, {text} * 4096)
        except BlockingIOError: pass
        termios.tcflush(peer, termios.TCIOFLUSH if {reads} else termios.TCOFLUSH)
        try: os.read(master, 65536)
        except BlockingIOError: pass
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("text", "terminals", "is_limited"), [(r'b"\x12"', 8, True), (r'b"a"', 8, False)], ids=["reprint", "letters"]
)
def test_time_of_kernel_threads_for_terminals_is_limited(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str], text: str, terminals: int, is_limited: bool
):
    """A reprint character makes a kernel thread repeat the whole line. Kernel threads are in no control group."""
    if has_own_kernel(runtime):
        pytest.skip("terminals belong to the sandbox's kernel")
    if "memory" not in enforced_limits or os.geteuid():
        pytest.skip("kernel threads cannot be inspected here")

    async def scenario() -> str:
        async with ready_sandbox(runtime, disk, memory_bytes=MEMORY_BYTES) as sandbox:
            source = _TERMINAL_INPUT.format(text=text, terminals=terminals, reads=not is_limited)
            command = Command(["/usr/bin/python3", "-c", _PRELUDE + source], {"PATH": "/usr/bin:/bin"}, "/workspace")
            output, _ = await sandbox.start(command)
            await read_until(output, b"held")
            try:
                async with asyncio.timeout(60 if is_limited else 5):
                    return await sandbox.wait_for_exceeded_limit()
            except TimeoutError:
                return ""

    assert ("terminals" in asyncio.run(scenario())) == is_limited


LOCK_WAIT_SECONDS_MAX = 15.0
"""Maximum wait of a program on the host for the lock, on a busy machine. Without the limit, it is over a minute."""

_OPENED_TERMINALS = """
import pty
for number in range(40):
    if os.fork() == 0:
        while True:
            try: os.close(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY))
            except OSError: pass
report("held")
for number in range({busy}):
    if os.fork() == 0:
        while True: pass
while True: time.sleep(600)
"""


@pytest.mark.parametrize(
    ("busy", "may_hold_lock"), [(400, True), (0, False)], ids=["busy programs", "no other programs"]
)
def test_lock_for_opening_terminals_is_not_held_for_long(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str], busy: int, may_hold_lock: bool
):
    """While a program holds the lock and gets no CPU time, no program of the machine can open a terminal."""
    if has_own_kernel(runtime):
        pytest.skip("terminals belong to the sandbox's kernel")
    if "memory" not in enforced_limits or os.geteuid():
        pytest.skip("the threads of the sandbox cannot be inspected here")

    async def scenario() -> str:
        async with ready_sandbox(runtime, disk, cpus=1, processes_max=512) as sandbox:
            source = _OPENED_TERMINALS.format(busy=busy)
            command = Command(["/usr/bin/python3", "-c", _PRELUDE + source], {"PATH": "/usr/bin:/bin"}, "/workspace")
            output, _ = await sandbox.start(command)
            await read_until(output, b"held")
            try:
                async with asyncio.timeout(45 if may_hold_lock else 6):
                    return await sandbox.wait_for_exceeded_limit()
            except TimeoutError:
                return ""

    waits, has_ended = [0.0], threading.Event()

    def measure_waits() -> None:
        while not has_ended.wait(0.05):
            started_at = time.monotonic()
            Path("/proc/tty/drivers").read_bytes()  # needs the lock
            waits.append(time.monotonic() - started_at)

    with ThreadPoolExecutor(1) as executor:
        measuring = executor.submit(measure_waits)
        try:
            violation = asyncio.run(scenario())
        finally:
            has_ended.set()
        measuring.result()
    assert max(waits) < LOCK_WAIT_SECONDS_MAX
    assert ("opened or closed terminals" in violation) == bool(violation), violation
    assert may_hold_lock or not violation
    # The scheduler decides whether a program gets the lock and loses the processor. On an idle machine, this is rare.
    if may_hold_lock and not violation:
        pytest.skip(f"the attack had no effect: no program waited longer than {max(waits):.1f} s")


# Buffers of system calls in progress


_BLOCKED_SYSCTL_READS = """
THREADS, BYTES = {threads}, (4 << 20) - 4096
file = os.open("/workspace/pages", os.O_RDWR | os.O_CREAT)
EXTENTS = 2048
def allocate(mode, start, size): return libc.fallocate(file, mode, ctypes.c_long(start), ctypes.c_long(size))
if not any(allocate(0, index * 8192, 4096) for index in range(EXTENTS)): os.truncate(file, EXTENTS * 8192)
pages = memoryview(mmap.mmap(file, 16 << 20))

def zero_extents():
    # The kernel locks the pages of the file for a few tenths of a second, so threads that write into them wait.
    while True:
        if allocate(0x10, 0, EXTENTS * 8192): os._exit(ctypes.get_errno())  # FALLOC_FL_ZERO_RANGE

def read_setting(index):
    setting = os.open("/proc/sys/kernel/pid_max", os.O_RDONLY)
    while True: os.preadv(setting, [pages[index * 4096:][:BYTES]], 0)

child = os.fork()
if not child: zero_extents()
time.sleep(1)
if os.waitpid(child, os.WNOHANG)[0]: report("unsupported"); time.sleep(600)
threading.stack_size(1 << 16)
for index in range(THREADS): threading.Thread(target=read_setting, args=[index], daemon=True).start()
report("held"); time.sleep(600)
"""


@pytest.mark.parametrize(("threads", "exceeds"), [(120, True), (24, False)])
def test_buffers_of_blocked_sysctl_reads_are_limited(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str], threads: int, exceeds: bool
):
    if has_own_kernel(runtime):
        pytest.skip("the sandbox's kernel has the buffers")
    if "memory" not in enforced_limits or os.geteuid():
        pytest.skip("the threads cannot be inspected here")

    async def scenario() -> str:
        async with ready_sandbox(runtime, disk, memory_bytes=MEMORY_BYTES, processes_max=512) as sandbox:
            source = _PRELUDE + _BLOCKED_SYSCTL_READS.format(threads=threads)
            await sandbox.kernel_usage()
            command = Command(["/usr/bin/python3", "-c", source], {"PATH": "/usr/bin:/bin"}, "/workspace")
            output, _ = await sandbox.start(command)
            if b"unsupported" in await read_until(output, b"\n"):
                pytest.skip("this file system cannot zero extents")
            for _ in range(600 if exceeds else 60):
                if violation := (await sandbox.kernel_usage()).find_exceeded_limit():
                    break
                await asyncio.sleep(0.1)
            await sandbox.kill()
            await sandbox.wait()
            return violation

    assert ("/proc/sys" in asyncio.run(scenario())) == exceeds


_BLOCKED_SYSCTL_READS_WITH_CLOSED_FILES = (
    _BUSY_PROCESSOR
    + _SLOW_PAGE_REMOVAL
    + """
settings = [os.open("/proc/sys/kernel/pid_max", os.O_RDONLY) for _ in range({threads})]
time.sleep(0.5); start_to_remove_pages()
threading.stack_size(1 << 16)
for index, setting in enumerate(settings):
    buffer = pages[PAGES_BYTES - (5 << 20) - index * 4096:][:(4 << 20) - 4096]
    threading.Thread(target=os.preadv, args=[setting, [buffer], 0], daemon=True).start()

def count_waiting():
    stats = (open(f"/proc/self/task/{thread}/stat").read() for thread in os.listdir("/proc/self/task"))
    return sum(stat.rpartition(")")[2].split()[0] == "D" for stat in stats)

while count_waiting() < len(settings): time.sleep(0.01)
null = os.open("/dev/null", os.O_RDONLY)
for setting in settings: os.dup2(null, setting)
report("held"); time.sleep(600)
"""
)


@pytest.mark.usefixtures("selectable_processors")
@pytest.mark.parametrize(("threads", "exceeds"), [(120, True), (24, False)])
def test_buffers_of_blocked_sysctl_reads_are_limited_after_their_file_is_closed(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str], threads: int, exceeds: bool
):
    if has_own_kernel(runtime):
        pytest.skip("the sandbox's kernel has the buffers")
    if "memory" not in enforced_limits or os.geteuid():
        pytest.skip("the threads cannot be inspected here")
    source = _BLOCKED_SYSCTL_READS_WITH_CLOSED_FILES.replace("{threads}", str(threads))
    violation = measure_held(runtime, disk, source, 4 * MEMORY_BYTES, exceeds=exceeds).find_exceeded_limit()
    assert ("/proc/sys" in violation) == exceeds, violation


# Other shared pools


_FILTERS = """
code = struct.pack("HBBI", 0x06, 0, 0, 0x7FFC0000)  # SECCOMP_RET_LOG
kept = ctypes.create_string_buffer(code, len(code))
program = struct.pack("HxxxxxxP", 1, ctypes.addressof(kept))
seccomp = {"x86_64": 317, "aarch64": 277}[os.uname().machine]
def confine(mode):
    if libc.prctl(22, mode, program, 0, 0) != 0: raise OSError(ctypes.get_errno(), "")
for mode in (1, 2): report(attempt(lambda: confine(mode)))
for flags in (0, 1, 2, 8): report(attempt(lambda: system_call(seccomp, 1, flags, program)))
"""

_FILTER_QUERIES = """
seccomp = {"x86_64": 317, "aarch64": 277}[os.uname().machine]
report(attempt(lambda: system_call(seccomp, 2, 0, struct.pack("I", 0x7FFF0000))), libc.prctl(39, 0, 0, 0, 0))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
report(status["Seccomp"].strip())
"""


def test_seccomp_filters_cannot_be_installed(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("filters belong to the sandbox's kernel")
    assert output_lines(runtime, disk, _FILTERS) == ["EINVAL"] * 6
    assert output_lines(runtime, disk, _FILTER_QUERIES) == ["done 1", "2"]


_NOTIFICATION_PIPES = """
report(attempt(lambda: os.pipe2(os.O_EXCL) and "made"))
report(attempt(lambda: os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT) and "made"))
"""


def test_notification_pipes_are_denied(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("pipes belong to the sandbox's kernel")
    assert output_lines(runtime, disk, _NOTIFICATION_PIPES) == ["ENOPKG", "made"]


_HUGE_PAGES = """
report(attempt(lambda: str(mmap.mmap(-1, 2 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000))))
report(attempt(lambda: str(os.memfd_create("huge", 4))))
report(attempt(lambda: str(os.memfd_create("all flags", 0xFFFFFFFF))))
shmget, secret = {"x86_64": 29, "aarch64": 194}[os.uname().machine], 447
report(attempt(lambda: str(system_call(shmget, 0, 2 << 20, 0o4000 | 0o1600))))
report(attempt(lambda: str(system_call(secret, 0))))
"""

_ORDINARY_PAGES = """
memory = mmap.mmap(-1, 4 << 20)
memory.madvise(mmap.MADV_HUGEPAGE); memory.write(bytes(4 << 20))
file = os.memfd_create("ordinary"); os.write(file, b"x")
shmget = {"x86_64": 29, "aarch64": 194}[os.uname().machine]
report(attempt(lambda: system_call(shmget, 0, 4096, 0o1600) and "shared"))
"""


def test_huge_pages_are_denied(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("pages belong to the sandbox's kernel")
    assert output_lines(runtime, disk, _HUGE_PAGES) == ["ENOMEM", "EINVAL", "EINVAL", "ENOMEM", "ENOSYS"]


def test_page_merging_is_denied(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("pages belong to the sandbox's kernel")
    source = """
memory = mmap.mmap(-1, 1 << 20)
report(attempt(lambda: memory.madvise(mmap.MADV_MERGEABLE)), libc.prctl(67, 1, 0, 0, 0))
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
this_process, ranges = os.pidfd_open(os.getpid()), (ctypes.c_size_t * 2)(address, 4096)
def advise(advice): system_call(440, this_process, ranges, 1, advice, 0)  # process_madvise
report(attempt(lambda: advise(mmap.MADV_MERGEABLE)), attempt(lambda: advise(20)))  # MADV_COLD
memory.madvise(mmap.MADV_DONTNEED); memory.madvise(mmap.MADV_WILLNEED); report(libc.prctl(15, b"name", 0, 0, 0))
"""
    assert output_lines(runtime, disk, source) == ["EINVAL -1", "EINVAL done", "0"]


def test_ordinary_memory_calls_succeed(runtime: Runtime, disk: Path):
    assert output_lines(runtime, disk, _ORDINARY_PAGES)[-1] in {"shared", "done"}


_OUT_OF_MEMORY_SCORE = """
report(open("/proc/self/oom_score_adj").read().strip())
for value in ("0", "-1", "499", "-1000"):
    for name in ("oom_score_adj", "oom_adj", f"task/{os.getpid()}/oom_score_adj"):
        def write():
            with open(f"/proc/self/{name}", "w") as file: file.write(value)
        report(attempt(write))
report(open("/proc/self/oom_score_adj").read().strip())
if os.fork() == 0: report(open("/proc/self/oom_score_adj").read().strip()); os._exit(0)
os.wait()
threading.Thread(target=lambda: libc.prctl(15, b"renamed")).start()
"""


def test_oom_score_cannot_be_lowered(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("scores belong to the sandbox's kernel")
    before, *attempts, after, child_score = output_lines(runtime, disk, _OUT_OF_MEMORY_SCORE)
    assert (before, after, child_score) == ("500", "500", "500")
    assert set(attempts) <= {"EROFS", "EACCES", "ENOENT"}, attempts
    assert len(attempts) == 12


async def test_oom_score_cannot_be_lowered_on_a_terminal(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("scores belong to the sandbox's kernel")

    async def scenario() -> str:
        from sandbox.interfaces.runtime import TerminalSize

        async with ready_sandbox(runtime, disk) as sandbox:
            output, _ = await sandbox.start(Command(["/bin/sh", "-c", "echo up; sleep 300"], {}, "/workspace"))
            await read_until(output, b"up")
            script = "echo 0 > /proc/self/oom_score_adj; cat /proc/self/oom_score_adj"
            terminal = await sandbox.open_terminal(
                Command(["/bin/bash", "-c", script], {}, "/workspace"), TerminalSize(24, 80)
            )
            async with asyncio.timeout(60):
                return (await terminal.output.read()).decode()

    assert (await scenario()).splitlines()[-1] == "500"


def test_timers_message_queues_and_priorities_are_limited(runtime: Runtime, disk: Path):
    if has_own_kernel(runtime):
        pytest.skip("timers belong to the sandbox's kernel")
    source = """
for kind in (11, 12, resource.RLIMIT_NICE, resource.RLIMIT_RTPRIO): report(*resource.getrlimit(kind))
"""
    lines = output_lines(runtime, disk, source)
    assert lines == ["1024 1024", "819200 819200", "0 0", "0 0"]


async def test_command_with_full_socket_buffers_exits(runtime: Runtime, disk: Path):
    async def scenario() -> CommandResult:
        async with ready_sandbox(runtime, disk, memory_bytes=MEMORY_BYTES) as sandbox:
            return await run_in(sandbox, ["/usr/bin/python3", "-c", _PRELUDE + _TCP_NEVER_READ.replace("600", "0")])

    result = await scenario()
    assert result.code == 0, result


@pytest.mark.parametrize(("source", "count_min"), [("time.sleep(600)", 3), ("while True: pass", 12)])
def test_kernel_usage_is_measured_while_programs_wait_or_run(
    runtime: Runtime, disk: Path, enforced_limits: frozenset[str], source: str, count_min: int
):
    """An idle sandbox is measured twice a second, and an active one ten times. A busy machine measures less often."""
    if has_own_kernel(runtime):
        pytest.skip("the kernel of an idle sandbox may run")
    if "memory" not in enforced_limits:
        pytest.skip("the CPU time of the sandbox is unknown here")

    async def scenario() -> list[float]:
        async with ready_sandbox(runtime, disk, memory_bytes=MEMORY_BYTES) as sandbox:
            times, measure_usage = list[float](), sandbox.kernel_usage

            async def measure_and_record() -> KernelUsage:
                times.append(time.monotonic())
                return await measure_usage()

            sandbox.kernel_usage = measure_and_record
            program = ["/usr/bin/python3", "-c", _PRELUDE + 'report("held")\n' + source]
            output, _ = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            await read_until(output, b"held")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(sandbox.wait_for_exceeded_limit(), 5)
            await sandbox.kill()
            await sandbox.wait()
            return times

    assert len(asyncio.run(scenario())) >= count_min
