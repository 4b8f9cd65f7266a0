"""Unknown and repeated query parameters are rejected."""

import pytest

from sandbox.api import request_parsing
from sandbox.model.errors import closest_name
from sandbox.model.fixed_limits import INPUT_ERRORS_MAX


@pytest.mark.parametrize(
    ("path", "field", "advice"),
    [
        ("/api/v1/tasks?states=running", "states", "did you mean 'state'?"),
        ("/api/v1/tasks?page=2", "page", "did you mean 'cursor'?"),
        ("/api/v1/tasks?per_page=50", "per_page", "did you mean 'limit'?"),
        ("/api/v1/tasks?search=login", "search", "did you mean 'q'?"),
        ("/api/v1/tasks?since=2026-01-29", "since", "did you mean 'created_after'?"),
        ("/api/v1/tasks/task-001/artifacts?page=2", "page", "valid parameters: none"),
        (
            "/api/v1/tasks?label=team%3Da",
            "label",
            "parameters: created_after, created_before, cursor, label.*, limit, offset, order, outcome, parent, q, "
            "repository, rerun_of,",
        ),
        ("/api/v1/tasks?labels.team=a", "labels.team", "is an unknown parameter"),
        ("/api/v1/tasks/task-001?follow=true", "follow", "valid parameters: none"),
        ("/api/v1/tasks/task-001/wait?time_out=5", "time_out", "did you mean 'timeout'?"),
        ("/api/v1/tasks/task-001/logs?Follow=true", "Follow", "did you mean 'follow'?"),
        ("/api/v1/tasks/task-001/artifacts?limit=1", "limit", "valid parameters: none"),
        ("/api/v1/tasks/task-001/artifacts/a/b?x=1", "x", "valid parameters: none"),
        ("/api/v1/health?verbose=1", "verbose", "valid parameters: none"),
        (f"/api/v1/health?{'x' * 5000}=1", "x" * 64, "valid parameters: none"),
    ],
)
def test_unknown_parameter_error_lists_the_known_parameters(api, tasks, path, field, advice):
    tasks.add("task-001")
    response = api.get(path)
    assert (response.status_code, response.json()["error"]) == (400, "invalid_parameter")
    detail = response.json()["details"][0]
    assert (detail["field"], detail["rule"]) == (field, "unknown_field")
    assert advice in detail["message"]


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/api/v1/tasks?state=running&state=pending", "state"),
        ("/api/v1/tasks?limit=1&label.team=a&limit=5", "limit"),
        ("/api/v1/tasks/task-001/logs?tail=1&tail=1", "tail"),
    ],
)
def test_repeated_parameter_is_rejected(api, tasks, path, field):
    tasks.add("task-001")
    response = api.get(path)
    assert (response.status_code, response.json()["error"]) == (400, "invalid_parameter")
    assert response.json()["details"][0]["field"] == field
    assert "give it once" in response.json()["message"]


def test_operations_accept_exactly_the_documented_parameters(api, tasks):
    tasks.add("task-001")
    for path, operations in api.schema["paths"].items():
        url = path.format(task_id="task-001", name="a", host="build-1")
        for method, operation in operations.items():
            query_parameters = [
                parameter for parameter in operation.get("parameters", ()) if parameter["in"] == "query"
            ]
            names = [
                "label.*" if parameter["name"] == "labels" else parameter["name"] for parameter in query_parameters
            ]
            detail = api(method.upper(), f"{url}?0=1").json()["details"][0]
            valid = ", ".join(sorted(names)) or "none"
            assert (detail["field"], detail["message"]) == ("0", f"is an unknown parameter; valid parameters: {valid}")


def test_request_does_not_generate_the_schema(api):
    assert api.get("/api/v1/tasks?limit=1").status_code == 200
    assert api.app.openapi_schema is None


def test_cancel_with_unknown_parameter_cancels_nothing(api, tasks):
    tasks.add("task-001")
    assert api.delete("/api/v1/tasks/task-001?forced=true").status_code == 400
    assert tasks.cancels == []
    assert api.delete("/api/v1/tasks/task-001?force=true&reason=done").status_code == 200


def test_label_parameters_are_accepted(api):
    assert api.get("/api/v1/tasks?label.states=a&label.states=a&label.=b&state=running&limit=1").status_code == 200


def test_suggestions_are_computed_only_for_listed_errors(api, monkeypatch):
    searched = []

    def search(name, known):
        searched.append(name)
        return closest_name(name, known)

    monkeypatch.setattr(request_parsing, "closest_name", search)
    names = [f"stat{number}" for number in range(1000)]
    problem = api.get(f"/api/v1/tasks?{'&'.join(names)}").json()
    assert problem["message"].startswith(
        "The request has 1000 errors; the first 100 are listed. The first one: query.stat0 "
    )
    assert [(detail["field"], detail["suggestion"]) for detail in problem["details"]] == [
        (name, "state") for name in names[:INPUT_ERRORS_MAX]
    ]
    assert searched == names[:INPUT_ERRORS_MAX]
    problem = api.get(f"/api/v1/tasks?{'&'.join(names[:3])}").json()
    assert [detail["suggestion"] for detail in problem["details"]] == ["state"] * 3
