"""What is not the model is refused, and the journal says what it was."""

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.gateway.conversation import Phase
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX
from sandbox.gateway.refusal import REASON, HttpRefusal, TlsRefusal
from sandbox.gateway.reports import Reports
from sandbox.model.event import EgressDenied


def http_refusal(address: str = "proxy", port: int = 3128) -> tuple[HttpRefusal, list]:
    told: list = []
    return HttpRefusal(address, port, Reports(told.append, lambda: 0.0)), told


def tls_refusal() -> tuple[TlsRefusal, list]:
    told: list = []
    return TlsRefusal("198.18.3.4", 443, Reports(told.append, lambda: 0.0)), told


@pytest.mark.parametrize(
    ("asked", "host", "port"),
    [
        (b"CONNECT files.example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n", "files.example.org", 443),
        (b"CONNECT files.example.org HTTP/1.1\r\nHost: x\r\n\r\n", "files.example.org", 443),
        (b"CONNECT [2001:db8::1]:22 HTTP/1.1\r\nHost: x\r\n\r\n", "2001:db8::1", 22),
        (b"GET http://files.example.org/a?b HTTP/1.1\r\nHost: y\r\n\r\n", "files.example.org", 80),
        (b"GET http://u:p@files.example.org:8080/ HTTP/1.1\r\nHost: y\r\n\r\n", "files.example.org", 8080),
        (b"GET https://files.example.org/ HTTP/1.1\r\nHost: y\r\n\r\n", "files.example.org", 443),
        (b"GET / HTTP/1.1\r\nHost: files.example.org\r\n\r\n", "files.example.org", 80),
        (b"HEAD / HTTP/1.1\r\nHost: files.example.org:81\r\n\r\n", "files.example.org", 81),
        (b"GET / HTTP/1.0\r\n\r\n", "proxy", 3128),
        (b"CONNECT files.example.org:99999 HTTP/1.1\r\nHost: x\r\n\r\n", "proxy", 3128),
        (b"GET / HTTP/1.1\r\nHost: [\r\n\r\n", "proxy", 3128),
    ],
)
def test_a_request_is_refused_with_a_sentence_and_reported_with_its_name(asked, host, port):
    refusal, told = http_refusal()
    reaction = refusal.client_sent(asked)
    assert reaction.to_client.startswith(b"HTTP/1.1 403 ")
    assert reaction.hang_up_client
    assert b"connection: close" in reaction.to_client.lower()
    assert (REASON.encode() in reaction.to_client) is not asked.startswith(b"HEAD")
    assert told == [EgressDenied(host, port, REASON)]
    assert refusal.phase is Phase.OVER


def test_a_request_that_comes_in_pieces_is_waited_for():
    refusal, told = http_refusal()
    assert not refusal.client_sent(b"CONNECT a.example:443 HTT").hang_up_client
    assert refusal.client_sent(b"P/1.1\r\nHost: a\r\n\r\n").hang_up_client
    assert told == [EgressDenied("a.example", 443, REASON)]


@pytest.mark.parametrize("scrap", [b"\x16\x03\x01", b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000])
def test_what_is_no_request_is_refused_by_its_address(scrap):
    refusal, told = http_refusal("198.18.3.4", 80)
    reaction = refusal.client_sent(scrap)
    assert reaction.to_client.startswith(b"HTTP/1.1 4")
    assert reaction.hang_up_client
    assert told == [EgressDenied("198.18.3.4", 80, REASON)]


def test_a_connection_that_says_nothing_is_reported_by_its_address():
    refusal, told = http_refusal("198.18.3.4", 80)
    assert refusal.client_sent(b"").hang_up_client
    assert told == [EgressDenied("198.18.3.4", 80, REASON)]


def hello(name: str) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


def test_a_tls_client_is_reported_by_the_name_it_wants_and_gets_no_byte():
    refusal, told = tls_refusal()
    whole = hello("files.example.org")
    assert not refusal.client_sent(whole[:50]).hang_up_client
    assert told == []
    reaction = refusal.client_sent(whole[50:])
    assert (reaction.hang_up_client, reaction.to_client) == (True, b"")
    assert told == [EgressDenied("files.example.org", 443, REASON)]
    assert not refusal.client_sent(whole).hang_up_client, "once is enough"


@pytest.mark.parametrize("said", [b"SSH-2.0-x\r\n", b"", b"\x16\x03\x01\x40\x00\x01" + bytes(CLIENT_HELLO_BYTES_MAX)])
def test_anybody_else_is_reported_by_address(said):
    refusal, told = tls_refusal()
    assert refusal.client_sent(said).hang_up_client
    assert told == [EgressDenied("198.18.3.4", 443, REASON)]


@given(st.lists(st.binary(max_size=60), max_size=6))
def test_no_bytes_make_it_raise(pieces):
    for refusal, told in (http_refusal(), tls_refusal()):
        for piece in [*pieces, b""]:
            refusal.client_sent(piece)
        assert len(told) == 1


@given(st.text(max_size=40), st.sampled_from(["CONNECT {} HTTP/1.1", "GET http://{}/ HTTP/1.1", "GET {} HTTP/1.1"]))
def test_no_target_makes_it_raise(target, line):
    refusal, told = http_refusal()
    refusal.client_sent(line.format(target).encode() + b"\r\nHost: a\r\n\r\n")
    refusal.client_sent(b"")
    assert len(told) == 1
    assert told[0].host.isascii()
