"""`openapi.json` describes the API for tools."""

import json
import re

import pytest
from starlette.requests import HTTPConnection

from sandbox.api.openapi import TAGS
from sandbox.api.responses import problem_response


def test_schema_lists_all_paths(api):
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


def operations(schema):
    return [each for operations in schema["paths"].values() for each in operations.values()]


def test_operation_ids_are_function_names(api):
    names = [operation["operationId"] for operation in operations(api.schema)]
    assert len(set(names)) == len(names)
    assert {"submit_task", "list_tasks", "get_task", "cancel_task", "get_logs", "download_artifact"} <= set(names)
    assert [name for name in names if not re.fullmatch("[a-z]+(_[a-z]+)+", name)] == []


def test_every_operation_parameter_and_response_is_described(api):
    for operation in operations(api.schema):
        assert operation["description"], operation["operationId"]
        assert operation["tags"][0] in TAGS
        parts = [*operation.get("parameters", ()), *operation["responses"].values()]
        assert all(part["description"] not in {"", "Successful Response"} for part in parts), operation["operationId"]


def test_json_responses_refer_to_components(api):
    responses = api.schema["paths"]["/api/v1/tasks"]["post"]["responses"]
    content = responses["202"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/SubmittedBody"}
    assert responses["202"]["description"].startswith("The task was accepted.")


def test_operations_document_their_errors_as_problems(api):
    for path, operations in api.schema["paths"].items():
        for operation in operations.values():
            errors = {status for status in operation["responses"] if int(status) >= 400}
            assert errors >= {"400", "403", "429", "500"}, path
            assert ("401" in errors) == (operation.get("security") != []), path
            assert ("422" in errors) == ("Idempotency-Key" in [one["name"] for one in operation.get("parameters", ())])
            for status in errors:
                response = operation["responses"][status]
                assert list(response["content"]) == ["application/problem+json"]
                assert ("Retry-After" in response.get("headers", {})) == (status in {"429", "503"})


@pytest.mark.parametrize(
    ("status", "name"),
    [(404, "Not Found"), (413, "Content Too Large"), (416, "Range Not Satisfiable"), (422, "Unprocessable Content")],
)
def test_problem_title_matches_the_schema(api, status, name):
    connection = HTTPConnection({"type": "http", "path": "/", "headers": []})
    assert json.loads(problem_response(connection, status, "some_code", "Some message.").body)["title"] == name
    documented = [operation["responses"] for paths in api.schema["paths"].values() for operation in paths.values()]
    assert {responses[str(status)]["description"] for responses in documented if str(status) in responses} == {name}


def test_manually_parsed_parameters_are_documented(api):
    def names(path):
        return {(parameter["in"], parameter["name"]) for parameter in api.schema["paths"][path]["get"]["parameters"]}

    assert {("query", "labels"), ("query", "state"), ("query", "offset")} <= names("/api/v1/tasks")
    assert {("header", "Last-Event-ID"), ("query", "after")} <= names("/api/v1/tasks/{task_id}/logs")
    artifact = names("/api/v1/tasks/{task_id}/artifacts/{name}")
    assert {("header", "Range"), ("header", "If-None-Match")} <= artifact
