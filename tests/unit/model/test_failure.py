"""The remedy of a failure, for programs."""

import pytest

from sandbox.model.failure import FailureCode, Remedy, find_remedy

VALUES = {
    ("vm", "memory"): "8G",
    ("vm", "disk"): "1.5G",
    ("lifecycle", "timeout"): "90m",
    ("lifecycle", "budget_usd"): 0.05,
    ("repository", "branch"): "main",
}


@pytest.mark.parametrize(
    ("code", "message", "remedy"),
    [
        ("out_of_memory", "A process was killed because vm.memory (8G) was used up; raise it.", ("vm.memory", "16G")),
        ("timeout", "The agent was still working after 90m; raise lifecycle.timeout.", ("lifecycle.timeout", "180m")),
        ("budget_exceeded", "lifecycle.budget_usd (0.05 USD) is spent.", ("lifecycle.budget_usd", "0.1")),
    ],
)
def test_remedy_of_a_limit_has_an_override_with_twice_the_value(code, message, remedy):
    field, value = remedy
    found = find_remedy(FailureCode(code), message, lambda *path: VALUES.get(path))
    assert found == Remedy(f"Raise {field}.", (f"{field}={value}",))


@pytest.mark.parametrize(
    ("code", "message", "remedy"),
    [
        ("clone_failed", "Cannot clone x: it has no branch 'a'; check repository.branch.", "Check repository.branch."),
        ("disk_full", "The sandbox's disk is full: vm.disk is 1.5G; raise it.", "Check vm.disk."),
        ("runner_lost", "The runner died.", "Run the task again."),
    ],
)
def test_remedy_without_a_value_to_propose_has_no_override(code, message, remedy):
    assert find_remedy(FailureCode(code), message, lambda *path: VALUES.get(path)) == Remedy(remedy)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("out_of_memory", "The sandbox has too many sockets; use fewer."),
        ("agent_failed", "The provider says: raise vm.memory."),
        ("clone_failed", "Cannot clone https://vm.example/x.git: vm.unknown."),
    ],
)
def test_failure_whose_message_names_no_field_of_the_manifest_has_no_remedy(code, message):
    assert find_remedy(FailureCode(code), message, lambda *path: VALUES.get(path)) is None
