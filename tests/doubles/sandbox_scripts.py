"""Scripts that run inside sandboxes of several runtimes."""

import asyncio
import socket

IDENTITY_SCRIPT = r"""
grep -E '^(Uid|Gid|Groups|CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp|Seccomp_filters|Umask|Cpus_allowed):' \
    /proc/self/status
grep -E '^(Speculation_Store_Bypass|SigIgn|SigBlk):' /proc/self/status
cat /proc/self/{uid_map,gid_map,setgroups,mountinfo,cgroup,oom_score_adj,limits}
readlink /proc/self/ns/{user,mnt,pid,net,ipc,uts,cgroup}
umask; id; hostname; ls -1 /proc/self/fd
"""
"""A bash script that prints the identity and confinement of a command."""

CONNECT_SCRIPT = """
import errno, socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    for address in ("198.51.100.1", "2001:db8::1"):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, kind) as one:
            one.settimeout(2)
            try:
                one.connect((address, 53))
                print("connected", address)
            except OSError as error:
                print(errno.errorcode[error.errno])
with socket.create_connection(("198.18.3.4", 443), timeout=5) as reached:
    print(reached.getpeername()[0])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
    asker.settimeout(5)
    asker.connect(("198.18.0.1", 53))
    asker.send(b"question")
    print(asker.recv(100).decode())
"""
"""A Python script that prints which destinations are reachable; `respond_to_query` must run concurrently."""

CONNECT_OUTPUT = [*["ENETUNREACH"] * 4, "198.18.3.4", "answer"]
"""The expected output: other hosts are unreachable, and the gateway gets the address that the client dialed."""


CLOSE_CONNECTION_IN_TRANSIT_SCRIPT = """
import os, select, socket, struct, time
server = socket.socket(); server.bind(("127.0.0.1", 0)); server.listen()
client = socket.create_connection(server.getsockname()); peer, _ = server.accept()
client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30)); client.setblocking(False)
full_since = time.monotonic()
while time.monotonic() < full_since + 0.5:
    try: client.send(bytes(65536)); full_since = time.monotonic()
    except BlockingIOError: time.sleep(0.01)
client.setblocking(True)
reading, writing = os.pipe(); one, other = socket.socketpair()
socket.send_fds(other, [b"x"], [one.fileno(), client.fileno(), peer.fileno(), writing])
for each in (one, client, peer, other): each.close()
os.close(writing)
poll = select.poll(); poll.register(reading, 0)
"""
"""A Python script that closes a connection whose only descriptors are in transit in a closed Unix socket.

Therefore, a kernel thread closes the connection, which has unsent data, before the connection's peer and a pipe.
`poll` waits until the thread has closed the pipe.
"""


async def respond_to_query(dns_listener: socket.socket) -> None:
    """Respond to one query at the DNS listener, like the gateway."""
    question, client_address = await asyncio.get_running_loop().sock_recvfrom(dns_listener, 100)
    assert question == b"question"
    dns_listener.sendto(b"answer", client_address)


def accept_connection(transparent_listener: socket.socket) -> None:
    """Accept one connection on port 443; its local address must be the one that the client dialed."""
    connection, _ = transparent_listener.accept()
    assert connection.getsockname() == ("198.18.3.4", 443)
    connection.close()
