"""Reads the server's name out of a TLS ClientHello (RFC 8446 §4.1.2, RFC 6066 §3), whoever sent it."""

from collections.abc import Iterator

import msgspec

_HANDSHAKE_RECORD = 22
_CLIENT_HELLO = 1
_SERVER_NAME_EXTENSION = 0
_EARLY_DATA_EXTENSION = 42
_ENCRYPTED_HELLO_EXTENSION = 0xFE0D
_HOST_NAME = 0
_RECORD_BYTES_MAX = 16384 + 256


class Hello(msgspec.Struct, frozen=True):
    """What the bytes so far tell. `server_name` is None in a whole hello without one, and in what is no hello or
    not alone in its record.

    hides_name: another hello is in it, encrypted (ECH), which may name another server; browsers put random bytes there.
    is_before_data: the client may send data before the server has answered (RFC 8446 §4.2.10).
    byte_count: of the records that it stands in, or the first of them: some servers may find a hello in what is odd.
    """

    is_whole: bool
    server_name: str | None = None
    hides_name: bool = False
    is_before_data: bool = False
    byte_count: int = 0


class HelloNames(msgspec.Struct, frozen=True):
    """What a ClientHello says of servers' names. The last two are as in `Hello`."""

    names: tuple[str, ...] = ()
    hides_name: bool = False
    is_before_data: bool = False


class _CutShortError(Exception):
    """A length points past the end."""


def read_hello(data: bytes) -> Hello:
    """Look at the first bytes of a connection. Not whole means: more bytes may tell more. Never raises."""
    message = bytearray()
    offset = 0
    while len(data) >= offset + 5:
        length = int.from_bytes(data[offset + 3 : offset + 5])
        is_handshake = data[offset] == _HANDSHAKE_RECORD
        if not is_handshake or data[offset + 1] != 3 or not 0 < length <= _RECORD_BYTES_MAX:
            return Hello(is_whole=True, byte_count=offset + 5 if is_handshake or message else 0)
        message += data[offset + 5 : offset + 5 + length]
        if message and message[0] != _CLIENT_HELLO:
            return Hello(is_whole=True)
        end = 4 + int.from_bytes(message[1:4])
        if len(message) >= 4 and len(message) >= end:
            # No client sends more in the same record, and the server might take what follows for the hello that counts.
            byte_count = offset + 5 + length
            is_alone = len(message) == end and len(data) >= byte_count
            return _told_by(bytes(message[4:end]), byte_count) if is_alone else Hello(True, byte_count=byte_count)
        offset += 5 + length
    is_odd = data[:1] == b"\x16" and data[1:2] not in (b"", b"\x03")
    return Hello(is_whole=is_odd or data[:1] not in (b"", b"\x16"), byte_count=len(data) if is_odd else 0)


def names_in(body: bytes) -> HelloNames | None:
    """The names in the body of a ClientHello; None when a length in it points past its end."""
    names, hides_name, is_before_data = [], False, False
    try:
        for kind, content in _extensions(body):
            if kind == _SERVER_NAME_EXTENSION:
                names += _host_names(content)
            hides_name |= kind == _ENCRYPTED_HELLO_EXTENSION
            is_before_data |= kind == _EARLY_DATA_EXTENSION
    except _CutShortError:
        return None
    return HelloNames(tuple(names), hides_name, is_before_data)


def _told_by(body: bytes, byte_count: int) -> Hello:
    told = names_in(body)
    if told is None:
        return Hello(True, byte_count=byte_count)
    # Several names are against the rules, and the server might take another one than we.
    name = told.names[0] if len(told.names) == 1 else None
    return Hello(True, name, told.hides_name, told.is_before_data, byte_count)


def _extensions(body: bytes) -> Iterator[tuple[int, bytes]]:
    reader = _Reader(body)
    reader.take(2 + 32)
    reader.vector(1)
    reader.vector(2)
    reader.vector(1)
    extensions = _Reader(reader.vector(2))
    while extensions.left:
        yield extensions.number(2), extensions.vector(2)


def _host_names(content: bytes) -> list[str]:
    names, found = _Reader(_Reader(content).vector(2)), []
    while names.left:
        kind, name = names.number(1), names.vector(2)
        if kind == _HOST_NAME and name:
            found.append(name.decode("ascii", errors="replace"))
    return found


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._offset

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _CutShortError
        self._offset += count
        return self._data[self._offset - count : self._offset]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, size: int) -> bytes:
        return self.take(self.number(size))
