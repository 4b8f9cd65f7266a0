"""Formatting of times and ages."""

from datetime import UTC, datetime

import pytest

from sandbox.cli.output import formatting

NOW = datetime(2026, 1, 29, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("timestamp", "formatted"),
    [
        ("2026-01-29T11:59:18.000Z", "42 s"),
        ("2026-01-29T11:48:00.000Z", "12 min"),
        ("2026-01-29T09:00:00.000Z", "3 h"),
        ("2026-01-25T09:00:00.000Z", "4 d"),
        ("2026-01-29T12:00:09.000Z", "0 s"),
        ("nonsense", "-"),
        ("0001-01-01T00:00:00+14:00", "-"),
        (None, "-"),
    ],
)
def test_age_is_formatted_in_one_unit(timestamp, formatted):
    assert formatting.format_age(timestamp, NOW) == formatted


def test_invalid_time_is_formatted_as_placeholder():
    for out_of_range in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
        assert formatting.format_time(out_of_range) == "--:--:--"
    assert (
        formatting.format_time("nonsense"),
        formatting.format_datetime(None),
        formatting.format_elapsed(None, "x"),
    ) == ("--:--:--", "-", "")


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
    assert [command for _, command in formatting.next_commands(task)] == expected


def test_generated_ids_in_commands_are_shortened_on_a_terminal():
    task = {**TASK, "diff": DIFF}
    assert formatting.next_commands(task)[0] == ("Diff", f"sandbox task diff {TASK['id']}")
    assert formatting.next_commands(task, on_terminal=True)[0] == ("Diff", "sandbox task diff 3f2c1d7e")
    chosen = formatting.next_commands({**task, "id": "x" * 60}, on_terminal=True)
    assert chosen[0] == ("Diff", f"sandbox task diff {'x' * 60}")


def test_shortened_ids_are_unique_in_their_list():
    first, second = "5e173eb5-58f6-4bd5-9b43-6f1d6ab4f6a0", "5e173eb5-5a2c-4f0e-8f37-5a2b2d0f9c11"
    alone = "77aa0000-0d2c-4f0e-8f37-5a2b2d0f9c11"
    shortened = formatting.shorten_ids([first, alone, second, first])
    assert shortened == {first: "5e173eb5-58", second: "5e173eb5-5a", alone: "77aa0000"}


def test_ids_that_a_user_chose_are_not_shortened_and_differ_from_shortened_ids():
    generated = "5e173eb5-58f6-4bd5-9b43-6f1d6ab4f6a0"
    chosen = ["5e173eb5", "fix-the-flaky-login-of-the-dashboard"]
    assert formatting.shorten_ids([generated, *chosen]) == {generated: "5e173eb5-", **{each: each for each in chosen}}
    assert formatting.shorten_ids([]) == {}


NOT_LISTED_REASON = "vm.allowed_hosts does not list it."


@pytest.mark.parametrize(
    ("vm", "refused", "options"),
    [
        ({}, [("a.org", 443, NOT_LISTED_REASON)], "--set vm.network_mode=outbound --set 'vm.allowed_hosts[0]=a.org'"),
        (
            {"network_mode": "outbound", "allowed_hosts": ["x.org"]},
            [("a.org", 8443, NOT_LISTED_REASON), ("a.org", 443, NOT_LISTED_REASON), ("a.org", 80, NOT_LISTED_REASON)],
            "--set 'vm.allowed_hosts[1]=a.org:8443' --set 'vm.allowed_hosts[2]=a.org'",
        ),
        ({"network_mode": "full"}, [("10.0.0.1", 80, "it is not a public address.")], ""),
        ({}, [("*.org", 443, NOT_LISTED_REASON), ("a b", 443, NOT_LISTED_REASON)], ""),
        ({}, [], ""),
    ],
)
def test_command_allows_the_refused_hosts_that_a_manifest_can_allow(vm, refused, options):
    task = {"id": "fix-42", "definition": {"vm": vm}}
    command = formatting.allow_command(task, [formatting.DeniedConnection(*each) for each in refused])
    assert command == (f"sandbox task rerun fix-42 {options}" if options else "")


def test_command_that_allows_hosts_is_bounded():
    refused = [formatting.DeniedConnection(f"host-{number}.org", 443, NOT_LISTED_REASON) for number in range(1000)]
    command = formatting.allow_command({"id": "a", "definition": {}}, refused)
    assert command.count("vm.allowed_hosts[") == formatting.ALLOWED_HOSTS_MAX
