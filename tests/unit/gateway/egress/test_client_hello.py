"""The gateway reads in a TLS ClientHello where it wants to go."""

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.gateway.egress.client_hello import ClientHello, parse_client_hello


def client_hello(server_name: str | None) -> bytes:
    """The first flight of a real TLS client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=server_name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


REAL = client_hello("files.example.org")


def refragmented(hello: bytes, size: int) -> bytes:
    body = hello[5:]
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(hello[:3] + len(piece).to_bytes(2) + piece for piece in pieces)


def test_the_name_of_a_real_client_is_read():
    assert parse_client_hello(REAL) == ClientHello(True, "files.example.org", byte_count=len(REAL))


def test_a_client_that_names_nobody_is_whole_without_a_name():
    assert parse_client_hello(client_hello(None)).server_name is None


def test_every_beginning_of_a_hello_asks_for_more():
    assert {parse_client_hello(REAL[:end]) for end in range(len(REAL))} == {ClientHello(False)}


def test_what_follows_the_hello_does_not_matter():
    assert parse_client_hello(REAL + b"\x17\x03\x03\0\5early").server_name == "files.example.org"


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_hello_in_many_records_is_read(size):
    said = refragmented(REAL, size)
    assert parse_client_hello(said + b"\x14\3\3") == ClientHello(True, "files.example.org", byte_count=len(said))


@pytest.mark.parametrize(
    "other",
    [
        b"GET / HTTP/1.1\r\n",
        b"SSH-2.0-x\r\n",
        b"\x16\x03\1\0\1\2",
        b"\x17\x03\3\0\1x",
    ],
)
def test_what_is_no_hello_is_told_at_once(other):
    assert parse_client_hello(other) == ClientHello(True, None)


@pytest.mark.parametrize("odd", [b"\x16\x02", b"\x16\x02\0\0\1\1", b"\x16\x03\1\0\0\1", b"\x16\x03\1\xff\xff\1"])
def test_what_some_servers_may_take_for_a_hello_names_nobody(odd):
    hello = parse_client_hello(odd)
    assert (hello.is_complete, hello.server_name) == (True, None)
    assert hello.byte_count > 0


@given(st.binary(max_size=300))
def test_no_bytes_make_it_raise(data):
    parse_client_hello(data)


@given(st.integers(0, len(REAL) - 1), st.binary(min_size=1, max_size=8))
def test_no_damaged_hello_makes_it_raise(at, damage):
    parse_client_hello(REAL[:at] + damage + REAL[at + len(damage) :])
