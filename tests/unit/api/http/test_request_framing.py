"""Request framing is unambiguous. Requests that another server could read differently are rejected."""

import h11
import pytest

from sandbox.api.http.request_framing import (
    CHUNK_EXTENSIONS_BYTES_MAX,
    CHUNK_LINE_BYTES_MAX,
    COSTLY_HEAD_BYTES,
    COSTLY_HEAD_FIELDS,
    COSTLY_HEAD_VALUES,
    FIELDS_MAX,
    HEAD_BYTES_MAX,
    FramedConnection,
    RequestFraming,
)

GET = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HANDSHAKE = b"GET /s HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"


def feed(framing: RequestFraming, data: bytes) -> bytes:
    """Feed the data to `framing`, and return everything that it passes on."""
    passed = framing.feed(data)
    while framing.has_next_request_bytes or framing.is_paused:
        passed += framing.feed(b"")
    return passed


def post(fields: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    return b"POST /api/v1/tasks HTTP/" + version + b"\r\nHost: localhost\r\n" + fields + b"\r\n" + body


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked\r\n", body)


def line_of(name: bytes, size: int) -> bytes:
    return name + b": " + b"x" * (size - len(name) - 4) + b"\r\n"


REJECTED = {
    "a coding and a length": post(b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", b"0\r\n\r\n"),
    "a length and a coding": post(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    "a coding and an empty length": post(b"Transfer-Encoding: chunked\r\nContent-Length:\r\n", b"0\r\n\r\n"),
    "two Content-Length headers": post(b"Content-Length: 5\r\nContent-Length: 6\r\n", b"hello!"),
    "one length twice": post(b"Content-Length: 5\r\ncontent-length: 5\r\n", b"hello"),
    "a list of lengths": post(b"Content-Length: 5, 5\r\n", b"hello"),
    "a length with a sign": post(b"Content-Length: +5\r\n", b"hello"),
    "a negative length": post(b"Content-Length: -5\r\n", b"hello"),
    "a hexadecimal length": post(b"Content-Length: 0x5\r\n", b"hello"),
    "a length with an underscore": post(b"Content-Length: 1_0\r\n", b"hellohello"),
    "a length with a leading zero": post(b"Content-Length: 05\r\n", b"hello"),
    "a length with a fraction": post(b"Content-Length: 5.0\r\n", b"hello"),
    "a length in Arabic-Indic digits": post("Content-Length: ٥\r\n".encode(), b"hello"),
    "a length with too many digits": post(b"Content-Length: " + b"9" * 19 + b"\r\n"),
    "an empty length": post(b"Content-Length:\r\n"),
    "a length after a tab": post(b"Content-Length:\t5\r\n", b"hello"),
    "a length followed by a space": post(b"Content-Length: 5 \r\n", b"hello"),
    "two codings in a list": post(b"Transfer-Encoding: chunked, identity\r\n", b"0\r\n\r\n"),
    "chunked last in a list": post(b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"),
    "chunked and an empty list item": post(b"Transfer-Encoding: chunked,\r\n", b"0\r\n\r\n"),
    "an unknown coding": post(b"Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n"),
    "an empty coding": post(b"Transfer-Encoding:\r\n", b"0\r\n\r\n"),
    "identity": post(b"Transfer-Encoding: identity\r\n"),
    "a coding in quotes": post(b'Transfer-Encoding: "chunked"\r\n', b"0\r\n\r\n"),
    "a coding with a parameter": post(b"Transfer-Encoding: chunked;q=1\r\n", b"0\r\n\r\n"),
    "two codings on two lines": post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", b"0\r\n\r\n"),
    "one coding twice": post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    "a coding after a vertical tab": post(b"Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n"),
    "a coding followed by a form feed": post(b"Transfer-Encoding: chunked\x0c\r\n", b"0\r\n\r\n"),
    "a coding after a tab": post(b"Transfer-Encoding:\tchunked\r\n", b"0\r\n\r\n"),
    "a coding followed by a space": post(b"Transfer-Encoding: chunked \r\n", b"0\r\n\r\n"),
    "a coding after a no-break space": post(b"Transfer-Encoding: \xa0chunked\r\n", b"0\r\n\r\n"),
    "a coding on a folded line": post(b"Transfer-Encoding:\r\n chunked\r\n", b"0\r\n\r\n"),
    "a coding in HTTP/1.0": post(b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", version=b"1.0"),
    "a folded line": post(b"X: a\r\n b\r\n"),
    "a line folded by a tab": post(b"X: a\r\n\tContent-Length: 5\r\n"),
    "a folded first field": b"GET / HTTP/1.1\r\n X: a\r\nHost: localhost\r\n\r\n",
    "LF instead of CRLF": GET.replace(b"\r\n", b"\n"),
    "one LF instead of CRLF": post(b"X: a\nContent-Length: 5\r\n"),
    "LF at the end of the head": b"GET / HTTP/1.1\r\nHost: localhost\r\n\n",
    "CR instead of CRLF": GET.replace(b"\r\n", b"\r") + b"\r\n\r\n",
    "CR within a value": post(b"X: a\rContent-Length: 5\r\n"),
    "CR twice": post(b"X: a\r\r\n"),
    "NUL within a value": post(b"X: a\0b\r\n"),
    "NUL within a name": post(b"Content-Length\0: 5\r\n"),
    "a control character": post(b"X: a\x01b\r\n"),
    "DEL": post(b"X: a\x7fb\r\n"),
    "a space before the colon": post(b"Transfer-Encoding : chunked\r\n", b"0\r\n\r\n"),
    "a tab before the colon": post(b"Content-Length\t: 5\r\n"),
    "a field without a name": post(b": 5\r\n"),
    "a field without a colon": post(b"Content-Length 5\r\n"),
    "a field name that is not ASCII": post("Content-Lengtḧ: 5\r\n".encode()),
    "a request line with two spaces": b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a request line with a tab": b"GET\t/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a request line with a trailing space": b"GET / HTTP/1.1 \r\nHost: localhost\r\n\r\n",
    "a target with a space": b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a target with NUL": b"GET /a\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an empty line first": b"\r\n" + GET,
    "LF first": b"\n" + GET,
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/1.2": GET.replace(b"1.1", b"1.2"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP in lower case": GET.replace(b"HTTP", b"http"),
    "TLS without a line break": bytes.fromhex("16030100a5010000a10303"),
    "too many values in a list": HANDSHAKE + b"Sec-WebSocket-Protocol: " + b"a," * (FIELDS_MAX + 1) + b"a\r\n\r\n",
    "too many header fields": post(b"X: y\r\n" * FIELDS_MAX),
    "too many trailer fields": chunked(b"0\r\n" + b"X: y\r\n" * (FIELDS_MAX + 1) + b"\r\n"),
    "a head that is too long": b"GET / HTTP/1.1\r\n" + line_of(b"X", HEAD_BYTES_MAX),
    "a request line that is too long": b"GET /" + b"x" * HEAD_BYTES_MAX,
    "a chunk size with a prefix": chunked(b"0x5\r\nhello\r\n0\r\n\r\n"),
    "a chunk size with a sign": chunked(b"+5\r\nhello\r\n0\r\n\r\n"),
    "a chunk size after a space": chunked(b" 5\r\nhello\r\n0\r\n\r\n"),
    "a chunk size followed by a space": chunked(b"5 \r\nhello\r\n0\r\n\r\n"),
    "a chunk size with an underscore": chunked(b"1_0\r\nhello\r\n0\r\n\r\n"),
    "a chunk size with too many digits": chunked(b"0" * 16 + b"5\r\nhello\r\n0\r\n\r\n"),
    "no chunk size": chunked(b"\r\n\r\n"),
    "a chunk size followed by LF": chunked(b"5\nhello\r\n0\r\n\r\n"),
    "an extension with CR": chunked(b"5;a\rb\r\nhello\r\n0\r\n\r\n"),
    "an extension with LF": chunked(b"5;a\nhello\r\n0\r\n\r\n"),
    "an extension with NUL": chunked(b"5;a\0\r\nhello\r\n0\r\n\r\n"),
    "an extension that is too long": chunked(b"5;" + b"a" * CHUNK_LINE_BYTES_MAX + b"\r\nhello\r\n0\r\n\r\n"),
    "an extension without an end": chunked(b"5;" + b"a" * CHUNK_LINE_BYTES_MAX),
    "an extension with an open quote": chunked(b'5;a="\r\nhello\r\n0\r\n\r\n'),
    "an extension after a space": chunked(b"5 ;a\r\nhello\r\n0\r\n\r\n"),
    "an extension with a space in its value": chunked(b"5;a=b c\r\nhello\r\n0\r\n\r\n"),
    "an extension with text after its quotes": chunked(b'5;a="b"c\r\nhello\r\n0\r\n\r\n'),
    "an extension without a name": chunked(b"5;\r\nhello\r\n0\r\n\r\n"),
    "too many extensions": chunked((b"1;" + b"a" * 99 + b"\r\nx\r\n") * (CHUNK_EXTENSIONS_BYTES_MAX // 100 + 1)),
    "a chunk that is longer than its size": chunked(b"5\r\nhello!\r\n0\r\n\r\n"),
    "a chunk that ends in LF": chunked(b"5\r\nhello\n0\r\n\r\n"),
    "a trailer with LF": chunked(b"0\r\nX: a\n\r\n"),
    "trailers that end in LF": chunked(b"0\r\nX: a\r\n\n"),
    "a length in a trailer": chunked(b"0\r\nContent-Length: 5\r\n\r\n"),
    "a coding in a trailer": chunked(b"0\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "a folded trailer": chunked(b"0\r\nX: a\r\n b\r\n\r\n"),
    "trailers that are too long": chunked(b"0\r\n" + line_of(b"X", HEAD_BYTES_MAX) + line_of(b"Y", 10)),
    "a handshake with a body": HANDSHAKE + b"Content-Length: 5\r\n\r\nhello",
    "a handshake in chunks": HANDSHAKE + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a handshake in HTTP/1.0": HANDSHAKE.replace(b"1.1", b"1.0") + b"\r\n",
    "a handshake with a second upgrade": HANDSHAKE + b"Upgrade: h2c, WebSocket\r\nContent-Length: 5\r\n\r\nhello",
}  # fmt: skip

ACCEPTED = {
    "no body": GET,
    "a length": post(b"Content-Length: 5\r\n", b"hello"),
    "a length without a space": post(b"content-length:5\r\n", b"hello"),
    "an empty body": post(b"Content-Length: 0\r\n"),
    "a body of lines": post(b"Content-Length: 6\r\n", b"a\nb\r\nc"),
    "a body that looks like a request": post(b"Content-Length: %d\r\n" % len(GET), GET),
    "chunks": chunked(b"5\r\nhello\r\n00A\r\n0123456789\r\n0\r\n\r\n"),
    "CHUNKED": post(b"TRANSFER-ENCODING: Chunked\r\n", b"1\r\nx\r\n0\r\n\r\n"),
    "chunks with extensions": chunked(b'5;a=b;c="d e"\r\nhello\r\n0;last\r\n\r\n'),
    "chunks with spaces and quoted pairs in extensions": chunked(b'5; a = "\\"\\\\;\xe4";b\r\nhello\r\n0;c=d\r\n\r\n'),
    "chunks with trailers": chunked(b"1\r\nx\r\n0\r\nX-Checksum: abc\r\n\r\n"),
    "an upload that expects 100-continue": post(b"Content-Length: 5\r\nExpect: 100-continue\r\n", b"hello"),
    "values with spaces, tabs and bytes that are not ASCII": post(
        b"A:b\r\nB:\t \r\nC: d e\tf \r\nD: \xff\xfe\r\nE: " + "grün".encode() + b"\r\n"
    ),
    "a handshake": HANDSHAKE + b"Content-Length: 0\r\n\r\n",
    "an upgrade to HTTP/2 with a body": post(b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 1\r\n", b"x"),
    "the maximum number of values in a list": post(b"Connection: " + b"a," * FIELDS_MAX + b"a\r\n"),
    "many values in a list without a limit": post(b"Accept: " + b"a," * 4000 + b"a\r\n"),
    "the maximum number of header fields": post(b"X: y\r\n" * (FIELDS_MAX - 1)),
    "the maximum number of trailer fields": chunked(b"0\r\n" + b"X: y\r\n" * FIELDS_MAX + b"\r\n"),
    "a head of the maximum size": b"GET / HTTP/1.1\r\n" + line_of(b"X", HEAD_BYTES_MAX - 18) + b"\r\n",
}


@pytest.mark.parametrize("data", REJECTED.values(), ids=REJECTED)
def test_ambiguous_request_is_rejected_and_ends_the_connection(data):
    framing = RequestFraming()
    passed = feed(framing, GET + data + GET)
    assert framing.error
    assert passed.startswith(GET)
    assert (GET + data).startswith(passed)
    assert passed != GET + data
    assert feed(framing, GET) == b""


@pytest.mark.parametrize("data", [*REJECTED.values(), *ACCEPTED.values()], ids=[*REJECTED, *ACCEPTED])
def test_framing_does_not_depend_on_read_boundaries(data):
    unsplit, split = RequestFraming(), RequestFraming()
    assert b"".join(feed(split, data[at : at + 1]) for at in range(len(data))) == feed(unsplit, data)
    assert split.error == unsplit.error


@pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED)
def test_valid_requests_are_passed_on_unchanged(data):
    framing = RequestFraming()
    assert feed(framing, data + GET + data) == data + GET + data
    assert framing.error is None


@pytest.mark.parametrize(
    "last",
    [
        post(b"Connection: close\r\nContent-Length: 1\r\n", b"x"),
        post(b"Connection: keep-alive, CLOSE\r\n"),
        b"GET / HTTP/1.0\r\n\r\n",
    ],
)
def test_data_after_a_final_request_is_ignored(last):
    framing = RequestFraming()
    assert feed(framing, last + REJECTED["two Content-Length headers"] + GET) == last
    assert (feed(framing, GET), framing.error) == (b"", None)


def test_incomplete_head_is_not_passed_on():
    framing = RequestFraming()
    assert feed(framing, GET[:-1]) == b""
    assert feed(framing, GET[-1:]) == GET


@pytest.mark.parametrize(
    "fields",
    [
        b"X: " + b"x" * COSTLY_HEAD_BYTES + b"\r\n",
        b"X: 1\r\n" * COSTLY_HEAD_FIELDS,
        b"Connection: " + b"a," * COSTLY_HEAD_VALUES + b"b,c\r\n",
    ],
)
def test_costly_head_is_passed_on_by_the_next_call(fields):
    framing, request = RequestFraming(), post(b"Content-Length: 5\r\n" + fields, b"hello")
    assert (framing.feed(request), framing.is_paused) == (b"", True)
    assert (framing.feed(b""), framing.is_paused) == (request, False)
    assert framing.feed(GET) == GET


def test_all_heads_can_be_held_back():
    framing = RequestFraming()
    framing.hold_heads(are_all_held=True)
    assert (framing.feed(GET), framing.is_paused, framing.has_costly_head) == (b"", True, False)
    assert (framing.feed(b""), framing.is_paused) == (GET, False)
    framing.hold_heads(are_all_held=False)
    assert (framing.feed(GET), framing.is_paused) == (GET, False)


def test_ordinary_head_is_passed_on_at_once():
    request = post(b"X: 1\r\n" * 20 + b"Connection: keep-alive, upgrade\r\nContent-Length: 5\r\n", b"hello")
    framing = RequestFraming()
    assert (framing.feed(request), framing.is_paused) == (request, False)


def test_body_is_passed_on_as_it_arrives():
    framing = RequestFraming()
    head = post(b"Content-Length: 5\r\n")
    assert feed(framing, head + b"he") == head + b"he"
    assert feed(framing, b"llo") == b"llo"


def test_pipelined_requests_are_passed_on_one_at_a_time():
    framing = RequestFraming()
    assert framing.feed(GET * 1000 + b"no request") == GET
    assert framing.has_next_request_bytes
    assert framing.error is None


@pytest.mark.parametrize("pieces", [1, 3, 7])
def test_pipelined_requests_are_handled_in_order_and_reading_pauses(pieces):
    connection = FramedConnection()
    sent = b"".join(post(b"Content-Length: 2\r\nX-Number: %d\r\n" % number, b"hi") for number in range(5))
    size = -(-len(sent) // pieces)
    numbers, paused, waiting = [], 0, [sent[at : at + size] for at in range(0, len(sent), size)]
    while len(numbers) < 5 or connection.their_state is not h11.DONE:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            numbers.append(dict(event.headers)[b"x-number"])
        elif event is h11.NEED_DATA:
            connection.receive_data(waiting.pop(0))
        elif event is h11.PAUSED:
            paused += 1
            if waiting:
                connection.receive_data(waiting.pop(0))
            connection.send(h11.Response(status_code=204, headers=[]))
            connection.send(h11.EndOfMessage())
            connection.start_next_cycle()
        elif connection.their_state is h11.DONE and len(numbers) < 5 and not waiting and pieces == 1:
            assert connection.next_event() is h11.PAUSED
            connection.send(h11.Response(status_code=204, headers=[]))
            connection.send(h11.EndOfMessage())
            connection.start_next_cycle()
    assert numbers == [b"%d" % number for number in range(5)]
