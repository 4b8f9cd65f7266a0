"""A ClientHello is forwarded in one record, because some load balancers ignore record boundaries."""

import ssl
from pathlib import Path

import pytest

from doubles.egress_host import client_hello
from sandbox.gateway.egress.inspector_interface import Denial, Tunnel
from sandbox.gateway.egress.policy import EgressPolicy
from sandbox.gateway.egress.tls import TlsInspector
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX
from sandbox.model.egress import EgressRule, EgressRules

HOST, OTHER = "files.example.org", "other.example"
POLICY = EgressPolicy(EgressRules((EgressRule(HOST),)), "api.anthropic.com")
UNRESTRICTED = EgressPolicy(EgressRules(is_unrestricted=True), "api.anthropic.com", allows_ip_addresses=True)
CERTIFICATE = Path(__file__).parents[3] / "doubles" / "loopback_only.pem"
APPLICATION_DATA = b"\x17\3\3\0\3abc"


def vector(size: int, content: bytes) -> bytes:
    return len(content).to_bytes(size) + content


def extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2) + vector(2, content)


def server_name(name: str) -> bytes:
    return extension(0, vector(2, b"\0" + vector(2, name.encode())))


def hello_message(extensions: bytes) -> bytes:
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0" + vector(2, extensions)
    return b"\1" + vector(3, body)


def records(message: bytes, *sizes: int) -> bytes:
    """Split a message into records of these sizes; the last record contains the rest."""
    pieces = []
    for size in sizes:
        pieces.append(message[:size])
        message = message[size:]
    return b"".join(b"\x16\3\1" + vector(2, piece) for piece in (*pieces, message))


def name_without_record_boundaries(data: bytes) -> str:
    """Return the name that HAProxy's `req.ssl_sni` finds. HAProxy parses all bytes after the first record's header."""
    at = 5 + 4 + 2 + 32
    at += 1 + data[at]
    at += 2 + int.from_bytes(data[at : at + 2])
    at += 1 + data[at]
    end = at + 2 + int.from_bytes(data[at : at + 2])
    at += 2
    while at + 4 <= end:
        if data[at : at + 2] == b"\0\0" and data[at + 6] == 0:
            return data[at + 9 : at + 9 + int.from_bytes(data[at + 7 : at + 9])].decode()
        at += 4 + int.from_bytes(data[at + 2 : at + 4])
    return ""


def hello_with_two_names() -> bytes:
    """Build a hello for HOST in two records. A parser that includes the second record's header reads a hello for OTHER.

    That header shifts the data by five bytes. To such a parser, the last five bytes of the first extension start
    another extension, which also covers the header of the second extension. The parser therefore reads the content of
    the second extension as a separate extension: the server name OTHER.
    """
    first = extension(0x1A1A, bytes(40) + b"\x2a\x2a\0\5\0")
    message = hello_message(first + extension(0x3A3A, server_name(OTHER)) + server_name(HOST))
    return records(message, message.index(first) + 20)


def forward(data: bytes, *, piece_bytes: int = 100_000) -> bytes | Denial:
    inspector, outcome, rest = TlsInspector(POLICY, HOST, "198.18.0.2", 443), None, b""
    for begin in range(0, len(data), piece_bytes):
        outcome = inspector.client_data_received(data[begin : begin + piece_bytes])
        rest = data[begin + piece_bytes :]
        if outcome is not None:
            break
    if not isinstance(outcome, Tunnel):
        assert outcome is not None
        return outcome
    forwarded = outcome.stream_filter.start()
    assert isinstance(forwarded, bytes)
    more = outcome.stream_filter.client_data_received(rest) if rest else b""
    assert isinstance(more, bytes)
    return forwarded + more


@pytest.mark.parametrize("piece_bytes", [1, 7, 100_000])
def test_load_balancer_that_ignores_records_finds_the_allowed_name(piece_bytes):
    data = hello_with_two_names()
    assert name_without_record_boundaries(data) == OTHER
    forwarded = forward(data + APPLICATION_DATA, piece_bytes=piece_bytes)
    assert isinstance(forwarded, bytes)
    assert name_without_record_boundaries(forwarded) == HOST


@pytest.mark.parametrize("piece_bytes", [1, 7, 100_000])
@pytest.mark.parametrize("sizes", [(), (1,), (4,), (50, 1, 9), (1,) * 60])
def test_fragmented_hello_is_forwarded_in_one_record(sizes, piece_bytes):
    hello = client_hello(HOST)
    assert forward(records(hello[5:], *sizes) + APPLICATION_DATA, piece_bytes=piece_bytes) == hello + APPLICATION_DATA


@pytest.mark.parametrize(
    ("size", "is_allowed"), [(CLIENT_HELLO_BYTES_MAX, True), (CLIENT_HELLO_BYTES_MAX + 1, False), (16_384, False)]
)
def test_length_of_a_hello_is_limited(size, is_allowed):
    padding = size - len(client_hello(HOST)) - 4
    data = client_hello(HOST, extra_extensions=extension(21, bytes(padding)))
    assert len(data) == size
    outcome = forward(data)
    assert (outcome == data) is is_allowed
    assert isinstance(outcome, Denial) is not is_allowed


@pytest.mark.parametrize("sizes", [(), (30,)])
def test_hello_for_an_address_has_no_name_and_is_forwarded_unchanged(sizes):
    data = records(hello_message(extension(0x1A1A, bytes(9))), *sizes)
    tunnel = TlsInspector(UNRESTRICTED, "8.8.4.4", "8.8.4.4", 443).client_data_received(data)
    assert isinstance(tunnel, Tunnel)
    assert tunnel.stream_filter.start() == data


def exchange(client: ssl.SSLObject, server: ssl.SSLObject) -> tuple[bool, bool]:
    """Let both sides continue the handshake; return whether each side has finished."""
    finished = []
    for side in (client, server):
        try:
            side.do_handshake()
            finished.append(True)
        except ssl.SSLWantReadError:
            finished.append(False)
    return finished[0], finished[1]


@pytest.mark.parametrize("sizes", [(), (100,), (1, 2, 3)])
def test_handshake_succeeds_although_its_hello_is_forwarded_in_one_record(sizes):
    to_client, from_client, to_server, from_server = (ssl.MemoryBIO() for _ in range(4))
    client_context, server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client_context.check_hostname, client_context.verify_mode = False, ssl.CERT_NONE
    server_context.load_cert_chain(CERTIFICATE)
    client = client_context.wrap_bio(to_client, from_client, server_hostname=HOST)
    server = server_context.wrap_bio(to_server, from_server, server_side=True)
    exchange(client, server)
    forwarded = forward(records(from_client.read()[5:], *sizes))
    assert isinstance(forwarded, bytes)
    to_server.write(forwarded)
    for _ in range(3):
        finished = exchange(client, server)
        to_client.write(from_server.read())
        to_server.write(from_client.read())
    assert finished == (True, True)


def test_tls_tunnel_sends_no_plain_text_responses():
    full = EgressPolicy(EgressRules(is_unrestricted=True), "api.anthropic.com", allows_ip_addresses=True)
    tunnel = TlsInspector(full, "8.8.4.4", "8.8.4.4", 443).client_data_received(b"SSH-2.0-x\r\n")
    assert isinstance(tunnel, Tunnel)
    assert (tunnel.established_response, tunnel.unreachable_response(504, "h is not responding.")) == (b"", b"")
