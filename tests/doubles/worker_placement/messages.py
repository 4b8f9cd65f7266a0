"""What the server and the worker exchange, as JSON lines."""

import msgspec


class TaskReport(msgspec.Struct, frozen=True):
    """Who holds the lock of a task's journal, and then its size."""

    liveness: str
    end_offset: int


class Report(msgspec.Struct, frozen=True):
    """What the server follows."""

    memory_available_bytes: int | None
    tasks: dict[str, TaskReport]


class Response(msgspec.Struct, frozen=True):
    """The result of a call, or the name and message of its error."""

    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    message: str = ""
