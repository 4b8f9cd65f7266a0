"""Connections on which nobody known is being answered, kept to a number: each takes a descriptor of the server."""

from __future__ import annotations

import resource
from collections import OrderedDict
from typing import Protocol

from uvicorn.server import ServerState

UNAUTHENTICATED_CONNECTIONS_MAX = 1024
"""Such connections of one port; one more ends the oldest of them."""

_DESCRIPTORS_SHARE = 8
"""They are no more than one in so many of the descriptors that the server may have."""


class Connection(Protocol):
    """What may be ended."""

    @property
    def is_known(self) -> bool:
        """Whether somebody who may look on or more is being answered."""

    def cut(self) -> None:
        """End it at once."""


class UnauthenticatedConnections:
    """Those that may be ended, the one that came or was answered first at the front. Pure."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: OrderedDict[Connection, None] = OrderedDict()

    def add(self, connection: Connection) -> None:
        """One has come, or its answer has ended. Those on which somebody known has begun to be answered leave."""
        self._waiting[connection] = None
        self._waiting.move_to_end(connection)
        while len(self._waiting) > self._limit:
            oldest, _ = self._waiting.popitem(last=False)
            if not oldest.is_known:
                oldest.cut()

    def remove(self, connection: Connection) -> None:
        """It is gone, or speaks another protocol, which only those who are known may."""
        self._waiting.pop(connection, None)


class DoorState(ServerState):
    """What the connections of one port share."""

    def __init__(self) -> None:
        super().__init__()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = (
            UNAUTHENTICATED_CONNECTIONS_MAX
            if soft == resource.RLIM_INFINITY
            else min(UNAUTHENTICATED_CONNECTIONS_MAX, soft // _DESCRIPTORS_SHARE)
        )
        self.strangers = UnauthenticatedConnections(most)
