"""What an examination of this machine finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. message: what is so; mend: what to do about it, empty when there is nothing.

    is_needed: without it no task can run here; otherwise tasks run, but something is weaker.
    """

    name: str
    ok: bool
    message: str
    mend: str = ""
    is_needed: bool = True
