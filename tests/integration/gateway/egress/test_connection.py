"""Allowed connections are forwarded unmodified and within limits. The host is a script on loopback."""

import asyncio
import os
import threading
from ipaddress import ip_address

import pytest

from doubles.egress_host import HOST, client_hello, gateway_with_egress_host, tunnel
from doubles.served_gateway import run, wait_until
from sandbox.gateway import limits
from sandbox.gateway.egress import connection, policy
from sandbox.interfaces.gateway import GatewayRules
from sandbox.model.egress import EgressRule, EgressRules
from sandbox.model.events import EgressDenied, ErrorReported


async def echo_after_eof(reader, writer):
    """Read to the end of the stream, then send everything back."""
    received = await reader.read()
    writer.write(received)
    writer.close()


def test_data_is_forwarded_in_both_directions_and_either_side_can_end_first(monkeypatch):
    async def scenario():
        async with gateway_with_egress_host(echo_after_eof, monkeypatch) as served:
            sent = client_hello(HOST) + b"\x17\3\3" + os.urandom(2_000_000)
            client = await tunnel(served, sent[:1000])
            assert b" 200 " in await client.read_until(b"\r\n\r\n")
            client.received = b""
            client.writer.write(sent[1000:])
            client.writer.write_eof()
            assert await client.read_to_end() == sent
            assert served.dialed_addresses == ["8.8.4.4"]
            assert served.events == []

    run(scenario)


def test_host_that_sends_faster_than_the_client_reads_is_paused(monkeypatch):
    written = 0

    async def flood(_, writer):
        nonlocal written
        while written < 200_000_000:
            writer.write(bytes(65536))
            await writer.drain()
            written += 65536

    async def scenario():
        async with gateway_with_egress_host(flood, monkeypatch) as served:
            client = await tunnel(served, client_hello(HOST))
            await client.read_until(b"\r\n\r\n")
            await wait_until(lambda: written > 0)
            last = -1
            while last != written:
                last = written
                await asyncio.sleep(0.3)
            assert written < 50_000_000

    run(scenario)


SMUGGLED = b" GET  *\r\nHost: evil.example"


@pytest.mark.parametrize(
    ("ends_by", "sent", "ending"),
    [
        # Some servers accept a request whose last line is terminated only by the end of the stream.
        ("client", SMUGGLED, "reset"),
        ("client", b"get key\r\nset other value", "end of the stream"),
        # Before the end of the client's stream, the last line may be incomplete. A tunnel with data that is not
        # searched ends as usual.
        ("timeout", SMUGGLED, "reset"),
        ("timeout", client_hello(HOST) + b"\x17\3\3", "end of the stream"),
        ("end of the gateway", SMUGGLED, "reset"),
        ("end of the gateway", client_hello(HOST) + b"\x17\3\3", "end of the stream"),
    ],
)
def test_end_of_stream_is_not_forwarded_after_denied_or_unsearched_data(monkeypatch, ends_by, sent, ending):
    endings, rules = [], GatewayRules(egress=EgressRules((EgressRule(HOST, (8080,)),), has_outbound_mode=True))
    if ends_by == "timeout":
        monkeypatch.setattr(limits, "TUNNEL_IDLE_TIMEOUT_SECONDS", 0.5)

    async def record_ending(reader, _):
        try:
            while await reader.read(1000):
                pass
            endings.append("end of the stream")
        except ConnectionResetError:
            endings.append("reset")

    async def scenario():
        async with gateway_with_egress_host(record_ending, monkeypatch, rules=rules) as served:
            client = await tunnel(served, sent, port=8080)
            await client.read_until(b"\r\n\r\n")
            await asyncio.sleep(0.2)
            match ends_by:
                case "client":
                    client.writer.write_eof()
                case "timeout":
                    await client.read_to_end()
                case _:
                    await served.stop()
            await wait_until(lambda: endings)
            assert endings == [ending]

    run(scenario)


def test_idle_tunnel_is_closed(monkeypatch):
    monkeypatch.setattr(limits, "TUNNEL_IDLE_TIMEOUT_SECONDS", 0.2)
    ended = asyncio.Event()

    async def silent(reader, _):
        await reader.read()
        ended.set()

    async def scenario():
        async with gateway_with_egress_host(silent, monkeypatch) as served:
            client = await tunnel(served, client_hello(HOST))
            await client.read_until(b"\r\n\r\n")
            client.received = b""
            assert await client.read_to_end() == b""
            await ended.wait()

    run(scenario)


def test_tunnel_with_another_server_name_is_closed_before_any_byte_is_forwarded(monkeypatch):
    received = []

    async def receive(reader, _):
        received.append(await reader.read())

    async def scenario():
        async with gateway_with_egress_host(receive, monkeypatch) as served:
            client = await tunnel(served, client_hello("other.example"))
            await client.read_to_end()
            await wait_until(lambda: bool(received))
            assert received == [b""]
            assert [(event.host, event.port) for event in served.events_of(EgressDenied)] == [("other.example", 443)]

    run(scenario)


@pytest.mark.parametrize(
    ("addresses", "dialed"),
    [
        (("10.0.0.1", "8.8.4.4", "169.254.169.254"), ["8.8.4.4"]),
        (("::ffff:8.8.4.4",), ["8.8.4.4"]),
        (("10.0.0.1", "127.0.0.1"), []),
        (("::ffff:169.254.169.254",), []),
        (("2002:a9fe:a9fe::1",), []),
    ],
)
def test_only_public_addresses_are_dialed(monkeypatch, addresses, dialed):
    async def scenario():
        async with gateway_with_egress_host(echo_after_eof, monkeypatch, addresses) as served:
            client = await tunnel(served)
            status = await client.read_until(b"\r\n\r\n")
            assert (b" 200 " in status) is bool(dialed)
            assert (b" 403 " in status) is not bool(dialed)
            assert served.dialed_addresses == dialed
            assert len(served.events_of(EgressDenied)) == (0 if dialed else 1)

    run(scenario)


def test_name_that_resolves_to_the_address_of_the_model_is_not_dialed(monkeypatch):
    async def scenario():
        names, model = {"model.example": ("8.8.4.4",)}, "http://model.example"
        async with gateway_with_egress_host(echo_after_eof, monkeypatch, names=names, model=model) as served:
            client = await tunnel(served)
            assert b" 403 " in await client.read_until(b"\r\n\r\n")
            assert "the model's" in served.events_of(EgressDenied)[0].reason
            assert served.dialed_addresses == []

    run(scenario)


def test_local_address_is_not_dialable():
    assert not policy.is_dialable(ip_address("127.0.0.1"))
    assert policy._is_local_address(ip_address("127.0.0.1"))
    assert not policy._is_local_address(ip_address("8.8.4.4"))
    assert policy.is_dialable(ip_address("8.8.4.4"))


def test_hanging_resolver_blocks_neither_clients_nor_the_gateway(monkeypatch):
    monkeypatch.setattr(limits, "LOOKUP_TIMEOUT_SECONDS", 0.2)
    hung = threading.Event()

    async def scenario():
        async with gateway_with_egress_host(echo_after_eof, monkeypatch) as served:
            monkeypatch.setattr(connection.socket, "getaddrinfo", lambda *_, **__: hung.wait(20) and [])
            before = threading.active_count()
            clients = [await tunnel(served) for _ in range(20)]
            for client in clients:
                assert b" 504 " in await client.read_until(b"\r\n\r\n")
            assert threading.active_count() - before <= limits.CONCURRENT_LOOKUPS_MAX
            assert [report.error for report in served.events_of(ErrorReported)] == ["host_unreachable"]

    run(scenario)
    hung.set()
    for thread in threading.enumerate():
        if "look_up" in thread.name:
            thread.join(5)


@pytest.mark.parametrize("host", [HOST, HOST.upper()])
def test_unresolvable_host_is_reported_to_the_client_and_in_an_event(monkeypatch, host):
    async def scenario():
        async with gateway_with_egress_host(echo_after_eof, monkeypatch, addresses=()) as served:
            client = await tunnel(served, host=host)
            assert b" 502 " in await client.read_until(b"\r\n\r\n")
            assert "does not resolve" in (await client.read_to_end()).decode()
            assert served.events_of(ErrorReported) == [ErrorReported("host_unreachable", f"{HOST} does not resolve.")]

    run(scenario)


def test_disconnected_clients_close_their_upstream_connections(monkeypatch):
    open_now = 0

    async def count(reader, writer):
        nonlocal open_now
        open_now += 1
        await reader.read()
        open_now -= 1
        writer.close()

    async def scenario():
        async with gateway_with_egress_host(count, monkeypatch) as served:
            clients = [await tunnel(served, client_hello(HOST)) for _ in range(10)]
            await wait_until(lambda: open_now == 10)
            for client in clients:
                client.abort()
            await wait_until(lambda: open_now == 0)

    run(scenario)


RULES_FOR_OTHER_PORTS = GatewayRules(egress=EgressRules((EgressRule(HOST, (22, 8080)),)))


def test_data_from_a_host_that_sends_first_is_forwarded(monkeypatch):
    async def greet(reader, writer):
        writer.write(b"SSH-2.0-host\r\n")
        writer.write(await reader.readline())

    async def scenario():
        async with gateway_with_egress_host(greet, monkeypatch, rules=RULES_FOR_OTHER_PORTS) as served:
            client = await tunnel(served, port=22)
            await client.read_until(b"\r\n\r\n")
            assert await client.read_until(b"\n") == b"SSH-2.0-host\r\n"
            client.writer.write(b"SSH-2.0-me\r\n")
            assert await client.read_until(b"\n") == b"SSH-2.0-me\r\n"
            assert served.events == []

    run(scenario)


def test_request_for_another_host_is_refused_on_any_port(monkeypatch):
    received = b""

    async def receive(reader, _):
        nonlocal received
        received += await reader.read()

    async def scenario():
        async with gateway_with_egress_host(receive, monkeypatch, rules=RULES_FOR_OTHER_PORTS) as served:
            client = await tunnel(served, port=8080)
            await client.read_until(b"\r\n\r\n")
            client.received = b""
            client.writer.write(b"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n")
            response = await client.read_to_end()
            assert response.startswith(b"HTTP/1.1 403 ")
            assert b"Sandbox refused other.example:8080: " in response
            await wait_until(lambda: served.events_of(EgressDenied) != [])
            assert (served.events_of(EgressDenied)[0].host, received) == ("other.example", b"")

    run(scenario)


@pytest.mark.parametrize("greeting", [b"220 host\r\n", b""])
def test_refusal_is_not_sent_after_data_from_the_host(monkeypatch, greeting):
    async def greet(reader, writer):
        writer.write(greeting)
        writer.write_eof()
        await reader.read()

    async def scenario():
        async with gateway_with_egress_host(greet, monkeypatch, rules=RULES_FOR_OTHER_PORTS) as served:
            client = await tunnel(served, port=8080)
            await client.read_until(b"\r\n\r\n")
            client.received = b""
            assert await client.read_to_end() == greeting
            client.writer.write(b"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n")
            await wait_until(lambda: served.events_of(EgressDenied) != [])
            assert [(event.host, event.port) for event in served.events] == [("other.example", 8080)]

    run(scenario)


@pytest.mark.parametrize("first_end", ["client", "host"])
def test_half_closed_connection_is_closed_after_a_timeout(monkeypatch, first_end):
    monkeypatch.setattr(limits, "HALF_CLOSED_TIMEOUT_SECONDS", 0.2)
    never_set = asyncio.Event()

    async def silent(_, writer):
        if first_end == "host":
            writer.write_eof()
        await never_set.wait()

    async def scenario():
        async with gateway_with_egress_host(silent, monkeypatch) as served:
            client = await tunnel(served, client_hello(HOST))
            await client.read_until(b"\r\n\r\n")
            client.received = b""
            if first_end == "client":
                client.writer.write_eof()
            assert await client.read_to_end() == b""

    run(scenario)


def test_hosts_are_not_dialed_while_the_name_of_the_model_is_unresolved(monkeypatch):
    async def scenario():
        async with gateway_with_egress_host(echo_after_eof, monkeypatch, model="http://model.example") as served:
            client = await tunnel(served)
            assert b" 502 " in await client.read_until(b"\r\n\r\n")
            assert "model's host does not resolve" in (await client.read_to_end()).decode()
            assert served.dialed_addresses == []
            served.addresses_by_name["model.example"] = ("8.8.4.6",)
            client = await tunnel(served)
            assert b" 200 " in await client.read_until(b"\r\n\r\n")
            assert served.dialed_addresses == ["8.8.4.4"]

    run(scenario)


def test_former_model_address_is_not_dialed(monkeypatch):
    monkeypatch.setattr(limits, "MODEL_LOOKUP_INTERVAL_SECONDS", 0.0)

    async def scenario():
        names = {"model.example": ("8.8.4.4", "8.8.4.6")}
        async with gateway_with_egress_host(
            echo_after_eof, monkeypatch, ("8.8.4.8",), names, model="http://model.example"
        ) as served:
            client = await tunnel(served)
            assert b" 200 " in await client.read_until(b"\r\n\r\n")
            del served.addresses_by_name["model.example"]
            served.addresses_by_name[HOST] = ("8.8.4.6",)
            client = await tunnel(served)
            assert b" 403 " in await client.read_until(b"\r\n\r\n")
            served.addresses_by_name[HOST] = ("8.8.4.8",)
            client = await tunnel(served)
            assert b" 200 " in await client.read_until(b"\r\n\r\n")
            assert served.dialed_addresses == ["8.8.4.8", "8.8.4.8"]

    run(scenario)


def test_name_is_resolved_once_per_connection(monkeypatch):
    """A second lookup would allow DNS rebinding."""
    lookups = []

    async def scenario():
        async with gateway_with_egress_host(echo_after_eof, monkeypatch) as served:
            resolve = connection.socket.getaddrinfo

            def rebinding(host, *rest, **more):
                lookups.append(host.removesuffix("."))
                results = resolve(host, *rest, **more)
                served.addresses_by_name[HOST] = ("169.254.169.254",)
                return results

            monkeypatch.setattr(connection.socket, "getaddrinfo", rebinding)
            client = await tunnel(served)
            assert b" 200 " in await client.read_until(b"\r\n\r\n")
            assert (lookups, served.dialed_addresses) == ([HOST], ["8.8.4.4"])
            client = await tunnel(served)
            assert b" 403 " in await client.read_until(b"\r\n\r\n")
            assert served.dialed_addresses == ["8.8.4.4"]

    run(scenario)


@pytest.mark.parametrize(
    ("address", "is_dialed"),
    [("8.8.4.4", True), ("[2606:4700::1]", True), ("[::ffff:8.8.4.4]", True)]
    + [
        (f"[{host}]" if ":" in host else host, False)
        for host in ("10.0.0.1", "169.254.169.254", "127.0.0.1", "::1", "fd00::1")
    ]
    + [
        (f"[{host}]", False)
        for host in ("::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "2001::1", "ff02::1")
    ]
    + [
        (host, False)
        for host in ("100.100.100.200", "168.63.129.16", "192.0.0.192", "198.18.0.1", "203.0.113.9", "224.0.0.1")
    ],
)
def test_unrestricted_egress_dials_only_global_addresses(monkeypatch, address, is_dialed):
    async def scenario():
        full = GatewayRules(egress=EgressRules(is_unrestricted=True))
        async with gateway_with_egress_host(echo_after_eof, monkeypatch, rules=full) as served:
            client = await tunnel(served, host=address, port=8443)
            response = await client.read_until(b"\r\n\r\n")
            assert (b" 200 " in response, b" 403 " in response) == (is_dialed, not is_dialed)
            assert len(served.dialed_addresses) == is_dialed
            assert len(served.events_of(EgressDenied)) == (not is_dialed)

    run(scenario)


def test_stop_closes_all_connections_and_refuses_new_ones(monkeypatch):
    async def scenario():
        async with gateway_with_egress_host(echo_after_eof, monkeypatch) as served:
            client = await tunnel(served, client_hello(HOST))
            await client.read_until(b"\r\n\r\n")
            client.received = b""
            port = served.listeners.proxy.getsockname()[1]
            await served.stop()
            assert await client.read_to_end() == b""
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)

    run(scenario)
