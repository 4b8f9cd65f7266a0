"""Limits the connections without an authenticated request in progress, because each uses a file descriptor."""

from __future__ import annotations

import resource
from collections import OrderedDict
from typing import Protocol

from uvicorn.server import ServerState

from sandbox.system.fair_share import FairShare

UNAUTHENTICATED_CONNECTIONS_MAX = 1024
"""Maximum number of such connections per port; an additional one closes the oldest."""

_DESCRIPTORS_SHARE = 8
"""Such connections may use 1/N of the server's file descriptors."""


class Connection(Protocol):
    """A connection that can be closed."""

    @property
    def is_authenticated(self) -> bool:
        """Whether an authenticated request is in progress."""

    def abort(self) -> None:
        """Close the connection immediately."""


class UnauthenticatedConnections:
    """Connections that may be closed, ordered by when they were accepted or last got a response. Performs no I/O."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: OrderedDict[Connection, None] = OrderedDict()

    def add(self, connection: Connection) -> None:
        """Add a new connection, or move one to the end after its response; close the oldest ones above the limit.

        Connections with an authenticated request in progress are not closed, only removed.
        """
        self._waiting[connection] = None
        self._waiting.move_to_end(connection)
        while len(self._waiting) > self._limit:
            oldest, _ = self._waiting.popitem(last=False)
            if not oldest.is_authenticated:
                oldest.abort()

    def remove(self, connection: Connection) -> None:
        """Remove a connection that is closed or was upgraded to WebSocket, which requires authentication."""
        self._waiting.pop(connection, None)


class PortState(ServerState):
    """State shared by the connections of one port. rejection_share: the share for responses to malformed requests."""

    def __init__(self) -> None:
        super().__init__()
        self.rejection_share = FairShare()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = (
            UNAUTHENTICATED_CONNECTIONS_MAX
            if soft == resource.RLIM_INFINITY
            else min(UNAUTHENTICATED_CONNECTIONS_MAX, soft // _DESCRIPTORS_SHARE)
        )
        self.unauthenticated_connections = UnauthenticatedConnections(limit)
