"""The messages between the server and the daemon, as JSON lines."""

import msgspec


class TaskReport(msgspec.Struct, frozen=True):
    """Whether the lock of a task's journal is held, and the size of the journal, read in this order."""

    lock_state: str
    end_offset: int


class Report(msgspec.Struct, frozen=True):
    """The state of the daemon's host, which the server polls."""

    memory_available_bytes: int | None
    tasks: dict[str, TaskReport]


class Response(msgspec.Struct, frozen=True):
    """The result of a call, or the name and message of its error."""

    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    message: str = ""
