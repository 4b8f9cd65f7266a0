"""Determines how the agent's work ended: a failure code and a message that says what to do."""

from __future__ import annotations

import re
import signal
from typing import Any

from sandbox.agents.claude_code.stream_json import sanitize
from sandbox.interfaces.runtime import ExitStatus
from sandbox.model.failure import Failure, FailureCode, FailureReason

_QUOTE_CHARACTERS_MAX = 500
_NOISE_PREFIXES = ("[claude-code:", "Warning:")
_SANDBOX_LOST_MESSAGE = "The sandbox was lost before the agent's result was recorded; submit the task again."
_SEE_LOGS = "the task's logs may contain the reason."
_NO_RESULT_MESSAGE = f"without a final result; {_SEE_LOGS}"
_AFTER_RESULT_MESSAGE = f"after it reported success; {_SEE_LOGS}"


def determine_failure(exit_status: ExitStatus, result: dict[str, Any] | None, stderr_tail: bytes) -> Failure | None:
    """Return the failure; None for exit code 0 together with a last result that has `is_error: false`."""
    if exit_status.code == 0 and result is not None and result.get("is_error") is False:
        return None
    # An error that the agent reports takes precedence over an OOM kill, which may have happened long before the error.
    if exit_status.was_oom_killed and (result is None or result.get("is_error") is False):
        return Failure(FailureCode.OUT_OF_MEMORY, "The sandbox ran out of memory; raise vm.memory.")
    if exit_status.code is None:
        return Failure(FailureCode.SANDBOX_LOST, _SANDBOX_LOST_MESSAGE)
    if result is not None and result.get("is_error") is not False:
        reason, message = _explain_error_result(result)
        return Failure(FailureCode.AGENT_FAILED, message, reason=reason)
    if exit_status.code == 0:
        return Failure(FailureCode.AGENT_NO_RESULT, f"Claude Code exited with code 0 {_NO_RESULT_MESSAGE}")
    message = _exit_message(exit_status.code, result, stderr_tail)
    return Failure(FailureCode.AGENT_FAILED, message, reason=FailureReason.AGENT_EXIT)


def determine_interactive_failure(exit_status: ExitStatus) -> Failure | None:
    """Return the failure; None for exit code 0."""
    if exit_status.code == 0:
        return None
    if exit_status.was_oom_killed:
        return Failure(FailureCode.OUT_OF_MEMORY, "The sandbox ran out of memory; raise vm.memory.")
    if exit_status.code is None:
        return Failure(FailureCode.SANDBOX_LOST, _SANDBOX_LOST_MESSAGE)
    message = f"{_describe_exit(exit_status.code)} before its session ended."
    return Failure(FailureCode.AGENT_FAILED, message, reason=FailureReason.AGENT_EXIT)


def _explain_error_result(result: dict[str, Any]) -> tuple[FailureReason, str]:
    """Return the machine-readable reason, and the message, for a result with `is_error`."""
    text = _error_text(result)
    match result.get("terminal_reason"), result.get("stop_reason"):
        case "max_turns", _:
            message = "Claude Code did not finish within the maximum number of turns; raise claude.max_turns."
            return FailureReason.MAX_TURNS, message
        case "aborted_tools" | "aborted_streaming", _:
            message = "Claude Code was interrupted before it had finished; submit the task again."
            return FailureReason.AGENT_INTERRUPTED, message
        case _, "refusal":
            return FailureReason.MODEL_REFUSAL, f"The model refused: {text.rstrip('.')}; change claude.prompt."
        case "api_error", _:
            return _explain_api_error(result.get("api_error_status"), text)
        case _:
            return FailureReason.AGENT_ERROR, f"Claude Code ended with an error: {text}"


_GATEWAY_HINT = re.compile(r" If it persists, check your inference gateway \([^)]*\)\.?")
"""Advice that is removed from messages. Claude Code adds it because its base URL is the address of the gateway."""

_UNKNOWN_COST = "so lifecycle.budget_usd cannot bound the cost"
_NO_CREDIT = re.compile("credit balance|billing", re.IGNORECASE)


def _explain_api_error(status: Any, text: str) -> tuple[FailureReason, str]:
    """Return the reason, and the provider's message as reported by Claude Code, followed by what to do."""
    error_text = _GATEWAY_HINT.sub("", text)
    if status == 402 and _UNKNOWN_COST in error_text:  # the gateway's message, which says what to do
        return FailureReason.MODEL_REQUEST_INVALID, f"The model could not be used: {error_text.rstrip('.')}."
    match status:
        case 400 | 402 | 403 if status == 402 or _NO_CREDIT.search(error_text):
            reason, todo = FailureReason.MODEL_BUDGET, "add credit to the account of the server's key"
        case 429:
            reason = FailureReason.MODEL_RATE_LIMITED
            todo = "wait or raise the account's rate limit, then submit the task again"
        case 401 | 403:
            reason = FailureReason.MODEL_REJECTED
            todo = "check the server's ANTHROPIC_API_KEY or ANTHROPIC_AUTH_TOKEN"
        case 404:
            reason, todo = FailureReason.MODEL_REQUEST_INVALID, "check claude.model"
        case 400 | 413:
            reason, todo = FailureReason.MODEL_REQUEST_INVALID, "check claude.model and claude.prompt"
        case _:
            reason, todo = FailureReason.MODEL_UNAVAILABLE, "submit the task again later"
    return reason, f"The model could not be used: {error_text.rstrip('.')}; {todo}."


def _error_text(result: dict[str, Any]) -> str:
    errors = result.get("errors")
    texts = [result.get("result"), *(errors[:1] if isinstance(errors, list) else ())]
    return next((_quote(text) for text in texts if isinstance(text, str) and text.strip()), "no reason given")


def _exit_message(code: int, result: dict[str, Any] | None, stderr_tail: bytes) -> str:
    stderr_line = _last_stderr_line(stderr_tail)
    if stderr_line:
        return f"{_describe_exit(code)}; last line on stderr: {stderr_line}"
    return f"{_describe_exit(code)} {_NO_RESULT_MESSAGE if result is None else _AFTER_RESULT_MESSAGE}"


def _describe_exit(code: int) -> str:
    if code <= 128:
        return f"Claude Code exited with code {code}"
    number = code - 128
    name = signal.Signals(number).name if number in signal.valid_signals() and number < 32 else "unknown"
    return f"Claude Code was killed by signal {number} ({name})"


def _last_stderr_line(stderr_tail: bytes) -> str:
    lines = [line.strip() for line in stderr_tail.decode(errors="replace").splitlines()]
    relevant_lines = [line for line in lines if line and not line.startswith(_NOISE_PREFIXES)]
    return _quote(relevant_lines[-1]) if relevant_lines else ""


def _quote(text: str) -> str:
    """Return the text on one line, truncated."""
    return sanitize(" ".join(text[: 4 * _QUOTE_CHARACTERS_MAX].split()), _QUOTE_CHARACTERS_MAX)
