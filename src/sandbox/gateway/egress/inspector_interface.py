"""Connection inspectors, their decisions, and the filters of allowed connections. No I/O."""

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


class NestedConnectionFilter:
    """The stream filter of a tunnel that contains another connection, on which `inspector` decides.

    initial_data: data inside the tunnel that has already arrived.
    """

    def __init__(self, inspector: ConnectionInspector, initial_data: bytes) -> None:
        self._inspector = inspector
        self._initial_data = initial_data
        self._stream_filter: StreamFilter | None = None
        self._has_host_data = False

    @property
    def drops_rest(self) -> bool:
        """Whether the inner connection is allowed and its filter drops the rest of the data."""
        return self._stream_filter is not None and self._stream_filter.drops_rest

    @property
    def is_passthrough(self) -> bool:
        """Whether the inner connection is allowed and its filter forwards data without inspection."""
        return self._stream_filter is not None and self._stream_filter.is_passthrough

    @property
    def may_end_in_denied_line(self) -> bool:
        """Whether the inner connection is allowed and its filter forwards data that it still searches."""
        return self._stream_filter is not None and self._stream_filter.may_end_in_denied_line

    def start(self) -> bytes | Denial:
        """Inspect the initial data and return what to forward."""
        return self.client_data_received(self._initial_data) if self._initial_data else b""

    def client_data_received(self, data: bytes) -> bytes | Denial:
        """Return no data until the inspector has selected a filter, then the output of that filter."""
        if self._stream_filter is not None:
            return self._stream_filter.client_data_received(data)
        outcome = self._inspector.client_data_received(data)
        if outcome is None or isinstance(outcome, Denial):
            return outcome or b""
        self._stream_filter = outcome.stream_filter
        if self._has_host_data:
            self._stream_filter.host_data_received()
        return self._stream_filter.start()

    def host_data_received(self) -> None:
        """Record that the host has sent data, and notify the inner connection's filter."""
        self._has_host_data = True
        if self._stream_filter is not None:
            self._stream_filter.host_data_received()
