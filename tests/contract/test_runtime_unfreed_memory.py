"""Memory that the kernel keeps after the end of a sandbox is reported.

On a kernel that does not free it, each run of this module keeps 1.5 MiB and six sockets until the machine restarts.
"""

import asyncio
import logging
import os
from pathlib import Path

import pytest

from doubles.sandbox_lifecycle import has_own_kernel, new_attempt_id, run_in, sandbox_spec
from sandbox.interfaces.runtime import Runtime
from sandbox.runtimes import kernel_uid_pool

SENT_BYTES = 3 * 512 * 1024

_CYCLE = f"""
import os, socket
pairs = dict(zip("ABC", (socket.socketpair() for _ in range(3))))
memory = os.memfd_create("memory")
os.write(memory, bytes({SENT_BYTES}))
for number, (sent, target) in enumerate(("AB", "BC", "BA", "CB")):
    files = [pairs[sent][0].fileno(), *([memory] if number == 0 else [])]
    socket.send_fds(pairs[target][1], [b"x"], files)
"""

_KILLED_WHILE_SENDING = f"""
import os, signal, socket
first, second = socket.socketpair()
memory = os.memfd_create("memory")
os.write(memory, bytes({SENT_BYTES}))
with open("/dev/shm/shared", "wb") as shared:
    shared.write(bytes({SENT_BYTES}))
socket.send_fds(first, [b"x"], [memory, second.fileno()])
os.kill(os.getpid(), signal.SIGKILL)
"""


async def _run(runtime: Runtime, disk: Path, source: str) -> tuple[int, int]:
    """Run a Python program. Return the sandbox's kernel uid and the reported number of bytes."""
    attempt_id = new_attempt_id()
    handle = runtime.prepare(attempt_id)
    try:
        sandbox = await runtime.create(handle, sandbox_spec(disk, attempt_id))
        assert (await run_in(sandbox, ["/usr/bin/python3", "-c", source])).errors == ""
    finally:
        await runtime.destroy(handle, disk)
    return int(handle.details["kernel_uid"]), runtime.unfreed_bytes(attempt_id)


@pytest.fixture(autouse=True)
def _require_measurement(runtime: Runtime, enforced_limits: frozenset[str]) -> None:
    if has_own_kernel(runtime):
        pytest.skip("the sandbox's own kernel handles Unix sockets")
    if os.getuid() != 0 or "memory" not in enforced_limits:
        pytest.skip("without root or control groups, memory in transit cannot be attributed to a sandbox")


def test_memory_that_the_kernel_never_frees_is_reported(runtime: Runtime, disk: Path, caplog):
    with caplog.at_level(logging.ERROR):
        uid, reported_bytes = asyncio.run(_run(runtime, disk, _CYCLE))
    if not kernel_uid_pool._has_files_in_transit(uid):
        assert (reported_bytes, caplog.text) == (0, "")
        pytest.skip("this kernel frees cycles of sockets in transit")
    assert SENT_BYTES <= reported_bytes < 2 * SENT_BYTES
    assert f"{reported_bytes} bytes" in caplog.text
    assert "when the host restarts" in caplog.text


def test_program_killed_while_it_sends_files_is_not_reported(runtime: Runtime, disk: Path, caplog):
    with caplog.at_level(logging.ERROR):
        _, reported_bytes = asyncio.run(_run(runtime, disk, _KILLED_WHILE_SENDING))
    assert (reported_bytes, caplog.text) == (0, "")
