"""Parses the server name (SNI) in a TLS ClientHello (RFC 8446 §4.1.2, RFC 6066 §3) from untrusted bytes."""

from collections.abc import Iterator

import msgspec

_HANDSHAKE_RECORD = 22
_CLIENT_HELLO = 1
_SERVER_NAME_EXTENSION = 0
_EARLY_DATA_EXTENSION = 42
_ENCRYPTED_NAME_EXTENSIONS = frozenset({0xFE0D, 0xFFCE})
"""ECH, and its predecessor ESNI."""

_HOST_NAME = 0
RECORD_HEADER_BYTES = 5
_RECORD_BYTES_MAX = 16384 + 256


class ClientHello(msgspec.Struct, frozen=True):
    """The result of parsing the bytes received so far.

    is_complete: more bytes cannot change the result.
    server_name: None if a complete hello has no name, if the bytes are not a hello, or if other data shares the hello's
    record.
    has_encrypted_name: the hello contains an encrypted hello (ECH) that may name a different server. Browsers that do
    not use ECH send random bytes in this extension.
    has_early_data: the client may send data before the server has responded (RFC 8446 §4.2.10).
    byte_count: length of the records that contain the hello. If the records are malformed, the length up to the end of
    the malformed record's header, because some servers may still find a hello there.
    """

    is_complete: bool
    server_name: str | None = None
    has_encrypted_name: bool = False
    has_early_data: bool = False
    byte_count: int = 0


class ServerNames(msgspec.Struct, frozen=True):
    """The server names in a ClientHello. The flags mean the same as in `ClientHello`."""

    names: tuple[str, ...]
    has_encrypted_name: bool
    has_early_data: bool


class _MalformedError(Exception):
    """The hello is malformed, so servers may interpret it differently."""


def parse_client_hello(data: bytes) -> ClientHello:
    """Parse the first bytes of a connection. Never raises. An incomplete result may change as more bytes arrive."""
    message = bytearray()
    offset = 0
    while len(data) >= offset + 5:
        length = int.from_bytes(data[offset + 3 : offset + 5])
        is_handshake = data[offset] == _HANDSHAKE_RECORD
        if not is_handshake or data[offset + 1] != 3 or not 0 < length <= _RECORD_BYTES_MAX:
            return ClientHello(is_complete=True, byte_count=offset + 5 if is_handshake or message else 0)
        message += data[offset + 5 : offset + 5 + length]
        if message and message[0] != _CLIENT_HELLO:
            return ClientHello(is_complete=True)
        end = 4 + int.from_bytes(message[1:4])
        if len(message) >= 4 and len(message) >= end:
            # No real client puts data after the hello in the same record. A server might use that data as the hello.
            byte_count = offset + 5 + length
            is_only_message = len(message) == end and len(data) >= byte_count
            return (
                _hello_from_body(bytes(message[4:end]), byte_count)
                if is_only_message
                else ClientHello(True, byte_count=byte_count)
            )
        offset += 5 + length
    is_nonstandard_tls = data[:1] == b"\x16" and data[1:2] not in (b"", b"\x03")
    return ClientHello(
        is_complete=is_nonstandard_tls or data[:1] not in (b"", b"\x16"),
        byte_count=len(data) if is_nonstandard_tls else 0,
    )


def join_records(data: bytes) -> bytes:
    """Return the records of one complete ClientHello as a single record.

    The message, which both sides hash, does not change. Some load balancers ignore record boundaries: they parse the
    header of the second record as part of the message, and may therefore read a different server name.
    """
    message, offset = bytearray(), 0
    while offset < len(data):
        end = offset + RECORD_HEADER_BYTES + int.from_bytes(data[offset + 3 : offset + 5])
        message += data[offset + RECORD_HEADER_BYTES : end]
        offset = end
    return data[:3] + len(message).to_bytes(2) + message


def parse_server_names(body: bytes) -> ServerNames | None:
    """Return the names in the body of a ClientHello, or None if it is malformed.

    It is malformed if a length field does not match the data, or if there are several lists of names.
    """
    names: list[str] = []
    has_names = has_encrypted_name = has_early_data = False
    try:
        for kind, content in _extensions(body):
            if kind == _SERVER_NAME_EXTENSION:
                if has_names:
                    raise _MalformedError
                names, has_names = _host_names(content), True
            has_encrypted_name |= kind in _ENCRYPTED_NAME_EXTENSIONS
            has_early_data |= kind == _EARLY_DATA_EXTENSION
    except _MalformedError:
        return None
    return ServerNames(tuple(names), has_encrypted_name, has_early_data)


def _hello_from_body(body: bytes, byte_count: int) -> ClientHello:
    server_names = parse_server_names(body)
    if server_names is None:
        return ClientHello(True, byte_count=byte_count)
    # More than one name violates the RFC, and the server might select a different name than the gateway.
    name = server_names.names[0] if len(server_names.names) == 1 else None
    return ClientHello(True, name, server_names.has_encrypted_name, server_names.has_early_data, byte_count)


def _extensions(body: bytes) -> Iterator[tuple[int, bytes]]:
    reader = _Reader(body)
    reader.read(2 + 32)
    reader.read_vector(1)
    reader.read_vector(2)
    reader.read_vector(1)
    extensions = _Reader(reader.read_last_vector())
    while extensions.remaining:
        yield extensions.read_integer(2), extensions.read_vector(2)


def _host_names(content: bytes) -> list[str]:
    """Return the host name, or all entries if there are several.

    Some servers read the first entry, whatever its type.
    """
    names, entries = _Reader(_Reader(content).read_last_vector()), []
    while names.remaining:
        entries.append((names.read_integer(1), names.read_vector(2)))
    found = entries if len(entries) > 1 else [entry for entry in entries if entry[0] == _HOST_NAME and entry[1]]
    return [name.decode("ascii", errors="replace") for _, name in found]


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    @property
    def remaining(self) -> int:
        return len(self._data) - self._offset

    def read(self, count: int) -> bytes:
        if count > self.remaining:
            raise _MalformedError
        self._offset += count
        return self._data[self._offset - count : self._offset]

    def read_integer(self, size: int) -> int:
        return int.from_bytes(self.read(size))

    def read_vector(self, size: int) -> bytes:
        return self.read(self.read_integer(size))

    def read_last_vector(self) -> bytes:
        """Return a vector with a two-byte length; no data may follow it."""
        vector = self.read_vector(2)
        if self.remaining:
            raise _MalformedError
        return vector
