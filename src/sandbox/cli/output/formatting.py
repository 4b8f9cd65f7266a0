"""Formatting of times, sizes and amounts."""

from __future__ import annotations

from datetime import UTC, datetime


def parse_timestamp(timestamp: str | None) -> datetime | None:
    """Parse the API's time (RFC 3339) to local time; return None for an empty or invalid one."""
    try:
        at = datetime.fromisoformat(timestamp) if timestamp else None
        return at and (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone()
    except (ValueError, OverflowError):
        return None


def format_time(timestamp: str | None) -> str:
    """Format the local time of day: `12:00:01`."""
    at = parse_timestamp(timestamp)
    return at.strftime("%H:%M:%S") if at else "--:--:--"


def format_date(timestamp: str | None) -> str:
    """Format the local date: `2026-01-29`; empty without a time."""
    at = parse_timestamp(timestamp)
    return at.strftime("%Y-%m-%d") if at else ""


def format_datetime(timestamp: str | None) -> str:
    """Format local date and time: `2026-01-29 12:00:01`."""
    at = parse_timestamp(timestamp)
    return at.strftime("%Y-%m-%d %H:%M:%S") if at else "-"


def format_elapsed(first: str | None, last: str | None) -> str:
    """Format the time between two times: `2 min 5 s`; empty unless both are given."""
    begin, end = parse_timestamp(first), parse_timestamp(last)
    return format_duration((end - begin).total_seconds()) if begin and end else ""


def format_duration(seconds: float) -> str:
    """Format a duration: `12 ms`, `0.3 s`, `42 s`, `2 min 5 s`, `3 h 12 min`."""
    seconds = max(seconds, 0.0)
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_age(timestamp: str | None, now: datetime) -> str:
    """Format an age in one unit: `42 s`, `12 min`, `3 h`, `4 d`."""
    at = parse_timestamp(timestamp)
    seconds = max(int((now - at).total_seconds()), 0) if at else 0
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s" if at else "-"


def format_size(size_bytes: int) -> str:
    """Format a size: `512 B`, `1.5 KiB`, `3.0 MiB`."""
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def format_cost(usd: float) -> str:
    """Format a cost: `$1.25`; four decimals below one dollar."""
    return f"${usd:.2f}" if usd >= 1 else f"${usd:.4f}"


def pluralize(number: int, noun: str) -> str:
    """Format a count with its noun: `1 task`, `2 tasks`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
