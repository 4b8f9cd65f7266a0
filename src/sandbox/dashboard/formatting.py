"""Formats counts, states and untrusted text for pages."""

from urllib.parse import quote

from sandbox.model.printable import replace_invisible, replace_unprintable
from sandbox.model.task_state import TaskState

_STATE_CLASSES = {
    TaskState.PENDING: "waits",
    TaskState.STAGING: "begins",
    TaskState.PROVISIONING: "begins",
    TaskState.READY: "begins",
    TaskState.RUNNING: "works",
    TaskState.COMPLETING: "works",
    TaskState.COMPLETED: "done",
    TaskState.FAILED: "failed",
    TaskState.FAILED_PRESERVED: "failed",
    TaskState.CANCELLED: "ended",
}


def format_count(number: int) -> str:
    """Format a count: `4711`, `26.9k`, `1.2M`."""
    if number < 10_000:
        return str(number)
    return f"{number / 1000:.1f}k" if number < 1_000_000 else f"{number / 1_000_000:.1f}M"


def state_label(value: TaskState) -> str:
    """Return the label of a state."""
    return "failed, preserved" if value is TaskState.FAILED_PRESERVED else value.value


def state_class(value: TaskState) -> str:
    """Return the CSS class of a state."""
    return _STATE_CLASSES[value]


def escape_name(text: str) -> str:
    """Escape all characters that do not print in an untrusted name."""
    return replace_unprintable(text, _code_point)


def escape_text(text: str) -> str:
    """Escape invisible characters in untrusted text; tabs and newlines stay."""
    return replace_invisible(text, _code_point, "\t\n")


def _code_point(character: str) -> str:
    return f"‹U+{ord(character):04X}›"


def quote_segment(text: str) -> str:
    """Quote text as one segment of a URL path."""
    return quote(text, safe="")
