"""How long a client goes on trying to reach a server that it has reached before."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox.client.errors import ClientError

PAUSES_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0)
"""About 30 s in all: a server that is restarted is back by then."""

RETRY_AFTER_SECONDS_MAX = 10.0
"""A server that asks for a longer pause is asked again after this one."""


class Patience:
    """Pauses between tries, longer and longer; after each success they begin anew."""

    def __init__(self, pauses_seconds: tuple[float, ...] | None = None) -> None:
        self._pauses_seconds = PAUSES_SECONDS if pauses_seconds is None else pauses_seconds
        self._left: Iterator[float] = iter(self._pauses_seconds)

    def restore(self) -> None:
        """Something arrived: be patient again."""
        self._left = iter(self._pauses_seconds)

    def pause_seconds(self, error: ClientError) -> float:
        """How long to wait before the next try, which is never shorter than what the server asks for within bounds.

        Raises `error` when there was the last try, or when another one cannot help.
        """
        seconds = next(self._left, None)
        if seconds is None or not error.retryable:
            raise error
        return max(seconds, min(error.retry_after_seconds or 0.0, RETRY_AFTER_SECONDS_MAX))
