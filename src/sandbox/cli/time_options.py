"""Times on the command line; callbacks of options."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import click

UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def span_seconds(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """`90s`, `15m`, `2h`, `1d` as seconds."""
    seconds = _seconds(value or "")
    if value is not None and seconds is None:
        raise click.BadParameter(f"{value!r} must be a whole number and a unit, such as 90s, 15m or 2h")
    return seconds


def past_time(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """A time (RFC 3339), or how long ago it was, as RFC 3339 in UTC."""
    if value is None:
        return None
    seconds = _seconds(value)
    try:
        now = datetime.now(UTC)
        at = datetime.fromisoformat(value).astimezone(UTC) if seconds is None else now - timedelta(seconds=seconds)
    except (ValueError, OverflowError):
        example = "2026-01-29T10:10:15Z, or a time span such as 10m"
        raise click.BadParameter(f"{value!r} must be a time such as {example}") from None
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _seconds(value: str) -> int | None:
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", value, re.ASCII)
    return int(match[1]) * UNIT_SECONDS[match[2]] if match else None
