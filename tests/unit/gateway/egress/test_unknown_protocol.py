"""At another port than 80 and 443: no bytes before HTTP or TLS get another host's name past the gateway."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.gateway.egress.policy import Denial, EgressPolicy, InspectingFilter, StreamFilter, Tunnel
from sandbox.gateway.egress.unknown_protocol import SniffingHandshake, open_transparent_tunnel
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX, PARTIAL_HELLOS_MAX, UNKNOWN_PROTOCOL_BYTES_MAX
from sandbox.model.egress import EgressRule, EgressRules

HOST, PORT, OTHER = "db.example.org", 8080, "other.example"
POLICY = EgressPolicy(EgressRules((EgressRule(HOST, (PORT,)),)), "api.anthropic.com")
OF_ANOTHER = f"GET / HTTP/1.1\r\nHost: {OTHER}\r\n\r\n".encode()


def hello_of(*names: str, behind: bytes = b"") -> bytes:
    """A ClientHello with these servers' names; `behind` is in the same record."""
    entries = b"".join(b"\0" + len(name).to_bytes(2) + name.encode() for name in names)
    extension = b"\0\x0a\0\4\0\2\0\x1d"
    if names:
        extension += b"\0\0" + (len(entries) + 2).to_bytes(2) + len(entries).to_bytes(2) + entries
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0" + len(extension).to_bytes(2) + extension
    message = b"\1" + len(body).to_bytes(3) + body + behind
    return b"\x16\3\1" + len(message).to_bytes(2) + message


HELLO, HELLO_OF_ANOTHER, HELLO_OF_NOBODY = hello_of(HOST), hello_of(OTHER), hello_of()
PROXY_1 = b"PROXY TCP4 192.0.2.1 192.0.2.2 4000 8080\r\n"
PROXY_2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\2\1\xc0\0\2\2\x0f\xa0\x1f\x90"
SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"


def sieve() -> StreamFilter:
    passage = open_transparent_tunnel(POLICY, HOST, "198.18.0.2", PORT)
    assert isinstance(passage, Tunnel)
    return passage.stream_filter


def fed(to: StreamFilter, said: bytes, step: int) -> tuple[bytes, Denial | None]:
    """What goes to the host, and the refusal that ends it."""
    onward = bytearray()
    for piece in [*(said[begin : begin + step] for begin in range(0, len(said), step)), b""]:
        told = to.client_data_received(piece)
        if isinstance(told, Denial):
            return bytes(onward), told
        onward += told
    return bytes(onward), None


def records(hello: bytes, size: int, version: bytes = b"\3\1", between: bytes = b"") -> bytes:
    """The same hello in records of `size` bytes."""
    body = hello[5:]
    pieces = [body[begin : begin + size] for begin in range(0, len(body), size)]
    return between.join(b"\x16" + version + len(piece).to_bytes(2) + piece for piece in pieces)


HTTP_ATTACKS = {
    "PROXY protocol 1": PROXY_1 + OF_ANOTHER,
    "PROXY protocol 1 of an unknown address": b"PROXY UNKNOWN\r\n" + OF_ANOTHER,
    "PROXY protocol 1 in small letters": b"proxy tcp4 192.0.2.1 192.0.2.2 1 2\r\n" + OF_ANOTHER,
    "PROXY protocol 1 behind an empty line": b"\r\n" + PROXY_1 + OF_ANOTHER,
    "PROXY protocol 1 of this host": PROXY_1 + f"GET / HTTP/1.1\r\nHost: {HOST}:{PORT}\r\n\r\n".encode(),
    "PROXY protocol 2": PROXY_2 + OF_ANOTHER,
    "PROXY protocol 2 of this host": PROXY_2 + f"GET / HTTP/1.1\r\nHost: {HOST}:{PORT}\r\n\r\n".encode(),
    "PROXY protocol 2, local": PROXY_2[:12] + b"\x20\0\0\0" + OF_ANOTHER,
    "PROXY protocol 2 behind something": b"\0" + PROXY_2 + OF_ANOTHER,
    "NetScaler's client address": b"\0\0\x35\x81\0\0\0\x28" + b"\x45" + bytes(39) + OF_ANOTHER,
    "NUL": b"\0" + OF_ANOTHER,
    "many NULs": bytes(5000) + OF_ANOTHER,
    "NUL behind the method": OF_ANOTHER.replace(b" ", b"\0", 1),
    "NUL before the version": OF_ANOTHER.replace(b" HTTP", b"\0HTTP"),
    "NUL in the target": OF_ANOTHER.replace(b"/ H", b"/\0 H"),
    "NUL behind the version": OF_ANOTHER.replace(b"1.1\r", b"1.1\0\r"),
    "byte order mark": b"\xef\xbb\xbf" + OF_ANOTHER,
    "no-break space": b"\xa0" + OF_ANOTHER,
    "unit separator": b"\x1f" + OF_ANOTHER,
    "file separators": OF_ANOTHER.replace(b" ", b"\x1c", 2),
    "next line": OF_ANOTHER.replace(b" ", b"\x85", 2),
    "no-break spaces": OF_ANOTHER.replace(b" ", b"\xa0", 2),
    "escape behind the method": OF_ANOTHER.replace(b"GET ", b"GET \x1b"),
    "tab behind the method": OF_ANOTHER.replace(b" ", b"\t", 1),
    "carriage return behind the method": OF_ANOTHER.replace(b" ", b"\r", 1),
    "NUL, and a carriage return behind the method": b"\0" + OF_ANOTHER.replace(b" ", b"\r", 1),
    "method in quotes": OF_ANOTHER.replace(b"GET", b'"GET"'),
    "method in brackets, absolute": b"(GET) http://other.example/\r\n\r\n",
    "carriage return alone": b"\r" + OF_ANOTHER.replace(b"\r\n", b"\r"),
    "line feeds": b"\n\n" + OF_ANOTHER.replace(b"\r\n", b"\n"),
    "unknown method": b"\0FROB /x HTTP/1.1\r\nHost: other.example\r\n\r\n",
    "small letters": b"\0get / http/1.1\r\nhost: other.example\r\n\r\n",
    "absolute": b"\0GET http://other.example/ HTTP/1.1\r\nHost: db.example.org\r\n\r\n",
    "star": b"\0OPTIONS * HTTP/1.1\r\nHost: other.example\r\n\r\n",
    "no slash": b"\0GET x HTTP/1.1\r\nHost: other.example\r\n\r\n",
    "CONNECT": b"\0CONNECT other.example:80 HTTP/1.1\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n",
    "HTTP/0.9, set in": b" GET /old\r\n",
    "HTTP/0.9 that ends with the connection": b"GET /old",
    "HTTP/0.9 of another host": b"get http://other.example/\r\n",
    "HTTP/0.9 with headers": b"GET x\r\nHost: other.example\r\n\r\n",
    "HTTP/0.9 with headers of another spelling": b"GET x\r\nA: b\r\nhost : other.example\r\n\r\n",
    "HTTP/0.9 with headers, and a target that does not show": b"GET\r\xb8\nA: b\r\nHost: other.example\r\n\r\n",
    "no version": b"GET / \r\nHost: other.example\r\n\r\n",
    "another version": b"GET / H/1.1\r\nHost: other.example\r\n\r\n",
    "no version, and another request after it": b"GET *\r\nConnection: keep-alive\r\n\r\n" + OF_ANOTHER,
    "no version, kept": b"G key\r\nConnection : keep-alive\r\n\r\n",
    "RTSP": b"OPTIONS * RTSP/1.0\r\nHost: other.example\r\n\r\n",
    "RTSP of a stream": b"DESCRIBE x RTSP/1.0\r\nHost: other.example\r\n\r\n",
    "ICE": b"SOURCE /x ICE/1.0\r\nHost: other.example\r\n\r\n",
    "HTTP/2": b"\0PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2 behind an empty line": b"\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "behind a line": b"PING\r\n" + OF_ANOTHER,
    "behind many lines": b"NOOP x\r\n" * 100 + OF_ANOTHER,
    "behind an empty WebSocket frame": b"\x89\x80\0\0\0\0" + OF_ANOTHER,
    "behind SOCKS": b"\5\1\0\5\1\0\3\x0dother.example\0\x50" + OF_ANOTHER,
    "behind a long line without an end": b"\x1c" + b"GET /" + b"a" * UNKNOWN_PROTOCOL_BYTES_MAX + b" HTTP/1.1\r\n",
}

TLS_ATTACKS = {
    "behind PROXY protocol 1": PROXY_1 + HELLO_OF_ANOTHER,
    "behind PROXY protocol 2": PROXY_2 + HELLO_OF_ANOTHER,
    "behind an alert": b"\x15\3\1\0\2\1\0" + HELLO_OF_ANOTHER,
    "of nobody behind an alert": b"\x15\3\1\0\2\1\0" + HELLO_OF_NOBODY,
    "of nobody behind a change of the cipher": b"\x14\3\3\0\1\1" + HELLO_OF_NOBODY,
    "behind an empty record": b"\x16\3\1\0\0" + HELLO_OF_ANOTHER,
    "in records of another version": records(HELLO_OF_ANOTHER, 10_000, b"\0\1"),
    "in small records of another version": records(HELLO_OF_ANOTHER, 1, b"\x0f\xff"),
    "in small records": records(HELLO_OF_ANOTHER, 1),
    "of SSL 2": b"\x80\x2e\1\3\1\0\x15\0\0\0\x10" + bytes(40),
    "of SSL 2 itself": b"\x80\x2e\1\0\2\0\x15\0\0\0\x10" + bytes(40),
    "PostgreSQL": SSL_REQUEST + HELLO_OF_ANOTHER,
    "PostgreSQL that asked for GSSAPI first": b"\0\0\0\x08\x04\xd2\x16\x30" + SSL_REQUEST + HELLO_OF_ANOTHER,
    "PostgreSQL in small records": SSL_REQUEST + records(HELLO_OF_ANOTHER, 1),
    "PostgreSQL in records with alerts between": SSL_REQUEST
    + records(HELLO_OF_ANOTHER, 50, between=b"\x15\3\1\0\2\1\0"),
    "PostgreSQL in records of another version": SSL_REQUEST + records(HELLO_OF_ANOTHER, 100, b"\5\5"),
    "PostgreSQL, two names": SSL_REQUEST + hello_of(HOST, OTHER),
    "PostgreSQL, two hellos in a record": SSL_REQUEST + hello_of(HOST, behind=HELLO_OF_ANOTHER[5:]),
    "PostgreSQL, two hellos": SSL_REQUEST + HELLO + HELLO_OF_ANOTHER,
    "STARTTLS": b"EHLO me\r\nSTARTTLS\r\n" + HELLO_OF_ANOTHER,
    "STARTTLS of IMAP": b"a1 STARTTLS\r\n" + HELLO_OF_ANOTHER,
    "behind SOCKS": b"\5\1\0\5\1\0\3\x0dother.example\1\xbb" + HELLO_OF_ANOTHER,
    "behind a NUL": b"\0" + HELLO_OF_ANOTHER,
    "that does not come to its end": b"\0\x16\3\1\x3f\xff\1\0\x3f\xfb\3\3" + bytes(CLIENT_HELLO_BYTES_MAX),
    "that begins too often": b"\0" + b"\x16\3\1\x3f\xff\1\0\x3f\xfb\3\3" * (PARTIAL_HELLOS_MAX + 1),
}

LEGITIMATE = {
    "PostgreSQL": b"\0\0\0\x29\0\3\0\0user\0bob\0database\0b\0\0Q\0\0\0\x0dSELECT 1\0",
    "PostgreSQL with TLS": SSL_REQUEST + HELLO,
    "PostgreSQL with TLS that names nobody": SSL_REQUEST + HELLO_OF_NOBODY,
    "PostgreSQL with TLS in small records": SSL_REQUEST + records(HELLO, 7),
    "STARTTLS": b"EHLO me\r\nSTARTTLS\r\n" + HELLO,
    "Redis": b"*2\r\n$4\r\nAUTH\r\n$1\r\nx\r\n*1\r\n$4\r\nPING\r\n",
    "Redis with a line of a log": b'*3\r\n$3\r\nSET\r\n$1\r\nx\r\n$30\r\n1.2.3.4 "GET / HTTP/1.1" 200 5\r\n',
    "Redis by hand": b"KEYS *\r\nGET key\r\n",
    "memcached": b"version\r\nget /key\r\nset k 0 900 5\r\nhello\r\n",
    "MongoDB": b"\x22\1\0\0\1\0\0\0\0\0\0\0\xdd\7\0\0\0\0\0\0\0" + bytes(260),
    "MongoDB, 278 bytes": b"\x16\1\0\0\1\0\0\0\0\0\0\0\xdd\7\0\0\0\0\0\0\0" + bytes(257),
    "Kafka": b"\0\0\0\x16\0\x12\0\3\0\1\0\1\0\0\5kafka",
    "git": b"0033git-upload-pack /project.git\0host=db.example.org\0"
    + b"0032want 7d1665144a3a975c05f1f43902ddaf084e784dbe\n",
    "SSH": b"SSH-2.0-OpenSSH_9.2 Debian-2\r\n\0\0\5\xdc\x08\x14" + bytes(range(256)) * 6,
    "AMQP": b"AMQP\0\0\x09\1\1\0\0\0\0\0\x10PLAIN\0guest\0guest",
    "MQTT": b"\x10\x17\0\4MQTT\4\2\0\x3c\0\x0bpython_test",
    "an access log line by line": b'{"n":1}\n{"log":"\\"GET /x HTTP/1.1\\" 200"}\nhostname: web\n{"n":3}\n',
    "STOMP": b"CONNECT\naccept-version:1.2\nhost:stomp.example.org\n\n\0",
    "STOMP with carriage returns": b"CONNECT\r\naccept-version:1.2\r\nhost:stomp.example.org\r\n\r\n\0",
    "LDAP": b"\x30\x0c\2\1\1\x60\7\2\1\3\4\0\x80\0",
    "MySQL": b"\xb4\0\0\1\x85\xa6\3\0\0\0\0\1\x21" + bytes(23) + b"root\0",
    "SIP": b"REGISTER sip:example.org SIP/2.0\r\nVia: SIP/2.0/TCP 192.0.2.1\r\n\r\n",
    "IRC": b"NICK me\r\nUSER me 0 * :me\r\nPRIVMSG #x :they say HTTP/2 is faster than HTTP/1.1\r\n",
    "syslog": b'<190>Jan  1 00:00:00 web nginx: 1.2.3.4 - - "GET /x HTTP/1.1" 200 17\n' * 3,
    "JSON": b'{"method": "GET", "url": "/x", "version": "HTTP/1.1"}\n',
    "host in a request of another protocol": b"JOB 1\r\nhost: db.example.org\r\n\r\n",
    "language server": b"Content-Length: 20\r\n\r\n" + b'{"jsonrpc": "2.0"}  ',
}


@pytest.mark.parametrize("step", [1, 7, 100_000])
@pytest.mark.parametrize("name", HTTP_ATTACKS)
def test_http_for_another_host_is_refused_whatever_stands_before_it(name, step):
    onward, refusal = fed(sieve(), HTTP_ATTACKS[name], step)
    assert refusal is not None
    assert refusal.host in (HOST, OTHER)
    assert OTHER.encode() + b"\r\n" not in onward
    request = HTTP_ATTACKS[name].lower().find(b"http/1.1")
    assert request < 0 or len(onward) <= request + len("HTTP/1.1\0"), "the line of the request has not ended"


@pytest.mark.parametrize("step", [1, 7, 100_000])
@pytest.mark.parametrize(
    "line",
    [b"GET x HTTP/1.1", b'"GET" / HTTP/1.1', b"GET / HTTP/1X", b'GET / HTTP/1.1"', b"\0G1 /\x85HTTP/1;1"],
)
def test_the_host_of_what_may_be_a_request_behind_another_line_must_be_this_one(line, step):
    onward, refusal = fed(sieve(), b"PING\r\n" + line + b"\r\nHost: other.example\r\n\r\n", step)
    assert refusal is not None
    assert OTHER.encode() + b"\r\n" not in onward
    proper = b"PING\r\n" + line + f"\r\nHost: {HOST}:{PORT}\r\n\r\n".encode()
    assert fed(sieve(), proper, step) == (proper, None)


@pytest.mark.parametrize("step", [1, 7, 100_000])
@pytest.mark.parametrize("name", TLS_ATTACKS)
def test_tls_for_another_host_is_refused_whatever_stands_before_it(name, step):
    onward, refusal = fed(sieve(), TLS_ATTACKS[name], step)
    assert refusal is not None
    assert refusal.host in (HOST, OTHER)
    assert len(onward) < len(TLS_ATTACKS[name])


@pytest.mark.parametrize("step", [1, 7, 100_000])
@pytest.mark.parametrize("name", LEGITIMATE)
def test_another_protocol_passes_as_it_comes(name, step):
    assert fed(sieve(), LEGITIMATE[name], step) == (LEGITIMATE[name], None)


@pytest.mark.parametrize(
    "said",
    [
        b"0033git-upload-pack /project.git\0host=db.example.org\0",
        b"0 \2\1\1\x60\x1b\2\1\3\4\x0ccn=x,dc=e,dc=o\x80\5abcde",  # LDAP, 32 bytes long
        SSL_REQUEST,
        b"AMQP\0\0\x09\1",
    ],
)
@pytest.mark.parametrize("step", [1, 100])
def test_what_waits_for_its_answer_is_not_held_back(said, step):
    to = sieve()
    onward = [to.client_data_received(said[begin : begin + step]) for begin in range(0, len(said), step)]
    assert b"".join(one for one in onward if isinstance(one, bytes)) == said


def test_a_host_that_speaks_first_is_no_http_server():
    mail = b"EHLO me\r\nDATA\r\nThey sent this:\r\nGET /x HTTP/1.1\r\nHost: other.example\r\n\r\n.\r\n"
    to = sieve()
    to.host_data_received()
    assert fed(to, mail, 1000) == (mail, None)
    assert fed(sieve(), mail, 1000)[1] is not None, "nobody answered before it was said"


@pytest.mark.parametrize(
    "again",
    [
        OF_ANOTHER,
        b"GET x\r\nHost: other.example\r\n\r\n",
        b"GET http://other.example/\r\n",
        b"\0GET http://other.example/ HTTP/1.1\r\n\r\n",
    ],
)
def test_a_host_that_answered_what_may_be_a_request_may_be_asked_no_other(again):
    to = sieve()
    assert to.client_data_received(b"GET *\r\nA: b\r\n\r\n") == b"GET *\r\nA: b\r\n\r\n"
    to.host_data_received()
    assert isinstance(to.client_data_received(again), Denial)


def test_a_host_that_answered_what_is_no_request_may_be_told_anything():
    to = sieve()
    assert to.client_data_received(b"*1\r\n$4\r\nPING\r\n") == b"*1\r\n$4\r\nPING\r\n"
    to.host_data_received()
    stored = b"*3\r\n$3\r\nSET\r\n$1\r\nx\r\n$41\r\n" + OF_ANOTHER + b"\r\n"
    assert fed(to, stored, 1000) == (stored, None)


def test_tls_is_looked_for_after_the_host_has_spoken_too():
    to = sieve()
    assert to.client_data_received(SSL_REQUEST) == SSL_REQUEST
    to.host_data_received()
    assert isinstance(to.client_data_received(HELLO_OF_ANOTHER), Denial)


def test_http_after_the_first_line_of_a_host_that_spoke_first_is_still_held_to_its_host():
    to = sieve()
    to.host_data_received()
    assert isinstance(to.client_data_received(OF_ANOTHER), Denial)


def test_the_beginning_is_searched_and_no_more():
    filled = b"\0" + b"x" * (UNKNOWN_PROTOCOL_BYTES_MAX - 2) + b"\n"
    to = sieve()
    assert to.client_data_received(filled) == filled
    assert to.client_data_received(OF_ANOTHER) == OF_ANOTHER
    to = sieve()
    assert to.client_data_received(filled[:-200]) == filled[:-200]
    assert isinstance(to.client_data_received(b"\n" + OF_ANOTHER), Denial)


def test_random_bytes_pass():
    source = random.Random(7)
    for _ in range(200):
        said = b"\xff" + source.randbytes(UNKNOWN_PROTOCOL_BYTES_MAX)
        assert fed(sieve(), said, 4096) == (said, None)


@given(st.lists(st.binary(max_size=40) | st.sampled_from([OF_ANOTHER, HELLO, PROXY_2, b"\x16\3\1\0\5\1"]), max_size=8))
def test_nothing_makes_it_raise_and_what_passes_is_what_came(pieces):
    to, onward = InspectingFilter(SniffingHandshake(POLICY, HOST, PORT), b""), b""
    for piece in [*pieces, b""]:
        told = to.client_data_received(piece)
        if isinstance(told, Denial) or to.is_done:
            return
        onward += told
    assert onward == b"".join(pieces)
