"""The uninterrupted kernel work of one system call is bounded."""

import asyncio
from pathlib import Path

import pytest

from doubles.sandbox_lifecycle import living, read_until
from sandbox.interfaces.runtime import Command, KernelUsage, Runtime
from sandbox.model.limits import UDP_SOCKETS_ON_PORT_MAX

_BOUND_SOCKETS = """
import socket, time
def bound(port):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind(("0.0.0.0", port))
    return one
held = [bound(9999) for _ in range({shared})] + [bound(0) for _ in range({alone})]
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
sender.sendto(b"hello", ("127.255.255.255", 9999))
print(held[0].recv(100), "held", flush=True)
time.sleep(600)
"""


def measure(runtime: Runtime, disk: Path, source: str) -> KernelUsage:
    """The kernel usage once the program printed `held`."""

    async def scenario() -> KernelUsage:
        async with living(runtime, disk) as sandbox:
            program = ["/usr/bin/python3", "-c", source]
            output, _ = await sandbox.start(Command(program, {"PATH": "/usr/bin:/bin"}, "/workspace"))
            assert b"hello" in await read_until(output, b"held")
            return await sandbox.kernel_usage()

    return asyncio.run(scenario())


def test_sockets_on_one_port_are_limited(runtime: Runtime, disk: Path):
    if runtime.name == "qemu":
        pytest.skip("sockets belong to the sandbox's kernel")
    usage = measure(runtime, disk, _BOUND_SOCKETS.format(shared=UDP_SOCKETS_ON_PORT_MAX + 1, alone=0))
    assert "UDP sockets on one port" in usage.find_violation()


def test_ordinary_port_sharing_is_within_limits(runtime: Runtime, disk: Path):
    usage = measure(runtime, disk, _BOUND_SOCKETS.format(shared=100, alone=400))
    assert usage.find_violation() == ""
