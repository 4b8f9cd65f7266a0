"""The state of a task, computed from its journal up to a given record."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from sandbox.model.artifacts import METADATA_NAME, Artifact, DiffStatistics, generated_artifact_names
from sandbox.model.events import CancelRequested, FollowUp, Idempotency, Parent, Progress
from sandbox.model.failure import Failure
from sandbox.model.fixed_limits import FINAL_MESSAGE_CHARACTERS_MAX
from sandbox.model.manifest.schema import Manifest
from sandbox.model.task_state import TaskState

INDEXED_TASK_VERSION = 6
"""Incremented with every change that makes an old journal yield a different `Task`, so older rows are indexed again."""


class StateHistoryEntry(msgspec.Struct, frozen=True):
    """The time at which a state was entered."""

    state: TaskState
    at: datetime


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True, rename={"sandbox_name": "vm_name"}):
    """One attempt of a task; its id names the sandbox, the directory and the cgroup.

    boot_id: id of the host's boot when the attempt started; empty in journals of versions that did not record it.
    resumes: the attempt continues with the previous attempt's disk.
    failure, exit_code, ended_at, follow_up: set when the attempt is torn down for the next one. For the last attempt,
        the task's own fields apply.
    """

    id: str
    runtime: str
    host: str
    sandbox_name: str | None = None
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
    follow_up: FollowUp | None = None

    def hands_over_disk(self, kind: FollowUp) -> bool:
        """Return whether the next attempt continues with this attempt's disk."""
        return kind is FollowUp.RESUME or (kind is FollowUp.AGAIN and self.resumes)


class TotalUsage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Model usage across all attempts. input_tokens includes cached tokens."""

    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0


class AgentStartTime(msgspec.Struct, frozen=True):
    """When the first agent started, according to the monotonic clock of the boot with the id `boot_id`."""

    monotonic_seconds: float
    boot_id: str


def final_message_in_result(result: object) -> str | None:
    """Return the agent's last message, from the field `result` of the agent's report; None if the field is missing."""
    return cut_final_message(result) if result and isinstance(result, str) else None


def cut_final_message(text: str) -> str:
    """Return the text, or its beginning and `…` if it is longer than FINAL_MESSAGE_CHARACTERS_MAX."""
    limit = FINAL_MESSAGE_CHARACTERS_MAX
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


class Task(
    msgspec.Struct,
    frozen=True,
    omit_defaults=True,
    rename={"attempt_count": "attempts", "skipped_follow_ups": "forgone", "agent_start_time": "beginning"},
):
    """The state of a task: the result of applying its events in order.

    last_seq: number of the last record.
    attempt_count: number of started attempts.
    agent_name: the agent's name for messages; `The agent` until it has started.
    parent: the task that this one continues, if any.
    rerun_of: id of the task that this one runs again, if any.
    cancel_requested_at: when the first effective cancel request was recorded; None while there is none.
    failure, agent_has_exited, exit_code, result, final_message, skipped_follow_ups: belong to the current attempt.
    diff: the size of the patch; None if there is no complete patch, or an earlier version did not record its size.
    """

    id: str
    manifest: Manifest
    state: TaskState
    state_message: str
    history: tuple[StateHistoryEntry, ...]
    last_seq: int
    attempt: Attempt | None = None
    attempt_count: int = 0
    cancel: CancelRequested | None = None
    failure: Failure | None = None
    agent_has_exited: bool = False
    exit_code: int | None = None
    result: dict[str, Any] | None = None
    progress: Progress = Progress()
    artifacts: tuple[Artifact, ...] = ()
    idempotency: Idempotency | None = None
    past_attempts: tuple[Attempt, ...] = ()
    skipped_follow_ups: tuple[FollowUp, ...] = ()
    spent: TotalUsage = TotalUsage()
    agent_start_time: AgentStartTime | None = None
    agent_name: str = "The agent"
    diff: DiffStatistics | None = None
    parent: Parent | None = None
    rerun_of: str | None = None
    final_message: str | None = None
    cancel_requested_at: datetime | None = None

    @property
    def final_message_or_result(self) -> str | None:
        """The agent's last message. Journals of earlier versions have it only in the agent's own report."""
        if self.final_message is not None:
            return self.final_message
        return final_message_in_result((self.result or {}).get("result"))

    @property
    def created_at(self) -> datetime:
        """When the task was submitted."""
        return self.history[0].at

    @property
    def state_changed_at(self) -> datetime:
        """When the current state was entered."""
        return self.history[-1].at

    @property
    def started_at(self) -> datetime | None:
        """When the agent started working."""
        return next((entry.at for entry in self.history if entry.state is TaskState.RUNNING), None)

    @property
    def finished_at(self) -> datetime | None:
        """When the task reached its final state."""
        return self.state_changed_at if self.state.is_final else None

    def duration_seconds(self, now: datetime) -> float | None:
        """Return the time from the agent's start to the task's end, or until now; None if the agent never started."""
        if self.started_at is None:
            return None
        return max(((self.finished_at or now) - self.started_at).total_seconds(), 0.0)

    @property
    def attempt_state(self) -> TaskState:
        """The state of the current attempt. An earlier attempt may have reached a later state."""
        attempt = self.attempt
        if attempt is None:
            return TaskState.PENDING
        if self.agent_has_exited or attempt.follow_up is not None:
            return TaskState.COMPLETING
        if attempt.base_commit is None:
            return TaskState.STAGING
        if attempt.sandbox_name is None:
            return TaskState.PROVISIONING
        return TaskState.READY if attempt.session_id is None else TaskState.RUNNING

    @property
    def final_progress(self) -> Progress:
        """The final counters. The last requests may be missing if the runner died before it counted them."""
        latest, spent = self.progress, self.spent
        return msgspec.structs.replace(
            latest,
            current_tool=None,
            current_subject=None,
            input_tokens=max(latest.input_tokens, spent.input_tokens),
            output_tokens=max(latest.output_tokens, spent.output_tokens),
            cost_usd=max(latest.cost_usd, spent.usd),
        )

    @property
    def is_waiting_to_start(self) -> bool:
        """Whether no attempt has started and nothing prevents the first one."""
        return self.state is TaskState.PENDING and self.cancel is None and self.failure is None

    @property
    def is_between_attempts(self) -> bool:
        """Whether the last attempt was torn down, and the next one has not started."""
        return self.attempt is not None and self.attempt.follow_up is not None

    @property
    def base_commit(self) -> str | None:
        """The base commit of the current workspace. A resumed attempt uses the base commit of an earlier attempt."""
        if self.attempt is None:
            return None
        attempts = (self.attempt, *reversed(self.past_attempts)) if self.attempt.resumes else (self.attempt,)
        return next((attempt.base_commit for attempt in attempts if attempt.base_commit is not None), None)

    @property
    def stored_files(self) -> tuple[Artifact, ...]:
        """All files in the artifacts directory: the artifacts, and the files inherited from the parent."""
        return (*(self.parent.files if self.parent is not None else ()), *self.artifacts)

    @property
    def is_collected(self) -> bool:
        """Whether the collection of artifacts has ended, complete or not. The runner may have died since then."""
        return any(artifact.name == METADATA_NAME for artifact in self.artifacts)

    @property
    def needs_only_teardown(self) -> bool:
        """Whether only the teardown is left: the agent has exited, and the collection of artifacts has ended.

        The outcome is final.
        """
        return self.agent_has_exited and self.is_collected

    @property
    def is_preserved_on_failure(self) -> bool:
        """Whether the sandbox's files are preserved if the task fails: the manifest requests it, and files exist."""
        attempt = self.attempt
        if attempt is None or self.manifest.lifecycle.failure_action != "preserve":
            return False
        if attempt.follow_up is not None:
            return attempt.hands_over_disk(attempt.follow_up)
        return attempt.sandbox_name is not None or attempt.resumes


def reserved_artifact_names(task: Task) -> frozenset[str]:
    """Return the names that no file of the agent may get: those of generated artifacts and inherited files."""
    inherited = (file.name for file in (task.parent.files if task.parent is not None else ()))
    return generated_artifact_names(task.id).union(inherited)
