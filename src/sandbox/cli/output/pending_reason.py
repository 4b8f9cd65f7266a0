"""Polls the reason why a pending task does not start."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandbox.cli.options import CliOptions


PENDING_POLL_INTERVAL_SECONDS = 2.0
PENDING_POLL_TIMEOUT_SECONDS = 2.0
"""Timeout of a poll. The status line is not updated during a poll; if there is no response, it keeps the old reason."""


class PendingReasonPoller:
    """Polls why a task is pending, over a separate connection. Called by the thread that draws the screen."""

    def __init__(self, options: CliOptions, task_id: str) -> None:
        self._options = options
        self._task_id = task_id
        self._reason = ""
        self._polled_at: float | None = None

    def __call__(self) -> str:
        """Return the latest reason; empty if there is none."""
        now = time.monotonic()
        if self._polled_at is None or now - self._polled_at >= PENDING_POLL_INTERVAL_SECONDS:
            self._polled_at = now
            self._reason = self._poll() or self._reason
        return self._reason

    def _poll(self) -> str:
        from sandbox.client import Client, ClientError

        try:
            with Client(
                self._options.server, self._options.token, timeout_seconds=PENDING_POLL_TIMEOUT_SECONDS
            ) as client:
                return str(client.status(self._task_id)["state_message"] or "")
        except ClientError:
            return ""
