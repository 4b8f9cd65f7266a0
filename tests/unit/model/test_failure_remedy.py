"""A remedy names the field to change, and proposes a value only for a limit."""

import pytest

from doubles.manifests import manifest
from sandbox.model.failure import FailureCode
from sandbox.model.wire.task_conversion import Remedy, double_limit, find_remedy

MANIFEST = manifest(
    repository={"subpath": "a"},
    vm={"memory": "8G", "disk": "40G"},
    lifecycle={"timeout": "90m", "hang_timeout": "5m", "budget_usd": 0.05},
)


@pytest.mark.parametrize(
    ("code", "message", "field", "value"),
    [
        ("out_of_memory", "A process was killed because vm.memory (8G) was used up; raise it.", "vm.memory", "16G"),
        ("disk_full", "The sandbox's disk is full: vm.disk is 40G; raise it.", "vm.disk", "80G"),
        (
            "timeout",
            "The agent was still working after 90m; raise lifecycle.timeout.",
            *("lifecycle.timeout", "180m"),
        ),
        (
            "hang",
            "The agent produced no output for 5m; raise lifecycle.hang_timeout or retry.",
            *("lifecycle.hang_timeout", "10m"),
        ),
        ("budget_exceeded", "lifecycle.budget_usd (0.05 USD) is spent.", "lifecycle.budget_usd", "0.1"),
        (
            "clone_failed",
            "Cannot clone https://vm.disk/lifecycle.timeout: not enough disk space; raise vm.disk, or free space.",
            *("vm.disk", "80G"),
        ),
        (
            "collect_failed",
            "Collecting took too long; raise lifecycle.collect_timeout.",
            *("lifecycle.collect_timeout", "20m"),
        ),
    ],
)
def test_remedy_of_a_limit_has_an_override_with_twice_the_value(code, message, field, value):
    found = find_remedy(FailureCode(code), message, MANIFEST)
    assert found == Remedy(f"Raise {field}.", field, (f"{field}={value}",))


@pytest.mark.parametrize(
    ("reason", "code", "is_changed"),
    [("max_turns", "agent_failed", True), ("agent_error", "agent_failed", False), ("max_turns", "timeout", False)],
)
def test_field_of_the_agents_section_is_changed_if_the_reason_is_its_limit(reason, code, is_changed):
    message = "The agent did not finish; raise claude.max_turns."
    limited = manifest(claude={"prompt": "Work.", "max_turns": 5})
    found = find_remedy(FailureCode(code), message, limited, reason=reason)
    raised = Remedy("Raise claude.max_turns.", "claude.max_turns", ("claude.max_turns=10",))
    assert found == (raised if is_changed else None)


@pytest.mark.parametrize(
    "message", ["Raise claude.unknown.", "Raise other.max_turns.", "See https://x/claude.max_turns."]
)
def test_field_that_the_agents_section_lacks_is_not_changed(message):
    limited = manifest(claude={"prompt": "Work.", "max_turns": 5})
    assert find_remedy(FailureCode.AGENT_FAILED, message, limited, reason="max_turns") is None


@pytest.mark.parametrize(("spent", "value"), [(0.05, "0.1"), (0.0999, "0.1"), (0.1, "0.2"), (7.21, "12.8")])
def test_proposed_budget_exceeds_what_the_task_spent(spent, value):
    message = "lifecycle.budget_usd (0.05 USD) is spent."
    found = find_remedy(FailureCode.BUDGET_EXCEEDED, message, MANIFEST, {"lifecycle.budget_usd": spent})
    assert found.overrides == (f"lifecycle.budget_usd={value}",)


@pytest.mark.parametrize("spent", [0, 1])
def test_no_value_is_proposed_for_a_budget_of_zero(spent):
    found = find_remedy(
        FailureCode.BUDGET_EXCEEDED,
        "lifecycle.budget_usd (0 USD) is spent.",
        manifest(lifecycle={"budget_usd": 0}),
        {"lifecycle.budget_usd": spent},
    )
    assert found == Remedy("Raise lifecycle.budget_usd.", "lifecycle.budget_usd")


@pytest.mark.parametrize(
    ("code", "message", "text", "field"),
    [
        (
            "clone_failed",
            "Cannot clone x: it has no branch 'vm.memory'; check repository.branch.",
            *("Check repository.branch.", "repository.branch"),
        ),
        (
            "clone_failed",
            "'a' is not a directory; check repository.subpath.",
            *("Check repository.subpath.", "repository.subpath"),
        ),
        (
            "budget_exceeded",
            "The price is unknown, so lifecycle.budget_usd cannot be enforced. Set lifecycle.budget_tokens instead.",
            *("Set lifecycle.budget_tokens.", "lifecycle.budget_tokens"),
        ),
        ("runner_lost", "The runner died.", "Run the task again.", ""),
        ("collect_failed", "The artifact a could not be stored: No space left on device.", "Run the task again.", ""),
    ],
)
def test_remedy_without_a_value_to_propose_has_no_override(code, message, text, field):
    assert find_remedy(FailureCode(code), message, MANIFEST) == Remedy(text, field)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("out_of_memory", "The sandbox has too many sockets; use fewer."),
        ("disk_full", "The server's disk is full; free space on that disk and submit the task again."),
        ("agent_failed", "The provider says: raise vm.memory."),
        ("clone_failed", "Cannot clone https://vm.example/x.git: vm.unknown."),
        ("clone_failed", "Cannot clone https://vm.memory/vm.disk: the connection broke."),
        ("clone_failed", "Cannot clone git@vm.memory:x.git: the connection broke."),
        ("clone_failed", "Cannot clone x: see lifecycle.timeout_seconds and my.vm.memory and vm.memory.x"),
    ],
)
def test_failure_whose_message_names_no_field_of_the_manifest_has_no_remedy(code, message):
    assert find_remedy(FailureCode(code), message, MANIFEST) is None


def test_failure_of_an_unknown_model_names_the_field_of_the_model():
    message = "The model could not be used: It may not exist or you may not have access to it; check claude.model."
    reason = "model_request_invalid"
    found = find_remedy(FailureCode.AGENT_FAILED, message, MANIFEST, reason=reason)
    assert found == Remedy("Set claude.model to a model that the provider offers.", "claude.model")
    assert find_remedy(FailureCode.AGENT_FAILED, message, MANIFEST, reason="agent_error") is None
    both = "The model could not be used: x; check claude.model and claude.prompt."
    assert find_remedy(FailureCode.AGENT_FAILED, both, MANIFEST, reason=reason) is None


@pytest.mark.parametrize(
    ("value", "doubled"),
    [("2G", "4G"), ("512M", "1024M"), ("90m", "180m"), (3, 6), (0.5, 1.0), (True, None), (None, None), ("full", None)],
)
def test_suggested_limit_is_twice_the_given_one(value, doubled):
    assert double_limit(value) == doubled
