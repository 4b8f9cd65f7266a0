"""Task status, list, wait and cancel."""

import time
from datetime import UTC, datetime

import pytest

from doubles.example_requests import Example
from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from doubles.manifests import manifest
from sandbox.interfaces.cluster_engine import JobPhase, JobStatus
from sandbox.interfaces.server_services import UnavailableError
from sandbox.interfaces.store import TaskQuery
from sandbox.model import events as e
from sandbox.model.artifacts import Artifact, DiffStatistics
from sandbox.model.failure import Failure, FailureCode, FailureReason
from sandbox.model.task_state import TaskState

EXAMPLES = (Example("list_tasks", query={"state": "completed,failed", "label.team": "platform", "limit": "50"}),)

KEYS = {
    "id", "name", "state", "labels", "created_at", "started_at", "finished_at", "state_changed_at", "state_message",
    "vm_name", "vm_ip", "vm", "exit_code", "error", "attempts", "progress", "repository", "branch", "diff",
    "duration_seconds", "final_message", "parent", "rerun_of", "continues", "sandbox_kept",
    "base_commit", "cancel", "host", "prompt_beginning",
}  # fmt: skip


def test_pending_task_has_all_keys_and_defaults(api, tasks):
    tasks.add(labels={"team": "platform"})
    status = api.get("/api/v1/tasks/task-001").json()
    assert set(status) == KEYS | {"definition", "result", "links", "job", "chain"}
    assert status["sandbox_kept"] is False
    assert (status["state"], status["labels"]) == ("pending", {"team": "platform"})
    assert (status["started_at"], status["finished_at"], status["exit_code"], status["error"]) == (None,) * 4
    assert (status["rerun_of"], status["chain"], status["progress"]["current_subject"]) == (None,) * 3
    assert (status["vm_name"], status["vm_ip"], status["vm"]["runtime"], status["vm"]["cpus"]) == (None, None, None, 4)
    assert status["definition"]["vm"]["profile"] == "agentic-dev"
    assert status["definition"]["lifecycle"]["timeout"] == "24h"
    assert status["definition"]["secrets"] == []
    assert status["progress"]["last_activity_at"] is None


def test_task_on_a_cluster_has_its_host_and_its_job(api, tasks):
    tasks.add("here", *TO_RUNNING)
    tasks.add("far", e.AttemptStarted("abcdefghijkl", "bubblewrap", "cluster:node-1"))
    tasks.add("queued")
    tasks.jobs["far"] = JobStatus(JobPhase.RUNNING, "node-1", "It runs.", "17")
    tasks.jobs["queued"] = JobStatus(JobPhase.UNKNOWN, reason="The job is being submitted.")
    statuses = {task_id: api.get(f"/api/v1/tasks/{task_id}").json() for task_id in ("here", "far", "queued")}
    assert [statuses[task_id]["host"] for task_id in statuses] == [None, "node-1", None]
    assert [statuses[task_id]["job"] for task_id in statuses] == [
        None,
        {"id": "17", "phase": "running", "host": "node-1", "reason": "It runs."},
        {"id": None, "phase": "unknown", "host": None, "reason": "The job is being submitted."},
    ]
    hosts = {task["id"]: task["host"] for task in api.get("/api/v1/tasks").json()["tasks"]}
    assert hosts == {"here": None, "far": "node-1", "queued": None}


def test_finished_task_has_times_and_result(api, tasks):
    tasks.add("task-001", *TO_RUNNING, e.Progress(turns=3, current_tool="Bash"), *TO_COMPLETED)
    status = api.get("/api/v1/tasks/task-001").json()
    assert (status["state"], status["exit_code"], status["result"]) == ("completed", 0, {"is_error": False})
    assert status["started_at"] == "2026-01-29T10:10:15.128Z"
    assert status["finished_at"] == status["state_changed_at"] == "2026-01-29T10:10:15.131Z"
    assert status["vm"]["runtime"] == "bubblewrap"
    assert status["vm_name"] == "sandbox-abcdefghijkl"
    assert status["progress"]["turns"] == 3


def test_status_and_list_have_the_final_message(api, tasks):
    tasks.add("task-001", *TO_RUNNING)
    assert api.get("/api/v1/tasks/task-001").json()["final_message"] is None
    report = {"is_error": False, "result": "In the agent's own words."}
    tasks.record("task-001", e.AgentExited(0, report, final_message="It is done."), e.TaskFinished())
    assert api.get("/api/v1/tasks/task-001").json()["final_message"] == "It is done."
    [listed] = api.get("/api/v1/tasks").json()["tasks"]
    assert (listed["final_message"], "result" in listed) == ("It is done.", False)


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"result": "I did it."}, "I did it."),
        ({"result": "x" * 20_000}, "x" * 9_999 + "…"),
        ({"result": ""}, None),
        ({"result": {"a": 1}}, None),
        ({"is_error": True}, None),
        (None, None),
    ],
)
def test_task_of_an_earlier_version_has_the_message_from_the_agent_report(api, tasks, report, message):
    tasks.add("task-001", *TO_RUNNING, e.AgentExited(0, report), e.TaskFinished())
    status = api.get("/api/v1/tasks/task-001").json()
    assert (status["final_message"], status["result"]) == (message, report)


def test_failed_task_has_an_error(api, tasks):
    tasks.add("task-001", e.AttemptFailed(Failure(FailureCode.CLONE_FAILED, "There is no branch main.")))
    tasks.record("task-001", e.TaskFinished())
    assert api.get("/api/v1/tasks/task-001").json()["error"] == {
        "code": "clone_failed",
        "reason": None,
        "message": "There is no branch main.",
        "remedy": None,
    }


def test_unknown_task_and_unknown_path_have_different_codes(api):
    for path in ("", "/wait", "/logs", "/artifacts", "/artifacts/x"):
        response = api.get(f"/api/v1/tasks/nobody{path}")
        assert (response.status_code, response.json()["error"]) == (404, "task_not_found")
    for path in ("/", "/api/v1/task", "/api/v1/tasks/", "/api/v1/tasks/a/b"):
        response = api.get(path)
        assert (response.status_code, response.json()["error"]) == (404, "not_found")


def test_wrong_method_returns_405_with_allow(api):
    response = api("PATCH", "/api/v1/tasks")
    assert (response.status_code, response.json()["error"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "GET, HEAD, POST"
    assert api("PUT", "/api/v1/tasks/task-001").headers["allow"] == "DELETE, GET, HEAD"


def test_list_is_paginated(api, tasks):
    for number in range(5):
        tasks.add(f"task-{number}")
    page = api.get("/api/v1/tasks?limit=2&offset=2").json()
    assert [item["id"] for item in page["tasks"]] == ["task-2", "task-3"]
    assert set(page["tasks"][0]) == KEYS
    assert (page["total_count"], page["limit"], page["offset"], page["has_more"]) == (5, 2, 2, True)
    assert page["next_cursor"]
    last = api.get("/api/v1/tasks?limit=2&offset=4").json()
    assert (last["has_more"], last["next_cursor"]) == (False, None)
    assert api.get("/api/v1/tasks?offset=99").json()["tasks"] == []


def test_list_parameters_are_passed_to_the_store(api, tasks):
    api.get("/api/v1/tasks")
    api.get("/api/v1/tasks?state=running,pending&label.team=platform&label.x.y=1&sort=name&order=asc&limit=7&offset=3")
    assert tasks.queries == [
        TaskQuery(),
        TaskQuery(
            states=frozenset({TaskState.RUNNING, TaskState.PENDING}),
            labels={"team": "platform", "x.y": "1"},
            sort="name",
            order="asc",
            limit=7,
            offset=3,
        ),
    ]


def test_search_parameters_are_passed_to_the_store(api, tasks):
    period = "created_after=2026-01-29T10:10:15.5%2B02:00&created_before=2026-01-30T00:00:00Z"
    api.get(f"/api/v1/tasks?q=%22fix+OR%22&repository=org/repo&parent=fix-1&rerun_of=fix-2&{period}")
    api.get("/api/v1/tasks?q=&repository=&parent=&created_after=&created_before=")
    assert tasks.queries == [
        TaskQuery(
            search='"fix OR"',
            repository="org/repo",
            parent="fix-1",
            rerun_of="fix-2",
            created_after=datetime(2026, 1, 29, 8, 10, 15, 500_000, UTC),
            created_before=datetime(2026, 1, 30, tzinfo=UTC),
        ),
        TaskQuery(),
    ]


def test_date_without_a_time_means_midnight_utc(api, tasks):
    assert api.get("/api/v1/tasks?created_after=2026-11-30&created_before=2026-12-01").status_code == 200
    expected = TaskQuery(
        created_after=datetime(2026, 11, 30, tzinfo=UTC), created_before=datetime(2026, 12, 1, tzinfo=UTC)
    )
    assert tasks.queries == [expected]


@pytest.mark.parametrize("text", ["2026-11-31", "2026-1-1", "20261130", "2026-W48-1", "\u0662026-11-30"])
def test_invalid_date_is_an_error(api, text):
    problem = api.get("/api/v1/tasks", params={"created_after": text}).json()
    assert (problem["error"], problem["details"][0]["field"]) == ("invalid_parameter", "created_after")
    assert problem["details"][0]["message"].endswith("or a date such as 2026-01-29")


def test_listed_task_has_duration_and_patch_size_and_repository(api, tasks):
    patch = Artifact("task-001.patch", ".sandbox/task-001.patch", 7, "text/x-diff", "sha256:00")
    collected = e.ArtifactCollected(patch, DiffStatistics(2, 30, 4))
    tasks.add("task-001", *TO_RUNNING, TO_COMPLETED[0], collected, *TO_COMPLETED[1:])
    tasks.add("task-002", *TO_RUNNING)
    tasks.add("task-003")
    listed = api.get("/api/v1/tasks").json()["tasks"]
    ended, running, pending = sorted(listed, key=lambda item: item["id"])
    assert (ended["repository"], ended["branch"]) == ("https://github.com/org/repo.git", "main")
    assert (ended["diff"], ended["duration_seconds"]) == ({"files": 2, "additions": 30, "deletions": 4}, 0.003)
    assert (running["diff"], pending["diff"], pending["duration_seconds"]) == (None, None, None)
    assert running["duration_seconds"] > 3600


def test_two_values_of_one_label_match_no_task(api, tasks):
    tasks.add(labels={"team": "a"})
    assert api.get("/api/v1/tasks?label.team=a&label.team=a").json()["total_count"] == 1
    assert api.get("/api/v1/tasks?label.team=a&label.team=b").json()["total_count"] == 0


@pytest.mark.parametrize("key", ["label.{number}", "label.same"], ids=["keys", "values of one key"])
@pytest.mark.parametrize(("count", "status"), [(64, 200), (65, 400)])
def test_number_of_requested_labels_is_limited(api, key, count, status):
    query = "&".join(f"{key.format(number=number)}={number}" for number in range(count))
    response = api.get(f"/api/v1/tasks?{query}")
    assert response.status_code == status
    assert [detail["field"] for detail in response.json().get("details", [])] == ["label.KEY"] * (status == 400)


@pytest.mark.parametrize(
    ("path", "field", "rule"),
    [
        ("/api/v1/tasks?limit=0", "limit", "range"),
        ("/api/v1/tasks?limit=1001", "limit", "range"),
        ("/api/v1/tasks?limit=many", "limit", "type"),
        ("/api/v1/tasks?offset=-1", "offset", "range"),
        ("/api/v1/tasks?offset=99999999999999999999999", "offset", "range"),
        ("/api/v1/tasks?state=sleeping", "state", "enum"),
        ("/api/v1/tasks?sort=age", "sort", "enum"),
        (f"/api/v1/tasks?q={'x' * 201}", "q", "range"),
        (f"/api/v1/tasks?repository={'x' * 2049}", "repository", "range"),
        (f"/api/v1/tasks?parent={'x' * 129}", "parent", "range"),
        ("/api/v1/tasks?created_after=yesterday", "created_after", "format"),
        ("/api/v1/tasks?created_before=2026-01-29T10:10:15", "created_before", "format"),
        ("/api/v1/tasks?created_before=2026-13-29T10:10:15Z", "created_before", "format"),
        ("/api/v1/tasks?cursor=abc", "cursor", "format"),
        ("/api/v1/tasks/task-001/wait?timeout=601", "timeout", "range"),
        ("/api/v1/tasks/task-001/wait?timeout=nan", "timeout", "range"),
        ("/api/v1/tasks/task-001/logs?tail=-1", "tail", "range"),
        ("/api/v1/tasks/task-001/logs?stream=stdin", "stream", "enum"),
        ("/api/v1/tasks/task-001/logs?follow=perhaps", "follow", "type"),
        ("/api/v1/tasks/task-001/logs?since=yesterday", "since", "format"),
        ("/api/v1/tasks/task-001/logs?since=2026-01-29T10:10:15", "since", "format"),
        ("/api/v1/tasks/task-001/logs?since=0001-01-01T00:00:00%2B23:59", "since", "format"),
    ],
)
def test_invalid_parameter_error_names_the_field(api, tasks, path, field, rule):
    tasks.add("task-001")
    response = api.get(path)
    problem = response.json()
    assert (response.status_code, problem["error"]) == (400, "invalid_parameter")
    assert [(detail["field"], detail["rule"]) for detail in problem["details"]] == [(field, rule)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/api/v1/tasks/task-001/wait?timeout=601", "must be at most 600"),
        ("/api/v1/tasks/task-001/wait?timeout=-0.5", "must be at least 0"),
        ("/api/v1/tasks?offset=9007199254740993", "must be at most 9007199254740992"),
    ],
)
def test_bounds_are_printed_as_integers(api, tasks, path, message):
    tasks.add("task-001")
    assert [detail["message"] for detail in api.get(path).json()["details"]] == [message]


def test_wait_returns_when_the_task_ends_or_the_timeout_expires(api, tasks):
    tasks.add("task-001", *TO_RUNNING)
    assert api.get("/api/v1/tasks/task-001/wait?timeout=0.01").json()["state"] == "running"
    tasks.record("task-001", *TO_COMPLETED)
    started = time.monotonic()
    assert api.get("/api/v1/tasks/task-001/wait").json()["state"] == "completed"
    assert time.monotonic() - started < 5


def test_cancel_returns_previous_and_new_state(api, tasks):
    tasks.add("task-001", *TO_RUNNING)
    assert api.delete("/api/v1/tasks/task-001").json() == {
        "success": True,
        "id": "task-001",
        "task_id": "task-001",
        "previous_state": "running",
        "new_state": "cancelled",
        "message": "The task is being stopped; its results so far are stored.",
        "state": "running",
        "requested_at": "2026-01-29T10:10:15.129Z",
        "cancelled_at": "2026-01-29T10:10:15.129Z",
    }


def test_repeated_cancel_returns_the_same_times(api, tasks):
    tasks.add("task-001", *TO_RUNNING)
    first = api.delete("/api/v1/tasks/task-001?reason=too+slow").json()
    assert api.get("/api/v1/tasks/task-001").json()["cancel"] == {
        "requested_at": first["requested_at"],
        "reason": "too slow",
    }
    assert api.delete("/api/v1/tasks/task-001?reason=other&force=true").json() == first


def test_status_has_the_base_commit_and_the_cancel_request(api, tasks):
    tasks.add("task-001", *TO_RUNNING[:1])
    status = api.get("/api/v1/tasks/task-001").json()
    assert (status["base_commit"], status["cancel"]) == (None, None)
    tasks.record("task-001", *TO_RUNNING[1:], e.CancelRequested())
    status = api.get("/api/v1/tasks/task-001").json()
    expected = {"requested_at": "2026-01-29T10:10:15.129Z", "reason": None}
    assert (status["state"], status["base_commit"], status["cancel"]) == ("running", "0" * 40, expected)
    listed = api.get("/api/v1/tasks").json()["tasks"][0]
    assert (listed["base_commit"], listed["cancel"]) == (status["base_commit"], expected)


def test_cancel_request_after_the_agent_exit_is_not_in_the_status(api, tasks):
    tasks.add("task-001", *TO_RUNNING, TO_COMPLETED[0], e.CancelRequested("late"))
    assert api.get("/api/v1/tasks/task-001").json()["cancel"] is None


@pytest.mark.parametrize(
    ("query", "body", "expected"),
    [
        ("", b"", ("", False)),
        ("?reason=too+slow&force=true", b"", ("too slow", True)),
        ("", b'{"reason": "too slow"}', ("too slow", False)),
        ("?force=true", b' {"reason": "late"}\n', ("late", True)),
        (
            "",
            '{"reason": "10\u00a0€, said \U0001f469\u200d\U0001f4bb"}'.encode(),
            ("10\u00a0€, said \U0001f469\u200d\U0001f4bb", False),
        ),
    ],
)
def test_cancel_accepts_a_reason_and_a_force_flag(api, tasks, query, body, expected):
    tasks.add("task-001")
    assert api.delete(f"/api/v1/tasks/task-001{query}", content=body).status_code == 200
    assert tasks.cancels == [("task-001", *expected)]


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("", b"[1]"),
        ("", b"{"),
        ("", b'{"force": "yes"}'),
        ("", b'{"forse": true}'),
        ("", b"[" * 100_000),
        ("", '{"reason": "zu spät"}'.encode("latin-1")),
        ("?force=perhaps", b""),
        ("?reason=%1b%5b2J", b""),
        ("?reason=two%0alines", b""),
        ("", '{"reason": "two\u2028lines"}'.encode()),
        ("", b'{"reason": "\\ud800"}'),
        ("", b'{"reason": "%s"}' % (b"x" * 1025)),
    ],
)
def test_invalid_cancel_request_cancels_nothing(api, tasks, query, body):
    tasks.add("task-001")
    response = api.delete(f"/api/v1/tasks/task-001{query}", content=body)
    assert (response.status_code, response.json()["error"]) == (400, "invalid_parameter")
    assert tasks.cancels == []


def test_finished_task_cannot_be_cancelled(api, tasks):
    tasks.add("task-001", *TO_RUNNING, *TO_COMPLETED)
    response = api.delete("/api/v1/tasks/task-001")
    assert (response.status_code, response.json()["error"]) == (409, "task_already_terminal")
    assert response.json()["task_state"] == "completed"


def test_cancel_without_runner_reply_returns_503(api, tasks):
    tasks.add("task-001")
    tasks.failure = UnavailableError("The runner of task task-001 is not responding; try again.")
    response = api.delete("/api/v1/tasks/task-001")
    assert (response.status_code, response.json()["error"]) == (503, "service_unavailable")


def test_head_request_returns_the_headers_of_a_get_request(api, tasks):
    tasks.add("task-001")
    head, body = api("HEAD", "/api/v1/tasks/task-001"), api.get("/api/v1/tasks/task-001")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == body.headers["content-length"] == str(len(body.content))
    assert (
        api("HEAD", "/api/v1/tasks/task-001/logs?follow=true").headers["content-type"].startswith("text/event-stream")
    )


def test_responses_have_a_request_id_and_forbid_caching(api, tasks):
    tasks.add("task-001")
    for path in ("/api/v1/tasks/task-001", "/nowhere", "/api/v1/tasks?limit=0"):
        response = api.get(path, headers={"x-request-id": "evil\tid"})
        assert response.headers["x-request-id"] not in {"", "evil\tid"}
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"
    assert api.get("/", headers={"x-request-id": "mine-1"}).json()["request_id"] == "mine-1"


@pytest.mark.parametrize(
    ("outcome", "states"),
    [
        ("active", {"pending", "staging", "provisioning", "ready", "running", "completing"}),
        ("succeeded", {"completed"}),
        ("failed", {"failed", "failed_preserved"}),
        ("cancelled", {"cancelled"}),
        ("failed,cancelled", {"failed", "failed_preserved", "cancelled"}),
    ],
)
def test_outcome_parameter_selects_states(api, tasks, outcome, states):
    assert api.get(f"/api/v1/tasks?outcome={outcome}").status_code == 200
    assert {state.value for state in tasks.queries[-1].states} == states


@pytest.mark.parametrize(
    ("value", "states"),
    [
        ("failed", {"failed", "failed_preserved"}),
        ("running,failed", {"running", "failed", "failed_preserved"}),
        ("failed,failed_preserved", {"failed", "failed_preserved"}),
        ("failed_preserved", {"failed_preserved"}),
        ("completed,cancelled", {"completed", "cancelled"}),
    ],
)
def test_failed_state_filter_includes_tasks_with_a_preserved_sandbox(api, tasks, value, states):
    assert api.get(f"/api/v1/tasks?state={value}").status_code == 200
    assert {state.value for state in tasks.queries[-1].states} == states


@pytest.mark.parametrize("query", ["outcome=failed&state=failed", "outcome=success"])
def test_invalid_outcome_is_an_error(api, query):
    problem = api.get(f"/api/v1/tasks?{query}").json()
    assert (problem["error"], [each["field"] for each in problem["details"]]) == ("invalid_parameter", ["outcome"])


def test_failed_task_has_the_code_and_the_reason(api, tasks):
    failure = Failure(FailureCode.AGENT_FAILED, "No credit.", reason=FailureReason.MODEL_BUDGET)
    tasks.add("task-001", *TO_RUNNING, e.AgentExited(1, failure=failure), e.TaskFinished())
    expected = {"code": "agent_failed", "reason": "model_budget", "message": "No credit.", "remedy": None}
    status = api.get("/api/v1/tasks/task-001").json()
    assert (status["error"], status["attempts"][-1]["error"]) == (expected, expected)
    assert status["state_message"] == "No credit."


def test_failed_task_has_a_remedy_that_reruns_it(api, tasks):
    failure = Failure(FailureCode.OUT_OF_MEMORY, "A process was killed because vm.memory (8G) was used up; raise it.")
    tasks.add("task-001", *TO_RUNNING, e.AgentExited(137, failure=failure), e.TaskFinished())
    remedy = api.get("/api/v1/tasks/task-001").json()["error"]["remedy"]
    assert remedy == {"text": "Raise vm.memory.", "field": "vm.memory", "overrides": ["vm.memory=16G"]}
    rerun = api.post("/api/v1/tasks/task-001/rerun?dry_run=true", json={"overrides": remedy["overrides"]})
    assert rerun.json()["definition"]["vm"]["memory"] == "16G"


def test_failure_recorded_by_an_earlier_version_has_no_reason(api, tasks):
    failure = Failure(FailureCode.AGENT_FAILED, "No credit.")
    tasks.add("task-001", *TO_RUNNING, e.AgentExited(1, failure=failure), e.TaskFinished())
    assert api.get("/api/v1/tasks/task-001").json()["error"]["reason"] is None


def test_prompt_beginning_is_shown_for_reruns_and_continuations_whose_name_does_not_repeat_it(api, tasks):
    for task_id, prompt, rerun_of in (
        ("first", "Fix it.\nBe quick.", None),
        ("second", "Now the docs.\nBe quick.", "first"),
        ("third", "Fix bug #42", "first"),
    ):
        settings = manifest(task_id, name="Fix bug #42", claude={"prompt": prompt})
        tasks._apply(task_id, e.TaskSubmitted(task_id, settings, None, None, rerun_of))
    listed = {task["id"]: task["prompt_beginning"] for task in api.get("/api/v1/tasks").json()["tasks"]}
    assert listed == {"first": None, "second": "Now the docs.", "third": None}
    assert api.get("/api/v1/tasks/second").json()["prompt_beginning"] == "Now the docs."


def test_unknown_short_id_needs_the_full_id(api):
    assert api.get("/api/v1/tasks/5e173eb5").json()["message"].endswith("to see their ids. Give the full id.")
    assert api.get("/api/v1/tasks/fix-tests").json()["message"].endswith("to see their ids.")
