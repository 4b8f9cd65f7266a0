"""`openapi.json` describes the API for tools."""

import json
import re

import pytest
from jsonschema import Draft202012Validator
from starlette.requests import HTTPConnection

from doubles.manifests import parse_manifest
from sandbox.agents import registered_agents
from sandbox.api.app import create_api_schema_app
from sandbox.api.openapi import TAGS, error_codes
from sandbox.api.responses import problem_response
from sandbox.model.failure import FailureCode, FailureReason


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


MEDIA_TYPE_KEYWORDS = {"schema", "example", "examples", "encoding"}
"""The keywords of a media type in OpenAPI 3.1. Extensions start with `x-`."""


def test_media_types_have_only_keywords_of_openapi_3_1(api):
    assert api.schema["openapi"].startswith("3.1.")
    bodies = [body for each in operations(api.schema) for body in each["responses"].values()]
    bodies += [each["requestBody"] for each in operations(api.schema) if "requestBody" in each]
    media_types = [media_type for body in bodies for media_type in body.get("content", {}).values()]
    keywords = {keyword for media_type in media_types for keyword in media_type if not keyword.startswith("x-")}
    assert keywords <= MEDIA_TYPE_KEYWORDS
    streams = [media_type for media_type in media_types if "x-itemSchema" in media_type]
    assert len(streams) >= 2
    assert all("schema" in stream for stream in streams)


def test_schema_names_the_server_and_the_license(api):
    assert [server["url"] for server in api.schema["servers"]] == ["/"]
    assert api.schema["info"]["license"] == {"name": "Apache License 2.0", "identifier": "Apache-2.0"}


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
    assert content["schema"] == {"$ref": "#/components/schemas/Submitted"}
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
    documented = [operation["responses"] for operation in operations(api.schema)]
    described = [responses[str(status)]["description"] for responses in documented if str(status) in responses]
    assert described
    assert {description.partition(":")[0] for description in described} == {name}


def test_manually_parsed_parameters_are_documented(api):
    def names(path):
        return {(parameter["in"], parameter["name"]) for parameter in api.schema["paths"][path]["get"]["parameters"]}

    assert {("query", "labels"), ("query", "state"), ("query", "offset")} <= names("/api/v1/tasks")
    assert {("header", "Last-Event-ID"), ("query", "after")} <= names("/api/v1/tasks/{task_id}/logs")
    artifact = names("/api/v1/tasks/{task_id}/artifacts/{name}")
    assert {("header", "Range"), ("header", "If-None-Match")} <= artifact


def test_every_operation_has_an_example_of_its_request_and_response(api):
    for operation in operations(api.schema):
        name = operation["operationId"]
        assert operation["summary"], name
        for media_type in operation.get("requestBody", {}).get("content", {}).values():
            assert "example" in media_type or not operation["requestBody"]["required"], name
            if "example" in media_type:
                validator(api, media_type["schema"]).validate(media_type["example"])
        required = [each for each in operation.get("parameters", ()) if each["required"]]
        assert all("example" in each for each in required), name
        for parameter in operation.get("parameters", ()):
            for example in [*parameter["schema"].get("examples", ()), *filter(None, [parameter.get("example")])]:
                validator(api, parameter["schema"]).validate(example)
        examples = [
            (media_type["schema"], media_type["example"])
            for status, response in operation["responses"].items()
            for media_type in response.get("content", {}).values()
            if int(status) < 300 and "example" in media_type
        ]
        assert len(examples) == (name != "close_session"), name
        for schema, example in examples:
            validator(api, schema).validate(example)


def test_app_without_examples_has_no_examples_from_another_app(api):
    agents, without = registered_agents(), {"operations": {}, "errors": {}}
    assert create_api_schema_app("0", agents).openapi()["components"]["examples"]
    schema = create_api_schema_app("0", agents, without).openapi()
    assert not [name for name in ("example", "examples") if f'"{name}":' in json.dumps(schema["paths"])]


def test_every_documented_error_has_an_example_with_its_code_and_status(api):
    examples = api.schema["components"]["examples"]
    documented = set()
    for operation in operations(api.schema):
        for status, response in operation["responses"].items():
            documented |= set(error_codes(response))
            for code in response.get("content", {}).get("application/problem+json", {}).get("examples", {}):
                body = examples[code]["value"]
                assert (body["error"], str(body["status"])) == (code, status)
    assert documented - examples.keys() == {"response_memory_exceeded"}
    assert examples.keys() <= documented
    for example in examples.values():
        validator(api, {"$ref": "#/components/schemas/Problem"}).validate(example["value"])


def validator(api, schema):
    return Draft202012Validator({**schema, "components": api.schema["components"]})


def test_deprecated_properties_are_marked(api):
    deprecated = {
        (name, field)
        for name, component in api.schema["components"]["schemas"].items()
        for field, described in component.get("properties", {}).items()
        if described.get("deprecated")
    }
    same_as_id = {(name, "task_id") for name in ("Submitted", "Cancelled", "Released", "Deleted")}
    always_null = {("TaskItem", "vm_ip"), ("Task", "vm_ip")}
    assert deprecated == {("Cancelled", "cancelled_at")} | same_as_id | always_null


@pytest.mark.parametrize(
    ("path", "name"), [("/api/v1/tasks", "created_after"), ("/api/v1/tasks/{task_id}/logs", "since")]
)
def test_time_parameters_have_a_single_type(api, path, name):
    (schema,) = [each["schema"] for each in api.schema["paths"][path]["get"]["parameters"] if each["name"] == name]
    assert (schema["type"], schema["format"], "anyOf" in schema) == ("string", "date-time", False)


def test_schema_lists_the_known_codes(api):
    """The codes are listed as examples, because generated types must accept codes that later versions add."""
    components = api.schema["components"]["schemas"]
    failure = components["Failure"]["properties"]
    assert failure["code"]["type"] == "string"
    assert failure["code"]["examples"] == sorted(FailureCode)
    assert failure["reason"]["examples"] == sorted(FailureReason)
    error = components["Problem"]["properties"]["error"]
    assert "enum" not in error
    documented = {
        code
        for operation in operations(api.schema)
        for each in operation["responses"].values()
        for code in error_codes(each)
    }
    assert set(error["examples"]) >= documented | {"not_found", "bad_request", "method_not_allowed"}


def test_definition_has_the_sections_of_the_manifest(api):
    components = api.schema["components"]["schemas"]
    properties = components["ResolvedManifest"]["properties"]
    sections = {name: agent.section_type.__name__ for name, agent in registered_agents().items()}
    for name, component in {"vm": "Vm", "lifecycle": "Lifecycle", **sections}.items():
        alternatives = properties[name].get("anyOf", [properties[name]])  # with several agents, a section is optional
        assert alternatives[0]["$ref"] == f"#/components/schemas/{component}"
    repository = components["Repository"]["properties"]
    assert properties["repository"]["properties"].keys() == repository.keys()
    assert "sha256" in properties["repository"]["properties"]["patch"]["description"]
    assert "Base64" in repository["patch"]["description"]


def test_descriptions_refer_to_no_files(api):
    assert re.findall(r"docs/\w+\.md", json.dumps(api.schema)) == []


def test_description_has_a_quick_start(api):
    description = api.schema["info"]["description"]
    [manifest] = re.findall(r"-d '(\{.*?\})'", description, re.DOTALL)
    assert parse_manifest(manifest.encode(), is_json=True).agent.prompt
    paths = re.findall(r'"\$SERVER(/[^"?]*)', description)
    known = [re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path)) for path in api.schema["paths"]]
    assert len(paths) == 3
    assert [path for path in paths if not any(re.fullmatch(each, path) for each in known)] == []
    assert "problem+json" in description
