"""Interface between the gateway's sans-I/O protocols and its sockets: bytes in, effects out."""

from enum import Enum
from typing import Protocol

import msgspec


class Phase(Enum):
    """The event that a client connection waits for; determines the connection's timeout."""

    HEAD = "head"
    BODY = "body"
    HELD = "held"
    RESPONSE = "response"
    IDLE = "idle"
    CLOSING = "closing"


class Effects(msgspec.Struct):
    """Effects to apply, in the order of the fields.

    close_upstream: abort the previous upstream connection.
    dial: open a new upstream connection; if that fails, discard the other effects except `to_client`.
    close_client: send EOF to the client after `to_client`.
    """

    close_upstream: bool = False
    dial: bool = False
    to_upstream: bytearray = bytearray()
    to_client: bytearray = bytearray()
    close_client: bool = False


class SansIOProtocol(Protocol):
    """One connection from the sandbox. Performs no I/O and never raises on data from the sandbox."""

    @property
    def phase(self) -> Phase:
        """The event that the connection is waiting for."""
        ...

    def client_data_received(self, data: bytes) -> Effects:
        """Process data from the client; empty data means EOF."""
        ...
