"""The runner's control socket: renewals of the lease."""

import asyncio

import msgspec
import pytest

from sandbox.interfaces.runner import RenewLease, Reply
from sandbox.primitives.runner_cpu_throttle import CpuThrottle
from sandbox.runner.control_socket import serve_control_socket
from sandbox.runner.terminals import TerminalServer


@pytest.fixture
def socket_path(tmp_path):
    return tmp_path / "abcdefghijkl.sock"


def serving(path, renew):
    terminals = TerminalServer(None, CpuThrottle().queue())
    return serve_control_socket(path, lambda _: Reply(done=True), terminals, renew)


async def send(path, line):
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(line + b"\n")
    reply = msgspec.json.decode(await reader.readline(), type=Reply)
    writer.close()
    return reply


async def test_lease_is_renewed(socket_path):
    deadlines = []
    async with serving(socket_path, deadlines.append):
        assert (await send(socket_path, msgspec.json.encode(RenewLease(12.5)))).done
    assert deadlines == [12.5]


async def test_runner_without_a_lease_rejects_a_renewal(socket_path):
    async with serving(socket_path, None):
        reply = await send(socket_path, msgspec.json.encode(RenewLease(12.5)))
    assert not reply.done
    assert "no lease" in reply.message


@pytest.mark.parametrize("deadline", [b'"soon"', b"null", b"1e999", b"[1]"])
async def test_invalid_deadline_is_rejected(socket_path, deadline):
    deadlines = []
    async with serving(socket_path, deadlines.append):
        reply = await send(socket_path, b'{"type":"renew_lease","deadline":%b}' % deadline)
    assert not reply.done
    assert deadlines == []
