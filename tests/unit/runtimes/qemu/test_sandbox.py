"""The console of a guest."""

import asyncio
import socket

from sandbox.runtimes.qemu.sandbox import CONSOLE_BYTES_MAX, CONSOLE_PAUSE_SECONDS, OutputTail


async def test_large_console_output_is_throttled():
    async def run() -> tuple[bytes, int]:
        host_end, guest_end = socket.socketpair()
        guest_end.setblocking(False)
        tail, reads = OutputTail(), 0
        data_received = tail.data_received

        def count_read(data: bytes) -> None:
            nonlocal reads
            reads += 1
            data_received(data)

        tail.data_received = count_read  # type: ignore[method-assign]
        await tail.open(host_end)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(guest_end, b"x" * (CONSOLE_BYTES_MAX + 1))
        reads, deadline = 0, loop.time() + 10 * CONSOLE_PAUSE_SECONDS
        while loop.time() < deadline:
            await loop.sock_sendall(guest_end, b"y")
            await asyncio.sleep(0)
        await loop.sock_sendall(guest_end, b"end")
        await asyncio.sleep(3 * CONSOLE_PAUSE_SECONDS)
        tail.abort()
        guest_end.close()
        return tail.text, reads

    text, reads = await run()
    assert text.endswith(b"yend")
    assert reads <= 20


async def test_early_console_output_is_read_immediately():
    async def run() -> bytes:
        host_end, guest_end = socket.socketpair()
        tail = OutputTail()
        await tail.open(host_end)
        with guest_end:
            for line in (b"one\n", b"two\n", b"three\n"):
                guest_end.send(line)
                for _ in range(3):
                    await asyncio.sleep(0)
        tail.abort()
        return tail.text

    assert (await run()) == b"one\ntwo\nthree\n"
