"""A task as its journal tells it up to some record."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from sandbox.model.errors import Failure
from sandbox.model.events import METADATA_NAME, Artifact, CancelRequested, Idempotency, Progress, RetryKind
from sandbox.model.manifest.schema import Manifest
from sandbox.model.task_state import TaskState

PROJECTION_VERSION = 4
"""Raised with every change by which an old journal makes another `Task`: indexes of before are then made anew."""


class StateHistoryEntry(msgspec.Struct, frozen=True):
    """When a state was entered."""

    state: TaskState
    at: datetime


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One try at carrying the task out; its id names the sandbox, its directory and its cgroup.

    boot_id: of the host when it began; empty in journals of before it was read.
    resumes: it goes on with the disk of the one before. failure, exit_code, ended_at, follow_up: set once it has ended
    and been cleared away for the one that follows; of the last attempt the task itself has them.
    """

    id: str
    runtime: str
    host: str
    vm_name: str | None = None
    tier: str | None = None
    image: str | None = None
    base_commit: str | None = None
    session_id: str | None = None
    number: int = 1
    started_at: datetime | None = None
    boot_id: str = ""
    resumes: bool = False
    failure: Failure | None = None
    exit_code: int | None = None
    ended_at: datetime | None = None
    follow_up: RetryKind | None = None

    def transfers_disk(self, kind: RetryKind) -> bool:
        """Whether the attempt that follows goes on with the disk of this one."""
        return kind is RetryKind.RESUME or (kind is RetryKind.RESTART and self.resumes)


class TotalUsage(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the model was asked for over all attempts; input_tokens with cached ones."""

    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0


class AgentStartTime(msgspec.Struct, frozen=True):
    """When the first agent began, by the monotonic clock of a boot of the machine."""

    monotonic_seconds: float
    boot_id: str


class Task(msgspec.Struct, frozen=True, omit_defaults=True):
    """The fold of a task's events. `last_seq` is the number of the last one; `attempts` counts those begun.

    failure, agent_has_exited, exit_code, result: of the present attempt. forgone: what is not to follow it.
    """

    id: str
    manifest: Manifest
    state: TaskState
    state_message: str
    history: tuple[StateHistoryEntry, ...]
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
    past_attempts: tuple[Attempt, ...] = ()
    forgone: tuple[RetryKind, ...] = ()
    spent: TotalUsage = TotalUsage()
    beginning: AgentStartTime | None = None

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
    def attempt_state(self) -> TaskState:
        """How far the present attempt has come, which may be less far than an earlier one had come."""
        attempt = self.attempt
        if attempt is None:
            return TaskState.PENDING
        if self.agent_has_exited or attempt.follow_up is not None:
            return TaskState.COMPLETING
        if attempt.base_commit is None:
            return TaskState.STAGING
        if attempt.vm_name is None:
            return TaskState.PROVISIONING
        return TaskState.READY if attempt.session_id is None else TaskState.RUNNING

    @property
    def final_progress(self) -> Progress:
        """The counters when nobody counts any more: a runner that died may not have come to its last requests."""
        latest, spent = self.progress, self.spent
        return msgspec.structs.replace(
            latest,
            current_tool=None,
            input_tokens=max(latest.input_tokens, spent.input_tokens),
            output_tokens=max(latest.output_tokens, spent.output_tokens),
            cost_usd=max(latest.cost_usd, spent.usd),
        )

    @property
    def is_waiting_to_start(self) -> bool:
        """No attempt has begun, and nothing keeps the first one from it."""
        return self.state is TaskState.PENDING and self.cancel is None and self.failure is None

    @property
    def is_between_attempts(self) -> bool:
        """The last attempt was cleared away for another one, which has not begun."""
        return self.attempt is not None and self.attempt.follow_up is not None

    @property
    def base_commit(self) -> str | None:
        """What the present attempt's workspace is compared with; of one that resumes, what the earlier one's was."""
        if self.attempt is None:
            return None
        attempts = (self.attempt, *reversed(self.past_attempts)) if self.attempt.resumes else (self.attempt,)
        return next((attempt.base_commit for attempt in attempts if attempt.base_commit is not None), None)

    @property
    def is_collected(self) -> bool:
        """Whether collecting is over, done or given up, perhaps in a runner that died later."""
        return any(artifact.name == METADATA_NAME for artifact in self.artifacts)

    @property
    def needs_only_teardown(self) -> bool:
        """Only cleaning up is left, which changes no outcome: the agent has exited, and collecting is over."""
        return self.agent_has_exited and self.is_collected

    @property
    def is_preserved(self) -> bool:
        """A failure leaves the sandbox's files for its user: it was asked for, and there are some of a sandbox."""
        attempt = self.attempt
        if attempt is None or self.manifest.lifecycle.failure_action != "preserve":
            return False
        if attempt.follow_up is not None:
            return attempt.transfers_disk(attempt.follow_up)
        return attempt.vm_name is not None or attempt.resumes
