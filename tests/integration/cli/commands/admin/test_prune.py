"""`sandbox admin prune` calls the server, or prunes offline."""

import json

import pytest

from doubles.fake_api import json_response
from doubles.stored_tasks import StoredTasks
from sandbox.bootstrap.private_directories import lock_data_dir


@pytest.fixture
def stored(tmp_path):
    tasks = StoredTasks(tmp_path / "data")
    for number in range(1, 5):
        tasks.add_completed_task(f"task-{number}")
    tasks.index("task-1", "task-2")
    return tasks


@pytest.fixture
def prune(run_cli, stored):
    """Run the command without a prompt."""
    location = ("--offline", "--data-dir", str(stored.data_dir))
    return lambda *options: run_cli("admin", "prune", *location, "--yes", *options)


def test_offline_prune_removes_tasks(prune, stored, run_cli):
    dry_run = prune("--keep", "3", "--dry-run")
    assert dry_run.returncode == 0, dry_run.stderr
    assert dry_run.stdout.startswith(b"task-1  completed  2026-01-29T10:01:")
    assert dry_run.stdout.endswith(b"B  A task\n")
    assert b"Would remove 1 task" in dry_run.stderr
    assert (stored.data_dir / "tasks" / "task-1").exists()

    result = json.loads(prune("--keep", "3", "-f", "json").stdout)
    assert [task["id"] for task in result["tasks"]] == ["task-1"]
    assert result["total_size_bytes"] == result["tasks"][0]["size_bytes"] > 0
    assert not (stored.data_dir / "tasks" / "task-1").exists()
    assert run_cli("admin", "check", "--data-dir", str(stored.data_dir)).returncode == 0


def test_prune_defaults_to_the_configured_retention(prune, environment):
    environment["SANDBOX_RETENTION_KEEP"] = "1"
    environment["SANDBOX_RETENTION_OLDER_THAN"] = "unlimited"
    assert [line.split()[0] for line in prune().stdout.splitlines()] == [b"task-1", b"task-2", b"task-3"]


@pytest.mark.parametrize(("column", "value"), [("task", b"{"), ("state", "asleep")])
def test_damaged_index_row_does_not_block_prune(prune, stored, column, value):
    stored.damage_row("task-1", column, value)
    result = prune("--keep", "1")
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == [b"task-1", b"task-2", b"task-3"]


def test_damaged_row_without_a_journal_suggests_rebuild(prune, stored):
    stored.damage_row("task-1")
    stored.records("task-1").unlink()
    result = prune("--keep", "1", "--dry-run")
    assert result.returncode == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == [b"task-2", b"task-3", b"task-4"]
    *_, heading, reason = result.stderr.decode().splitlines()
    assert heading == "Would keep 1 task, because the data cannot be examined:"
    assert reason.startswith("  task-1: its entry in the index is damaged")
    assert "sandbox admin rebuild" in reason
    result = prune("--keep", "1")
    assert result.returncode != 0
    assert b"sandbox admin rebuild" in result.stderr
    assert b"Traceback" not in result.stderr


def test_offline_prune_with_a_running_server_is_rejected(prune, stored):
    with lock_data_dir(stored.data_dir):
        result = prune("--keep", "1")
    assert result.returncode == 4
    assert b"uses" in result.stderr
    assert (stored.data_dir / "tasks" / "task-1").exists()


@pytest.mark.parametrize(
    "option", [("--older-than", "5"), ("--older-than", "unlimited"), ("--max-bytes", "1K"), ("--keep", "0")]
)
def test_invalid_limits_are_usage_errors(run_cli, option):
    assert run_cli("admin", "prune", *option).returncode == 2


def test_prune_calls_the_server_by_default(run_cli, api):
    pruned = {"id": "old", "state": "completed", "finished_at": "2026-01-29T00:00:00.000Z", "size_bytes": 4096}
    response = {"dry_run": True, "tasks": [pruned], "total_count": 1, "total_size_bytes": 4096}
    api.responses["POST", "/admin/prune"] = [json_response(response)]
    result = run_cli("admin", "prune", "--older-than", "2d", "--max-bytes", "1G", "--dry-run", "-f", "json")
    assert json.loads(result.stdout) == response
    assert api.requests[-1].query == {
        "older_than_seconds": ["172800"],
        "max_bytes": ["1073741824"],
        "dry_run": ["true"],
    }
    plain = run_cli("admin", "prune", "--keep", "2", "--yes")
    assert plain.stdout == b"old  completed  2026-01-29T00:00:00.000Z  4.0 KiB\n"
    assert plain.stderr == b"Removed 1 task, 4.0 KiB.\n"
    assert api.requests[-1].query == {"keep": ["2"]}


def test_prune_without_options_suggests_the_options_if_nothing_is_removed(run_cli, api):
    api.on("POST", "/admin/prune", json_response({"tasks": [], "total_count": 0, "total_size_bytes": 0}))
    advice = b"Removed 0 tasks, 0 B. Choose tasks with --older-than, --keep or --max-bytes.\n"
    assert run_cli("admin", "prune", "-y").stderr == advice
    assert run_cli("admin", "prune", "-y", "--keep", "2").stderr == b"Removed 0 tasks, 0 B.\n"


def prune_response(request):
    is_dry_run = request.query.get("dry_run") == ["true"]
    names = ["one", "two"] if request.query.get("keep") == ["2"] else []
    tasks = [{"id": name, "state": "completed", "finished_at": "t", "size_bytes": 2048} for name in names]
    body = {"dry_run": is_dry_run, "tasks": tasks, "total_count": len(tasks), "total_size_bytes": 2048 * len(tasks)}
    return json_response(body)


@pytest.mark.parametrize(
    ("answer", "code", "end", "dry_runs"),
    [
        (b"y\n", 0, "Removed 2 tasks, 4.0 KiB.", ["true", None]),
        (b"n\n", 130, "No task was removed.", ["true"]),
        (b"\n", 130, "No task was removed.", ["true"]),
    ],
)
def test_terminal_prompts_with_the_number_and_size_of_the_tasks(
    api, on_terminal, terminal, answer, code, end, dry_runs
):
    api.on("POST", "/admin/prune", prune_response)
    process = on_terminal("admin", "prune", "--keep", "2")
    terminal.read_until(b"Remove 2 tasks and their data (4.0 KiB)? [y/N]: ")
    terminal.type(answer)
    output = terminal.read_to_end(process).decode().replace("\r", "")
    assert (process.returncode, output.splitlines()[-1]) == (code, end)
    assert [request.query.get("dry_run", [None])[0] for request in api.requests] == dry_runs


def test_terminal_does_not_prompt_if_nothing_is_removed(api, on_terminal, terminal):
    api.on("POST", "/admin/prune", prune_response)
    process = on_terminal("admin", "prune", "--keep", "3")
    assert b"Removed 0 tasks, 0 B." in terminal.read_to_end(process)
    assert process.returncode == 0


@pytest.mark.parametrize("options", [(), ("-f", "json")])
def test_prune_without_a_terminal_needs_yes(api, run_cli, options):
    api.on("POST", "/admin/prune", prune_response)
    result = run_cli("admin", "prune", "--keep", "2", *options)
    assert (result.returncode, result.stdout, api.requests) == (2, b"", [])
    assert result.stderr.decode().splitlines() == [
        "Error: This command prompts for confirmation and needs a terminal.",
        "  Remove the tasks without a prompt: add --yes",
    ]
    assert run_cli("admin", "prune", "--keep", "2", "--dry-run").returncode == 0


@pytest.mark.parametrize("option", ["--data-dir", "--config"])
def test_data_dir_or_config_without_offline_is_a_usage_error(run_cli, api, stored, option):
    api.on("POST", "/admin/prune", json_response({"tasks": [], "total_count": 0, "total_size_bytes": 0}))
    result = run_cli("admin", "prune", "--yes", option, str(stored.data_dir), "--keep", "1")
    assert (result.returncode, api.requests) == (2, [])
    assert b"add --offline" in result.stderr
    assert b"--server" in result.stderr


def test_server_output_is_escaped(run_cli, api):
    hostile = "\x1b]0;x\x07"
    pruned = {"id": hostile, "state": hostile, "finished_at": hostile, "size_bytes": 1}
    api.on("POST", "/admin/prune", json_response({"tasks": [pruned], "total_count": 1, "total_size_bytes": 1}))
    plain = run_cli("admin", "prune", "--keep", "2", "--yes")
    escaped = rb"\x1b]0;x\x07"
    assert plain.stdout == b"  ".join([escaped, escaped, escaped, b"1 B\n"])


def test_terminal_shows_that_a_sandbox_was_released(api, run_cli, on_terminal, terminal):
    """Tasks with a preserved sandbox are never removed, so the sandbox of a task in this list was released."""
    pruned = {"id": "old", "name": "N\x1b", "state": "failed_preserved", "finished_at": "t", "size_bytes": 1}
    api.on("POST", "/admin/prune", json_response({"tasks": [pruned], "total_count": 1, "total_size_bytes": 1}))
    text = terminal.read_to_end(on_terminal("admin", "prune", "--dry-run")).decode()
    assert "old  failed, released  t  1 B  N\\x1b" in text
    assert run_cli("admin", "prune", "--dry-run").stdout == b"old  failed_preserved  t  1 B  N\\x1b\n"
