"""Failure codes and messages for failed runs."""

import pytest

from sandbox.agents.claude_code.output_parser import determine_failure, determine_interactive_failure
from sandbox.interfaces.runtime import ExitStatus
from sandbox.model.failure import FailureCode


def test_failure_quotes_the_last_relevant_stderr_line():
    stderr = b"Warning: slow\nError: Session ID is already in use.\n\n[claude-code:unrecognized_model] {}\n"
    failure = determine_failure(ExitStatus(1), None, stderr)
    assert failure.code is FailureCode.AGENT_FAILED
    assert "code 1" in failure.message
    assert "Session ID is already in use." in failure.message


def test_quoted_line_is_truncated_and_printable():
    failure = determine_failure(ExitStatus(1), None, b"\x1b[31m\xff" + b"x" * 8000)
    assert failure.message.isprintable()
    assert len(failure.message) < 700


@pytest.mark.parametrize(
    ("exit_status", "code", "advice"),
    [
        (ExitStatus(0), FailureCode.AGENT_NO_RESULT, "without a final result"),
        (ExitStatus(None), FailureCode.SANDBOX_LOST, "submit the task again"),
        (ExitStatus(137, was_oom_killed=True), FailureCode.OUT_OF_MEMORY, "raise vm.memory"),
        (ExitStatus(139), FailureCode.AGENT_FAILED, "SIGSEGV"),
        (ExitStatus(255), FailureCode.AGENT_FAILED, "signal 127 (unknown)"),
    ],
    ids=str,
)
def test_exit_without_result_maps_to_code_and_advice(exit_status, code, advice):
    failure = determine_failure(exit_status, None, b"")
    assert failure.code is code
    assert advice in failure.message


@pytest.mark.parametrize("code", [1, 137])
def test_failure_message_for_a_bad_exit_after_a_result_mentions_the_result(code):
    failure = determine_failure(ExitStatus(code), {"is_error": False, "result": "Done."}, b"")
    assert failure.code is FailureCode.AGENT_FAILED
    assert "after it reported success" in failure.message
    assert "without a final result" not in failure.message
    assert (
        "last line on stderr: Killed" in determine_failure(ExitStatus(code), {"is_error": False}, b"Killed\n").message
    )


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "ANTHROPIC_API_KEY"), (404, "claude.model"), (413, "claude.prompt"), (529, "later"), (None, "later")],
)
def test_api_error_message_names_the_fix(status, advice):
    result = {"is_error": True, "terminal_reason": "api_error", "api_error_status": status, "result": "API Error"}
    assert advice in determine_failure(ExitStatus(1), result, b"").message


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (429, "API Error: Request rejected (429) · Rate limit of 40,000 tokens.",
         "API Error: Request rejected (429) · Rate limit of 40,000 tokens; wait or raise the account's rate limit, "
         "then submit the task again."),
        (529, "API Error: 529 Overloaded. Try again in a moment. If it persists, check your inference gateway "
         "(127.0.0.1:1).",
         "API Error: 529 Overloaded. Try again in a moment; submit the task again later."),
        (400, "Credit balance is too low", "Credit balance is too low; add credit to the account of the server's key."),
        (402, "API Error: 402 There's an issue with your billing.",
         "API Error: 402 There's an issue with your billing; add credit to the account of the server's key."),
        (402, "API Error: 402 The account is closed.",
         "API Error: 402 The account is closed; add credit to the account of the server's key."),
        (402, "API Error: 402 The model x has no price in Sandbox's table, so lifecycle.budget_usd cannot bound the "
         "cost; use a model that has one, or set lifecycle.budget_tokens instead.",
         "API Error: 402 The model x has no price in Sandbox's table, so lifecycle.budget_usd cannot bound the "
         "cost; use a model that has one, or set lifecycle.budget_tokens instead."),
        (403, "API Error: 403 \x1b[31mNo\u202e" + "x" * 5000,
         "API Error: 403  [31mNo " + "x" * 477 + "; check the server's ANTHROPIC_API_KEY or "
         "ANTHROPIC_AUTH_TOKEN."),
    ],
)  # fmt: skip
def test_provider_message_is_quoted_with_the_remedy(status, text, expected):
    """Claude Code 2 reports these texts for error responses from the Messages API."""
    result = {"is_error": True, "terminal_reason": "api_error", "api_error_status": status, "result": text}
    failure = determine_failure(ExitStatus(1), result, b"")
    assert (failure.code, failure.message) == (FailureCode.AGENT_FAILED, f"The model could not be used: {expected}")


def test_failure_with_a_reason_is_not_reported_as_out_of_memory():
    """The kernel may have killed a child process earlier, while the agent failed for another reason."""
    result = {"is_error": True, "terminal_reason": "api_error", "api_error_status": 401, "result": "API Error"}
    assert determine_failure(ExitStatus(1, was_oom_killed=True), result, b"").code is FailureCode.AGENT_FAILED
    success_result = {"is_error": False, "result": "Done."}
    assert (
        determine_failure(ExitStatus(137, was_oom_killed=True), success_result, b"").code is FailureCode.OUT_OF_MEMORY
    )


@pytest.mark.parametrize(
    "result", [{}, {"is_error": True, "result": 5, "errors": {}}, {"is_error": True, "errors": [1]}]
)
def test_malformed_result_is_an_error_without_reason(result):
    assert "no reason given" in determine_failure(ExitStatus(1), result, b"").message


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ({"terminal_reason": "max_turns"}, "max_turns"),
        ({"terminal_reason": "aborted_tools"}, "agent_interrupted"),
        ({"stop_reason": "refusal", "result": "I cannot."}, "model_refusal"),
        ({"subtype": "error_during_execution"}, "agent_error"),
        *(
            ({"terminal_reason": "api_error", "api_error_status": status, "result": text}, reason)
            for status, text, reason in (
                (400, "Credit balance is too low", "model_budget"),
                (402, "No such account", "model_budget"),
                (402, "x has no price, so lifecycle.budget_usd cannot bound the cost", "model_request_invalid"),
                (403, "There's an issue with your billing.", "model_budget"),
                (401, "Invalid key", "model_rejected"),
                (403, "Not allowed", "model_rejected"),
                (400, "Bad request", "model_request_invalid"),
                (404, "No such model", "model_request_invalid"),
                (413, "Too long", "model_request_invalid"),
                (429, "Rate limit", "model_rate_limited"),
                (529, "Overloaded", "model_unavailable"),
                (None, "Connection error", "model_unavailable"),
            )
        ),
    ],
)
def test_error_result_has_a_machine_readable_reason(result, reason):
    failure = determine_failure(ExitStatus(1), {"is_error": True, **result}, b"")
    assert (failure.code, failure.reason) == ("agent_failed", reason)


def test_failed_exit_has_a_reason_but_other_failures_have_none():
    failures = [
        determine_failure(ExitStatus(1), None, b""),
        determine_failure(ExitStatus(137), {"is_error": False}, b""),
        determine_interactive_failure(ExitStatus(1)),
    ]
    assert [(failure.code, failure.reason) for failure in failures] == [("agent_failed", "agent_exit")] * 3
    for exit_status in (ExitStatus(0), ExitStatus(None), ExitStatus(137, was_oom_killed=True)):
        assert determine_failure(exit_status, None, b"").reason == ""
