"""Where attempts are carried out."""

from typing import Protocol

import msgspec

from sandbox.contracts.gateway import ModelUpstream


class LaunchOrder(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a runner is told when it starts; goes through a pipe, never an argument list or a file.

    finish: only end and collect what a dead runner left (the finisher).
    """

    task_id: str
    attempt_id: str
    data_dir: str
    run_dir: str
    runtime: str
    upstream: ModelUpstream | None = None
    finish: bool = False
    version: int = 1


class Placement(Protocol):
    """Starts runners."""

    async def launch(self, order: LaunchOrder, lock_fd: int) -> None:
        """Start a runner in a session of its own that inherits the journal's lock. Raises OSError."""
        ...
