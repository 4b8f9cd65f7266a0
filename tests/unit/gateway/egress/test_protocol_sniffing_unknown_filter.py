"""On ports other than 80 and 443, the gateway detects HTTP and TLS for another host, even if other bytes come first."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.gateway.egress.inspector_interface import Denial, StreamFilter, Tunnel
from sandbox.gateway.egress.policy import EgressPolicy
from sandbox.gateway.egress.protocol_sniffing import (
    NestedConnectionFilter,
    SniffingInspector,
    UnknownProtocolFilter,
    decide_transparent_connection,
)
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX, PARTIAL_HELLOS_MAX, UNKNOWN_PROTOCOL_BYTES_MAX
from sandbox.model.egress import EgressRule, EgressRules

HOST, PORT, OTHER = "db.example.org", 8080, "other.example"
POLICY = EgressPolicy(EgressRules((EgressRule(HOST, (PORT,)),)), "api.anthropic.com")
REQUEST_TO_ANOTHER = f"GET / HTTP/1.1\r\nHost: {OTHER}\r\n\r\n".encode()


def hello_for(*names: str, trailing: bytes = b"") -> bytes:
    """Build a ClientHello with these server names; `trailing` is in the same record."""
    entries = b"".join(b"\0" + len(name).to_bytes(2) + name.encode() for name in names)
    extension = b"\0\x0a\0\4\0\2\0\x1d"
    if names:
        extension += b"\0\0" + (len(entries) + 2).to_bytes(2) + len(entries).to_bytes(2) + entries
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0" + len(extension).to_bytes(2) + extension
    message = b"\1" + len(body).to_bytes(3) + body + trailing
    return b"\x16\3\1" + len(message).to_bytes(2) + message


HELLO, HELLO_TO_ANOTHER, HELLO_WITHOUT_SNI = hello_for(HOST), hello_for(OTHER), hello_for()
PROXY_PROTOCOL_V1 = b"PROXY TCP4 192.0.2.1 192.0.2.2 4000 8080\r\n"
PROXY_PROTOCOL_V2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\2\1\xc0\0\2\2\x0f\xa0\x1f\x90"
SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"


def create_stream_filter() -> StreamFilter:
    tunnel = decide_transparent_connection(POLICY, HOST, "198.18.0.2", PORT)
    assert isinstance(tunnel, Tunnel)
    return tunnel.stream_filter


def test_filter_may_end_in_a_denied_line_until_all_bytes_to_search_have_arrived():
    stream_filter = UnknownProtocolFilter(POLICY, HOST, PORT, b"")
    assert (stream_filter.is_passthrough, stream_filter.may_end_in_denied_line) == (False, True)
    stream_filter.client_data_received(bytes(UNKNOWN_PROTOCOL_BYTES_MAX - 1))
    assert (stream_filter.is_passthrough, stream_filter.may_end_in_denied_line) == (False, True)
    stream_filter.client_data_received(b"\0")
    assert (stream_filter.is_passthrough, stream_filter.may_end_in_denied_line) == (True, False)


def test_search_ends_if_more_bytes_arrive_than_are_searched():
    stream_filter = UnknownProtocolFilter(POLICY, HOST, PORT, b"")
    for piece in (b"\0", bytes(UNKNOWN_PROTOCOL_BYTES_MAX), REQUEST_TO_ANOTHER):
        assert stream_filter.client_data_received(piece) == piece
    assert stream_filter.is_passthrough


def feed(stream_filter: StreamFilter, data: bytes, piece_bytes: int) -> tuple[bytes, Denial | None]:
    """Return the data forwarded to the host, and the denial that ends the stream, if any."""
    forwarded = bytearray()
    for piece in [*(data[begin : begin + piece_bytes] for begin in range(0, len(data), piece_bytes)), b""]:
        result = stream_filter.client_data_received(piece)
        if isinstance(result, Denial):
            return bytes(forwarded), result
        forwarded += result
    return bytes(forwarded), None


def records(hello: bytes, size: int, version: bytes = b"\3\1", between: bytes = b"") -> bytes:
    """Split `hello` into TLS records of `size` bytes."""
    body = hello[5:]
    pieces = [body[begin : begin + size] for begin in range(0, len(body), size)]
    return between.join(b"\x16" + version + len(piece).to_bytes(2) + piece for piece in pieces)


HTTP_ATTACKS = {
    "PROXY protocol 1": PROXY_PROTOCOL_V1 + REQUEST_TO_ANOTHER,
    "PROXY protocol 1 with an unknown address": b"PROXY UNKNOWN\r\n" + REQUEST_TO_ANOTHER,
    "PROXY protocol 1 in lower case": b"proxy tcp4 192.0.2.1 192.0.2.2 1 2\r\n" + REQUEST_TO_ANOTHER,
    "PROXY protocol 1 after an empty line": b"\r\n" + PROXY_PROTOCOL_V1 + REQUEST_TO_ANOTHER,
    "PROXY protocol 1 and a request to this host": PROXY_PROTOCOL_V1
    + f"GET / HTTP/1.1\r\nHost: {HOST}:{PORT}\r\n\r\n".encode(),
    "PROXY protocol 2": PROXY_PROTOCOL_V2 + REQUEST_TO_ANOTHER,
    "PROXY protocol 2 and a request to this host": PROXY_PROTOCOL_V2
    + f"GET / HTTP/1.1\r\nHost: {HOST}:{PORT}\r\n\r\n".encode(),
    "PROXY protocol 2, local": PROXY_PROTOCOL_V2[:12] + b"\x20\0\0\0" + REQUEST_TO_ANOTHER,
    "PROXY protocol 2 after a NUL": b"\0" + PROXY_PROTOCOL_V2 + REQUEST_TO_ANOTHER,
    "NetScaler client address": b"\0\0\x35\x81\0\0\0\x28" + b"\x45" + bytes(39) + REQUEST_TO_ANOTHER,
    "NUL": b"\0" + REQUEST_TO_ANOTHER,
    "many NULs": bytes(5000) + REQUEST_TO_ANOTHER,
    "NUL after the method": REQUEST_TO_ANOTHER.replace(b" ", b"\0", 1),
    "NUL before the version": REQUEST_TO_ANOTHER.replace(b" HTTP", b"\0HTTP"),
    "NUL in the target": REQUEST_TO_ANOTHER.replace(b"/ H", b"/\0 H"),
    "NUL after the version": REQUEST_TO_ANOTHER.replace(b"1.1\r", b"1.1\0\r"),
    "byte order mark": b"\xef\xbb\xbf" + REQUEST_TO_ANOTHER,
    "no-break space": b"\xa0" + REQUEST_TO_ANOTHER,
    "unit separator": b"\x1f" + REQUEST_TO_ANOTHER,
    "file separators": REQUEST_TO_ANOTHER.replace(b" ", b"\x1c", 2),
    "next line": REQUEST_TO_ANOTHER.replace(b" ", b"\x85", 2),
    "no-break spaces": REQUEST_TO_ANOTHER.replace(b" ", b"\xa0", 2),
    "escape after the method": REQUEST_TO_ANOTHER.replace(b"GET ", b"GET \x1b"),
    "tab after the method": REQUEST_TO_ANOTHER.replace(b" ", b"\t", 1),
    "carriage return after the method": REQUEST_TO_ANOTHER.replace(b" ", b"\r", 1),
    "NUL, and a carriage return after the method": b"\0" + REQUEST_TO_ANOTHER.replace(b" ", b"\r", 1),
    "method in quotes": REQUEST_TO_ANOTHER.replace(b"GET", b'"GET"'),
    "method in brackets, absolute": b"(GET) http://other.example/\r\n\r\n",
    "carriage return alone": b"\r" + REQUEST_TO_ANOTHER.replace(b"\r\n", b"\r"),
    "line feeds": b"\n\n" + REQUEST_TO_ANOTHER.replace(b"\r\n", b"\n"),
    "unknown method": b"\0FROB /x HTTP/1.1\r\nHost: other.example\r\n\r\n",
    "lower case": b"\0get / http/1.1\r\nhost: other.example\r\n\r\n",
    "absolute target": b"\0GET http://other.example/ HTTP/1.1\r\nHost: db.example.org\r\n\r\n",
    "absolute target without a method": b" http://other.example/ HTTP/1.1\r\nHost: db.example.org\r\n\r\n",
    "absolute target after a short method": b"a http://other.example/ x\r\nHost: db.example.org\r\n\r\n",
    "absolute target after a method with a colon": b"a:b http://other.example/ x\r\nHost: db.example.org\r\n\r\n",
    "absolute target after a method that is not ASCII": b"\xe9 http://other.example/ HTTP/1.1\r\n\r\n",
    "asterisk target": b"\0OPTIONS * HTTP/1.1\r\nHost: other.example\r\n\r\n",
    "target without a slash": b"\0GET x HTTP/1.1\r\nHost: other.example\r\n\r\n",
    "CONNECT": b"\0CONNECT other.example:80 HTTP/1.1\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n",
    "HTTP/0.9, indented": b" GET /old\r\n",
    "HTTP/0.9 terminated by the end of the connection": b"GET /old",
    "HTTP/0.9 for another host": b"get http://other.example/\r\n",
    "HTTP/0.9 for another host, with a short method": b"E http://other.example\r\n",
    "HTTP/0.9 for another host, with a tab": b"E\thttp://other.example\r\n",
    "HTTP/0.9 for another host, without a method": b" http://other.example\r\n",
    "HTTP/0.9 for another host, with a colon in the method": b"a: http://other.example\r\n",
    "HTTP/0.9 for another host, with a method that is not ASCII": b"\xe9 http://other.example\r\n",
    "HTTP/0.9 for another host, with a control character as method": b"\1 http://other.example\r\n",
    "HTTP/0.9 for another host, with an unusual scheme": b"E opc.tcp://other.example\r\n",
    "CONNECT without a version": b"CONNECT other.example:80\r\n",
    "CONNECT without a version and port": b"CONNECT other.example\r\n",
    "CONNECT with another version": b"CONNECT other.example:80 HTTPS/1.1\r\n",
    "HTTP/0.9 with headers": b"GET x\r\nHost: other.example\r\n\r\n",
    "HTTP/0.9 with malformed headers": b"GET x\r\nA: b\r\nhost : other.example\r\n\r\n",
    "HTTP/0.9 with headers and an invisible target": b"GET\r\xb8\nA: b\r\nHost: other.example\r\n\r\n",
    "no version": b"GET / \r\nHost: other.example\r\n\r\n",
    "another version": b"GET / H/1.1\r\nHost: other.example\r\n\r\n",
    "no version, and another request after it": b"GET *\r\nConnection: keep-alive\r\n\r\n" + REQUEST_TO_ANOTHER,
    "no version, keep-alive": b"G key\r\nConnection : keep-alive\r\n\r\n",
    "RTSP": b"OPTIONS * RTSP/1.0\r\nHost: other.example\r\n\r\n",
    "RTSP DESCRIBE": b"DESCRIBE x RTSP/1.0\r\nHost: other.example\r\n\r\n",
    "ICE": b"SOURCE /x ICE/1.0\r\nHost: other.example\r\n\r\n",
    "HTTP/2": b"\0PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2 after an empty line": b"\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "after a line": b"PING\r\n" + REQUEST_TO_ANOTHER,
    "after many lines": b"NOOP x\r\n" * 100 + REQUEST_TO_ANOTHER,
    "after an empty WebSocket frame": b"\x89\x80\0\0\0\0" + REQUEST_TO_ANOTHER,
    "after SOCKS": b"\5\1\0\5\1\0\3\x0dother.example\0\x50" + REQUEST_TO_ANOTHER,
    "after a long unterminated line": b"\x1c" + b"GET /" + b"a" * UNKNOWN_PROTOCOL_BYTES_MAX + b" HTTP/1.1\r\n",
}

TLS_ATTACKS = {
    "after PROXY protocol 1": PROXY_PROTOCOL_V1 + HELLO_TO_ANOTHER,
    "after PROXY protocol 2": PROXY_PROTOCOL_V2 + HELLO_TO_ANOTHER,
    "after an alert": b"\x15\3\1\0\2\1\0" + HELLO_TO_ANOTHER,
    "without SNI after an alert": b"\x15\3\1\0\2\1\0" + HELLO_WITHOUT_SNI,
    "without SNI after ChangeCipherSpec": b"\x14\3\3\0\1\1" + HELLO_WITHOUT_SNI,
    "after an empty record": b"\x16\3\1\0\0" + HELLO_TO_ANOTHER,
    "in records of another version": records(HELLO_TO_ANOTHER, 10_000, b"\0\1"),
    "in small records of another version": records(HELLO_TO_ANOTHER, 1, b"\x0f\xff"),
    "in small records": records(HELLO_TO_ANOTHER, 1),
    "for the allowed host in a record of another version": records(HELLO, 10_000, b"\4\1"),
    "for the allowed host in two records of another version": records(HELLO, 60, b"\x0f\1"),
    "SSL 2 hello for TLS 1.2": b"\x80\x2e\1\3\1\0\x15\0\0\0\x10" + bytes(40),
    "SSL 2 hello": b"\x80\x2e\1\0\2\0\x15\0\0\0\x10" + bytes(40),
    "PostgreSQL": SSL_REQUEST + HELLO_TO_ANOTHER,
    "PostgreSQL after a GSSAPI request": b"\0\0\0\x08\x04\xd2\x16\x30" + SSL_REQUEST + HELLO_TO_ANOTHER,
    "PostgreSQL in small records": SSL_REQUEST + records(HELLO_TO_ANOTHER, 1),
    "PostgreSQL in records separated by alerts": SSL_REQUEST
    + records(HELLO_TO_ANOTHER, 50, between=b"\x15\3\1\0\2\1\0"),
    "PostgreSQL in records of another version": SSL_REQUEST + records(HELLO_TO_ANOTHER, 100, b"\5\5"),
    "PostgreSQL, two names": SSL_REQUEST + hello_for(HOST, OTHER),
    "PostgreSQL, two hellos in one record": SSL_REQUEST + hello_for(HOST, trailing=HELLO_TO_ANOTHER[5:]),
    "PostgreSQL, two hellos": SSL_REQUEST + HELLO + HELLO_TO_ANOTHER,
    "STARTTLS": b"EHLO me\r\nSTARTTLS\r\n" + HELLO_TO_ANOTHER,
    "IMAP STARTTLS": b"a1 STARTTLS\r\n" + HELLO_TO_ANOTHER,
    "after SOCKS": b"\5\1\0\5\1\0\3\x0dother.example\1\xbb" + HELLO_TO_ANOTHER,
    "after a NUL": b"\0" + HELLO_TO_ANOTHER,
    "incomplete hello": b"\0\x16\3\1\x3f\xff\1\0\x3f\xfb\3\3" + bytes(CLIENT_HELLO_BYTES_MAX),
    "too many starts of a hello": b"\0" + b"\x16\3\1\x3f\xff\1\0\x3f\xfb\3\3" * (PARTIAL_HELLOS_MAX + 1),
}

LEGITIMATE = {
    "PostgreSQL": b"\0\0\0\x29\0\3\0\0user\0bob\0database\0b\0\0Q\0\0\0\x0dSELECT 1\0",
    "PostgreSQL with TLS": SSL_REQUEST + HELLO,
    "PostgreSQL with TLS without SNI": SSL_REQUEST + HELLO_WITHOUT_SNI,
    "PostgreSQL with TLS in small records": SSL_REQUEST + records(HELLO, 7),
    "STARTTLS": b"EHLO me\r\nSTARTTLS\r\n" + HELLO,
    "Redis": b"*2\r\n$4\r\nAUTH\r\n$1\r\nx\r\n*1\r\n$4\r\nPING\r\n",
    "Redis with a log line": b'*3\r\n$3\r\nSET\r\n$1\r\nx\r\n$30\r\n1.2.3.4 "GET / HTTP/1.1" 200 5\r\n',
    "Redis inline commands": b"KEYS *\r\nGET key\r\n",
    "memcached": b"version\r\nget /key\r\nset k 0 900 5\r\nhello\r\n",
    "MongoDB": b"\x22\1\0\0\1\0\0\0\0\0\0\0\xdd\7\0\0\0\0\0\0\0" + bytes(260),
    "MongoDB, 278 bytes": b"\x16\1\0\0\1\0\0\0\0\0\0\0\xdd\7\0\0\0\0\0\0\0" + bytes(257),
    "MongoDB, 278 bytes, request 257": b"\x16\1\0\0\1\1\0\0\0\0\0\0\xdd\7\0\0\0\0\0\0\0" + bytes(257),
    "Kafka": b"\0\0\0\x16\0\x12\0\3\0\1\0\1\0\0\5kafka",
    "git": b"0033git-upload-pack /project.git\0host=db.example.org\0"
    + b"0032want 7d1665144a3a975c05f1f43902ddaf084e784dbe\n",
    "SSH": b"SSH-2.0-OpenSSH_9.2 Debian-2\r\n\0\0\5\xdc\x08\x14" + bytes(range(256)) * 6,
    "AMQP": b"AMQP\0\0\x09\1\1\0\0\0\0\0\x10PLAIN\0guest\0guest",
    "MQTT": b"\x10\x17\0\4MQTT\4\2\0\x3c\0\x0bpython_test",
    "access log, line by line": b'{"n":1}\n{"log":"\\"GET /x HTTP/1.1\\" 200"}\nhostname: web\n{"n":3}\n',
    "STOMP": b"CONNECT\naccept-version:1.2\nhost:stomp.example.org\n\n\0",
    "STOMP with carriage returns": b"CONNECT\r\naccept-version:1.2\r\nhost:stomp.example.org\r\n\r\n\0",
    "STOMP with an address": b"CONNECT\nhost:a\n\n\0SEND\nto:a\n\nsee http://a.example/ now\na http://b.example/ x\n\0",
    "NATS": b'CONNECT {"verbose":false,"protocol":1}\r\nPING\r\n',
    "OPC UA": b"HELF\x3c\0\0\0" + bytes(4) + b"\0\0\1\0" * 2 + bytes(8) + b"\x1c\0\0\0opc.tcp://a.example.org:4840",
    "LDAP": b"\x30\x0c\2\1\1\x60\7\2\1\3\4\0\x80\0",
    "MySQL": b"\xb4\0\0\1\x85\xa6\3\0\0\0\0\1\x21" + bytes(23) + b"root\0",
    "SIP": b"REGISTER sip:example.org SIP/2.0\r\nVia: SIP/2.0/TCP 192.0.2.1\r\n\r\n",
    "IRC": b"NICK me\r\nUSER me 0 * :me\r\nPRIVMSG #x :they say HTTP/2 is faster than HTTP/1.1\r\n",
    "syslog": b'<190>Jan  1 00:00:00 web nginx: 1.2.3.4 - - "GET /x HTTP/1.1" 200 17\n' * 3,
    "JSON": b'{"method": "GET", "url": "/x", "version": "HTTP/1.1"}\n',
    "host in a request of another protocol": b"JOB 1\r\nhost: db.example.org\r\n\r\n",
    "address after a word": b"JOB 1\r\nA: http://a.example/ b\r\n\r\na http://a.example/\r\n",
    "address in text": b"http://a.example/ answers\r\na link: http://a.example/ answers\r\n",
    "language server": b"Content-Length: 20\r\n\r\n" + b'{"jsonrpc": "2.0"}  ',
}


@pytest.mark.parametrize("piece_bytes", [1, 7, 100_000])
@pytest.mark.parametrize("name", HTTP_ATTACKS)
def test_http_for_another_host_is_denied_after_any_prefix(name, piece_bytes):
    forwarded, denial = feed(create_stream_filter(), HTTP_ATTACKS[name], piece_bytes)
    assert denial is not None
    assert denial.host in (HOST, OTHER)
    assert OTHER.encode() + b"\r\n" not in forwarded
    request = HTTP_ATTACKS[name].lower().find(b"http/1.1")
    assert request < 0 or len(forwarded) <= request + len("HTTP/1.1\0"), "the request line is incomplete"


@pytest.mark.parametrize("piece_bytes", [1, 7, 100_000])
@pytest.mark.parametrize(
    "line",
    [b"GET x HTTP/1.1", b'"GET" / HTTP/1.1', b"GET / HTTP/1X", b'GET / HTTP/1.1"', b"\0G1 /\x85HTTP/1;1"],
)
def test_line_that_may_be_a_request_must_name_this_host(line, piece_bytes):
    forwarded, denial = feed(
        create_stream_filter(), b"PING\r\n" + line + b"\r\nHost: other.example\r\n\r\n", piece_bytes
    )
    assert denial is not None
    assert OTHER.encode() + b"\r\n" not in forwarded
    matching = b"PING\r\n" + line + f"\r\nHost: {HOST}:{PORT}\r\n\r\n".encode()
    assert feed(create_stream_filter(), matching, piece_bytes) == (matching, None)


@pytest.mark.parametrize("piece_bytes", [1, 7, 100_000])
@pytest.mark.parametrize("name", TLS_ATTACKS)
def test_tls_for_another_host_is_denied_after_any_prefix(name, piece_bytes):
    forwarded, denial = feed(create_stream_filter(), TLS_ATTACKS[name], piece_bytes)
    assert denial is not None
    assert denial.host in (HOST, OTHER)
    assert len(forwarded) < len(TLS_ATTACKS[name])


@pytest.mark.parametrize("piece_bytes", [1, 7, 100_000])
@pytest.mark.parametrize("name", LEGITIMATE)
def test_other_protocol_is_forwarded_unchanged(name, piece_bytes):
    assert feed(create_stream_filter(), LEGITIMATE[name], piece_bytes) == (LEGITIMATE[name], None)


@pytest.mark.parametrize(
    "data",
    [
        b"0033git-upload-pack /project.git\0host=db.example.org\0",
        b"0 \2\1\1\x60\x1b\2\1\3\4\x0ccn=x,dc=e,dc=o\x80\5abcde",  # LDAP, 32 bytes long
        SSL_REQUEST,
        b"AMQP\0\0\x09\1",
    ],
)
@pytest.mark.parametrize("piece_bytes", [1, 100])
def test_data_before_a_response_is_forwarded_immediately(data, piece_bytes):
    stream_filter = create_stream_filter()
    forwarded = [
        stream_filter.client_data_received(data[begin : begin + piece_bytes])
        for begin in range(0, len(data), piece_bytes)
    ]
    assert b"".join(one for one in forwarded if isinstance(one, bytes)) == data


def test_later_requests_are_not_inspected_if_the_host_sent_first():
    smtp_commands = b"EHLO me\r\nDATA\r\nThey sent this:\r\nGET /x HTTP/1.1\r\nHost: other.example\r\n\r\n.\r\n"
    stream_filter = create_stream_filter()
    stream_filter.host_data_received()
    assert feed(stream_filter, smtp_commands, 1000) == (smtp_commands, None)
    assert feed(create_stream_filter(), smtp_commands, 1000)[1] is not None, "without an earlier response of the host"


@pytest.mark.parametrize(
    "second_request",
    [
        REQUEST_TO_ANOTHER,
        b"GET x\r\nHost: other.example\r\n\r\n",
        b"GET http://other.example/\r\n",
        b"\0GET http://other.example/ HTTP/1.1\r\n\r\n",
        b" http://other.example/ x\r\n",
        b"x\r\n http://other.example/ x\r\n",
        b"a:b http://other.example/ x\r\n",
    ],
)
def test_second_request_is_denied_after_a_response_to_a_possible_request(second_request):
    stream_filter = create_stream_filter()
    assert stream_filter.client_data_received(b"GET *\r\nA: b\r\n\r\n") == b"GET *\r\nA: b\r\n\r\n"
    stream_filter.host_data_received()
    assert isinstance(stream_filter.client_data_received(second_request), Denial)


def test_http_requests_are_not_inspected_after_a_response_to_another_protocol():
    stream_filter = create_stream_filter()
    assert stream_filter.client_data_received(b"*1\r\n$4\r\nPING\r\n") == b"*1\r\n$4\r\nPING\r\n"
    stream_filter.host_data_received()
    command = b"*3\r\n$3\r\nSET\r\n$1\r\nx\r\n$41\r\n" + REQUEST_TO_ANOTHER + b"\r\n"
    assert feed(stream_filter, command, 1000) == (command, None)


def test_tls_is_inspected_after_the_host_has_responded():
    stream_filter = create_stream_filter()
    assert stream_filter.client_data_received(SSL_REQUEST) == SSL_REQUEST
    stream_filter.host_data_received()
    assert isinstance(stream_filter.client_data_received(HELLO_TO_ANOTHER), Denial)


def test_first_request_must_name_this_host_even_if_the_host_sent_first():
    stream_filter = create_stream_filter()
    stream_filter.host_data_received()
    assert isinstance(stream_filter.client_data_received(REQUEST_TO_ANOTHER), Denial)


def test_only_the_first_bytes_are_inspected():
    filler = b"\0" + b"x" * (UNKNOWN_PROTOCOL_BYTES_MAX - 2) + b"\n"
    stream_filter = create_stream_filter()
    assert stream_filter.client_data_received(filler) == filler
    assert stream_filter.client_data_received(REQUEST_TO_ANOTHER) == REQUEST_TO_ANOTHER
    stream_filter = create_stream_filter()
    assert stream_filter.client_data_received(filler[:-200]) == filler[:-200]
    assert isinstance(stream_filter.client_data_received(b"\n" + REQUEST_TO_ANOTHER), Denial)


def test_random_bytes_are_forwarded():
    source = random.Random(7)
    for _ in range(200):
        data = b"\xff" + source.randbytes(UNKNOWN_PROTOCOL_BYTES_MAX)
        assert feed(create_stream_filter(), data, 4096) == (data, None)


@given(
    st.lists(
        st.binary(max_size=40) | st.sampled_from([REQUEST_TO_ANOTHER, HELLO, PROXY_PROTOCOL_V2, b"\x16\3\1\0\5\1"]),
        max_size=8,
    )
)
def test_arbitrary_input_is_forwarded_unchanged_and_does_not_raise(pieces):
    stream_filter, forwarded = NestedConnectionFilter(SniffingInspector(POLICY, HOST, PORT), b""), b""
    for piece in [*pieces, b""]:
        result = stream_filter.client_data_received(piece)
        if isinstance(result, Denial) or stream_filter.drops_rest:
            return
        forwarded += result
    assert forwarded == b"".join(pieces)


def test_rest_of_an_unknown_protocol_is_forwarded():
    assert not UnknownProtocolFilter(POLICY, HOST, PORT, b"hello").drops_rest
