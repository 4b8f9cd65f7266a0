"""The gateway reads the server name from a TLS ClientHello."""

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.gateway.egress.tls import ClientHello, parse_client_hello


def client_hello(server_name: str | None) -> bytes:
    """Return the first flight of a real TLS client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=server_name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


REAL_HELLO = client_hello("files.example.org")


def refragmented(hello: bytes, size: int) -> bytes:
    body = hello[5:]
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(hello[:3] + len(piece).to_bytes(2) + piece for piece in pieces)


def test_server_name_of_a_real_client_is_parsed():
    assert parse_client_hello(REAL_HELLO) == ClientHello(True, "files.example.org", byte_count=len(REAL_HELLO))


def test_hello_without_sni_has_no_server_name():
    assert parse_client_hello(client_hello(None)).server_name is None


def test_truncated_hello_is_incomplete():
    assert {parse_client_hello(REAL_HELLO[:end]) for end in range(len(REAL_HELLO))} == {ClientHello(False)}


def test_data_after_the_hello_is_ignored():
    assert parse_client_hello(REAL_HELLO + b"\x17\x03\x03\0\5early").server_name == "files.example.org"


@pytest.mark.parametrize("size", [1, 7, 100])
def test_hello_split_across_many_records_is_parsed(size):
    hello = refragmented(REAL_HELLO, size)
    assert parse_client_hello(hello + b"\x14\3\3") == ClientHello(True, "files.example.org", byte_count=len(hello))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"SSH-2.0-x\r\n",
        b"\x16\x03\1\0\1\2",
        b"\x17\x03\3\0\1x",
    ],
)
def test_non_hello_data_is_complete_without_a_server_name(data):
    assert parse_client_hello(data) == ClientHello(True, None)


@pytest.mark.parametrize("data", [b"\x16\x02", b"\x16\x02\0\0\1\1", b"\x16\x03\1\0\0\1", b"\x16\x03\1\xff\xff\1"])
def test_nonstandard_record_is_complete_without_a_server_name(data):
    hello = parse_client_hello(data)
    assert (hello.is_complete, hello.server_name) == (True, None)
    assert hello.byte_count > 0


@given(st.binary(max_size=300))
def test_arbitrary_bytes_do_not_raise(data):
    parse_client_hello(data)


@given(st.integers(0, len(REAL_HELLO) - 1), st.binary(min_size=1, max_size=8))
def test_corrupted_hello_does_not_raise(at, damage):
    parse_client_hello(REAL_HELLO[:at] + damage + REAL_HELLO[at + len(damage) :])
