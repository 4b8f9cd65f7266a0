"""Formatting of numbers, durations and untrusted text for pages."""

from datetime import timedelta
from urllib.parse import quote

from sandbox.model.printable import replace_invisible, replace_unprintable
from sandbox.model.task_state import TaskState

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_STEP = 1024

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


def format_size(bytes_: int) -> str:
    """Format a size: `4.2 MiB`."""
    value, unit = float(bytes_), 0
    while value >= _STEP and unit < len(_UNITS) - 1:
        value, unit = value / _STEP, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 or value >= 100 else f"{value:.1f} {_UNITS[unit]}"


def format_duration(duration: timedelta) -> str:
    """Format a duration: `850 ms`, `12.4 s`, `3 min 05 s`, `2 h 10 min`, `4 d 6 h`."""
    seconds = max(duration.total_seconds(), 0)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"


def format_cost(dollars: float) -> str:
    """Format a cost: `$0.089`; rounded to 0.001 below one dollar, to 0.01 above."""
    return f"${dollars:.3f}" if 0 < dollars < 1 else f"${dollars:.2f}"


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
