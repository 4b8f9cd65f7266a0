"""`sandbox task rerun`: what it sends and prints."""

import json

import pytest

from doubles.fake_api import error_response, json_response
from doubles.sample_task import TASK_ID, task_status

SUBMITTED = {"task_id": "new-1", "state": "pending", "message": "", "created_at": "", "links": {}}
RERUN = f"/tasks/{TASK_ID}/rerun"


@pytest.fixture
def task(api):
    api.on("POST", RERUN, json_response(SUBMITTED, 202))
    api.on("GET", "/tasks/new-1", json_response(task_status("completed") | {"id": "new-1"}))


def sent(api):
    [request] = api.requests_to("POST", RERUN)
    assert request.headers["idempotency-key"]
    return json.loads(request.body)


def test_rerun_prints_only_the_new_id_on_stdout(run_cli, task, api):
    result = run_cli("task", "rerun", TASK_ID)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"new-1\n", b"")
    assert sent(api) == {"overrides": []}


def test_options_change_the_manifest(run_cli, task, api):
    result = run_cli("task", "rerun", TASK_ID, "--set", "vm.cpus=16", "--prompt", "Use tabs", "--id", "it's-1")
    assert result.returncode == 0, result.stderr
    assert sent(api) == {"overrides": ["vm.cpus=16", "metadata.id='it''s-1'"], "prompt": "Use tabs"}


def test_prompt_can_be_an_argument_or_an_option_but_not_both(run_cli, task, api):
    assert run_cli("task", "rerun", TASK_ID, "Use tabs").returncode == 0
    assert sent(api) == {"overrides": [], "prompt": "Use tabs"}
    result = run_cli("task", "rerun", TASK_ID, "Use tabs", "--prompt", "Use spaces")
    assert (result.returncode, b"not both" in result.stderr) == (2, True)
    assert len(api.requests_to("POST", RERUN)) == 1


def test_error_explains_how_to_set_an_entry_of_a_list(run_cli, api):
    message = "must be a list, not text"
    details = [{"field": "vm.allowed_hosts", "rule": "type", "message": message, "line": None, "column": None}]
    api.on("POST", RERUN, error_response(400, "invalid_manifest", "1 error", details))
    result = run_cli("task", "rerun", TASK_ID, "--set", "vm.allowed_hosts=a.example,b.example")
    assert f"{message}; set an entry with --set vm.allowed_hosts[0]=VALUE" in result.stderr.decode()


def test_prompt_is_read_from_stdin(run_cli, task, api):
    assert run_cli("task", "rerun", TASK_ID, "--prompt", "-", stdin="Größer\n".encode()).returncode == 0
    assert sent(api)["prompt"] == "Größer\n"
    result = run_cli("task", "rerun", TASK_ID, "--prompt", "-", stdin=b"\xff")
    assert result.returncode == 2
    assert b"must be UTF-8" in result.stderr


def test_rerun_waits_for_the_new_task(run_cli, task, api):
    result = run_cli("task", "rerun", TASK_ID, "--wait")
    assert (result.returncode, result.stdout) == (0, b"new-1\n")
    assert b"sandbox task diff new-1" in result.stderr
    assert api.requests_to("GET", "/tasks/new-1")


def test_errors_name_the_option(run_cli, api):
    details = [{"field": "vm.cpus", "rule": "type", "message": "must be a number", "line": None, "column": None}]
    details.append({"field": "vm.profile", "rule": "not_offered", "message": "is gone", "line": None, "column": None})
    api.on("POST", RERUN, error_response(400, "invalid_manifest", "2 errors", details))
    result = run_cli("task", "rerun", TASK_ID, "--set", "vm.cpus=many")
    assert result.returncode == 9
    assert result.stderr.decode().splitlines() == [
        "--set vm.cpus=many: must be a number",
        f"The manifest of task {TASK_ID}: vm.profile: is gone",
        f"Error: The manifest of task {TASK_ID} has 2 errors.",
    ]


def test_unknown_task_and_invalid_option_fail(run_cli, api):
    api.on("POST", RERUN, error_response(404, "task_not_found", "There is no task"))
    assert run_cli("task", "rerun", TASK_ID).returncode == 3
    result = run_cli("task", "rerun", TASK_ID, "--set", "vm.cpus")
    assert result.returncode == 2
    assert b"is not PATH=VALUE" in result.stderr
    assert len(api.requests_to("POST", RERUN)) == 1


def test_status_shows_which_task_was_rerun(run_cli, api):
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("completed", rerun_of="earlier")))
    assert "Rerun of    earlier\n" in run_cli("task", "status", TASK_ID).stdout.decode()
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("completed")))
    assert "Rerun of" not in run_cli("task", "status", TASK_ID).stdout.decode()


def test_status_shows_the_subject_of_the_current_tool_call(run_cli, api):
    task = task_status("running")
    for subject, text in (("npm test\u202e", "Bash npm test\\u202e now"), (None, "Bash now")):
        task["progress"] |= {"current_tool": "Bash", "current_subject": subject}
        api.on("GET", f"/tasks/{TASK_ID}", json_response(task))
        assert f"4 turns · 4 tool calls · {text}\n" in run_cli("task", "status", TASK_ID).stdout.decode()
