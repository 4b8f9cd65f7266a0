"""What the decisions of the gateway look like to the sockets: bytes in, reactions out."""

from enum import Enum
from typing import Protocol

import msgspec


class Phase(Enum):
    """What a connection from inside is waiting for, which decides how long it may wait."""

    HEAD = "head"
    BODY = "body"
    HELD = "held"
    RESPONSE = "answer"
    IDLE = "idle"
    CLOSING = "over"


class Effects(msgspec.Struct):
    """What is to be done, in the order of the fields.

    hang_up_upstream: cut the connection to the upstream that there was before.
    dial: open one; when that fails the rest is void.
    hang_up_client: nothing more will be sent; what came before is delivered first.
    """

    close_upstream: bool = False
    dial: bool = False
    to_upstream: bytearray = bytearray()
    to_client: bytearray = bytearray()
    close_client: bool = False


class SansIOProtocol(Protocol):
    """One connection from inside. Does no I/O and never raises on what comes from inside."""

    @property
    def phase(self) -> Phase:
        """What it is waiting for now."""
        ...

    def client_data_received(self, data: bytes) -> Effects:
        """Bytes came from inside; none mean that no more will."""
        ...
