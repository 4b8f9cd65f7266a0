"""What the work under way is about, so that every line of the log can say it whoever writes it."""

from contextvars import ContextVar

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
TOKEN_ID: ContextVar[str | None] = ContextVar("token_id", default=None)
TASK_ID: ContextVar[str | None] = ContextVar("task_id", default=None)
ATTEMPT_ID: ContextVar[str | None] = ContextVar("attempt_id", default=None)


def bind_task(task_id: str) -> None:
    """What follows, in this asyncio task, is about one task of the server, and not about the request that began it."""
    REQUEST_ID.set(None)
    TOKEN_ID.set(None)
    TASK_ID.set(task_id)
