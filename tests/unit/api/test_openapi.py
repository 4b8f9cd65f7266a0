"""`openapi.json` tells tools what there is."""

import json

import pytest
from starlette.requests import HTTPConnection

from sandbox.api.responses import problem_response


def test_it_is_served_and_lists_every_address(api):
    schema = api.get("/openapi.json").json()
    assert set(schema["paths"]) >= {
        "/api/v1/tasks",
        "/api/v1/tasks/{task_id}",
        "/api/v1/tasks/{task_id}/wait",
        "/api/v1/tasks/{task_id}/logs",
        "/api/v1/tasks/{task_id}/artifacts",
        "/api/v1/tasks/{task_id}/artifacts/{name}",
        "/api/health",
        "/api/v1/health",
        "/api/v1/health/ready",
        "/api/v1/health/live",
    }


def test_every_operation_documents_its_errors_in_the_one_shape(api):
    for path, operations in api.schema["paths"].items():
        for operation in operations.values():
            errors = {status for status in operation["responses"] if int(status) >= 400}
            assert errors >= {"400", "403", "429", "500"}, path
            assert ("401" in errors) == (operation.get("security") != []), path
            assert ("422" in errors) == (operation["operationId"].startswith("submit_task"))
            for status in errors:
                answer = operation["responses"][status]
                assert list(answer["content"]) == ["application/problem+json"]
                assert ("Retry-After" in answer.get("headers", {})) == (status in {"429", "503"})


@pytest.mark.parametrize(
    ("status", "name"),
    [(404, "Not Found"), (413, "Content Too Large"), (416, "Range Not Satisfiable"), (422, "Unprocessable Content")],
)
def test_a_problem_has_the_title_that_the_schema_gives_it(api, status, name):
    asked = HTTPConnection({"type": "http", "path": "/", "headers": []})
    assert json.loads(problem_response(asked, status, "some_code", "Some message.").body)["title"] == name
    told = [operation["responses"] for paths in api.schema["paths"].values() for operation in paths.values()]
    assert {answers[str(status)]["description"] for answers in told if str(status) in answers} == {name}


def test_what_routes_read_by_themselves_is_listed_too(api):
    def names(path):
        return {(told["in"], told["name"]) for told in api.schema["paths"][path]["get"]["parameters"]}

    assert {("query", "labels"), ("query", "state"), ("query", "offset")} <= names("/api/v1/tasks")
    assert {("header", "Last-Event-ID"), ("query", "after")} <= names("/api/v1/tasks/{task_id}/logs")
    artifact = names("/api/v1/tasks/{task_id}/artifacts/{name}")
    assert {("header", "Range"), ("header", "If-None-Match")} <= artifact
