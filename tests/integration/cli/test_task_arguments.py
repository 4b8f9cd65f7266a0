"""The TASK_ID argument: a full id, or a prefix of a generated id."""

import hashlib
import json

import click
import pytest

from doubles.deployment import git
from doubles.fake_api import ApiResponse, error_response, json_response
from doubles.sample_task import task_status
from sandbox.cli import main

FIRST = "5e173eb5-58f6-4bd5-9b43-6f1d6ab4f6a0"
SECOND = "5e17a0c2-0d2c-4f0e-8f37-5a2b2d0f9c11"
OTHER = "77aa0000-0d2c-4f0e-8f37-5a2b2d0f9c11"


def task_commands():
    """Yield the names of all commands with a TASK_ID argument."""
    context = click.Context(main.task)
    for name in main.task.list_commands(context):
        command = main.task.get_command(context, name)
        if any(
            parameter.name in {"task_id", "task_ids"}
            for parameter in command.params
            if isinstance(parameter, click.Argument)
        ):
            yield name


COMMANDS = tuple(task_commands())
ARGUMENTS = {"download": ["--all"], "continue": ["Add a test."], "delete": ["--yes"]}
"""Additional arguments that some commands need."""


@pytest.fixture
def set_search_results(api):
    """Set the tasks that each search finds."""

    def set_results(*ids: str, **changes):
        tasks = [task_status("running", task_id=task_id, **changes) for task_id in ids]
        api.on("GET", "/tasks", json_response({"tasks": tasks, "total_count": len(tasks), "next_cursor": None}))

    return set_results


def test_all_commands_with_a_task_id_are_tested():
    assert set(COMMANDS) >= {
        "status", "logs", "open", "wait", "cancel", "artifacts", "download", "diff", "apply", "release", "shell",
        "attach",
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_ambiguous_prefix_lists_the_tasks_and_changes_nothing(run_cli, api, set_search_results, command):
    set_search_results(FIRST, SECOND, OTHER)
    result = run_cli("task", command, "5e17", *ARGUMENTS.get(command, []))
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.decode().splitlines() == [
        "Error: 2 tasks have an id that begins with '5e17'. Give more characters of the id:",
        f"  {FIRST}  running  Fix bug #42",
        f"  {SECOND}  running  Fix bug #42",
    ]
    assert {(request.method, request.path) for request in api.requests} == {("GET", "/tasks/5e17"), ("GET", "/tasks")}


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"shell", "attach"}))
def test_unique_prefix_selects_the_task(run_cli, api, set_search_results, tmp_path, command):
    git("init", "-q", cwd=tmp_path)  # for `apply`
    set_search_results(FIRST, OTHER)
    run_cli("task", command, "5e173eb5-58", *ARGUMENTS.get(command, []))
    assert api.requests_to("GET", "/tasks")[0].query["q"] == ["5e173eb5-58"]
    # If the task is not found, the latest tasks are requested for a suggestion.
    sent = [request.path for request in api.requests[2:] if request.path != "/tasks"]
    assert sent
    assert all(path.startswith(f"/tasks/{FIRST}") for path in sent)


@pytest.mark.parametrize("command", ["shell", "attach"])
def test_unique_prefix_selects_the_task_for_a_terminal(on_terminal, terminal, api, set_search_results, command):
    set_search_results(FIRST)
    api.on("GET", f"/tasks/{FIRST}", json_response(task_status("completed", task_id=FIRST)))
    terminal.read_to_end(on_terminal("task", command, "5e17"))
    assert [request.path for request in api.requests[2:4]] == [f"/tasks/{FIRST}", f"/tasks/{FIRST}/terminal"]


def test_cancel_sends_the_full_id(run_cli, api, set_search_results):
    set_search_results(FIRST)
    cancelled = {"success": True, "task_id": FIRST, "previous_state": "running", "new_state": "cancelled"}
    api.on("DELETE", f"/tasks/{FIRST}", json_response({**cancelled, "message": "m", "cancelled_at": ""}))
    for path in (f"/tasks/{FIRST}", f"/tasks/{FIRST}/wait"):
        api.on("GET", path, json_response(task_status("cancelled", task_id=FIRST)))
    result = run_cli("task", "cancel", "5e17")
    assert (result.returncode, result.stderr.decode()) == (0, f"Task {FIRST} was cancelled.\n")


def test_exact_id_takes_precedence_over_a_prefix(run_cli, api, set_search_results):
    set_search_results(FIRST, SECOND)
    api.on("GET", "/tasks/5e17", json_response(task_status("running", task_id="5e17")))
    assert run_cli("task", "status", "5e17").stdout.startswith(b"Task        5e17\n")
    assert api.requests_to("GET", "/tasks") == []


def test_id_in_a_response_does_not_become_the_name_of_a_directory(run_cli, api, tmp_path):
    """A hostile server could replace the configuration of git."""
    entry = {"name": "config", "path": "config", "contains_secret": False, "checksum": ""}
    api.on("GET", "/tasks/5e173eb5", json_response(task_status("completed", task_id=".git")))
    api.on("GET", "/tasks/5e173eb5/artifacts", json_response({"artifacts": [entry]}))
    headers = {"X-Checksum-SHA256": hashlib.sha256(b"x").hexdigest()}
    api.on("GET", "/tasks/5e173eb5/artifacts/config", ApiResponse(200, [b"x"], headers))
    run_cli("task", "download", "5e173eb5", "--all")
    assert [path.name for path in tmp_path.glob("*") if path.is_dir() and list(path.glob("config"))] == ["5e173eb5"]


@pytest.mark.parametrize("text", ["5", "1d", "5e1"])
def test_short_prefix_is_not_searched_and_needs_more_characters(run_cli, api, set_search_results, text):
    set_search_results(FIRST)
    result = run_cli("task", "status", text)
    message = b"Error: There is no such task. Give at least 4 characters of a generated id.\n"
    assert (result.returncode, result.stdout, result.stderr) == (3, b"", message)
    assert [request.path for request in api.requests] == [f"/tasks/{text}"]


def test_short_id_that_a_user_chose_selects_its_task(run_cli, api, set_search_results):
    set_search_results(FIRST)
    api.on("GET", "/tasks/5e1", json_response(task_status("running", task_id="5e1")))
    assert run_cli("task", "status", "5e1").stdout.startswith(b"Task        5e1\n")


@pytest.mark.parametrize("text", [FIRST, "fix-1", "5e173eb5x", "5e173eb558f6", "../5e17"])
def test_other_arguments_are_sent_unchanged(run_cli, api, set_search_results, text):
    """A full id needs no search. An id that a user chose, such as `fix-1`, must not become `fix-10`."""
    set_search_results(FIRST, "fix-10")
    result = run_cli("task", "cancel", text)
    assert result.returncode == 3
    assert not [request for request in api.requests_to("GET", "/tasks") if "q" in request.query]


def test_prefix_of_a_custom_id_selects_nothing(run_cli, api, set_search_results):
    set_search_results("beef-stew")
    result = run_cli("task", "cancel", "beef")
    assert (result.returncode, result.stderr) == (
        3,
        b"Error: There is no such task. Did you mean beef-stew?\n  List the tasks: sandbox task list\n",
    )
    assert [request.path for request in api.requests] == ["/tasks/beef", "/tasks", "/tasks/beef", "/tasks"]


def test_ids_that_begin_with_the_argument_are_suggested(run_cli, set_search_results):
    set_search_results("fix-basket-2", "prefix", "fix-basket", "fix-login", "fix-9")
    result = run_cli("task", "cancel", "fix")
    assert result.returncode == 3
    assert b" Did you mean fix-basket-2 or fix-basket or fix-login?\n" in result.stderr


def test_all_pages_of_a_search_are_read_before_a_task_is_selected(run_cli, api):
    pages = [
        {"tasks": [task_status("running", task_id=FIRST)], "total_count": 2, "next_cursor": "c"},
        {"tasks": [task_status("running", task_id=SECOND)], "total_count": 2, "next_cursor": None},
    ]
    api.on("GET", "/tasks", *map(json_response, pages))
    assert run_cli("task", "cancel", "5e17").returncode == 2
    assert [request.query.get("cursor") for request in api.requests_to("GET", "/tasks")] == [None, ["c"]]


def test_endless_search_selects_no_task(run_cli, api):
    page = {"tasks": [task_status("running", task_id=FIRST)], "total_count": 9, "next_cursor": "c"}
    api.on("GET", "/tasks", json_response(page), json_response({**page, "tasks": []}))
    result = run_cli("task", "cancel", "5e17")
    assert (result.returncode, len(api.requests_to("GET", "/tasks"))) == (2, 10)
    assert b"Give the full id." in result.stderr


def test_at_most_ten_tasks_are_listed(run_cli, api, set_search_results):
    set_search_results(
        *(f"5e17{number:04}-58f6-4bd5-9b43-6f1d6ab4f6a0" for number in range(13)), name="a\x1b[31m\n" + "x" * 200
    )
    lines = run_cli("task", "status", "5e17").stderr.decode().splitlines()
    assert len(lines) == 12
    assert lines[1] == r"  5e170000-58f6-4bd5-9b43-6f1d6ab4f6a0  running  a\x1b[31m\n" + "x" * 48 + "…"
    assert lines[-1] == "  … and 3 more tasks"


NO_SUCH_TASK = b"Error: There is no such task.\n  List the tasks: sandbox task list\n"


def test_error_of_the_server_is_reported_if_no_id_has_the_prefix(run_cli, set_search_results):
    set_search_results()
    result = run_cli("task", "status", "5e17")
    assert (result.returncode, result.stderr) == (3, NO_SUCH_TASK)


def test_unknown_task_is_reported_if_the_server_has_no_search(run_cli, api):
    api.on("GET", "/tasks", error_response(400, "invalid_parameter", "q: unknown parameter"))
    result = run_cli("task", "status", "5e17")
    assert (result.returncode, result.stderr) == (3, NO_SUCH_TASK)


def test_json_output_has_the_full_id(run_cli, api, set_search_results):
    set_search_results(FIRST)
    api.on("GET", f"/tasks/{FIRST}/artifacts", json_response({"task_id": FIRST, "artifacts": []}))
    assert json.loads(run_cli("task", "artifacts", "5e17", "-f", "json").stdout)["task_id"] == FIRST
