"""What is let through is carried faithfully and within bounds; the host is a script on loopback."""

import asyncio
import os
import threading
from ipaddress import ip_address

import pytest

from doubles.far_host import HOST, client_hello, played, tunnel
from doubles.served_gateway import run, until_true
from sandbox.gateway import limits, outward
from sandbox.model.event import EgressDenied, Trouble


async def echo_reversed_order(reader, writer):
    """Hears everything to its end, then sends it back."""
    received = await reader.read()
    writer.write(received)
    writer.close()


def test_bytes_go_both_ways_and_one_side_may_end_before_the_other(monkeypatch):
    async def story():
        async with played(echo_reversed_order, monkeypatch) as served:
            sent = client_hello(HOST) + os.urandom(2_000_000)
            client = await tunnel(served, sent[:1000])
            assert b" 200 " in await client.until(b"\r\n\r\n")
            client.received = b""
            client.writer.write(sent[1000:])
            client.writer.write_eof()
            assert await client.rest() == sent
            assert served.dialled == ["8.8.4.4"]
            assert served.told == []

    run(story)


def test_a_host_that_sends_more_than_is_taken_waits(monkeypatch):
    written = 0

    async def flood(_, writer):
        nonlocal written
        while written < 200_000_000:
            writer.write(bytes(65536))
            await writer.drain()
            written += 65536

    async def story():
        async with played(flood, monkeypatch) as served:
            client = await tunnel(served, client_hello(HOST))
            await client.until(b"\r\n\r\n")
            await until_true(lambda: written > 0)
            last = -1
            while last != written:
                last = written
                await asyncio.sleep(0.3)
            assert written < 50_000_000

    run(story)


def test_a_tunnel_on_which_nothing_moves_ends(monkeypatch):
    monkeypatch.setattr(limits, "TUNNEL_IDLE_SECONDS", 0.2)
    ended = asyncio.Event()

    async def silent(reader, _):
        await reader.read()
        ended.set()

    async def story():
        async with played(silent, monkeypatch) as served:
            client = await tunnel(served, client_hello(HOST))
            await client.until(b"\r\n\r\n")
            client.received = b""
            assert await client.rest() == b""
            await ended.wait()

    run(story)


def test_a_tunnel_that_asks_for_another_server_is_cut_before_a_byte_of_it_arrives(monkeypatch):
    received = []

    async def hear(reader, _):
        received.append(await reader.read())

    async def story():
        async with played(hear, monkeypatch) as served:
            client = await tunnel(served, client_hello("other.example"))
            await client.rest()
            await until_true(lambda: bool(received))
            assert received == [b""]
            assert [(one.host, one.port) for one in served.of(EgressDenied)] == [("other.example", 443)]

    run(story)


@pytest.mark.parametrize(
    ("addresses", "dialled"),
    [
        (("10.0.0.1", "8.8.4.4", "169.254.169.254"), ["8.8.4.4"]),
        (("::ffff:8.8.4.4",), ["8.8.4.4"]),
        (("10.0.0.1", "127.0.0.1"), []),
        (("::ffff:169.254.169.254",), []),
        (("2002:a9fe:a9fe::1",), []),
    ],
)
def test_only_addresses_that_are_public_are_dialled(monkeypatch, addresses, dialled):
    async def story():
        async with played(echo_reversed_order, monkeypatch, addresses) as served:
            client = await tunnel(served)
            status = await client.until(b"\r\n\r\n")
            assert (b" 200 " in status) is bool(dialled)
            assert (b" 403 " in status) is not bool(dialled)
            assert served.dialled == dialled
            assert len(served.of(EgressDenied)) == (0 if dialled else 1)

    run(story)


def test_a_name_behind_which_the_model_is_is_not_dialled(monkeypatch):
    async def story():
        names, model = {"model.example": ("8.8.4.4",)}, "http://model.example"
        async with played(echo_reversed_order, monkeypatch, names=names, model=model) as served:
            client = await tunnel(served)
            assert b" 403 " in await client.until(b"\r\n\r\n")
            assert "the model's" in served.of(EgressDenied)[0].reason
            assert served.dialled == []

    run(story)


def test_addresses_of_this_machine_are_its_own():
    assert not outward.may_be_dialled(ip_address("127.0.0.1"))
    assert outward._is_own(ip_address("127.0.0.1"))
    assert not outward._is_own(ip_address("8.8.4.4"))
    assert outward.may_be_dialled(ip_address("8.8.4.4"))


def test_resolvers_that_hang_keep_neither_clients_nor_the_gateway(monkeypatch):
    monkeypatch.setattr(limits, "LOOKUP_SECONDS", 0.2)
    hung = threading.Event()

    async def story():
        async with played(echo_reversed_order, monkeypatch) as served:
            monkeypatch.setattr(outward.socket, "getaddrinfo", lambda *_, **__: hung.wait(20) and [])
            before = threading.active_count()
            clients = [await tunnel(served) for _ in range(20)]
            for client in clients:
                assert b" 504 " in await client.until(b"\r\n\r\n")
            assert threading.active_count() - before <= limits.LOOKUPS_MAX
            assert [one.error for one in served.of(Trouble)] == ["host_unreachable"]

    run(story)
    hung.set()
    for thread in threading.enumerate():
        if "look_up" in thread.name:
            thread.join(5)


def test_a_host_that_does_not_resolve_is_told_to_the_client_and_in_an_event(monkeypatch):
    async def story():
        async with played(echo_reversed_order, monkeypatch, addresses=()) as served:
            client = await tunnel(served)
            assert b" 502 " in await client.until(b"\r\n\r\n")
            assert "does not resolve" in (await client.rest()).decode()
            assert served.of(Trouble) == [Trouble("host_unreachable", f"{HOST} does not resolve.")]

    run(story)


def test_clients_that_leave_take_their_connections_with_them(monkeypatch):
    open_now = 0

    async def count(reader, writer):
        nonlocal open_now
        open_now += 1
        await reader.read()
        open_now -= 1
        writer.close()

    async def story():
        async with played(count, monkeypatch) as served:
            clients = [await tunnel(served, client_hello(HOST)) for _ in range(10)]
            await until_true(lambda: open_now == 10)
            for client in clients:
                client.leave()
            await until_true(lambda: open_now == 0)

    run(story)
