"""A task as its journal tells it up to some record."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from sandbox.model.artifact import Artifact
from sandbox.model.errors import Failure
from sandbox.model.event import CancelRequested, Idempotency, Progress
from sandbox.model.manifest import Manifest
from sandbox.model.state import TaskState

FOLD = 1
"""Raised with every change by which an old journal makes another `Task`: indexes of before are then made anew."""


class StateEntry(msgspec.Struct, frozen=True):
    """When a state was entered."""

    state: TaskState
    at: datetime


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One try at carrying the task out; its id names the sandbox, its directory and its cgroup.

    boot_id: of the host when it began; empty in journals of before it was read.
    """

    id: str
    runtime: str
    host: str
    vm_name: str | None = None
    tier: str | None = None
    image: str | None = None
    base_commit: str | None = None
    session_id: str | None = None
    boot_id: str = ""


class Task(msgspec.Struct, frozen=True, omit_defaults=True):
    """The fold of a task's events. `last_seq` is the number of the last one; `attempts` counts those begun."""

    id: str
    manifest: Manifest
    state: TaskState
    state_message: str
    history: tuple[StateEntry, ...]
    last_seq: int
    attempt: Attempt | None = None
    attempts: int = 0
    cancel: CancelRequested | None = None
    failure: Failure | None = None
    agent_has_exited: bool = False
    exit_code: int | None = None
    result: dict[str, Any] | None = None
    progress: Progress = Progress()
    artifacts: tuple[Artifact, ...] = ()
    idempotency: Idempotency | None = None

    @property
    def created_at(self) -> datetime:
        """When the task was submitted."""
        return self.history[0].at

    @property
    def state_changed_at(self) -> datetime:
        """When the present state was entered."""
        return self.history[-1].at

    @property
    def started_at(self) -> datetime | None:
        """When the agent began to work."""
        return next((entry.at for entry in self.history if entry.state is TaskState.RUNNING), None)

    @property
    def finished_at(self) -> datetime | None:
        """When the task reached its final state."""
        return self.state_changed_at if self.state.is_terminal else None

    @property
    def may_be_attempted_again(self) -> bool:
        """Its attempt has made nothing that another one could not make again, and nothing speaks against one."""
        return self.state is TaskState.STAGING and self.cancel is None and self.failure is None

    @property
    def is_preserved(self) -> bool:
        """A failure leaves the sandbox's files for its user: it was asked for, and there is a sandbox."""
        wanted = self.manifest.lifecycle.failure_action == "preserve"
        return wanted and self.attempt is not None and self.attempt.vm_name is not None
