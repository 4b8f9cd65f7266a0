"""Failures of tasks: a stable code, a reason and a message."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum

import msgspec

from sandbox.model.errors import SandboxError
from sandbox.model.fixed_limits import KILL_TIMEOUT_SECONDS

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
    "still executing their system calls, such as the removal of a fragmented file. They exit when these calls return. "
    "If they remain, check the machine's log and disks, and restart the machine."
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
        f"The server has no usable value for these secrets: {listed}. Operators can find the reason in the task's "
        "status and in the server's log."
    )


def without_secret_sources(message: str) -> str:
    """Return the public form of a message, including one written by an earlier version."""
    names = _LEAKED_SOURCES.findall(message) if message.startswith("Secret ") else []
    return missing_secrets_message(names) if names else message


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """The reason a task failed, as shown to users.

    is_transient: the cause is temporary. If the agent had not started, the attempt may be run again.
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
