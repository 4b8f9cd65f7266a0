"""The suggested next commands for a task."""

import pytest

from sandbox.cli.output import task_outcome

TASK = {"id": "3f2c1d7e-2222-4222-8222-abcdefabcdef", "state": "failed", "error": None, "diff": None}


DIFF = {"files": 1, "additions": 16, "deletions": 4}


def error(field=None, *overrides):
    """Return the part of a status that has a failure with this remedy."""
    remedy = {"text": "Raise it.", "field": field, "overrides": list(overrides)}
    return {"error": {"code": "x", "message": "vm.memory is 2G; raise it.", "remedy": remedy}}


BRANCH = "--branch sandbox/3f2c1d7e"


@pytest.mark.parametrize(
    ("changes", "commands"),
    [
        ({"state": "running"}, ["status ID --watch", "cancel ID"]),
        ({"state": "completed", "diff": DIFF}, ["diff ID", "apply ID", f"apply ID {BRANCH}", 'continue ID "…"']),
        (
            {"state": "completed", "diff": DIFF, "definition": {"repository": {"patch": "…"}}},
            ["diff ID", "apply ID", 'continue ID "…"'],
        ),
        (
            {"state": "completed", "diff": DIFF, "parent": "a"},
            ["diff ID --chain", "apply ID --chain", f"apply ID {BRANCH}", 'continue ID "…"'],
        ),
        ({"state": "completed", "diff": {**DIFF, "files": 0}}, ["logs ID", 'continue ID "…"']),
        ({}, ["logs ID", "rerun ID"]),
        ({"diff": DIFF}, ["diff ID", 'continue ID "…"', "rerun ID"]),
        (error("vm.memory", "vm.memory=4G"), ["logs ID", "rerun ID --set vm.memory=4G"]),
        (error("repository.branch"), ["logs ID", "rerun ID --set repository.branch=…"]),
        (error(), ["logs ID", "rerun ID"]),
        (error("vm.memory", "vm.memory=4G; reboot", "vm.disk=\x1b[2J"), ["logs ID", "rerun ID"]),
        ({"error": {"code": "x", "message": "Raise vm.memory.", "remedy": None}}, ["logs ID", "rerun ID"]),
        # An older server sends no remedy, or a remedy without a field.
        ({"error": {"code": "x", "message": "Raise vm.memory."}}, ["logs ID", "rerun ID"]),
        (
            {"error": {"code": "x", "message": "x", "remedy": {"text": "Raise it.", "overrides": ["vm.memory=4G"]}}},
            ["logs ID", "rerun ID --set vm.memory=4G"],
        ),
    ],
)
def test_next_commands_depend_on_the_outcome(changes, commands):
    task = {**TASK, **changes}
    expected = [f"sandbox task {command.replace('ID', task['id'])}" for command in commands]
    assert [command for _, command in task_outcome.next_commands(task)] == expected


def test_generated_ids_in_commands_are_shortened_on_a_terminal():
    task = {**TASK, "diff": DIFF}
    assert task_outcome.next_commands(task)[0] == ("Diff", f"sandbox task diff {TASK['id']}")
    assert task_outcome.next_commands(task, on_terminal=True)[0] == ("Diff", "sandbox task diff 3f2c1d7e")
    chosen = task_outcome.next_commands({**task, "id": "x" * 60}, on_terminal=True)
    assert chosen[0] == ("Diff", f"sandbox task diff {'x' * 60}")
