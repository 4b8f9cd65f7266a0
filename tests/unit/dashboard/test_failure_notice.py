"""Notices of failures."""

import pytest

from sandbox.dashboard.failure_notice import describe_failure
from sandbox.model.failure import FailureCode


@pytest.mark.parametrize("code", FailureCode)
def test_each_code_has_a_title_and_a_remedy(code):
    notice = describe_failure({"code": code.value, "message": "It broke."})
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
    notice = describe_failure({"code": "agent_failed", "message": message})
    assert (notice.detail, notice.remedy) == (message, "")


@pytest.mark.parametrize(
    ("code", "message", "title", "detail", "remedy"),
    [
        (
            "budget_exceeded",
            "lifecycle.budget_tokens (30,000 tokens) is spent; no more model requests are forwarded. Raise the budget.",
            *("The task used its budget of 30,000 tokens", "", "Raise the budget, or make the task smaller."),
        ),
        (
            "clone_failed",
            "Cannot clone https://host/x.git: it has no branch 'nope'; check repository.branch.",
            *("The repository could not be cloned", "The repository has no branch 'nope'; check the branch.", ""),
        ),
        (
            "timeout",
            "The agent was still working after 5m; raise lifecycle.timeout.",
            *("The agent was still working after 5m", "", "Raise the timeout."),
        ),
        (
            "out_of_memory",
            "A process was killed because vm.memory (2G) was used up; raise it.",
            *("A process was killed because the memory (2G) was used up", "", "Raise it."),
        ),
        (
            "runner_lost",
            "The task's runner died; the work up to that point is stored. Submit the task again.",
            *("The task's runner died", "", "The work up to that point is stored. Submit the task again."),
        ),
        (
            "agent_failed",
            "The tests need more vm.memory; ask for it.",
            *("The agent failed", "The tests need more vm.memory; ask for it.", ""),
        ),
    ],
)
def test_notice_says_each_fact_once_and_uses_the_labels_of_the_form(code, message, title, detail, remedy):
    notice = describe_failure({"code": code, "message": message})
    assert (notice.title, notice.detail, notice.remedy) == (title, detail, remedy)
    assert notice.message == message


def test_code_from_another_version_has_a_general_title():
    notice = describe_failure({"code": "new_code", "message": "It broke."})
    assert (notice.title, notice.remedy, notice.code) == ("The task failed", "", "new_code")


@pytest.mark.parametrize(
    ("code", "message", "summary"),
    [
        (
            "budget_exceeded",
            "lifecycle.budget_usd (1 USD) is spent; no more model requests are forwarded.",
            "The task used its budget of 1 USD. Raise the budget, or make the task smaller.",
        ),
        ("clone_failed", "Cannot clone https://host/x.git: the branch is missing.", "The branch is missing."),
        ("clone_failed", "Cannot clone https://host/x.git: ", "Cannot clone https://host/x.git: "),
        ("clone_failed", "The patch does not apply.", "The patch does not apply."),
        ("agent_failed", "Cannot clone https://host/x.git: no.", "Cannot clone https://host/x.git: no."),
        ("new_code", "It broke.", "It broke."),
    ],
)
def test_summary_starts_with_the_cause(code, message, summary):
    assert describe_failure({"code": code, "message": message}).summary == summary


@pytest.mark.parametrize(
    ("code", "message", "setting"),
    [
        ("budget_exceeded", "lifecycle.budget_usd (1 USD) is spent. Raise the budget.", "lifecycle.budget_usd"),
        (
            "budget_exceeded",
            "lifecycle.budget_usd cannot be enforced. Set lifecycle.budget_tokens instead.",
            "lifecycle.budget_tokens",
        ),
        (
            "clone_failed",
            "Cannot clone x: it has no branch 'a'; check repository.branch.",
            "repository.branch",
        ),
        ("clone_failed", "The connection broke.", None),
        ("clone_failed", "'a' is not a directory; check repository.subpath.", None),
        ("out_of_memory", "The sandbox ran out of memory; raise vm.memory.", "vm.memory"),
        (
            "out_of_memory",
            "The sandbox's sockets held 65 MiB in their buffers; the limit is 64 MiB. Raise vm.memory.",
            "vm.memory",
        ),
        ("out_of_memory", "The sandbox had 9000 sockets; the limit is 8192. Close unused connections.", None),
        ("out_of_memory", "The sandbox had more than 8192 locks on files; release unused ones.", None),
        ("timeout", "It took too long; raise lifecycle.timeout.", "lifecycle.timeout"),
        ("agent_failed", "Raise vm.memory.", None),
        ("new_code", "Raise vm.memory.", None),
    ],
)
def test_notice_names_the_setting_that_would_prevent_the_failure(code, message, setting):
    notice = describe_failure({"code": code, "message": message})
    assert (notice.setting, bool(notice.change)) == (setting, setting is not None)


def test_limit_that_more_memory_does_not_raise_has_another_remedy():
    message = "The sandbox left 40 MiB of kernel memory in partly used slabs. Close files in order."
    notice = describe_failure({"code": "out_of_memory", "message": message})
    assert (notice.title, notice.detail) == ("The sandbox reached a limit", message)
    assert notice.remedy == "Let the agent use fewer of these resources."
