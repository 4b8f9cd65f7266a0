"""A TLS connection to a host: the server name in its ClientHello must be that host."""

from collections.abc import Callable

from sandbox.gateway.egress.client_hello import RECORD_HEADER_BYTES, ClientHello, join_records, parse_client_hello
from sandbox.gateway.egress.inspector_interface import Denial, Tunnel
from sandbox.gateway.egress.policy import EgressPolicy, is_address, normalize_host
from sandbox.gateway.limits import CLIENT_HELLO_BYTES_MAX


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
    """Forwards everything except a second ClientHello that names a different server.

    The first ClientHello is forwarded in one record.
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
