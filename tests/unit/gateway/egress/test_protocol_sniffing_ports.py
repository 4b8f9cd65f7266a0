"""On ports other than 80 and 443, every host name in a connection must be the name of the connected host."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles.egress_host import client_hello
from sandbox.gateway.egress.inspector_interface import Denial, Tunnel
from sandbox.gateway.egress.policy import EgressPolicy
from sandbox.gateway.egress.protocol_sniffing import SniffingInspector, decide_transparent_connection
from sandbox.gateway.egress.proxy_inspector import ProxyInspector
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX
from sandbox.model.egress import EgressRule, EgressRules

HOST, MODEL = "db.example.org", "api.anthropic.com"
RULES = EgressRules((EgressRule(HOST, (5432, 8080)), EgressRule(MODEL, (8080,)), EgressRule("*.example.net", (22,))))
POLICY = EgressPolicy(RULES, MODEL)


def create_inspector(host: str = HOST, port: int = 8080) -> SniffingInspector:
    return SniffingInspector(POLICY, host, port)


def forwarded_data(outcome) -> bytes:
    """Return the data that is forwarded to the host immediately."""
    assert isinstance(outcome, Tunnel), outcome
    forwarded = outcome.stream_filter.start()
    assert isinstance(forwarded, bytes)
    return forwarded


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2 Debian-2\r\n",
        b"\x00\x00\x00\x08\x04\xd2\x16\x2f",  # PostgreSQL SSLRequest
        b"U\x00\x00\x01\x85\xa6",  # MySQL
        b"*1\r\n$4\r\nPING\r\n",
        b"PING\r\n",
        b"EHLO me.example.org\r\n",
        b'{"jsonrpc": "2.0"}',
        b"GET key\r\n",  # Redis inline command
        b"get /key\r\n",  # memcached
        b"  an indented line\r\n",
        b"PING\r",
        b"\x16\x00",
        b"\xff\xfe",
    ],
)
def test_protocol_without_host_names_is_forwarded_unchanged(data):
    assert forwarded_data(create_inspector().client_data_received(data)) == data


def test_fragmented_data_is_buffered_until_the_protocol_is_known():
    inspector = create_inspector()
    assert inspector.client_data_received(b"PI") is None
    assert inspector.client_data_received(b"NG") is None
    assert forwarded_data(inspector.client_data_received(b"\r\nrest")) == b"PING\r\nrest"


def test_data_of_a_client_whose_stream_ends_before_detection_is_forwarded():
    inspector = create_inspector()
    assert inspector.client_data_received(b"quit") is None
    assert forwarded_data(inspector.client_data_received(b"")) == b"quit"


def test_options_request_for_the_whole_server_is_forwarded():
    data = f"OPTIONS * HTTP/1.1\r\nHost: {HOST}:8080\r\n\r\n".encode()
    assert forwarded_data(create_inspector().client_data_received(data)).startswith(b"OPTIONS * HTTP/1.1\r\n")


def test_only_one_http_request_for_the_host_is_forwarded():
    data = f"GET /a HTTP/1.1\r\nHost: {HOST}:8080\r\n\r\nGET /b HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    forwarded = forwarded_data(create_inspector().client_data_received(data))
    assert forwarded.startswith(b"GET /a HTTP/1.1\r\n")
    assert b"/b" not in forwarded


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: db.example.org:81\r\n\r\n",
        b"\r\n\r\nGET / HTTP/1.1\r\nHost: other.example\r\n\r\n",
        b" GET / HTTP/1.1\r\nHost: other.example\r\n\r\n",
        b"\r\n\t \v\fGET / HTTP/1.1\r\nHost: other.example\r\n\r\n",
        b"GET  /  HTTP/1.1\r\nHost: other.example\r\n\r\n",
        b"GET\t/ HTTP/1.1\r\nHost: other.example\r\n\r\n",
        b"GET\v/ HTTP/1.1\r\nHost: other.example\r\n\r\n",
        b"GET\f/\fHTTP/1.1\r\nHost: other.example\r\n\r\n",
        b"get / http/1.1\r\nhost: other.example\r\n\r\n",
        b"FOO-BAR / HTTP/1.0\r\nHost: other.example\r\n\r\n",
        b"GET http://other.example/ HTTP/1.1\r\nHost: db.example.org:8080\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: db.example.org:8080\r\nHost: other.example\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        client_hello("other.example"),
    ],
)
@pytest.mark.parametrize("piece_bytes", [1, 7, 10_000])
def test_http_and_tls_for_another_host_are_denied(data, piece_bytes):
    inspector, outcome = create_inspector(), None
    for begin in range(0, len(data), piece_bytes):
        outcome = inspector.client_data_received(data[begin : begin + piece_bytes])
        if outcome is not None:
            break
    assert isinstance(outcome, Denial)


def test_tls_for_the_host_is_forwarded():
    data = client_hello(HOST)
    assert forwarded_data(create_inspector().client_data_received(data)) == data
    inspector = create_inspector()
    assert inspector.client_data_received(data[:1]) is None
    assert inspector.client_data_received(data[1:20]) is None
    assert forwarded_data(inspector.client_data_received(data[20:])) == data


def test_oversized_first_line_is_denied():
    inspector = create_inspector()
    assert inspector.client_data_received(b"GET " + b"a" * (CLIENT_HELLO_BYTES_MAX - 4)) is None
    assert isinstance(inspector.client_data_received(b"a"), Denial)


def test_transparent_connection_is_opened_before_the_client_sends():
    tunnel = decide_transparent_connection(POLICY, "git.example.net", "198.18.0.2", 22)
    assert isinstance(tunnel, Tunnel)
    assert tunnel.stream_filter.start() == b""
    assert tunnel.stream_filter.client_data_received(b"SSH-2.0-x\r\n") == b"SSH-2.0-x\r\n"


@pytest.mark.parametrize(
    ("name", "port", "host", "reason"),
    [
        (None, 22, "198.18.0.9", "IP addresses are reachable only with network_mode full."),
        ("git.example.net", 5432, "git.example.net", "vm.allowed_hosts does not list it at this port."),
        ("example.net", 22, "example.net", "vm.allowed_hosts does not list it."),
        (MODEL, 8080, MODEL, "the model is reachable only at the gateway's address."),
    ],
)
def test_transparent_connection_to_an_unlisted_host_or_port_is_denied(name, port, host, reason):
    denial = decide_transparent_connection(POLICY, name, "198.18.0.9", port)
    assert isinstance(denial, Denial)
    assert (denial.host, denial.port) == (host, port)
    assert denial.reason.endswith(reason)


@pytest.mark.parametrize(
    ("host", "port", "is_allowed"),
    [
        (HOST, 5432, True),
        (HOST, 443, False),
        ("a.example.net", 22, True),
        ("example.net", 22, False),
        (MODEL, 8080, False),
    ],
)
def test_proxy_opens_tunnels_only_to_listed_ports(host, port, is_allowed):
    request = f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    outcome = ProxyInspector(POLICY, 3128).client_data_received(request)
    assert isinstance(outcome, Tunnel if is_allowed else Denial)


def test_tunnel_to_another_port_is_inspected():
    request = f"CONNECT {HOST}:8080 HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    tunnel = ProxyInspector(POLICY, 3128).client_data_received(request)
    assert isinstance(tunnel, Tunnel)
    assert isinstance(
        tunnel.stream_filter.client_data_received(b"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n"), Denial
    )


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_arbitrary_bytes_are_allowed_or_denied_before_the_stream_ends(pieces):
    inspector, outcome = create_inspector(), None
    for piece in [*pieces, b""]:
        outcome = inspector.client_data_received(piece)
        if outcome is not None:
            break
    assert isinstance(outcome, Tunnel | Denial)
