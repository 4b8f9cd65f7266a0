"""When a gateway is killed, a sandbox that is still there has no network at all; nothing opens instead."""

import os
import socket
import subprocess
import sys

import msgspec
import pytest

from doubles import gateway_process
from doubles.blocked_internet import ClosedInternet
from doubles.fake_internet import run
from doubles.network_namespace import in_namespace
from sandbox.interfaces.gateway import GatewayRules
from sandbox.model.egress import EgressRules

HOST_ADDRESS = "8.8.4.4"
RULES = msgspec.json.encode(GatewayRules(egress=EgressRules(is_unrestricted=True))).decode()


@pytest.fixture
def internet():
    with ClosedInternet() as internet:
        run(*internet.internet_prefix, "ip", "address", "add", f"{HOST_ADDRESS}/32", "dev", "lo")
        yield internet


@pytest.fixture
def sandbox():
    """A network namespace as a launcher makes it; gives its path."""
    keeper = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec sleep 600"], stdout=subprocess.PIPE
    )
    assert keeper.stdout.readline() == b"ready\n"
    path = f"/proc/{keeper.pid}/ns/net"
    run("nsenter", f"--net={path}", "ip", "route", "add", "local", "198.18.0.0/15", "dev", "lo")
    yield path
    keeper.kill()
    keeper.wait()
    keeper.stdout.close()


@pytest.fixture
def gateway(internet, sandbox):
    """Its process, which lives on the server's side, and listens in the sandbox."""
    with in_namespace(sandbox):
        tcp = [
            socket.create_server((address, port))
            for address, port in (("127.0.0.1", 8123), ("127.0.0.1", 3128), ("0.0.0.0", 53), ("0.0.0.0", 443))
        ]
        names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        names.bind(("0.0.0.0", 53))
    model, proxy, names_tcp, transparent = (one.fileno() for one in tcp)
    numbers = [model, proxy, names.fileno(), names_tcp, transparent]
    told = f"{model},{proxy},{names.fileno()},{names_tcp},443={transparent}"
    process = subprocess.Popen(
        [*internet.server_prefix, sys.executable, gateway_process.__file__, told, RULES],
        pass_fds=numbers,
        stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for one in (*tcp, names):
        one.close()
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


def test_with_its_process_the_door_closes(internet, sandbox, gateway):
    with in_namespace(f"/proc/{internet.internet_prefix[3]}/ns/net"):
        host = socket.create_server((HOST_ADDRESS, 22))
    with host, tunnel(sandbox) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        arrived, _ = host.accept()
        with arrived:
            arrived.sendall(b"SSH-2.0-host\r\n")
            assert connection.recv(1000) == b"SSH-2.0-host\r\n"
            before = list(internet.packets)
            assert ("tcp", HOST_ADDRESS, 22) in before
            gateway.kill()
            gateway.wait()
            assert connection.recv(1000) == b"", "what was open ends"
            arrived.settimeout(10)
            assert arrived.recv(1000) == b""
    for address, port in (("127.0.0.1", 8123), ("127.0.0.1", 3128), ("198.18.0.2", 443), ("198.18.0.1", 53)):
        with pytest.raises(ConnectionRefusedError):
            connect(sandbox, address, port)
    for address in (HOST_ADDRESS, "203.0.113.1"):
        with pytest.raises(OSError, match="unreachable"):
            connect(sandbox, address, 22)
    assert internet.packets == before
