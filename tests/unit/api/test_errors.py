"""Every error in a request is listed in one response, with its location and a suggestion for misspelled names."""

import pytest

from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.model.fixed_limits import INPUT_ERRORS_MAX

MANIFEST = """\
version: "1"
kind: Task
metadata: {name: A task}
repository: {url: https://github.com/org/repo.git, branch: main}
claude: {prompt: Do it}
vm: {memry: 8G, cpus: many, network_mode: isolatd}
"""


def error_locations(response, code="invalid_parameter"):
    problem = response.json()
    assert (response.status_code, problem["error"]) == (400, code)
    return {(each["location"], each["rule"], each["suggestion"]) for each in problem["details"]}


def test_all_errors_of_a_query_are_listed(api, tasks):
    query = "sot=name&state=runing&limit=0&offset=x&order=up&order=down&created_after=yesterday&cursor=a"
    assert error_locations(api.get(f"/api/v1/tasks?{query}")) == {
        ("query.sot", "unknown_field", "sort"),
        ("query.state", "enum", "running"),
        ("query.limit", "range", None),
        ("query.offset", "type", None),
        ("query.order", "format", None),
        ("query.order", "enum", None),
        ("query.created_after", "format", None),
        ("query.cursor", "format", None),
    }
    assert tasks.queries == []


def test_all_invalid_values_are_listed_if_every_name_is_known(api):
    response = api.get("/api/v1/tasks?sort=nam&limit=1001")
    assert error_locations(response) == {("query.sort", "enum", "name"), ("query.limit", "range", None)}
    messages = {each["field"]: each["message"] for each in response.json()["details"]}
    first = response.json()["details"][0]
    text = f"The request has 2 errors. The first one: {first['location']} {first['message']}"
    assert response.json()["message"].removesuffix(".") == text.removesuffix(".")
    assert messages["sort"].endswith("; did you mean 'name'?")
    assert messages["limit"] == "must be at most 1000"


def test_valid_query_is_accepted(api, tasks):
    tasks.add("task-001", *TO_RUNNING)
    query = "sort=name&state=running,pending&limit=10&offset=0&order=asc&created_after=2026-01-01T00:00:00Z"
    assert api.get(f"/api/v1/tasks?{query}").json()["total_count"] == 1


def test_message_describes_a_single_error(api):
    message = api.get("/api/v1/tasks?limit=many").json()["message"]
    assert message == "The request is invalid: query.limit must be a whole number."
    message = api.get("/api/v1/tasks?limt=1").json()["message"]
    assert message == "The request is invalid: query.limt is an unknown parameter; did you mean 'limit'?"


def test_errors_in_headers_and_parameters_are_listed_together(api, tasks):
    tasks.add("task-001")
    response = api.get("/api/v1/tasks/task-001/logs?tail=-1&folow=true", headers={"Last-Event-ID": "x"})
    assert error_locations(response) == {
        ("query.folow", "unknown_field", "follow"),
        ("query.tail", "range", None),
        ("header.Last-Event-ID", "format", None),
    }
    assert api.get("/api/v1/tasks/task-001/logs?tail=1", headers={"Last-Event-ID": "1"}).status_code == 200


def test_errors_in_headers_and_parameters_and_the_manifest_are_listed_together(api, tasks):
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    response = api.post("/api/v1/tasks?dry_run=maybe", headers=headers, content=MANIFEST.replace("memry: 8G, ", ""))
    assert error_locations(response) == {
        ("query.dry_run", "type", None),
        ("header.Idempotency-Key", "format", None),
        ("body.vm.cpus", "type", None),
        ("body.vm.network_mode", "enum", "isolated"),
    }
    assert tasks.entries == {}


@pytest.mark.parametrize(
    ("method", "path", "body", "locations"),
    [
        ("DELETE", "task-001", b'{"reson": "x"}', {"query.x", "body.reson"}),
        ("POST", "task-001/rerun", b'{"prompt": ""}', {"query.x", "body.prompt"}),
        ("POST", "task-001/continue", b"{", {"query.x", "body"}),
        ("POST", "task-001/continue", b'{"prompt": "Go on."}', {"query.x"}),
    ],
)
def test_errors_in_parameters_and_a_json_body_are_listed_together(api, tasks, method, path, body, locations):
    tasks.add("task-001", *TO_RUNNING)
    response = api(method, f"/api/v1/tasks/{path}?x=1", content=body)
    assert {location for location, _, _ in error_locations(response)} == locations
    assert tasks.cancels == []


def test_all_errors_of_a_manifest_have_locations_and_suggestions(api):
    response = api.post("/api/v1/tasks", content=MANIFEST)
    assert error_locations(response, "invalid_manifest") == {
        ("body.vm.memry", "unknown_field", "memory"),
        ("body.vm.cpus", "type", None),
        ("body.vm.network_mode", "enum", "isolated"),
    }
    assert {each["line"] for each in response.json()["details"]} == {6}


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (
            "rerun",
            {"promt": "x", "overrides": ["vm.cpus=1", 5]},
            {("body.promt", "unknown_field", "prompt"), ("body.overrides[1]", "type", None)},
        ),
        ("continue", {}, {("body.prompt", "required", None)}),
        ("continue", {"promt": "x"}, {("body.promt", "unknown_field", "prompt")}),
        (
            "continue",
            {"prompt": " ", "overrides": "vm.cpus=1"},
            {("body.prompt", "format", None), ("body.overrides", "type", None)},
        ),
        ("rerun", [], {("body", "type", None)}),
        (
            "rerun",
            {"overrides": ["vm.cpus", "vm.cpus=1", "secrets[7].name=A"]},
            {("body.overrides[0]", "format", None), ("body.overrides[2]", "format", None)},
        ),
    ],
)
def test_all_errors_of_a_json_body_are_listed(api, tasks, path, body, expected):
    tasks.add("task-001", *TO_RUNNING, *TO_COMPLETED)
    assert error_locations(api.post(f"/api/v1/tasks/task-001/{path}", json=body)) == expected


def test_an_error_in_a_changed_manifest_has_the_location_of_its_override(api, tasks):
    tasks.add("task-001")
    body = {"overrides": ["vm.cpus=many", "vm.cpus=few", "vm={memry: 8G}", "claude.modl=x", "clade.model=x"]}
    response = api.post("/api/v1/tasks/task-001/rerun", json=body)
    locations = {(each["location"], each["field"]) for each in response.json()["details"]}
    assert locations == {
        ("body.overrides[2]", "vm"),
        ("body.overrides[3]", "claude.modl"),
        ("body.overrides[4]", "clade"),
    }


def test_cancel_lists_the_errors_of_its_body(api, tasks):
    tasks.add("task-001")
    response = api("DELETE", "/api/v1/tasks/task-001", json={"reson": "x", "force": "yes", "reason": "two\nlines"})
    assert error_locations(response) == {
        ("body.reson", "unknown_field", "reason"),
        ("body.force", "type", None),
        ("body.reason", "format", None),
    }
    assert tasks.cancels == []


def test_number_of_listed_errors_is_limited(api):
    query = "&".join(f"x{number}=1" for number in range(INPUT_ERRORS_MAX + 50))
    problem = api.get(f"/api/v1/tasks?{query}").json()
    assert len(problem["details"]) == INPUT_ERRORS_MAX
    assert problem["message"].startswith(
        "The request has 150 errors; the first 100 are listed. The first one: query.x0 "
    )
