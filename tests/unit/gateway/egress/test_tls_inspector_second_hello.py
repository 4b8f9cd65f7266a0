"""A TLS server may request a second ClientHello. It is denied unless it names the same server as the first."""

import ssl
from contextlib import suppress
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
CERTIFICATE = Path(__file__).parents[3] / "doubles" / "loopback_only.pem"
CHANGE_CIPHER_SPEC, ALERT = b"\x14\3\3\0\1\1", b"\x15\3\3\0\2\1\0"
APPLICATION_DATA, KEY_EXCHANGE = b"\x17\3\3\0\3abc", b"\x16\3\3\0\5\x10\0\0\1x"


def create_stream_filter(first: bytes = b""):
    tunnel = TlsInspector(POLICY, HOST, "198.18.0.2", 443).client_data_received(client_hello(HOST) + first)
    assert isinstance(tunnel, Tunnel)
    return tunnel.stream_filter


def forward(stream_filter, data: bytes, piece_bytes: int):
    """Return the forwarded data, or the denial, if the input arrives in pieces of `piece_bytes`."""
    forwarded = stream_filter.start()
    for begin in range(0, len(data), piece_bytes):
        if isinstance(forwarded, Denial):
            return forwarded
        more = stream_filter.client_data_received(data[begin : begin + piece_bytes])
        forwarded = more if isinstance(more, Denial) else forwarded + more
    return forwarded


@pytest.mark.parametrize("piece_bytes", [1, 6, 100_000])
@pytest.mark.parametrize(
    "before", [b"", CHANGE_CIPHER_SPEC, CHANGE_CIPHER_SPEC * 3, ALERT + CHANGE_CIPHER_SPEC + ALERT]
)
def test_second_hello_for_another_host_is_denied(before, piece_bytes):
    denial = forward(create_stream_filter(), before + client_hello(OTHER), piece_bytes)
    assert isinstance(denial, Denial)
    assert (denial.host, denial.port) == (OTHER, 443)


@pytest.mark.parametrize("piece_bytes", [1, 6, 100_000])
@pytest.mark.parametrize(
    "data",
    [
        client_hello(HOST) + CHANGE_CIPHER_SPEC + APPLICATION_DATA,
        CHANGE_CIPHER_SPEC + client_hello(HOST) + APPLICATION_DATA,
        CHANGE_CIPHER_SPEC + APPLICATION_DATA,
        KEY_EXCHANGE + CHANGE_CIPHER_SPEC + APPLICATION_DATA,
        APPLICATION_DATA * 2,
        ALERT + APPLICATION_DATA,
    ],
)
def test_records_of_one_connection_are_forwarded_unchanged(data, piece_bytes):
    assert forward(create_stream_filter(), data, piece_bytes) == client_hello(HOST) + data


def test_data_after_the_second_hello_is_not_held_back():
    stream_filter = create_stream_filter()
    stream_filter.start()
    assert stream_filter.client_data_received(client_hello(HOST)) == client_hello(HOST)
    assert stream_filter.is_passthrough
    assert stream_filter.client_data_received(client_hello(OTHER)[:20]) == client_hello(OTHER)[:20]


def in_one_record(*hellos: bytes) -> bytes:
    messages = b"".join(hello[5:] for hello in hellos)
    return b"\x16\3\1" + len(messages).to_bytes(2) + messages


@pytest.mark.parametrize("piece_bytes", [1, 6, 100_000])
@pytest.mark.parametrize("following", [client_hello(OTHER), client_hello(HOST), client_hello(OTHER)[:10], b"-----x"])
def test_second_hello_in_the_same_record_is_denied(following, piece_bytes):
    inspector, outcome = TlsInspector(POLICY, HOST, "198.18.0.2", 443), None
    data = in_one_record(client_hello(HOST), following)
    for begin in range(0, len(data), piece_bytes):
        outcome = outcome or inspector.client_data_received(data[begin : begin + piece_bytes])
    assert isinstance(outcome, Denial)
    assert isinstance(forward(create_stream_filter(), CHANGE_CIPHER_SPEC + data, piece_bytes), Denial)
    split = in_one_record(client_hello(HOST)[:50]) + in_one_record(b"-----" + client_hello(HOST)[50:], following)
    assert isinstance(TlsInspector(POLICY, HOST, "198.18.0.2", 443).client_data_received(split), Denial)


def test_single_hello_in_a_record_is_forwarded():
    assert create_stream_filter(CHANGE_CIPHER_SPEC + in_one_record(client_hello(HOST))).start()


def test_second_hello_in_the_first_read_is_denied():
    assert isinstance(create_stream_filter(CHANGE_CIPHER_SPEC + client_hello(OTHER)).start(), Denial)
    assert (
        create_stream_filter(CHANGE_CIPHER_SPEC + APPLICATION_DATA).start()
        == client_hello(HOST) + CHANGE_CIPHER_SPEC + APPLICATION_DATA
    )


def test_incomplete_second_hello_is_bounded():
    stream_filter = create_stream_filter()
    stream_filter.start()
    endless = b"\x16\3\3\x40\0\1\0\x3f\xfc"
    assert stream_filter.client_data_received(endless.ljust(CLIENT_HELLO_BYTES_MAX)) == b""
    assert isinstance(stream_filter.client_data_received(b"x"), Denial)


def test_buffered_data_is_forwarded_when_the_client_ends_its_stream():
    stream_filter = create_stream_filter()
    stream_filter.start()
    assert stream_filter.client_data_received(CHANGE_CIPHER_SPEC + client_hello(HOST)[:20]) == CHANGE_CIPHER_SPEC
    assert stream_filter.client_data_received(b"") == client_hello(HOST)[:20]


def early_data_hello(name: str) -> bytes:
    """Build a ClientHello that announces early data."""
    return client_hello(name, extra_extensions=b"\0\x2a\0\0")


@pytest.mark.parametrize("piece_bytes", [1, 6, 100_000])
@pytest.mark.parametrize(
    "before",
    [
        APPLICATION_DATA,
        CHANGE_CIPHER_SPEC + APPLICATION_DATA * 3,
        b"\x17\3\3\x40\0" + bytes(0x4000) + CHANGE_CIPHER_SPEC,
    ],
)
def test_second_hello_for_another_host_is_denied_after_early_data(before, piece_bytes):
    tunnel = TlsInspector(POLICY, HOST, "198.18.0.2", 443).client_data_received(early_data_hello(HOST))
    denial = forward(tunnel.stream_filter, before + client_hello(OTHER), piece_bytes)
    assert isinstance(denial, Denial)
    assert (denial.host, denial.port) == (OTHER, 443)


@pytest.mark.parametrize("piece_bytes", [1, 6, 100_000])
@pytest.mark.parametrize(
    "following",
    [b"", CHANGE_CIPHER_SPEC + APPLICATION_DATA * 9, client_hello(HOST) + CHANGE_CIPHER_SPEC + APPLICATION_DATA * 2],
)
def test_resumed_session_with_early_data_is_forwarded(following, piece_bytes):
    tunnel = TlsInspector(POLICY, HOST, "198.18.0.2", 443).client_data_received(early_data_hello(HOST))
    assert (
        forward(tunnel.stream_filter, APPLICATION_DATA + following, piece_bytes)
        == early_data_hello(HOST) + APPLICATION_DATA + following
    )


@pytest.mark.parametrize("piece_bytes", [1, 6, 100_000])
@pytest.mark.parametrize("nonstandard", [b"\x16\4\1", b"\x16\3\1\0\0\x16\3\1"])
def test_second_hello_in_nonstandard_records_is_denied(nonstandard, piece_bytes):
    other = client_hello(OTHER)
    assert isinstance(
        forward(create_stream_filter(), CHANGE_CIPHER_SPEC + nonstandard + other[3:], piece_bytes), Denial
    )
    split = other[:3] + b"\0\1" + other[5:6] + nonstandard + (len(other) - 6).to_bytes(2) + other[6:]
    assert isinstance(forward(create_stream_filter(), split, piece_bytes), Denial)


@pytest.mark.parametrize("piece_bytes", [1, 6, 100_000])
@pytest.mark.parametrize("between", [CHANGE_CIPHER_SPEC, ALERT, CHANGE_CIPHER_SPEC * 2, APPLICATION_DATA])
@pytest.mark.parametrize("cut", [1, 3, 10, 60])
def test_second_hello_split_by_a_non_handshake_record_is_denied(cut, between, piece_bytes):
    """OpenSSL skips the record between the fragments and joins the fragments before and after it."""
    message = client_hello(OTHER)[5:]
    parts = [b"\x16\3\3" + len(part).to_bytes(2) + part for part in (message[:cut], message[cut:])]
    assert isinstance(forward(create_stream_filter(), between.join(parts), piece_bytes), Denial)


@pytest.mark.parametrize("curve", [None, "secp384r1"])
def test_real_handshake_succeeds_with_or_without_a_hello_retry_request(curve):
    """If a curve is given, the client sends no key share for the curve, so the server requests another ClientHello."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(CERTIFICATE)
    if curve is not None:
        server_context.set_ecdh_curve(curve)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname, client_context.verify_mode = False, ssl.CERT_NONE
    to_client, from_client, to_server, from_server = (ssl.MemoryBIO() for _ in range(4))
    client = client_context.wrap_bio(to_client, from_client, server_hostname=HOST)
    server = server_context.wrap_bio(to_server, from_server, server_side=True)
    inspector, stream_filter, hellos = TlsInspector(POLICY, HOST, "198.18.0.2", 443), None, 0
    for _ in range(6):
        continue_handshake(client)
        data = from_client.read()
        hellos += data[:1] == b"\x16" or b"\x14\3\3\0\1\1\x16" in data
        if stream_filter is None and data:
            outcome = inspector.client_data_received(data)
            assert isinstance(outcome, Tunnel)
            stream_filter, data = outcome.stream_filter, outcome.stream_filter.start()
        elif data:
            data = stream_filter.client_data_received(data)
        assert isinstance(data, bytes)
        to_server.write(data)
        continue_handshake(server)
        to_client.write(from_server.read())
    assert client.version() == server.version() == "TLSv1.3"
    assert hellos == (1 if curve is None else 2)
    client.write(b"hello")
    to_server.write(stream_filter.client_data_received(from_client.read()))
    assert server.read(10) == b"hello"


def continue_handshake(side):
    with suppress(ssl.SSLWantReadError):
        side.do_handshake()
