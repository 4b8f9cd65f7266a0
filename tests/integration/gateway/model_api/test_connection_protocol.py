"""Model requests through a real gateway on real sockets; the model is a script on loopback."""

import asyncio
import gc
import resource
import socket
import time
import warnings
from pathlib import Path

import pytest

from doubles.scripted_upstream import UpstreamRequest, scripted_upstream
from doubles.served_gateway import GATEWAY_KEY, SERVER_KEY, run, served_gateway, wait_until
from sandbox.gateway import limits, tcp_connections
from sandbox.gateway.model_api.connection_protocol import ModelProtocol
from sandbox.interfaces.gateway import GatewayRules
from sandbox.model.egress import EgressRules
from sandbox.model.events import EgressDenied, ErrorReported, Usage

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = [
    b'event: message_start\ndata: {"type":"message_start","message":{"model":"claude-haiku-4-5",'
    b'"usage":{"input_tokens":10,"output_tokens":1}}}\n\n',
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"h\xc3\xa9"}}\n\n',
    b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":5}}\n\n',
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
]
BODY = b"".join(EVENTS)
EXPECTED_USAGE = Usage("claude-haiku-4-5", 10, 5, 0, 0, (10 + 25) / 1e6)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def respond(_: UpstreamRequest, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"".join(chunk(event) for event in EVENTS) + b"0\r\n\r\n")


class SteppedUpstream:
    """Sends one item of `steps` at a time; None aborts the connection."""

    def __init__(self) -> None:
        self.steps: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def __call__(self, _: UpstreamRequest, writer: asyncio.StreamWriter) -> None:
        while (step := await self.steps.get()) is not None:
            writer.write(step)
            await writer.drain()
        writer.transport.abort()


def test_response_is_byte_identical_and_the_task_key_is_replaced():
    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url + "/prefix") as served:
            client = await served.connect()
            client.send_request(b'{"any":"text \xc3\xa9"}')
            status, headers, body = await client.read_response()
            assert (status, headers["content-type"], body) == (200, "text/event-stream", BODY)
            request = upstream.requests[0]
            assert request.target == "/prefix/v1/messages?beta=true"
            assert request.body == b'{"any":"text \xc3\xa9"}'
            assert request.headers["x-api-key"] == SERVER_KEY
            assert request.headers["host"] == f"127.0.0.1:{upstream.port}"
            assert GATEWAY_KEY.encode() not in request.head + request.body
            assert SERVER_KEY.encode() not in client.received
            assert served.events == [EXPECTED_USAGE]

    run(scenario)


def test_key_in_a_response_header_is_redacted():
    async def respond_with_key(_, writer):
        key = SERVER_KEY.encode()
        headers = b"Request-Id: %b\r\nAnthropic-Ratelimit-%b: value" % (key, key)
        writer.write(b"HTTP/1.1 200 %b\r\n%b\r\nContent-Length: 0\r\n\r\n" % (key, headers))

    async def scenario():
        async with scripted_upstream(respond_with_key) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            client.send_request()
            status, headers, _ = await client.read_response()
            redacted = "*" * len(SERVER_KEY)
            assert (status, headers["request-id"]) == (200, redacted)
            assert headers[f"anthropic-ratelimit-{redacted}"] == "value"
            assert SERVER_KEY.encode() not in client.received

    run(scenario)


def test_each_event_is_forwarded_before_the_next_is_sent():
    async def scenario():
        script = SteppedUpstream()
        async with scripted_upstream(script) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            client.send_request()
            script.steps.put_nowait(HEAD)
            await client.read_until(b"\r\n\r\n")
            for event in EVENTS:
                assert served.gateway.requests_in_flight == 1
                script.steps.put_nowait(chunk(event))
                assert await client.read_exactly(len(chunk(event))) == chunk(event)
            assert served.events == []
            script.steps.put_nowait(b"0\r\n\r\n")
            assert await client.read_until(b"0\r\n\r\n") == b"0\r\n\r\n"
            assert served.gateway.requests_in_flight == 0
            assert served.events == [EXPECTED_USAGE]

    run(scenario)


def test_connections_are_reused_on_both_sides():
    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            for _ in range(5):
                client.send_request()
                assert (await client.read_response())[2] == BODY
            assert (upstream.connections, len(upstream.requests)) == (1, 5)
            assert served.events == [EXPECTED_USAGE] * 5

    run(scenario)


def test_idle_upstream_connection_that_was_closed_is_replaced():
    async def respond_and_close(request, writer):
        await respond(request, writer)
        await writer.drain()
        writer.close()

    async def scenario():
        async with scripted_upstream(respond_and_close) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            for _ in range(3):
                upstream.disconnected.clear()
                client.send_request()
                assert (await client.read_response())[0] == 200
                await upstream.disconnected.wait()
                await asyncio.sleep(0.02)  # until the gateway detects the disconnect
            assert upstream.connections == 3

    run(scenario)


def test_idle_upstream_connection_is_closed_after_a_timeout(monkeypatch):
    monkeypatch.setattr(limits, "UPSTREAM_IDLE_TIMEOUT_SECONDS", 0.1)

    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            for _ in range(2):
                upstream.disconnected.clear()
                client.send_request()
                assert (await client.read_response())[2] == BODY
                async with asyncio.timeout(5):
                    await upstream.disconnected.wait()
                await asyncio.sleep(0.02)  # until the gateway detects the disconnect
            assert upstream.connections == 2
            assert served.events == [EXPECTED_USAGE] * 2

    run(scenario)


@pytest.mark.parametrize("key", ["another", SERVER_KEY, ""])
def test_wrong_key_is_refused_without_an_upstream_connection(key):
    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            client.send_request(b"x" * 300_000, key=key)
            status, kind, message = await client.read_error()
            assert (status, kind) == (401, "authentication_error")
            assert served.events == [EgressDenied("model", served.port, message)]
            assert upstream.connections == 0
            client.send_request()
            assert (await client.read_response())[0] == 200, "the right key works on the same connection"

    run(scenario)


def test_disconnected_client_cancels_its_upstream_request():
    async def scenario():
        script = SteppedUpstream()
        async with scripted_upstream(script) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            client.send_request()
            script.steps.put_nowait(HEAD + chunk(EVENTS[0]))
            await client.read_until(b"\r\n\r\n")
            client.abort()
            reader = upstream.requests[0].reader
            await wait_until(lambda: reader.at_eof() or reader.exception() is not None)
            await wait_until(lambda: served.gateway.requests_in_flight == 0)
            assert served.events == [Usage("claude-haiku-4-5", 10, 1, 0, 0, 15 / 1e6)]

    run(scenario)


def test_truncated_response_is_truncated_for_the_client():
    async def scenario():
        script = SteppedUpstream()
        async with scripted_upstream(script) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            client.send_request()
            for step in (HEAD, chunk(EVENTS[0]), None):
                script.steps.put_nowait(step)
            received = await client.read_to_end()
            assert chunk(EVENTS[0]) in received
            assert not received.endswith(b"0\r\n\r\n")
            assert [type(event) for event in served.events] in ([ErrorReported, Usage], [Usage, ErrorReported])
            assert served.gateway.requests_in_flight == 0

    run(scenario)


def test_unreachable_model_returns_an_error_and_is_reported_once():
    async def scenario():
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            async with served_gateway(f"http://127.0.0.1:{unused.getsockname()[1]}") as served:
                client = await served.connect()
                for _ in range(3):
                    client.send_request()
                    status, kind, message = await client.read_error()
                    assert (status, kind) == (502, "api_error")
                    assert "ANTHROPIC_BASE_URL" in message
                assert served.events == [ErrorReported("upstream_unreachable", message)]

    run(scenario)


def test_model_without_a_response_times_out(monkeypatch):
    monkeypatch.setattr(limits, "UPSTREAM_TIMEOUT_SECONDS", 0.2)

    async def scenario():
        script = SteppedUpstream()
        async with scripted_upstream(script) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            client.send_request()
            assert (await client.read_error())[:2] == (504, "timeout_error")

    run(scenario)


def test_model_that_does_not_accept_connections_times_out(monkeypatch):
    monkeypatch.setattr(limits, "CONNECT_TIMEOUT_SECONDS", 0.2)

    async def scenario():
        full_listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        pending = [socket.socket() for _ in range(3)]
        for sock in pending:
            sock.setblocking(False)
            sock.connect_ex(full_listener.getsockname())
        try:
            async with served_gateway(f"http://127.0.0.1:{full_listener.getsockname()[1]}") as served:
                client = await served.connect()
                client.send_request()
                assert (await client.read_error())[:2] == (504, "timeout_error")

        finally:
            for sock in (full_listener, *pending):
                sock.close()

    run(scenario)


def test_twenty_clients_are_served_concurrently():
    async def scenario():
        may_respond = asyncio.Event()

        async def respond_when_open(request, writer):
            await may_respond.wait()
            await respond(request, writer)

        async with scripted_upstream(respond_when_open) as upstream, served_gateway(upstream.base_url) as served:
            clients = [await served.connect() for _ in range(20)]
            for client in clients:
                client.send_request()
            await wait_until(lambda: len(upstream.requests) == 20)
            assert served.gateway.requests_in_flight == 20
            may_respond.set()
            assert [(await client.read_response())[2] for client in clients] == [BODY] * 20
            assert served.gateway.requests_in_flight == 0
            assert served.events == [EXPECTED_USAGE] * 20

    run(scenario)


def test_large_bodies_use_bounded_memory():
    size = 24 * 1024 * 1024

    async def respond_with_zeros(request, writer):
        assert len(request.body) == size
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // 65536):
            writer.write(bytes(65536))
            await writer.drain()

    async def scenario():
        rules = GatewayRules(egress=EgressRules(is_unrestricted=True))
        async with (
            scripted_upstream(respond_with_zeros) as upstream,
            served_gateway(upstream.base_url, rules) as served,
        ):
            client = await served.connect()
            client.send_request(bytes(size))
            assert (await client.read_response())[2] == bytes(size)

    run(scenario)


def test_upstream_is_paused_while_the_client_does_not_read():
    sent = 0

    async def endless(_, writer):
        nonlocal sent
        writer.write(HEAD)
        while True:
            writer.write(chunk(bytes(65536)))
            await writer.drain()
            sent += 65536

    async def scenario():
        async with scripted_upstream(endless) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            client.reader._transport.pause_reading()
            client.send_request()
            before = -1
            while sent == 0 or sent != before:
                before = sent
                await asyncio.sleep(0.3)
            assert sent < 32 * 1024 * 1024

    run(scenario)


@pytest.mark.parametrize("send_slowly", [b"", b"POST /v1/messages HTTP/1.1\r\n"])
def test_slow_request_head_closes_the_connection(monkeypatch, send_slowly):
    monkeypatch.setitem(tcp_connections.PHASE_TIMEOUT_SECONDS, tcp_connections.Phase.HEAD, 0.3)

    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            client.writer.write(send_slowly)
            started = time.monotonic()
            while not client.reader.at_eof() and time.monotonic() - started < 5:
                if send_slowly:
                    client.writer.write(b"X: 1\r\n")
                await asyncio.sleep(0.05)
            assert time.monotonic() - started < 10

    run(scenario)


def test_idle_client_is_closed_and_busy_client_is_not(monkeypatch):
    monkeypatch.setitem(tcp_connections.PHASE_TIMEOUT_SECONDS, tcp_connections.Phase.IDLE, 0.3)

    async def scenario():
        script = SteppedUpstream()
        async with scripted_upstream(script) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            client.send_request()
            await asyncio.sleep(0.6)
            script.steps.put_nowait(HEAD + chunk(BODY) + b"0\r\n\r\n")
            assert (await client.read_response())[2] == BODY
            async with asyncio.timeout(5):
                await client.read_to_end()

    run(scenario)


def test_connections_above_the_limit_wait(monkeypatch):
    monkeypatch.setattr(limits, "CONNECTIONS_MAX", 2)

    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url) as served:
            holders = [await served.connect() for _ in range(2)]
            third = await served.connect()
            third.send_request()
            response = asyncio.ensure_future(third.read_response())
            assert (await asyncio.wait([response], timeout=0.2))[0] == set()
            holders[0].abort()
            assert (await response)[0] == 200

    run(scenario)


def test_idle_listeners_reserve_no_connections(monkeypatch):
    """The proxy and all transparent ports share one limit."""
    monkeypatch.setattr(limits, "CONNECTIONS_MAX", 2)

    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url) as served:
            proxy = served.listeners.proxy.getsockname()[1]
            clients = [await served.connect(proxy) for _ in range(3)]
            for client in clients:
                client.writer.write(b"GET http://elsewhere.example/ HTTP/1.1\r\nHost: elsewhere.example\r\n")
            clients[2].writer.write(b"\r\n")
            waiting = asyncio.ensure_future(clients[2].read_response())
            assert (await asyncio.wait([waiting], timeout=0.2))[0] == set()
            clients[1].writer.write(b"\r\n")
            assert (await clients[1].read_response())[0] == 403
            assert (await waiting)[0] == 403

    run(scenario)


def test_stop_ends_all_connections_and_leaves_no_descriptor():
    async def scenario():
        script = SteppedUpstream()
        async with scripted_upstream(script) as upstream, served_gateway(upstream.base_url) as served:
            busy, idle, proxy = await served.connect(), await served.connect(), None
            proxy = await served.connect(served.listeners.proxy.getsockname()[1])
            busy.send_request()
            script.steps.put_nowait(HEAD + chunk(EVENTS[0]))
            await busy.read_until(b"\r\n\r\n")
            started = time.monotonic()
            await served.stop()
            assert time.monotonic() - started < 5
            for client in (busy, idle, proxy):
                await client.read_to_end()
            assert served.gateway.requests_in_flight == 0
            with pytest.raises(OSError):  # noqa: PT011 - any error shows that it is closed
                served.listeners.model.getsockname()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", busy.port)

    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        run(scenario)
        gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_before


def test_exception_in_a_connection_affects_no_other_connection(monkeypatch):
    def fail(self, data):
        raise RuntimeError("a bug")

    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url) as served:
            with monkeypatch.context() as patched:
                patched.setattr(ModelProtocol, "client_data_received", fail)
                client = await served.connect()
                client.send_request()
                assert await client.read_to_end() == b""
            assert [report.error for report in served.events_of(ErrorReported)] == ["gateway_error"]
            client = await served.connect()
            client.send_request()
            assert (await client.read_response())[0] == 200

    run(scenario)


def test_gateway_recovers_from_a_lack_of_file_descriptors():
    async def scenario():
        async with scripted_upstream(respond) as upstream, served_gateway(upstream.base_url) as served:
            client = await served.connect()
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            late_client = socket.socket()
            late_client.setblocking(False)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                late_client.connect_ex(("127.0.0.1", served.port))
                await asyncio.sleep(0.3)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            late_client.close()
            client.send_request()
            assert (await client.read_response())[0] == 200

    run(scenario)
