"""`sandbox task continue`, and what `sandbox task status` shows about the parent."""

import json

import pytest

from doubles.fake_api import error_response, json_response
from doubles.sample_task import TASK_ID, task_status

SUBMITTED = {"task_id": "new-1", "state": "pending", "message": "", "created_at": "", "links": {}}
CONTINUE = f"/tasks/{TASK_ID}/continue"


def sent(api):
    [request] = api.requests_to("POST", CONTINUE)
    return json.loads(request.body)


def test_continue_sends_the_prompt_and_prints_the_new_id(run_cli, api):
    api.on("POST", CONTINUE, json_response(SUBMITTED, 202))
    result = run_cli("task", "continue", TASK_ID, "Add a test.", "--id", "new-1", "--set", "lifecycle.timeout=2h")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"new-1\n", b"")
    assert sent(api) == {"prompt": "Add a test.", "overrides": ["lifecycle.timeout=2h", "metadata.id='new-1'"]}


def test_prompt_is_read_from_stdin(run_cli, api):
    api.on("POST", CONTINUE, json_response(SUBMITTED, 202))
    assert run_cli("task", "continue", TASK_ID, "-", stdin=b"-v is wrong\n").returncode == 0
    assert sent(api) == {"prompt": "-v is wrong\n", "overrides": []}


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [(409, "task_not_ended", 4), (409, "task_not_continuable", 4), (404, "task_not_found", 3)],
)
def test_reason_for_a_refusal_is_printed(run_cli, api, status, code, exit_code):
    api.on("POST", CONTINUE, error_response(status, code, "Because of this."))
    result = run_cli("task", "continue", TASK_ID, "x")
    assert (result.returncode, result.stdout) == (exit_code, b"")
    assert b"Because of this." in result.stderr


def test_refusal_names_the_command_that_runs_the_task_again(run_cli, api):
    message = f"Task {TASK_ID} cannot be continued: x. Run it again with POST /api/v1/tasks/{TASK_ID}/rerun."
    api.on("POST", CONTINUE, error_response(409, "task_not_continuable", message))
    error = " ".join(run_cli("task", "continue", TASK_ID, "x").stderr.decode().split())
    assert f"cannot be continued: x. Run it again with: sandbox task rerun {TASK_ID}" in error
    assert "POST" not in error


@pytest.mark.parametrize(
    ("continues", "text"),
    [("session", "in the agent's session"), ("context", "with the earlier conversation as text")],
)
def test_status_shows_the_parent(run_cli, api, continues, text):
    task = task_status("completed", parent="earlier", continues=continues)
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task))
    assert f"Continues   earlier  {text}" in run_cli("task", "status", TASK_ID).stdout.decode()
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("completed")))
    assert "Continues" not in run_cli("task", "status", TASK_ID).stdout.decode()


def test_status_shows_the_totals_of_the_chain(run_cli, api):
    chain = {"tasks": 3, "cost_usd": 1.25, "duration_seconds": 185.4}
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("completed", parent="earlier", chain=chain)))
    assert "Chain       3 tasks · $1.25 · 3 min 5 s\n" in run_cli("task", "status", TASK_ID).stdout.decode()
    for task in (task_status("completed", chain=None), task_status("completed")):  # an older server omits `chain`
        api.on("GET", f"/tasks/{TASK_ID}", json_response(task))
        assert "Chain" not in run_cli("task", "status", TASK_ID).stdout.decode()
