"""Formats sizes, durations, costs and states for people. The command line and the dashboard use the same formats."""

import math

from sandbox.model.task_state import TaskState

_SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_STEP = 1024


def format_size(size_bytes: int) -> str:
    """Format a size: `512 B`, `1.5 KiB`, `120 MiB`."""
    value, unit = float(size_bytes), 0
    while value >= _STEP and unit < len(_SIZE_UNITS) - 1:
        value, unit = value / _STEP, unit + 1
    return f"{value:,.0f} {_SIZE_UNITS[unit]}" if unit == 0 or value >= 100 else f"{value:.1f} {_SIZE_UNITS[unit]}"


def format_gib(byte_count: int) -> str:
    """Return a size with three digits, such as `1.5 GiB`."""
    gibibytes = byte_count / 1024**3
    return f"{gibibytes:,.0f} GiB" if gibibytes >= 1000 else f"{gibibytes:.3g} GiB"


def format_duration(seconds: float) -> str:
    """Format a duration: `12 ms`, `0.3 s`, `42 s`, `2 min 5 s`, `3 h 12 min`, `4 d 6 h`."""
    seconds = max(seconds, 0.0)
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min {rest} s"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"


def format_cost(usd: float) -> str:
    """Format a cost: `$1.25`, `$0.0150` and `<$0.0001`; four decimals below one dollar."""
    if 0 < usd < 0.0001:
        return "<$0.0001"
    return f"${usd:.4f}" if 0 < usd < 0.99995 else f"${usd:,.2f}"


def format_budget(usd: float) -> str:
    """Format a budget with two decimals, or with more decimals if it needs them: `$0.50`, `$2.50`, `$0.005`."""
    return f"${usd:,.2f}" if math.isclose(usd, round(usd, 2)) else f"${usd:.6g}"


def format_count(number: int) -> str:
    """Format a count: `4,711`."""
    return f"{number:,}"


def format_state(state: str, *, is_preserved: bool = True) -> str:
    """Format a state: `failed_preserved` as `failed, preserved`. is_preserved: the sandbox still exists."""
    if state == TaskState.FAILED_PRESERVED:
        return "failed, preserved" if is_preserved else "failed, released"
    return str(state)
