"""Notices of failures."""

import pytest

from sandbox.dashboard.failure_notice import describe_failure
from sandbox.model.failure import FailureCode


def describe(code, message, field=None, reason=None):
    """Describe a failure whose remedy, if any, changes this field."""
    remedy = field and {"text": f"Raise {field}.", "field": field, "overrides": []}
    return describe_failure({"code": code, "reason": reason, "message": message, "remedy": remedy})


@pytest.mark.parametrize("code", FailureCode)
def test_each_code_has_a_title_and_a_remedy(code):
    notice = describe(code.value, "It broke.")
    assert notice.title not in {"", "The task failed"}
    assert notice.title[-1] != "."
    assert notice.remedy.endswith(".")
    assert (notice.message, notice.code) == ("It broke.", code.value)


@pytest.mark.parametrize(
    "message",
    [
        "The model could not be used; check claude.model.",
        "The agent sent no result. Submit the task again.",
    ],
)
def test_remedy_that_the_message_contains_is_not_repeated(message):
    notice = describe("agent_failed", message)
    assert (notice.detail, notice.remedy) == (message, "")


@pytest.mark.parametrize(
    ("code", "message", "field", "title", "detail", "remedy"),
    [
        (
            "budget_exceeded",
            "lifecycle.budget_tokens (30,000 tokens) is spent; no more model requests are forwarded. Raise the budget.",
            "lifecycle.budget_tokens",
            *("The task used its budget of 30,000 tokens", "", "Raise the budget, or make the task smaller."),
        ),
        (
            "clone_failed",
            "Cannot clone https://host/x.git: it has no branch 'nope'; check repository.branch.",
            "repository.branch",
            *("The repository could not be cloned", "The repository has no branch 'nope'; check the branch.", ""),
        ),
        (
            "timeout",
            "The agent was still working after 5m; raise lifecycle.timeout.",
            "lifecycle.timeout",
            *("The agent was still working after 5m", "", "Raise the timeout."),
        ),
        (
            "hang",
            "The agent produced no output for 5m; raise lifecycle.hang_timeout or retry.",
            "lifecycle.hang_timeout",
            *("The agent produced no output for 5m", "", "Raise the hang timeout or retry."),
        ),
        (
            "out_of_memory",
            "A process was killed because vm.memory (2G) was used up; raise it.",
            "vm.memory",
            *("A process was killed because the memory (2G) was used up", "", "Raise it."),
        ),
        (
            "runner_lost",
            "The task's runner died; the work up to that point is stored. Submit the task again.",
            None,
            *("The task's runner died", "", "The work up to that point is stored. Submit the task again."),
        ),
        (
            "agent_failed",
            "The tests need more vm.memory; ask for it.",
            None,
            *("The agent failed", "The tests need more vm.memory; ask for it.", ""),
        ),
    ],
)
def test_notice_contains_each_fact_once_and_uses_the_labels_of_the_form(code, message, field, title, detail, remedy):
    notice = describe(code, message, field)
    assert (notice.title, notice.detail, notice.remedy) == (title, detail, remedy)
    assert notice.message == message


def test_notice_of_a_limit_of_the_agent_names_it_in_words():
    message = "The agent did not finish within the maximum number of turns; raise claude.max_turns."
    notice = describe("agent_failed", message, "claude.max_turns", "max_turns")
    assert (notice.title, notice.detail) == ("The agent did not finish within the maximum number of turns", "")
    assert (notice.remedy, notice.new_value_words) == ("Raise the maximum number of turns.", "more turns")
    assert notice.summary == f"{notice.title}. {notice.remedy}"


@pytest.mark.parametrize(
    ("code", "message", "has_note"),
    [
        ("budget_exceeded", "lifecycle.budget_usd (0.5 USD) is spent; no more model requests are forwarded.", True),
        ("budget_exceeded", "lifecycle.budget_tokens (30,000 tokens) is spent.", True),
        ("budget_exceeded", "The price is unknown, so lifecycle.budget_usd cannot be enforced.", False),
        ("timeout", "lifecycle.budget_usd (0.5 USD) is spent.", False),
    ],
)
def test_note_says_why_a_task_costs_more_than_its_budget(code, message, has_note):
    assert describe(code, message).overspending_note == (
        "The last response is billed in full, even if it exceeds the budget." if has_note else ""
    )


def test_code_from_another_version_has_a_general_title():
    notice = describe("new_code", "It broke.")
    assert (notice.title, notice.remedy, notice.code) == ("The task failed", "", "new_code")


@pytest.mark.parametrize(
    ("code", "message", "summary"),
    [
        (
            "budget_exceeded",
            "lifecycle.budget_usd (1 USD) is spent; no more model requests are forwarded.",
            "The task used its budget of $1.00. Raise the budget, or make the task smaller.",
        ),
        ("clone_failed", "Cannot clone https://host/x.git: the branch is missing.", "The branch is missing."),
        ("clone_failed", "Cannot clone https://host/x.git: ", "Cannot clone https://host/x.git: "),
        ("clone_failed", "The patch does not apply.", "The patch does not apply."),
        ("agent_failed", "Cannot clone https://host/x.git: no.", "Cannot clone https://host/x.git: no."),
        ("new_code", "It broke.", "It broke."),
    ],
)
def test_summary_starts_with_the_cause(code, message, summary):
    assert describe(code, message).summary == summary


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("lifecycle.budget_usd", "a larger budget"),
        ("lifecycle.budget_tokens", "a larger budget"),
        ("lifecycle.hang_timeout", "more time"),
        ("lifecycle.provision_timeout", "more time"),
        ("lifecycle.stage_timeout", "more time"),
        ("lifecycle.timeout", "more time"),
        ("repository.branch", "another branch"),
        ("repository.url", "another URL"),
        ("vm.disk", "a larger disk"),
        ("vm.memory", "more memory"),
    ],
)
def test_notice_offers_a_change_of_the_setting_in_the_remedy(field, change):
    notice = describe("new_code", "It broke.", field)
    assert (notice.field, notice.new_value_words) == (field, change)


@pytest.mark.parametrize("field", [None, "repository.subpath"])
def test_notice_offers_no_change_of_a_field_without_a_description(field):
    notice = describe("clone_failed", "'a' is not a directory; check repository.subpath and vm.memory.", field)
    assert (notice.field, notice.new_value_words) == (None, "")


def test_larger_disk_is_not_suggested_if_the_disk_of_the_server_is_full():
    notice = describe("disk_full", "The server's disk is full; free space on that disk and submit the task again.")
    assert (notice.field, notice.remedy) == (None, "Free space on that disk and submit the task again.")


def test_more_memory_is_not_suggested_if_it_does_not_raise_the_limit():
    message = "The sandbox left 40 MiB of kernel memory in partly used slabs. Close files in order."
    notice = describe("out_of_memory", message)
    assert (notice.title, notice.detail) == ("The sandbox reached a limit", message)
    assert notice.remedy == "Let the agent use fewer of these resources."
