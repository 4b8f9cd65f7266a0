"""TLS from the sandbox: parses a ClientHello, checks its server name, and finds it in an unknown protocol's data.

The parser reads untrusted bytes (RFC 8446 §4.1.2, RFC 6066 §3).
"""

import re
from collections.abc import Callable, Iterator

import msgspec

from sandbox.gateway.egress.inspector_interface import Denial, Tunnel
from sandbox.gateway.egress.policy import EgressPolicy, is_address, normalize_host
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX, PARTIAL_HELLOS_MAX, UNKNOWN_PROTOCOL_BYTES_MAX

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
    server_name: the only server name in a complete, well-formed hello that shares its record with no other data;
    otherwise None.
    has_encrypted_name: the hello contains the extension for an encrypted hello (ECH), which may name a different
    server. Browsers also send the extension, with random bytes, if they do not use ECH.
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
    return [name.decode("ascii", errors="backslashreplace") for _, name in found]


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


_HELLO_START = re.compile(rb"\x16(?=[\x00-\x0f].[\x00-\x40].\x01)", re.DOTALL)
_HELLO_START_BYTES = 6
_RECORD_HEADER = re.compile(rb"[\x14-\x16][\x00-\x0f].[\x00-\x40].", re.DOTALL)
"""Matches the records that lenient servers accept: some allow an alert or a ChangeCipherSpec between a hello's records.

Lenient servers check the version only in the hello, where its first byte is 3.
"""

_HANDSHAKE = 22
_BODY_BYTES_MIN = 39
_BODY_BYTES_MAX = 0x2FFFF


class _PartialHello(msgspec.Struct, frozen=True):
    """The available part of a ClientHello. is_complete: the message and its records have arrived in full."""

    message: bytes
    is_complete: bool


class ClientHelloSearch:
    """Looks for a ClientHello in the bytes from a client that is connecting to `name`.

    The hello may omit the server name, because the surrounding protocol does not contain one either.
    """

    def __init__(self, policy: EgressPolicy, name: str) -> None:
        self._policy = policy
        self._name = name
        self._searched = 0
        self._offsets: list[int] = []

    def deny_reason(self, received: bytearray) -> str | None:
        """Return why a hello in the bytes received so far is denied, or None."""
        self._find_offsets(received)
        if len(self._offsets) > PARTIAL_HELLOS_MAX:
            return "the connection contains too many possible TLS ClientHellos."
        for offset in tuple(self._offsets):
            partial_hello = _read_partial_hello(received, offset)
            reason = None
            if partial_hello is None or partial_hello.is_complete:
                self._offsets.remove(offset)
                reason = self._mismatch(partial_hello.message) if partial_hello is not None else None
            elif len(received) - offset >= CLIENT_HELLO_BYTES_MAX:
                reason = f"the connection to {self._name} contains an incomplete TLS ClientHello."
            if reason is not None:
                return reason
        return None

    def _find_offsets(self, received: bytearray) -> None:
        last = UNKNOWN_PROTOCOL_BYTES_MAX - CLIENT_HELLO_BYTES_MAX
        while (begin := _HELLO_START.search(received, self._searched)) is not None and begin.start() <= last:
            self._searched = begin.end()
            self._offsets.append(begin.start())
        self._searched = max(self._searched, len(received) - _HELLO_START_BYTES + 1)

    def _mismatch(self, message: bytes) -> str | None:
        end = _message_end(message)
        server_names = parse_server_names(message[4:end])
        if server_names is None or len(message) != end or len(server_names.names) > 1:
            return f"the connection to {self._name} contains a TLS ClientHello that servers may interpret differently."
        if server_names.names and normalize_host(server_names.names[0]) != normalize_host(self._name):
            return f"the connection is to {self._name}, but its TLS handshake names another server (SNI)."
        if server_names.has_encrypted_name and not self._policy.allows_encrypted_hello:
            return "the TLS ClientHello contains a second, encrypted server name (ECH); disable ECH in the program."
        return None


def _read_partial_hello(received: bytearray, offset: int) -> _PartialHello | None:
    """Return the ClientHello whose first record starts at `offset`, or None if there is none."""
    message = bytearray()
    while len(header := bytes(received[offset : offset + RECORD_HEADER_BYTES])) == RECORD_HEADER_BYTES:
        if _RECORD_HEADER.match(header) is None:
            return None
        end = offset + RECORD_HEADER_BYTES + int.from_bytes(header[3:])
        if header[0] == _HANDSHAKE:
            message += received[offset + RECORD_HEADER_BYTES : end]
        if not _may_be_hello(message):
            return None
        offset = end
        if offset <= len(received) and 4 <= _message_end(message) <= len(message):
            return _PartialHello(bytes(message), is_complete=True)
    return _PartialHello(bytes(message), is_complete=False)


def _message_end(message: bytes | bytearray) -> int:
    """Return the end offset of the message, or 0 while it is unknown."""
    return 4 + int.from_bytes(message[1:4]) if len(message) >= 4 else 0


def _may_be_hello(message: bytes | bytearray) -> bool:
    has_plausible_length = len(message) < 4 or _BODY_BYTES_MIN <= int.from_bytes(message[1:4]) <= _BODY_BYTES_MAX
    return message[:1] == b"\x01" and has_plausible_length and message[4:5] in (b"", b"\x03")


class TlsInspector:
    """Inspects a connection to `name`, or to `address` if no name was assigned to that address (`name` is None).

    A denied connection gets no response bytes.
    """

    def __init__(self, policy: EgressPolicy, name: str | None, address: str, port: int) -> None:
        self._policy = policy
        self._name = name
        self._address = address
        self._port = port
        self._received = b""

    def client_data_received(self, data: bytes) -> Tunnel | Denial | None:
        """Wait for a complete ClientHello and check it."""
        self._received += data
        hello = parse_client_hello(self._received)
        if data and not hello.is_complete and len(self._received) <= CLIENT_HELLO_BYTES_MAX:
            return None
        requested = hello.server_name
        target = self._name or requested or self._address
        reason = self._policy.deny_reason(target, self._port)
        if reason is None:
            reason = self._mismatch(hello)
        if reason is not None:
            return Denial(requested or target, self._port, reason)
        return Tunnel(target, self._port, HelloRetryFilter(self._received, hello, self._check_second_hello))

    def _check_second_hello(self, hello: ClientHello) -> Denial | None:
        reason = self._mismatch(hello)
        return None if reason is None else Denial(hello.server_name or self._address, self._port, reason)

    def _mismatch(self, hello: ClientHello) -> str | None:
        requested = hello.server_name
        if self._name is None:
            return f"{self._address} is not assigned to a host name."
        if not hello.is_complete:
            return f"the connection to {self._name} starts with an incomplete TLS ClientHello."
        if hello.byte_count > CLIENT_HELLO_BYTES_MAX:
            limit = CLIENT_HELLO_BYTES_MAX // 1024
            return f"the TLS ClientHello of the connection to {self._name} is larger than {limit} KiB."
        if requested is None and not is_address(self._name):
            return f"the connection to {self._name} does not start with a TLS handshake that names the server (SNI)."
        if requested is not None and normalize_host(requested) != normalize_host(self._name):
            return f"the connection is to {self._name}, but its TLS handshake names another server (SNI)."
        if hello.has_encrypted_name and not self._policy.allows_encrypted_hello:
            return "the TLS ClientHello contains a second, encrypted server name (ECH); disable ECH in the program."
        return None


_IGNORABLE_RECORDS = frozenset({20, 21})
"""Record types (ChangeCipherSpec, alert) that may occur between two hellos any number of times."""

_APPLICATION_DATA_RECORD = 23


class HelloRetryFilter:
    """Forwards everything except a second ClientHello that fails the same checks as the first one.

    The first ClientHello is forwarded in one record if it names a server.
    A TLS 1.3 server may request a second hello (RFC 8446 §4.1.4) and might then serve the site that the second hello
    names. All data after the second hello is encrypted. Early data, which the client sends before the server has
    responded, may arrive between the two hellos.
    """

    drops_rest = False
    may_end_in_denied_line = False

    def __init__(
        self, received: bytes, first_hello: ClientHello, check: Callable[[ClientHello], Denial | None]
    ) -> None:
        hello_bytes = received[: first_hello.byte_count]
        self._first_hello_bytes = hello_bytes if first_hello.server_name is None else join_records(hello_bytes)
        self._pending = received[first_hello.byte_count :]
        self._skippable_records = (
            _IGNORABLE_RECORDS | {_APPLICATION_DATA_RECORD} if first_hello.has_early_data else _IGNORABLE_RECORDS
        )
        self._skip_bytes = 0
        self._check = check
        self._is_passthrough = not first_hello.byte_count

    @property
    def is_passthrough(self) -> bool:
        """Whether no second hello can follow."""
        return self._is_passthrough

    def start(self) -> bytes | Denial:
        """Return the first hello and the checked data after it."""
        trailing_data, self._pending = self._pending, b""
        output = self.client_data_received(trailing_data) if trailing_data else b""
        return output if isinstance(output, Denial) else self._first_hello_bytes + output

    def client_data_received(self, data: bytes) -> bytes | Denial:
        """Return the bytes to forward, or a Denial.

        Data that may belong to a second ClientHello is held back until that hello is complete.
        """
        if self._is_passthrough:
            return data
        self._pending += data
        skipped_records = self._read_skippable()
        hello = parse_client_hello(self._pending)
        is_known = hello.is_complete and self._pending[0] not in self._skippable_records
        if data and not is_known and len(self._pending) <= CLIENT_HELLO_BYTES_MAX:
            return skipped_records
        is_second_hello = hello.byte_count > 0 or not hello.is_complete
        denial = self._check(hello) if is_second_hello and data else None
        if denial is not None:
            return denial
        output, self._pending, self._is_passthrough = skipped_records + self._pending, b"", True
        return output

    def host_data_received(self) -> None:
        """Do nothing, because the search for a second hello does not depend on the host's responses."""

    def _read_skippable(self) -> bytes:
        """Remove and return the received bytes of skippable records. The last record may be incomplete."""
        end = 0
        while True:
            available_bytes = min(self._skip_bytes, len(self._pending) - end)
            self._skip_bytes -= available_bytes
            end += available_bytes
            header = self._pending[end : end + RECORD_HEADER_BYTES]
            if self._skip_bytes or len(header) < RECORD_HEADER_BYTES or header[0] not in self._skippable_records:
                break
            self._skip_bytes = RECORD_HEADER_BYTES + int.from_bytes(header[3:])
        skipped, self._pending = self._pending[:end], self._pending[end:]
        return skipped
