"""Waiting for a process to exit, through its pidfd, and reading output."""

import asyncio
import errno
import os
import socket
import subprocess

import pytest

from sandbox.runtimes.sandbox_descriptors import open_reader, wait_readable


async def test_two_waiters_are_both_notified():
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        pidfd = os.pidfd_open(process.pid)
        try:
            waiters = [asyncio.create_task(wait_readable(pidfd)) for _ in range(2)]
            await asyncio.sleep(0)
            process.stdin.close()
            async with asyncio.timeout(30):
                await asyncio.gather(*waiters)
        finally:
            os.close(pidfd)


async def test_cancelled_waiter_does_not_affect_another_waiter():
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        pidfd = os.pidfd_open(process.pid)
        try:
            waiter, cancelled = (asyncio.create_task(wait_readable(pidfd)) for _ in range(2))
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.sleep(0)
            process.stdin.close()
            async with asyncio.timeout(30):
                await waiter
        finally:
            os.close(pidfd)


def send_urgently(sender: socket.socket, data: bytes) -> None:
    try:
        sender.send(data, socket.MSG_OOB)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("this kernel has no urgent data in Unix sockets")


async def test_urgent_data_in_the_output_is_read_and_thus_counted():
    """If the kernel dropped it, each byte would wake the runner up without being charged to its CPU budget."""
    source, sender = socket.socketpair()
    reader, transport = await open_reader(source)
    with sender:
        async with asyncio.timeout(30):
            for number in range(10):
                send_urgently(sender, b"%d" % number)
                assert await reader.readexactly(1) == b"%d" % number
            sender.send(b"ordinary")
            sender.shutdown(socket.SHUT_WR)
            assert await reader.read() == b"ordinary"
    transport.abort()
