"""Strict request framing: delimits requests on a connection before the HTTP library parses any byte.

If a reverse proxy and a server disagree about where a request ends, one client can inject a request into another
client's connection (request smuggling). Input whose interpretation RFC 9112 leaves to the recipient is therefore
rejected.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import h11

HEAD_BYTES_MAX = 16 * 1024
"""Maximum size of the request line with all header fields, and of the trailer fields after a chunked body."""

CHUNK_LINE_BYTES_MAX = 512
"""Maximum size of a chunk-size line, including its extensions."""

CHUNK_EXTENSIONS_BYTES_MAX = 4 * 1024
"""Maximum total size of a body's chunk extensions; their content is ignored."""

FIELDS_MAX = 128
"""Maximum number of fields in a header or trailer, and of values in list fields. Even short ones are slow to parse."""

COSTLY_HEAD_BYTES, COSTLY_HEAD_FIELDS, COSTLY_HEAD_VALUES = 2 * 1024, 32, 16
"""A head with more bytes, fields or values in list fields is costly: `feed` holds it back.

Such a head takes more than a millisecond until its client is authenticated, and many may arrive together.
"""

PARTS_PER_READ_MAX = 24
"""Maximum number of parts (heads, chunk-size lines, chunks, line endings) that one call passes on."""

_TOKEN = rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(_TOKEN + rb" [\x21-\x7e]+ HTTP/1\.([01])")
_FIELD = re.compile(rb"(" + _TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)")
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")
_QUOTED = rb'"(?:[\t\x20\x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
_EXTENSION = rb";[ \t]*" + _TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?"
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})((?:" + _EXTENSION + rb")*)")
_WHITESPACE = b" \t"
_FRAMING_FIELDS = frozenset({b"content-length", b"transfer-encoding"})
_Fields = Sequence[tuple[bytes, bytes]]
"""Pairs of lower-case name and value."""


class _FramingError(Exception):
    """The bytes are not a valid request. The message is for users."""


class RequestFraming:
    """Passes on complete heads and body bytes of one connection, one request at a time. Performs no I/O.

    error: why nothing more is passed on, or None.
    is_paused: whether there may be more parts of the current request, or a held head; the next `feed` returns them.
    has_costly_head: whether the last head is costly.
    """

    def __init__(self) -> None:
        self.error: str | None = None
        self.is_paused = False
        self._buffer = bytearray()
        self._searched_bytes = 0
        self._body_bytes_left = 0
        self._line_bytes_left = HEAD_BYTES_MAX
        self._extension_bytes_left = 0
        self._head_lines: list[bytes] = []
        self._fields: list[tuple[bytes, bytes]] = []
        self._is_last_request = False
        self._has_request_ended = False
        self._is_head_held = False
        self._holds_all_heads = False
        self.has_costly_head = False
        self._parse_step: Callable[[], bytes | None] = self._read_head

    def feed(self, data: bytes) -> bytes:
        """Add received bytes. Return the bytes that can be parsed now: a few parts, all of the same request.

        A client may send thousands of requests or chunks together. Parsing all of them in one call would delay other
        clients.
        """
        self._buffer += data
        output = bytearray()
        self._has_request_ended = self._is_head_held = False
        parts_left = PARTS_PER_READ_MAX
        try:
            while parts_left and not self._has_request_ended and (part := self._parse_step()) is not None:
                output += part
                parts_left -= 1
        except _FramingError as refused:
            self.error = str(refused)
            self._parse_step = self._discard
        self.is_paused = self._is_head_held or (not parts_left and not self._has_request_ended)
        return bytes(output)

    def hold_heads(self, *, are_all_held: bool) -> None:
        """Hold back all heads from now on, or only costly ones."""
        self._holds_all_heads = are_all_held

    def buffer(self, data: bytes) -> None:
        """Add received bytes for later parsing."""
        self._buffer += data

    @property
    def has_next_request_bytes(self) -> bool:
        """Whether there are bytes after the end of the last request that was passed on."""
        return self._has_request_ended and bool(self._buffer)

    def _read_head(self) -> bytes | None:
        if not self._head_lines and self._buffer and re.match(_TOKEN, self._buffer) is None:
            raise _FramingError("The request line does not start with a method.")
        while (line := self._consume_head_line()) is not None:
            if not self._head_lines:
                if _REQUEST_LINE.fullmatch(line) is None:
                    raise _FramingError("The request line must be METHOD TARGET HTTP/1.1, with one space between them.")
            elif line:
                self._add_field(line)
            elif self._must_hold_head():
                self._is_head_held, self._parse_step = True, self._finish_head
                return None
            else:
                return self._finish_head()
            self._head_lines.append(line)
        return None

    def _must_hold_head(self) -> bool:
        self.has_costly_head = (
            HEAD_BYTES_MAX - self._line_bytes_left > COSTLY_HEAD_BYTES
            or len(self._fields) > COSTLY_HEAD_FIELDS
            or _count_list_values(self._fields) > COSTLY_HEAD_VALUES
        )
        return self._holds_all_heads or self.has_costly_head

    def _add_field(self, line: bytes) -> bytes:
        """Parse a header or trailer field and return its name."""
        self._fields.append(_parse_field(line))
        if len(self._fields) > FIELDS_MAX:
            raise _FramingError(f"The request has more than {FIELDS_MAX} header fields or trailer fields.")
        return self._fields[-1][0]

    def _finish_head(self) -> bytes:
        lines, self._head_lines, self._line_bytes_left = self._head_lines, [], HEAD_BYTES_MAX
        fields, self._fields = self._fields, []
        is_http_1_0 = lines[0].endswith(b"HTTP/1.0")
        if _count_list_values(fields) > FIELDS_MAX:
            raise _FramingError(f"Connection, Upgrade and Sec-WebSocket-* have more than {FIELDS_MAX} values.")
        length, is_chunked = _body_framing(fields, is_http_1_0=is_http_1_0)
        if b"websocket" in _list_values(fields, b"upgrade") and (is_http_1_0 or is_chunked or length):
            raise _FramingError("The WebSocket handshake has a body, or uses HTTP/1.0.")
        self._is_last_request = is_http_1_0 or b"close" in _list_values(fields, b"connection")
        self._body_bytes_left = length
        if is_chunked:
            self._extension_bytes_left = CHUNK_EXTENSIONS_BYTES_MAX
            self._parse_step = self._read_chunk_line
        elif length:
            self._parse_step = self._read_body
        else:
            self._finish_request()
        return b"".join(line + b"\r\n" for line in (*lines, b""))

    def _read_body(self) -> bytes | None:
        part = self._consume_body()
        if part is not None and self._body_bytes_left == 0:
            self._finish_request()
        return part

    def _read_chunk_line(self) -> bytes | None:
        line = self._consume_line(CHUNK_LINE_BYTES_MAX)
        if line is None:
            return None
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise _FramingError("A chunk size is not a hexadecimal number, or a chunk extension is malformed.")
        self._extension_bytes_left -= len(match[2])
        if self._extension_bytes_left < 0:
            raise _FramingError(f"The chunk extensions have more than {CHUNK_EXTENSIONS_BYTES_MAX} bytes.")
        self._body_bytes_left = int(match[1], 16)
        self._parse_step = self._read_chunk if self._body_bytes_left else self._read_trailers
        return line + b"\r\n"

    def _read_chunk(self) -> bytes | None:
        part = self._consume_body()
        if part is not None and self._body_bytes_left == 0:
            self._parse_step = self._read_chunk_end
        return part

    def _read_chunk_end(self) -> bytes | None:
        end = bytes(self._buffer[:2])
        if not b"\r\n".startswith(end):
            raise _FramingError("A chunk is longer or shorter than its declared size.")
        if len(end) < 2:
            return None
        del self._buffer[:2]
        self._parse_step = self._read_chunk_line
        return end

    def _read_trailers(self) -> bytes | None:
        line = self._consume_head_line()
        if line is None:
            return None
        if not line:
            self._finish_request()
        elif self._add_field(line) in _FRAMING_FIELDS:
            raise _FramingError("A trailer field is Content-Length or Transfer-Encoding.")
        return line + b"\r\n"

    def _finish_request(self) -> None:
        self._has_request_ended = True
        self._fields = []
        self._line_bytes_left = HEAD_BYTES_MAX
        self._parse_step = self._discard if self._is_last_request else self._read_head
        if self._is_last_request:
            self._buffer.clear()

    def _discard(self) -> None:
        """Ignore everything after the last request on a connection."""
        self._buffer.clear()

    def _consume_body(self) -> bytes | None:
        if not self._buffer:
            return None
        part = bytes(self._buffer[: self._body_bytes_left])
        del self._buffer[: len(part)]
        self._body_bytes_left -= len(part)
        return part

    def _consume_head_line(self) -> bytes | None:
        line = self._consume_line(self._line_bytes_left)
        if line is not None:
            self._line_bytes_left -= len(line) + 2
        return line

    def _consume_line(self, bytes_max: int) -> bytes | None:
        """Return the next line without its line ending, or None until it is complete."""
        end = self._buffer.find(b"\n", self._searched_bytes)
        self._searched_bytes = len(self._buffer)
        if (self._searched_bytes if end < 0 else end + 1) > bytes_max:
            raise _FramingError("The header fields, the trailer fields or a chunk-size line are too long.")
        if end < 0:
            return None
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        self._searched_bytes = 0
        if not line.endswith(b"\r\n"):
            raise _FramingError("A line ends in LF without CR.")
        return line[:-2]


class FramedConnection(h11.Connection):
    """An h11 connection with strict framing. `next_event` raises an error for a rejected request."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEAD_BYTES_MAX)
        self._framing = RequestFraming()

    @property
    def framing_error(self) -> str | None:
        """Why the connection must be closed, or None."""
        return self._framing.error

    @property
    def is_paused(self) -> bool:
        """Whether there may be more parts of the current request, or a held head; `resume` passes them on."""
        return self._framing.is_paused

    @property
    def is_next_part_cheap(self) -> bool:
        """Whether the held part is a head that is not costly."""
        return self.their_state is h11.IDLE and not self._framing.has_costly_head

    def hold_heads(self, *, are_all_held: bool) -> None:
        """Hold back all heads from now on, or only costly ones."""
        self._framing.hold_heads(are_all_held=are_all_held)

    def resume(self) -> None:
        """Pass on further parts of the current request."""
        if framed := self._framing.feed(b""):
            super().receive_data(framed)

    def receive_data(self, data: bytes) -> None:
        """Frame received data. Pass a few parts of one request to h11, and buffer the remaining data."""
        if self.is_paused or (self._framing.has_next_request_bytes and self.their_state is not h11.IDLE):
            self._framing.buffer(data)
        elif framed := self._framing.feed(data):  # empty data would signal EOF to h11
            super().receive_data(framed)

    def next_event(self) -> Any:
        """Return h11's next event. Requests before a rejected one get their responses first."""
        if self._framing.has_next_request_bytes and self.their_state is h11.IDLE:
            self.receive_data(b"")
        event = super().next_event()
        if event is h11.NEED_DATA and (self._framing.has_next_request_bytes or self.is_paused):
            return h11.PAUSED
        if event is not h11.NEED_DATA or self.framing_error is None:
            return event
        if self.their_state is h11.DONE:
            return h11.PAUSED
        if self.their_state in {h11.IDLE, h11.SEND_BODY}:
            raise h11.RemoteProtocolError(self.framing_error)
        return event

    def send(self, event: Any) -> Any:
        """Send an event. If 100 Continue was never sent, the body may never arrive, so close after the response."""
        if isinstance(event, h11.Response) and self.they_are_waiting_for_100_continue:
            headers = [*event.headers.raw_items(), (b"Connection", b"close")]
            event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        return super().send(event)


def _parse_field(line: bytes) -> tuple[bytes, bytes]:
    match = _FIELD.fullmatch(line)
    if match is None:
        raise _FramingError(
            "A header field must be NAME: VALUE on one line, without control characters and "
            "without a space before the colon."
        )
    name, value = match[1].lower(), match[2]
    if name in _FRAMING_FIELDS and value.removeprefix(b" ").strip(_WHITESPACE) != value.removeprefix(b" "):
        raise _FramingError("Content-Length or Transfer-Encoding has tabs or spaces around its value.")
    return name, value.strip(_WHITESPACE)


def _is_list_field(name: bytes) -> bool:
    """Return whether this field contains a list of values that is parsed before the client is authenticated."""
    return name in {b"connection", b"upgrade"} or name.startswith(b"sec-websocket-")


def _count_list_values(fields: _Fields) -> int:
    return sum(value.count(b",") for name, value in fields if _is_list_field(name))


def _field_values(fields: _Fields, name: bytes) -> list[bytes]:
    return [value for each, value in fields if each == name]


def _list_values(fields: _Fields, name: bytes) -> set[bytes]:
    return {word.strip(_WHITESPACE).lower() for value in _field_values(fields, name) for word in value.split(b",")}


def _body_framing(fields: _Fields, *, is_http_1_0: bool) -> tuple[int, bool]:
    """Return the length of the body and whether it is chunked (RFC 9112 §6.1 to §6.3). Raises _FramingError."""
    lengths, codings = _field_values(fields, b"content-length"), _field_values(fields, b"transfer-encoding")
    if lengths and codings:
        raise _FramingError("The request has both Content-Length and Transfer-Encoding.")
    if codings:
        if is_http_1_0:
            raise _FramingError("HTTP/1.0 has no Transfer-Encoding; use HTTP/1.1.")
        if [coding.lower() for coding in codings] != [b"chunked"]:
            raise _FramingError("Transfer-Encoding must be 'chunked' and occur only once.")
        return 0, True
    if not lengths:
        return 0, False
    if len(lengths) > 1 or _LENGTH.fullmatch(lengths[0]) is None:
        raise _FramingError("Content-Length must be one decimal number and occur only once.")
    return int(lengths[0]), False
