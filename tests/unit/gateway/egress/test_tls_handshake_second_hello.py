"""A server may ask for a second ClientHello; that one names the same server, or goes nowhere."""

import ssl
from contextlib import suppress
from pathlib import Path

import pytest

from doubles.remote_host import client_hello
from sandbox.gateway.egress.policy import Denial, EgressPolicy, Tunnel
from sandbox.gateway.egress.tls_handshake import TlsHandshake
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX
from sandbox.model.egress import EgressRule, EgressRules

HOST, OTHER = "files.example.org", "other.example"
POLICY = EgressPolicy(EgressRules((EgressRule(HOST),)), "api.anthropic.com")
CERTIFICATE = Path(__file__).parents[3] / "doubles" / "loopback_only.pem"
CHANGE, ALERT = b"\x14\3\3\0\1\1", b"\x15\3\3\0\2\1\0"
ENCRYPTED, KEY_EXCHANGE = b"\x17\3\3\0\3abc", b"\x16\3\3\0\5\x10\0\0\1x"


def sieve(first: bytes = b""):
    passage = TlsHandshake(POLICY, HOST, "198.18.0.2", 443).client_data_received(client_hello(HOST) + first)
    assert isinstance(passage, Tunnel)
    return passage.stream_filter


def through(sieve, said: bytes, step: int):
    """What goes on of it in pieces, or the refusal."""
    onward = sieve.start()
    for begin in range(0, len(said), step):
        if isinstance(onward, Denial):
            return onward
        more = sieve.client_data_received(said[begin : begin + step])
        onward = more if isinstance(more, Denial) else onward + more
    return onward


@pytest.mark.parametrize("step", [1, 6, 100_000])
@pytest.mark.parametrize("before", [b"", CHANGE, CHANGE * 3, ALERT + CHANGE + ALERT])
def test_another_name_the_second_time_is_refused(before, step):
    refusal = through(sieve(), before + client_hello(OTHER), step)
    assert isinstance(refusal, Denial)
    assert (refusal.host, refusal.port) == (OTHER, 443)


@pytest.mark.parametrize("step", [1, 6, 100_000])
@pytest.mark.parametrize(
    "said",
    [
        client_hello(HOST) + CHANGE + ENCRYPTED,
        CHANGE + client_hello(HOST) + ENCRYPTED,
        CHANGE + ENCRYPTED,
        KEY_EXCHANGE + CHANGE + ENCRYPTED,
        ENCRYPTED * 2,
        ALERT + ENCRYPTED,
    ],
)
def test_what_belongs_to_one_connection_passes_unchanged(said, step):
    assert through(sieve(), said, step) == client_hello(HOST) + said


def in_one_record(*hellos: bytes) -> bytes:
    messages = b"".join(hello[5:] for hello in hellos)
    return b"\x16\3\1" + len(messages).to_bytes(2) + messages


@pytest.mark.parametrize("step", [1, 6, 100_000])
@pytest.mark.parametrize("behind", [client_hello(OTHER), client_hello(HOST), client_hello(OTHER)[:10], b"-----x"])
def test_another_one_in_the_same_record_is_refused(behind, step):
    opening, outcome = TlsHandshake(POLICY, HOST, "198.18.0.2", 443), None
    said = in_one_record(client_hello(HOST), behind)
    for begin in range(0, len(said), step):
        outcome = outcome or opening.client_data_received(said[begin : begin + step])
    assert isinstance(outcome, Denial)
    assert isinstance(through(sieve(), CHANGE + said, step), Denial)
    split = in_one_record(client_hello(HOST)[:50]) + in_one_record(b"-----" + client_hello(HOST)[50:], behind)
    assert isinstance(TlsHandshake(POLICY, HOST, "198.18.0.2", 443).client_data_received(split), Denial)


def test_one_alone_in_its_record_passes():
    assert sieve(CHANGE + in_one_record(client_hello(HOST))).start()


def test_it_is_seen_right_behind_the_first_one_too():
    assert isinstance(sieve(CHANGE + client_hello(OTHER)).start(), Denial)
    assert sieve(CHANGE + ENCRYPTED).start() == client_hello(HOST) + CHANGE + ENCRYPTED


def test_nothing_is_waited_for_without_a_bound():
    waiting = sieve()
    waiting.start()
    endless = b"\x16\3\3\x40\0\1\0\x3f\xfc"
    assert waiting.client_data_received(endless.ljust(CLIENT_HELLO_BYTES_MAX)) == b""
    assert isinstance(waiting.client_data_received(b"x"), Denial)


def test_a_client_that_ends_sends_what_was_waited_for():
    waiting = sieve()
    waiting.start()
    assert waiting.client_data_received(CHANGE + client_hello(HOST)[:20]) == CHANGE
    assert waiting.client_data_received(b"") == client_hello(HOST)[:20]


def before_data(name: str) -> bytes:
    """A ClientHello that announces data which come before the server's answer."""
    return client_hello(name, beside=b"\0\x2a\0\0")


@pytest.mark.parametrize("step", [1, 6, 100_000])
@pytest.mark.parametrize("before", [ENCRYPTED, CHANGE + ENCRYPTED * 3, b"\x17\3\3\x40\0" + bytes(0x4000) + CHANGE])
def test_another_name_behind_early_data_is_refused(before, step):
    passage = TlsHandshake(POLICY, HOST, "198.18.0.2", 443).client_data_received(before_data(HOST))
    refusal = through(passage.stream_filter, before + client_hello(OTHER), step)
    assert isinstance(refusal, Denial)
    assert (refusal.host, refusal.port) == (OTHER, 443)


@pytest.mark.parametrize("step", [1, 6, 100_000])
@pytest.mark.parametrize("behind", [b"", CHANGE + ENCRYPTED * 9, client_hello(HOST) + CHANGE + ENCRYPTED * 2])
def test_a_session_taken_up_with_early_data_passes_at_once(behind, step):
    passage = TlsHandshake(POLICY, HOST, "198.18.0.2", 443).client_data_received(before_data(HOST))
    assert through(passage.stream_filter, ENCRYPTED + behind, step) == before_data(HOST) + ENCRYPTED + behind


@pytest.mark.parametrize("step", [1, 6, 100_000])
@pytest.mark.parametrize("odd", [b"\x16\4\1", b"\x16\3\1\0\0\x16\3\1"])
def test_another_name_in_records_that_only_some_servers_read_is_refused(odd, step):
    other = client_hello(OTHER)
    assert isinstance(through(sieve(), CHANGE + odd + other[3:], step), Denial)
    split = other[:3] + b"\0\1" + other[5:6] + odd + (len(other) - 6).to_bytes(2) + other[6:]
    assert isinstance(through(sieve(), split, step), Denial)


@pytest.mark.parametrize("step", [1, 6, 100_000])
@pytest.mark.parametrize("between", [CHANGE, ALERT, CHANGE * 2, ENCRYPTED])
@pytest.mark.parametrize("cut", [1, 3, 10, 60])
def test_another_name_with_a_record_in_its_midst_is_refused(cut, between, step):
    """OpenSSL passes over such a record and puts together what stands before and behind it."""
    message = client_hello(OTHER)[5:]
    parts = [b"\x16\3\3" + len(part).to_bytes(2) + part for part in (message[:cut], message[cut:])]
    assert isinstance(through(sieve(), between.join(parts), step), Denial)


@pytest.mark.parametrize("curve", [None, "secp384r1"])
def test_a_real_handshake_passes_whether_the_server_asks_again_or_not(curve):
    """With a curve for which the client has sent no key the server asks for another hello."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(CERTIFICATE)
    if curve is not None:
        server_context.set_ecdh_curve(curve)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname, client_context.verify_mode = False, ssl.CERT_NONE
    to_client, from_client, to_server, from_server = (ssl.MemoryBIO() for _ in range(4))
    client = client_context.wrap_bio(to_client, from_client, server_hostname=HOST)
    server = server_context.wrap_bio(to_server, from_server, server_side=True)
    opening, passed, hellos = TlsHandshake(POLICY, HOST, "198.18.0.2", 443), None, 0
    for _ in range(6):
        step(client)
        said = from_client.read()
        hellos += said[:1] == b"\x16" or b"\x14\3\3\0\1\1\x16" in said
        if passed is None and said:
            outcome = opening.client_data_received(said)
            assert isinstance(outcome, Tunnel)
            passed, said = outcome.stream_filter, outcome.stream_filter.start()
        elif said:
            said = passed.client_data_received(said)
        assert isinstance(said, bytes)
        to_server.write(said)
        step(server)
        to_client.write(from_server.read())
    assert client.version() == server.version() == "TLSv1.3"
    assert hellos == (1 if curve is None else 2)
    client.write(b"hello")
    to_server.write(passed.client_data_received(from_client.read()))
    assert server.read(10) == b"hello"


def step(side):
    with suppress(ssl.SSLWantReadError):
        side.do_handshake()
