"""Somebody mistypes a query parameter or gives it twice and is told, rather than given something else."""

import pytest


@pytest.mark.parametrize(
    ("path", "field", "advice"),
    [
        ("/api/v1/tasks?states=running", "states", "did you mean state?"),
        (
            "/api/v1/tasks?label=team%3Da",
            "label",
            "valid parameters: cursor, label.*, limit, offset, order, sort, state",
        ),
        ("/api/v1/tasks?labels.team=a", "labels.team", "is unknown"),
        ("/api/v1/tasks/task-001?follow=true", "follow", "valid parameters: none"),
        ("/api/v1/tasks/task-001/wait?time_out=5", "time_out", "did you mean timeout?"),
        ("/api/v1/tasks/task-001/logs?Follow=true", "Follow", "did you mean follow?"),
        ("/api/v1/tasks/task-001/artifacts?limit=1", "limit", "valid parameters: none"),
        ("/api/v1/tasks/task-001/artifacts/a/b?x=1", "x", "valid parameters: none"),
        ("/api/v1/health?verbose=1", "verbose", "valid parameters: none"),
        (f"/api/v1/health?{'x' * 5000}=1", "x" * 64, "valid parameters: none"),
    ],
)
def test_an_unknown_parameter_is_named_with_the_known_ones(api, tasks, path, field, advice):
    tasks.add("task-001")
    answer = api.get(path)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_parameter")
    detail = answer.json()["details"][0]
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
def test_a_parameter_that_is_given_twice_is_named(api, tasks, path, field):
    tasks.add("task-001")
    answer = api.get(path)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_parameter")
    assert answer.json()["details"][0]["field"] == field
    assert "give it once" in answer.json()["message"]


def test_every_operation_takes_the_parameters_that_the_schema_tells_of_and_no_other(api, tasks):
    tasks.add("task-001")
    for path, operations in api.schema["paths"].items():
        address = path.format(task_id="task-001", name="a")
        for method, operation in operations.items():
            told = [one for one in operation.get("parameters", ()) if one["in"] == "query"]
            names = ["label.*" if one["name"] == "labels" else one["name"] for one in told]
            detail = api(method.upper(), f"{address}?0=1").json()["details"][0]
            valid = ", ".join(sorted(names)) or "none"
            assert (detail["field"], detail["message"]) == ("0", f"is unknown; valid parameters: {valid}")


def test_no_schema_is_made_to_hold_a_question_against(api):
    assert api.get("/api/v1/tasks?limit=1").status_code == 200
    assert api.app.openapi_schema is None


def test_a_cancel_with_a_mistyped_wish_cancels_nothing(api, tasks):
    tasks.add("task-001")
    assert api.delete("/api/v1/tasks/task-001?forced=true").status_code == 400
    assert tasks.cancels == []
    assert api.delete("/api/v1/tasks/task-001?force=true&reason=done").status_code == 200


def test_labels_of_any_name_are_known(api):
    assert api.get("/api/v1/tasks?label.states=a&label.states=a&label.=b&state=running&limit=1").status_code == 200
