"""Interfaces of connection inspectors and of the filters of allowed connections, and their decisions. No I/O."""

from collections.abc import Callable
from typing import Protocol

import msgspec


class Denial(msgspec.Struct, frozen=True):
    """A denied connection. response: bytes sent to the client before the connection ends."""

    host: str
    port: int
    reason: str
    response: bytes = b""


class StreamFilter(Protocol):
    """Inspects the data that the client sends to the host, for as long as the protocol requires."""

    @property
    def drops_rest(self) -> bool:
        """Whether the rest of the client's data is dropped."""
        ...

    @property
    def is_passthrough(self) -> bool:
        """Whether the rest of the client's data is forwarded without inspection."""
        ...

    @property
    def may_end_in_denied_line(self) -> bool:
        """Whether the data forwarded so far may end within a line that is about to be denied."""
        ...

    def start(self) -> bytes | Denial:
        """Return the bytes to send as soon as the host is connected."""
        ...

    def client_data_received(self, data: bytes) -> bytes | Denial:
        """Return the part of `data` to forward to the host; empty data means EOF."""
        ...

    def host_data_received(self) -> None:
        """Record that the host has sent data."""
        ...


class Tunnel(msgspec.Struct, frozen=True):
    """An allowed connection to `host`.

    established_response: sent to the client once the host is connected.
    unreachable_response: builds the response for a failed dial from an HTTP status and a message.
    """

    host: str
    port: int
    stream_filter: StreamFilter
    established_response: bytes = b""
    unreachable_response: Callable[[int, str], bytes] = lambda _status, _sentence: b""


class ConnectionInspector(Protocol):
    """Reads the first bytes that a sandbox sends on a connection, and decides between `Tunnel` and `Denial`.

    Never raises on received data, and always decides at EOF.
    """

    def client_data_received(self, data: bytes) -> Tunnel | Denial | None:
        """Return the decision, or None to wait for more data. Empty data means EOF."""
        ...
