"""Why a task is still pending: what it waits for changes and is no event, so the server is asked now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandbox.cli.options import Chosen

ASK_EVERY_SECONDS = 2.0
SERVER_SECONDS = 2.0
"""The line is not drawn anew meanwhile; without an answer it shows what was known."""


class PendingReason:
    """Asks over a connection of its own, from whatever thread draws the screen."""

    def __init__(self, options: Chosen, task_id: str) -> None:
        self._options = options
        self._task_id = task_id
        self._reason = ""
        self._asked_at: float | None = None

    def __call__(self) -> str:
        """The latest sentence; empty where there is none."""
        now = time.monotonic()
        if self._asked_at is None or now - self._asked_at >= ASK_EVERY_SECONDS:
            self._asked_at = now
            self._reason = self._ask() or self._reason
        return self._reason

    def _ask(self) -> str:
        from sandbox.client import Client, ClientError

        try:
            with Client(self._options.server, self._options.token, timeout_seconds=SERVER_SECONDS) as client:
                return str(client.status(self._task_id)["state_message"] or "")
        except ClientError:
            return ""
