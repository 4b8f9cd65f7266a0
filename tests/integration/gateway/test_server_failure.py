"""A sandbox that outlives its killed gateway has no network access."""

import os
import socket
import subprocess
import sys

import msgspec
import pytest

from doubles import gateway_process
from doubles.deployment import wait_until
from doubles.fake_internet import FakeInternet
from doubles.fake_internet_deployment import run
from doubles.network_namespace import in_namespace
from sandbox.interfaces.gateway import GatewayRules
from sandbox.model.egress import EgressRules

HOST_ADDRESS = "8.8.4.4"
RULES = msgspec.json.encode(GatewayRules(egress=EgressRules(is_unrestricted=True))).decode()


@pytest.fixture
def network():
    with FakeInternet() as network:
        run(*network.internet_command_prefix, "ip", "address", "add", f"{HOST_ADDRESS}/32", "dev", "lo")
        yield network


@pytest.fixture
def sandbox_namespace():
    """Create a network namespace like the launcher's; yield its path."""
    namespace_holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec sleep 600"], stdout=subprocess.PIPE
    )
    assert namespace_holder.stdout.readline() == b"ready\n"
    path = f"/proc/{namespace_holder.pid}/ns/net"
    run("nsenter", f"--net={path}", "ip", "route", "add", "local", "198.18.0.0/15", "dev", "lo")
    yield path
    namespace_holder.kill()
    namespace_holder.wait()
    namespace_holder.stdout.close()


@pytest.fixture
def gateway(network, sandbox_namespace):
    """Run the gateway in a process in the server's namespace; its listeners are in the sandbox's namespace."""
    with in_namespace(sandbox_namespace):
        tcp = [
            socket.create_server((address, port))
            for address, port in (("127.0.0.1", 8123), ("127.0.0.1", 3128), ("0.0.0.0", 53), ("0.0.0.0", 443))
        ]
        dns_udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        dns_udp.bind(("0.0.0.0", 53))
    model, proxy, dns_tcp, transparent = (listener.fileno() for listener in tcp)
    descriptors = [model, proxy, dns_udp.fileno(), dns_tcp, transparent]
    listeners = f"{model},{proxy},{dns_udp.fileno()},{dns_tcp},443={transparent}"
    process = subprocess.Popen(
        [*network.server_command_prefix, sys.executable, gateway_process.__file__, listeners, RULES],
        pass_fds=descriptors,
        stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for listener in (*tcp, dns_udp):
        listener.close()
    assert process.stdout.readline() == b"serves\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def connect(namespace, address, port):
    with in_namespace(namespace):
        return socket.create_connection((address, port), 10)


def tunnel(namespace):
    connection = connect(namespace, "127.0.0.1", 3128)
    connection.sendall(f"CONNECT {HOST_ADDRESS}:22 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return connection


def test_killed_gateway_closes_all_connections_and_listeners(network, sandbox_namespace, gateway):
    with in_namespace(f"/proc/{network.internet_command_prefix[3]}/ns/net"):
        host = socket.create_server((HOST_ADDRESS, 22))
    with host, tunnel(sandbox_namespace) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        accepted, _ = host.accept()
        with accepted:
            accepted.sendall(b"SSH-2.0-host\r\n")
            assert connection.recv(1000) == b"SSH-2.0-host\r\n"
            wait_until(lambda: ("tcp", HOST_ADDRESS, 22) in network.packets, 10, "the packets to be recorded")
            before = list(network.packets)
            gateway.kill()
            gateway.wait()
            assert connection.recv(1000) == b"", "the open tunnel ends"
            accepted.settimeout(10)
            assert accepted.recv(1000) == b""
    for address, port in (("127.0.0.1", 8123), ("127.0.0.1", 3128), ("198.18.0.2", 443), ("198.18.0.1", 53)):
        with pytest.raises(ConnectionRefusedError):
            connect(sandbox_namespace, address, port)
    for address in (HOST_ADDRESS, "203.0.113.1"):
        with pytest.raises(OSError, match="unreachable"):
            connect(sandbox_namespace, address, 22)
    assert network.packets == before
