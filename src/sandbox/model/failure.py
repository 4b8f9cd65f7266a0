"""Failures of tasks: a stable code, a message, and the remedy."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from sandbox.model.errors import SandboxError
from sandbox.model.fixed_limits import KILL_TIMEOUT_SECONDS

if TYPE_CHECKING:
    from sandbox.model.manifest.schema import Manifest


_LEAKED_SOURCES = re.compile(r"Secret ([A-Za-z_][A-Za-z0-9_]*) \(source ")
"""The prefix of messages in which earlier versions exposed the source of a secret."""


class FailureCode(StrEnum):
    """Why a task failed. Stable: clients branch on these words."""

    AGENT_FAILED = "agent_failed"
    AGENT_NO_RESULT = "agent_no_result"
    AGENT_NOT_OFFERED = "agent_not_offered"
    BUDGET_EXCEEDED = "budget_exceeded"
    CLONE_FAILED = "clone_failed"
    COLLECT_FAILED = "collect_failed"
    DISK_FULL = "disk_full"
    HANG = "hang"
    HOST_LOST = "host_lost"
    INTERNAL = "internal_error"
    MCP_FAILED = "mcp_failed"
    OUT_OF_MEMORY = "out_of_memory"
    PROCESS_LIMIT = "process_limit"
    PROVISION_FAILED = "provision_failed"
    RUNNER_LOST = "runner_lost"
    SANDBOX_LOST = "sandbox_lost"
    SECRET_UNAVAILABLE = "secret_unavailable"
    STAGE_TIMEOUT = "stage_timeout"
    PROVISION_TIMEOUT = "provision_timeout"
    TIMEOUT = "timeout"
    TOOL_UNKNOWN = "tool_unknown"


class FailureReason(StrEnum):
    """The cause of a failure with the code `agent_failed`. Stable, like the codes; later versions may add words."""

    AGENT_ERROR = "agent_error"
    AGENT_EXIT = "agent_exit"
    AGENT_INTERRUPTED = "agent_interrupted"
    MAX_TURNS = "max_turns"
    MODEL_BUDGET = "model_budget"
    MODEL_RATE_LIMITED = "model_rate_limited"
    MODEL_REFUSAL = "model_refusal"
    MODEL_REJECTED = "model_rejected"
    MODEL_REQUEST_INVALID = "model_request_invalid"
    MODEL_UNAVAILABLE = "model_unavailable"


BUSY_KERNEL_MESSAGE = (
    f"Processes of the sandbox did not end within {KILL_TIMEOUT_SECONDS:g} s after SIGKILL, because the kernel was "
    "still executing their system calls, such as the removal of a fragmented file. They end with these calls. If they "
    "remain, check the machine's log and disks, and restart the machine."
)
"""The message of `sandbox_lost` if killed processes do not end."""


def unfreed_memory_message(unfreed_bytes: int) -> str:
    """Return the message about memory of an ended sandbox that the kernel never frees."""
    return (
        f"The kernel did not free {unfreed_bytes} bytes of the sandbox's memory, because programs sent Unix sockets "
        "through each other. The memory becomes free when the host restarts."
    )


def missing_secrets_message(names: Iterable[str]) -> str:
    """Return the public message about missing secrets. It omits the secrets' sources, which only operators may see."""
    listed = ", ".join(dict.fromkeys(names))
    return (
        f"The server has no usable value for these secrets: {listed}. Operators find the reason in the status of the "
        "task and in the server's log."
    )


def without_secret_sources(message: str) -> str:
    """Return the public form of a message, including one written by an earlier version."""
    names = _LEAKED_SOURCES.findall(message) if message.startswith("Secret ") else []
    return missing_secrets_message(names) if names else message


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """The reason a task failed, as shown to users.

    is_transient: the cause is temporary, so the attempt is retried.
    detail: the message for operators, if it differs from `message`.
    reason: a `FailureReason`, or a word from a later version; empty if the code needs none, and in journals of earlier
        versions.
    """

    code: FailureCode
    message: str
    is_transient: bool = False
    detail: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        """Move operator-only content, which earlier versions wrote into the message, to `detail`."""
        if (
            self.code is FailureCode.SECRET_UNAVAILABLE
            and (public := without_secret_sources(self.message)) != self.message
        ):
            msgspec.structs.force_setattr(self, "detail", self.message)
            msgspec.structs.force_setattr(self, "message", public)

    def message_for(self, *, is_operator: bool) -> str:
        """Return the message for operators or the one for everyone else."""
        return (is_operator and self.detail) or self.message


class AttemptError(SandboxError):
    """A step of an attempt failed. The error becomes the task's `Failure`."""

    def __init__(self, code: FailureCode, message: str, *, is_transient: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.failure = Failure(code, message, is_transient)


_CODES_THAT_NAME_A_FIELD = frozenset(
    {
        FailureCode.BUDGET_EXCEEDED,
        FailureCode.CLONE_FAILED,
        FailureCode.COLLECT_FAILED,
        FailureCode.DISK_FULL,
        FailureCode.HANG,
        FailureCode.OUT_OF_MEMORY,
        FailureCode.PROVISION_TIMEOUT,
        FailureCode.STAGE_TIMEOUT,
        FailureCode.TIMEOUT,
    }
)
"""Failures whose messages come from Sandbox and name a field for which another value may help."""

_REASONS_THAT_NAME_A_FIELD = frozenset({FailureReason.MAX_TURNS})
"""Reasons whose messages name a field of the agent's section for which another value may help."""

_FIELD = re.compile(r"(?<![\w./@-])(lifecycle|repository|vm)\.([a-z_]+)(?![\w/@-]|\.\w)")
"""A field in a message, but not a part of a URL."""

_RERUN_ADVISED_CODES = frozenset(
    {FailureCode.COLLECT_FAILED, FailureCode.HOST_LOST, FailureCode.RUNNER_LOST, FailureCode.SANDBOX_LOST}
)
"""Failures after which the same task may succeed."""

_LIMIT = re.compile(r"(?P<number>[1-9][0-9]{0,5})(?P<unit>[a-zA-Z]{1,3})")


class Remedy(NamedTuple):
    """What to do about a failure.

    field: the manifest's field to change, such as `vm.memory`; empty if there is none.
    overrides: changes to the manifest for a new run; empty if the user chooses them.
    """

    text: str
    field: str = ""
    overrides: tuple[str, ...] = ()


def find_remedy(
    code: FailureCode,
    message: str,
    manifest: Manifest,
    spent: Mapping[str, float] | None = None,
    *,
    reason: str = "",
) -> Remedy | None:
    """Return what to do about a failure; None if only the message says what to do.

    The field to change is the last one that the message names. A limit is doubled, such as `4G` for `2G`. A budget is
    doubled until it exceeds what the task spent, because the last response can cost many times the budget.
    spent: what the task spent, keyed by the budget's field. reason: the failure's reason; empty if it has none.
    """
    if code is FailureCode.AGENT_FAILED and reason in _REASONS_THAT_NAME_A_FIELD:
        return _change_agent_field(message, manifest)
    model_field = f"{manifest.agent.kind}.model"
    # Other invalid requests have the same reason, so check that the message names only the model.
    if reason == FailureReason.MODEL_REQUEST_INVALID and message.endswith(f"; check {model_field}."):
        return Remedy(f"Set {model_field} to a model that the provider offers.", model_field)
    names = reversed(_FIELD.findall(message)) if code in _CODES_THAT_NAME_A_FIELD else ()
    for section, name in names:
        values: Any = getattr(manifest, section)
        if name in {field.name for field in dataclasses.fields(values)}:
            field = f"{section}.{name}"
            return _change_field(field, getattr(values, name), (spent or {}).get(field, 0))
    return Remedy("Run the task again.") if code in _RERUN_ADVISED_CODES else None


def _change_agent_field(message: str, manifest: Manifest) -> Remedy | None:
    """Return the remedy for the last agent setting that the message names, or None if the message names no setting."""
    kind, settings = manifest.agent.kind, manifest.agent.settings
    names = re.findall(rf"(?<![\w./@-]){re.escape(kind)}\.(\w+)(?![\w/@-]|\.\w)", message)
    return next(
        (_change_field(f"{kind}.{name}", settings[name], 0) for name in reversed(names) if name in settings), None
    )


def _change_field(field: str, value: object, spent: float) -> Remedy:
    """Return the remedy that changes this field. New values are proposed only for limits, not for repository fields."""
    if value is None:
        return Remedy(f"Set {field}.", field)
    limit = None if field.startswith("repository.") else double_limit(value)
    if limit is None:
        return Remedy(f"Check {field}.", field)
    if limit == 0:
        return Remedy(f"Raise {field}.", field)
    while not isinstance(limit, str) and limit <= spent:
        limit *= 2
    return Remedy(f"Raise {field}.", field, (f"{field}={limit if isinstance(limit, str) else f'{limit:.12g}'}",))


def double_limit(value: object) -> int | float | str | None:
    """Return twice the value of a manifest's limit, such as `4G` for `2G`; None if the value is not a limit."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 2 * value
    limit = _LIMIT.fullmatch(value) if isinstance(value, str) else None
    return f"{2 * int(limit['number'])}{limit['unit']}" if limit else None
