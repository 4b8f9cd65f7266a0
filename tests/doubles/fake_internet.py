"""Two network namespaces: one for the server, and one that serves as a fake internet.

A veth pair connects them. Every packet that arrives at the internet's end is recorded, whatever its destination. No
packet can reach a real network: neither namespace has another route.
"""

import contextlib
import select
import socket
import struct
import subprocess
import threading
import time

from doubles.network_namespace import in_namespace

INTERNET_ADDRESS = "203.0.113.1"
SERVER_ADDRESS = "203.0.113.2"
METADATA_ADDRESS = "169.254.169.254"
PUBLIC_ADDRESS = "198.51.100.7"
PRIVATE_ADDRESS = "10.1.2.3"


class FakeInternet:
    """A context manager that creates both namespaces.

    server_command_prefix, internet_command_prefix: the words before a command that runs in one of the namespaces.
    packets: (protocol, address, port) of every recorded packet. For TCP connections, only the SYN packets are recorded.
    """

    def __init__(self):
        self.packets = []
        self._holders = []
        self._stop = threading.Event()

    def __enter__(self):
        self._holders = [_hold_namespace(), _hold_namespace()]
        server, internet = (str(holder.pid) for holder in self._holders)
        self.server_command_prefix = ("nsenter", "--net", "--target", server, "--")
        self.server_namespace = f"/proc/{server}/ns/net"
        self.internet_command_prefix = ("nsenter", "--net", "--target", internet, "--")
        _run(
            *self.server_command_prefix,
            "ip",
            "link",
            "add",
            "wire0",
            "type",
            "veth",
            "peer",
            "name",
            "wire1",
            "netns",
            internet,
        )
        for command_prefix, device, address in (
            (self.server_command_prefix, "wire0", SERVER_ADDRESS),
            (self.internet_command_prefix, "wire1", INTERNET_ADDRESS),
        ):
            _run(*command_prefix, "ip", "link", "set", "lo", "up")
            _run(*command_prefix, "ip", "address", "add", f"{address}/24", "dev", device)
            _run(*command_prefix, "ip", "link", "set", device, "up")
        _run(*self.server_command_prefix, "ip", "route", "add", "default", "via", INTERNET_ADDRESS)
        for address in (METADATA_ADDRESS, PUBLIC_ADDRESS, PRIVATE_ADDRESS):
            _run(*self.internet_command_prefix, "ip", "address", "add", f"{address}/32", "dev", "lo")
        self._sniffer = threading.Thread(target=self._capture_packets, args=(f"/proc/{internet}/ns/net",))
        self._sniffer.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._sniffer.join()
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def can_reach(self, address, port):
        """Return whether a process in the server's namespace can connect to the address.

        Tests use it to check that the veth pair works.
        """
        script = f"import socket; socket.create_connection(({address!r}, {port}), 3).close()"
        with contextlib.suppress(subprocess.CalledProcessError):
            _run(*self.server_command_prefix, "python3", "-I", "-c", script)
            return True
        return False

    def _capture_packets(self, namespace):
        with in_namespace(namespace):
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
            wire.bind(("wire1", 0x0003))
        with wire:
            while not self._stop.is_set():
                if select.select([wire], [], [], 0.05)[0]:
                    packet, (_, protocol, kind, *_rest) = wire.recvfrom(65_535)
                    if kind != socket.PACKET_OUTGOING and protocol == 0x0800:
                        self._record(packet)

    def _record(self, packet):
        header_length = (packet[0] & 15) * 4
        protocol, destination = packet[9], socket.inet_ntoa(packet[16:20])
        if protocol == socket.IPPROTO_TCP:
            flags = packet[header_length + 13]
            if flags & 0x12 == 0x02:
                self.packets.append(("tcp", destination, struct.unpack_from("!H", packet, header_length + 2)[0]))
        elif protocol == socket.IPPROTO_UDP:
            self.packets.append(("udp", destination, struct.unpack_from("!H", packet, header_length + 2)[0]))
        else:
            self.packets.append((str(protocol), destination, 0))


def _hold_namespace():
    """Start a process that keeps a new network namespace alive."""
    holder = subprocess.Popen(["unshare", "--net", "sleep", "3600"])
    own, deadline = _namespace("self"), time.monotonic() + 10
    while _namespace(holder.pid) == own:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return holder


def _namespace(pid):
    import os

    return os.readlink(f"/proc/{pid}/ns/net")  # noqa: PTH115


def _run(*command):
    subprocess.run(command, check=True, timeout=20, capture_output=True)
