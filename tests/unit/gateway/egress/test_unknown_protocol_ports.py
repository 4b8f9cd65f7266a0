"""A connection at another port than 80 and 443: whatever names a host in it must name that one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles.remote_host import client_hello
from sandbox.gateway.egress.policy import Denial, EgressPolicy, Tunnel
from sandbox.gateway.egress.proxy_handshake import ProxyHandshake
from sandbox.gateway.egress.unknown_protocol import SniffingHandshake, open_transparent_tunnel
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX
from sandbox.model.egress import EgressRule, EgressRules

HOST, MODEL = "db.example.org", "api.anthropic.com"
RULES = EgressRules((EgressRule(HOST, (5432, 8080)), EgressRule(MODEL, (8080,)), EgressRule("*.example.net", (22,))))
POLICY = EgressPolicy(RULES, MODEL)


def opened(host: str = HOST, port: int = 8080) -> SniffingHandshake:
    return SniffingHandshake(POLICY, host, port)


def told(outcome) -> bytes:
    """What goes to the host at once."""
    assert isinstance(outcome, Tunnel), outcome
    onward = outcome.stream_filter.start()
    assert isinstance(onward, bytes)
    return onward


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.2 Debian-2\r\n",
        b"\x00\x00\x00\x08\x04\xd2\x16\x2f",  # PostgreSQL asks whether there is TLS
        b"U\x00\x00\x01\x85\xa6",  # MySQL
        b"*1\r\n$4\r\nPING\r\n",
        b"PING\r\n",
        b"EHLO me.example.org\r\n",
        b'{"jsonrpc": "2.0"}',
        b"GET key\r\n",  # Redis, by hand
        b"get /key\r\n",  # memcached
        b"  a line that is set in\r\n",
        b"PING\r",
        b"\x16\x00",
        b"\xff\xfe",
    ],
)
def test_a_protocol_that_names_no_host_passes_as_it_comes(said):
    assert told(opened().client_data_received(said)) == said


def test_a_protocol_in_pieces_is_waited_for_until_it_is_known():
    opening = opened()
    assert opening.client_data_received(b"PI") is None
    assert opening.client_data_received(b"NG") is None
    assert told(opening.client_data_received(b"\r\nrest")) == b"PING\r\nrest"


def test_a_client_that_ends_before_it_is_known_is_let_through():
    opening = opened()
    assert opening.client_data_received(b"quit") is None
    assert told(opening.client_data_received(b"")) == b"quit"


def test_http_for_the_host_passes_as_one_request():
    said = f"GET /a HTTP/1.1\r\nHost: {HOST}:8080\r\n\r\nGET /b HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    onward = told(opened().client_data_received(said))
    assert onward.startswith(b"GET /a HTTP/1.1\r\n")
    assert b"/b" not in onward


@pytest.mark.parametrize(
    "said",
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
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_http_and_tls_for_another_host_are_refused_however_they_come(said, step):
    opening, outcome = opened(), None
    for begin in range(0, len(said), step):
        outcome = opening.client_data_received(said[begin : begin + step])
        if outcome is not None:
            break
    assert isinstance(outcome, Denial)


def test_tls_for_the_host_passes():
    said = client_hello(HOST)
    assert told(opened().client_data_received(said)) == said
    opening = opened()
    assert opening.client_data_received(said[:1]) is None
    assert opening.client_data_received(said[1:20]) is None
    assert told(opening.client_data_received(said[20:])) == said


def test_an_endless_first_line_is_refused():
    opening = opened()
    assert opening.client_data_received(b"GET " + b"a" * (CLIENT_HELLO_BYTES_MAX - 4)) is None
    assert isinstance(opening.client_data_received(b"a"), Denial)


def test_a_transparent_connection_is_let_through_before_it_speaks():
    passage = open_transparent_tunnel(POLICY, "git.example.net", "198.18.0.2", 22)
    assert isinstance(passage, Tunnel)
    assert passage.stream_filter.start() == b""
    assert passage.stream_filter.client_data_received(b"SSH-2.0-x\r\n") == b"SSH-2.0-x\r\n"


@pytest.mark.parametrize(
    ("name", "port", "host"),
    [
        (None, 22, "198.18.0.9"),
        ("git.example.net", 5432, "git.example.net"),
        ("example.net", 22, "example.net"),
        (MODEL, 8080, MODEL),
    ],
)
def test_a_transparent_connection_elsewhere_is_not(name, port, host):
    refusal = open_transparent_tunnel(POLICY, name, "198.18.0.9", port)
    assert isinstance(refusal, Denial)
    assert (refusal.host, refusal.port) == (host, port)


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
def test_the_proxy_opens_tunnels_to_the_ports_that_are_listed(host, port, is_allowed):
    asked = f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    outcome = ProxyHandshake(POLICY, 3128).client_data_received(asked)
    assert isinstance(outcome, Tunnel if is_allowed else Denial)


def test_a_tunnel_to_another_port_is_looked_into_as_well():
    asked = f"CONNECT {HOST}:8080 HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    fronted = ProxyHandshake(POLICY, 3128).client_data_received(asked)
    assert isinstance(fronted, Tunnel)
    assert isinstance(
        fronted.stream_filter.client_data_received(b"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n"), Denial
    )


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_no_bytes_make_it_raise_or_wait_for_ever(pieces):
    opening, outcome = opened(), None
    for piece in [*pieces, b""]:
        outcome = opening.client_data_received(piece)
        if outcome is not None:
            break
    assert isinstance(outcome, Tunnel | Denial)
