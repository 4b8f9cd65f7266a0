"""What the server is told at its start, and what an examination of this machine finds. Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the server listens and keeps its data.

    port, ws_port: 0 means any free port. runtime: a runtime's name, or `auto` for the strongest that works here.
    announce: how the addresses are printed once the server answers: for people, or as one JSON line.
    """

    host: str
    port: int
    ws_port: int
    data_dir: Path
    runtime: str
    announce: Literal["text", "json"] = "text"


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
