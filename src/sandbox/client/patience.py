"""How long a client goes on trying to reach a server that it has reached before."""

from __future__ import annotations

import time
from collections.abc import Iterator

from sandbox.client.errors import ClientError

PAUSES_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0)
"""About 30 s in all: a server that is restarted is back by then."""


class Patience:
    """Pauses between tries, longer and longer; after each success they begin anew."""

    def __init__(self, pauses_seconds: tuple[float, ...] | None = None) -> None:
        self._pauses_seconds = PAUSES_SECONDS if pauses_seconds is None else pauses_seconds
        self._left: Iterator[float] = iter(self._pauses_seconds)

    def restore(self) -> None:
        """Something arrived: be patient again."""
        self._left = iter(self._pauses_seconds)

    def pause(self, error: ClientError) -> None:
        """Sleep before the next try; raise `error` when there was the last one, or when another try cannot help."""
        seconds = next(self._left, None)
        if seconds is None or not error.retryable:
            raise error
        time.sleep(seconds)
