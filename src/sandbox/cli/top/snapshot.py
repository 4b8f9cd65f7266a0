"""What a server does at one moment: its counts, its unfinished tasks and the latest that ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandbox.model.state import TERMINAL_STATES, TaskState

if TYPE_CHECKING:
    from sandbox.client import AsyncClient, Health, TaskSummary

UNFINISHED_MAX = 500
ENDED_MAX = 100

_AT_WORK = ("running", "completing", "ready", "provisioning", "staging", "pending")
_ORDER = {state: place for place, state in enumerate(_AT_WORK)}


@dataclass(frozen=True)
class Snapshot:
    """tasks: those at work, then those that wait, then the ended ones, the latest first. missing: further ones."""

    health: Health
    tasks: tuple[TaskSummary, ...]
    missing: int


async def take_snapshot(client: AsyncClient) -> Snapshot:
    """Ask the server. Raises ClientError."""
    unfinished = [state for state in TaskState if state not in TERMINAL_STATES]
    health = await client.health()
    living = await client.tasks(states=unfinished, limit=UNFINISHED_MAX, sort="created_at", order="asc")
    ended = await client.tasks(states=sorted(TERMINAL_STATES), limit=ENDED_MAX, sort="state_changed_at", order="desc")
    ordered = sorted(living["tasks"], key=lambda task: _ORDER.get(task["state"], 0))
    missing = living["total_count"] + ended["total_count"] - len(ordered) - len(ended["tasks"])
    return Snapshot(health, (*ordered, *ended["tasks"]), missing)
