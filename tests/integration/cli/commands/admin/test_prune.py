"""`sandbox admin prune` asks the server, or does it where none works."""

import json

import pytest

from doubles.recorded_api import of_json
from doubles.stored_tasks import KeptTasks
from sandbox.bootstrap.data_dir_lock import lock_data_dir


@pytest.fixture
def kept(tmp_path):
    made = KeptTasks(tmp_path / "data")
    for number in range(1, 5):
        made.finish(f"task-{number}")
    made.index("task-1", "task-2")
    return made


@pytest.fixture
def prune(sandbox, kept):
    return lambda *options: sandbox("admin", "prune", "--offline", "--data-dir", str(kept.data_dir), *options)


def test_without_a_server_it_is_done_here(prune, kept, sandbox):
    would = prune("--keep", "3", "--dry-run")
    assert would.returncode == 0, would.stderr
    assert would.stdout.startswith(b"task-1  completed  2026-01-29T10:01:")
    assert b"1 task would go" in would.stderr
    assert (kept.data_dir / "tasks" / "task-1").exists()

    done = json.loads(prune("--keep", "3", "-f", "json").stdout)
    assert [task["id"] for task in done["tasks"]] == ["task-1"]
    assert done["total_size_bytes"] == done["tasks"][0]["size_bytes"] > 0
    assert not (kept.data_dir / "tasks" / "task-1").exists()
    assert sandbox("admin", "check", "--data-dir", str(kept.data_dir)).returncode == 0


def test_without_bounds_those_of_the_configuration_count(prune, environment):
    environment["SANDBOX_RETENTION_KEEP"] = "1"
    environment["SANDBOX_RETENTION_OLDER_THAN"] = "unlimited"
    assert [line.split()[0] for line in prune().stdout.splitlines()] == [b"task-1", b"task-2", b"task-3"]


@pytest.mark.parametrize(("column", "value"), [("task", b"{"), ("state", "asleep")])
def test_a_damaged_row_of_the_index_keeps_nobody_from_it(prune, kept, column, value):
    kept.damage_row("task-1", column, value)
    done = prune("--keep", "1")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [b"task-1", b"task-2", b"task-3"]


def test_a_damaged_row_whose_journal_is_gone_is_told_with_what_to_do(prune, kept):
    kept.damage_row("task-1")
    kept.records("task-1").unlink()
    done = prune("--keep", "1")
    assert done.returncode != 0
    assert b"sandbox admin rebuild" in done.stderr
    assert b"Traceback" not in done.stderr


def test_beside_a_server_it_is_refused(prune, kept):
    with lock_data_dir(kept.data_dir):
        refused = prune("--keep", "1")
    assert refused.returncode == 4
    assert b"works on" in refused.stderr
    assert (kept.data_dir / "tasks" / "task-1").exists()


@pytest.mark.parametrize(
    "option", [("--older-than", "5"), ("--older-than", "unlimited"), ("--max-bytes", "1K"), ("--keep", "0")]
)
def test_what_makes_no_sense_is_a_usage_error(sandbox, option):
    assert sandbox("admin", "prune", *option).returncode == 2


def test_the_server_is_asked_unless_told_otherwise(sandbox, api):
    gone = {"id": "old", "state": "completed", "finished_at": "2026-01-29T00:00:00.000Z", "size_bytes": 4096}
    answer = {"dry_run": True, "tasks": [gone], "total_count": 1, "total_size_bytes": 4096}
    api.answers["POST", "/admin/prune"] = [of_json(answer)]
    done = sandbox("admin", "prune", "--older-than", "2d", "--max-bytes", "1G", "--dry-run", "-f", "json")
    assert json.loads(done.stdout) == answer
    assert api.asked[-1].query == {"older_than_seconds": ["172800"], "max_bytes": ["1073741824"], "dry_run": ["true"]}
    plain = sandbox("admin", "prune", "--keep", "2")
    assert plain.stdout == b"old  completed  2026-01-29T00:00:00.000Z  4096 bytes\n"
    assert api.asked[-1].query == {"keep": ["2"]}


@pytest.mark.parametrize("option", ["--data-dir", "--config"])
def test_a_data_directory_that_was_named_is_never_mistaken_for_another_servers(sandbox, api, kept, option):
    api.on("POST", "/admin/prune", of_json({"tasks": [], "total_count": 0, "total_size_bytes": 0}))
    refused = sandbox("admin", "prune", option, str(kept.data_dir), "--keep", "1")
    assert (refused.returncode, api.asked) == (2, [])
    assert b"add --offline" in refused.stderr
    assert b"--server" in refused.stderr


def test_what_a_server_tells_does_not_steer_the_terminal(sandbox, api):
    hostile = "\x1b]0;x\x07"
    gone = {"id": hostile, "state": hostile, "finished_at": hostile, "size_bytes": 1}
    api.on("POST", "/admin/prune", of_json({"tasks": [gone], "total_count": 1, "total_size_bytes": 1}))
    plain = sandbox("admin", "prune", "--keep", "2")
    shown = rb"\x1b]0;x\x07"
    assert plain.stdout == b"  ".join([shown, shown, shown, b"1 bytes\n"])
