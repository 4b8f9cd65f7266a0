"""Context variables for the current request, token, task and attempt. Every log line contains their values."""

from contextvars import ContextVar

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
TOKEN_ID: ContextVar[str | None] = ContextVar("token_id", default=None)
TASK_ID: ContextVar[str | None] = ContextVar("task_id", default=None)
ATTEMPT_ID: ContextVar[str | None] = ContextVar("attempt_id", default=None)


def bind_task(task_id: str) -> None:
    """Label later log lines of this asyncio task with a Sandbox task instead of an API request."""
    REQUEST_ID.set(None)
    TOKEN_ID.set(None)
    TASK_ID.set(task_id)
