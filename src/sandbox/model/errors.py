"""Errors that carry a stable code and a sentence that says what to do."""

from enum import StrEnum

import msgspec


class FailureCode(StrEnum):
    """Why a task failed. Stable: clients branch on these words."""

    AGENT_FAILED = "agent_failed"
    AGENT_NO_RESULT = "agent_no_result"
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


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """The reason a task failed, as users read it. is_transient: plainly of the moment, so that it is tried again."""

    code: FailureCode
    message: str
    is_transient: bool = False


class SandboxError(Exception):
    """An error with a stable code. `message` is one sentence for a person, `retryable` a claim about trying again."""

    code: str = "internal_error"
    retryable: bool = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class AttemptError(SandboxError):
    """A step of an attempt failed; becomes the task's `Failure`."""

    def __init__(self, code: FailureCode, message: str, *, is_transient: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.failure = Failure(code, message, is_transient)


def reason_of(error: BaseException) -> str:
    """What an error says, also where it is a time that is over, of which Python says nothing."""
    return str(error) or "it takes too long"
