"""What is let through is carried faithfully and within bounds; the host is a script on loopback."""

import asyncio
import os
import threading
from ipaddress import ip_address

import pytest

from doubles.remote_host import HOST, client_hello, played, tunnel
from doubles.served_gateway import run, until_true
from sandbox.gateway import limits
from sandbox.gateway.egress import dialer
from sandbox.interfaces.gateway import GatewayRules
from sandbox.model.egress import EgressRule, EgressRules
from sandbox.model.events import EgressDenied, ErrorReported


async def echo_reversed_order(reader, writer):
    """Hears everything to its end, then sends it back."""
    received = await reader.read()
    writer.write(received)
    writer.close()


def test_bytes_go_both_ways_and_one_side_may_end_before_the_other(monkeypatch):
    async def story():
        async with played(echo_reversed_order, monkeypatch) as served:
            sent = client_hello(HOST) + b"\x17\3\3" + os.urandom(2_000_000)
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
    assert not dialer.is_dialable(ip_address("127.0.0.1"))
    assert dialer._is_local_address(ip_address("127.0.0.1"))
    assert not dialer._is_local_address(ip_address("8.8.4.4"))
    assert dialer.is_dialable(ip_address("8.8.4.4"))


def test_resolvers_that_hang_keep_neither_clients_nor_the_gateway(monkeypatch):
    monkeypatch.setattr(limits, "LOOKUP_SECONDS", 0.2)
    hung = threading.Event()

    async def story():
        async with played(echo_reversed_order, monkeypatch) as served:
            monkeypatch.setattr(dialer.socket, "getaddrinfo", lambda *_, **__: hung.wait(20) and [])
            before = threading.active_count()
            clients = [await tunnel(served) for _ in range(20)]
            for client in clients:
                assert b" 504 " in await client.until(b"\r\n\r\n")
            assert threading.active_count() - before <= limits.LOOKUPS_MAX
            assert [one.error for one in served.of(ErrorReported)] == ["host_unreachable"]

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
            assert served.of(ErrorReported) == [ErrorReported("host_unreachable", f"{HOST} does not resolve.")]

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


OTHER_PORTS = GatewayRules(egress=EgressRules((EgressRule(HOST, (22, 8080)),)))


def test_a_host_that_speaks_first_is_heard_before_the_client_says_anything(monkeypatch):
    async def greet(reader, writer):
        writer.write(b"SSH-2.0-host\r\n")
        writer.write(await reader.readline())

    async def story():
        async with played(greet, monkeypatch, rules=OTHER_PORTS) as served:
            client = await tunnel(served, port=22)
            await client.until(b"\r\n\r\n")
            assert await client.until(b"\n") == b"SSH-2.0-host\r\n"
            client.writer.write(b"SSH-2.0-me\r\n")
            assert await client.until(b"\n") == b"SSH-2.0-me\r\n"
            assert served.told == []

    run(story)


def test_a_request_for_another_host_reaches_nobody_at_any_port(monkeypatch):
    received = b""

    async def listen(reader, _):
        nonlocal received
        received += await reader.read()

    async def story():
        async with played(listen, monkeypatch, rules=OTHER_PORTS) as served:
            client = await tunnel(served, port=8080)
            await client.until(b"\r\n\r\n")
            client.received = b""
            client.writer.write(b"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n")
            answer = await client.rest()
            assert answer.startswith(b"HTTP/1.1 403 ")
            assert b"Sandbox refused other.example:8080: " in answer
            await until_true(lambda: served.of(EgressDenied) != [])
            assert (served.of(EgressDenied)[0].host, received) == ("other.example", b"")

    run(story)


@pytest.mark.parametrize("said", [b"220 host\r\n", b""])
def test_a_refusal_does_not_stand_behind_what_the_host_has_said(monkeypatch, said):
    async def greet(reader, writer):
        writer.write(said)
        writer.write_eof()
        await reader.read()

    async def story():
        async with played(greet, monkeypatch, rules=OTHER_PORTS) as served:
            client = await tunnel(served, port=8080)
            await client.until(b"\r\n\r\n")
            client.received = b""
            assert await client.rest() == said
            client.writer.write(b"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n")
            await until_true(lambda: served.of(EgressDenied) != [])
            assert [(one.host, one.port) for one in served.told] == [("other.example", 8080)]

    run(story)


@pytest.mark.parametrize("who", ["client", "host"])
def test_a_connection_that_one_side_has_ended_ends_when_the_other_is_silent(monkeypatch, who):
    monkeypatch.setattr(limits, "HALF_OPEN_SECONDS", 0.2)
    never = asyncio.Event()

    async def silent(_, writer):
        if who == "host":
            writer.write_eof()
        await never.wait()

    async def story():
        async with played(silent, monkeypatch) as served:
            client = await tunnel(served, client_hello(HOST))
            await client.until(b"\r\n\r\n")
            client.received = b""
            if who == "client":
                client.writer.write_eof()
            assert await client.rest() == b""

    run(story)


def test_as_long_as_the_model_cannot_be_told_from_others_nobody_is_dialled(monkeypatch):
    async def story():
        async with played(echo_reversed_order, monkeypatch, model="http://model.example") as served:
            client = await tunnel(served)
            assert b" 502 " in await client.until(b"\r\n\r\n")
            assert "model's host does not resolve" in (await client.rest()).decode()
            assert served.dialled == []
            served.table["model.example"] = ("8.8.4.6",)
            client = await tunnel(served)
            assert b" 200 " in await client.until(b"\r\n\r\n")
            assert served.dialled == ["8.8.4.4"]

    run(story)


def test_an_address_that_was_once_the_models_stays_the_models(monkeypatch):
    monkeypatch.setattr(limits, "MODEL_LOOKUP_SECONDS", 0.0)

    async def story():
        names = {"model.example": ("8.8.4.4", "8.8.4.6")}
        async with played(
            echo_reversed_order, monkeypatch, ("8.8.4.8",), names, model="http://model.example"
        ) as served:
            client = await tunnel(served)
            assert b" 200 " in await client.until(b"\r\n\r\n")
            del served.table["model.example"]
            served.table[HOST] = ("8.8.4.6",)
            client = await tunnel(served)
            assert b" 403 " in await client.until(b"\r\n\r\n")
            served.table[HOST] = ("8.8.4.8",)
            client = await tunnel(served)
            assert b" 200 " in await client.until(b"\r\n\r\n")
            assert served.dialled == ["8.8.4.8", "8.8.4.8"]

    run(story)


def test_a_name_is_resolved_once_for_each_connection_and_dialled_where_it_was_found(monkeypatch):
    """Rebinding: the second answer is never asked for."""
    asked = []

    async def story():
        async with played(echo_reversed_order, monkeypatch) as served:
            resolve = dialer.socket.getaddrinfo

            def rebinding(host, *rest, **more):
                asked.append(host)
                found = resolve(host, *rest, **more)
                served.table[HOST] = ("169.254.169.254",)
                return found

            monkeypatch.setattr(dialer.socket, "getaddrinfo", rebinding)
            client = await tunnel(served)
            assert b" 200 " in await client.until(b"\r\n\r\n")
            assert (asked, served.dialled) == ([HOST], ["8.8.4.4"])
            client = await tunnel(served)
            assert b" 403 " in await client.until(b"\r\n\r\n")
            assert served.dialled == ["8.8.4.4"]

    run(story)


@pytest.mark.parametrize(
    ("address", "is_dialled"),
    [("8.8.4.4", True), ("[2606:4700::1]", True), ("[::ffff:8.8.4.4]", True)]
    + [
        (f"[{one}]" if ":" in one else one, False)
        for one in ("10.0.0.1", "169.254.169.254", "127.0.0.1", "::1", "fd00::1")
    ]
    + [
        (f"[{one}]", False)
        for one in ("::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "2001::1", "ff02::1")
    ]
    + [
        (one, False)
        for one in ("100.100.100.200", "168.63.129.16", "192.0.0.192", "198.18.0.1", "203.0.113.9", "224.0.0.1")
    ],
)
def test_addresses_are_dialled_where_everything_is_reached_and_only_global_ones(monkeypatch, address, is_dialled):
    async def story():
        full = GatewayRules(egress=EgressRules(is_unrestricted=True))
        async with played(echo_reversed_order, monkeypatch, rules=full) as served:
            client = await tunnel(served, host=address, port=8443)
            answer = await client.until(b"\r\n\r\n")
            assert (b" 200 " in answer, b" 403 " in answer) == (is_dialled, not is_dialled)
            assert len(served.dialled) == is_dialled
            assert len(served.of(EgressDenied)) == (not is_dialled)

    run(story)


def test_with_the_gateway_every_connection_ends_and_nobody_gets_in_any_more(monkeypatch):
    async def story():
        async with played(echo_reversed_order, monkeypatch) as served:
            client = await tunnel(served, client_hello(HOST))
            await client.until(b"\r\n\r\n")
            client.received = b""
            port = served.listeners.proxy.getsockname()[1]
            await served.stop()
            assert await client.rest() == b""
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)

    run(story)
