"""Builds the OpenAPI schema."""

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from sandbox.api import paths
from sandbox.api.auth.sessions import SESSION_COOKIE
from sandbox.api.route_declarations import PROBLEM_JSON
from sandbox.model.manifest.schema import AgentSchema

TAGS = {
    "Tasks": "Submit, list, watch and cancel tasks.",
    "Logs": "Output and events of a task, as a download or a live stream, and state changes of all tasks.",
    "Artifacts": "Results of a task: patch, transcript and files.",
    "Health": "For health probes, load balancers and Prometheus.",
    "Administration": "For operators.",
    "Sessions": "Exchange a token for a session cookie, for browsers.",
}
"""Tags of operations, in documentation order."""

DESCRIPTION = """\
Runs coding agents unattended, each task in its own isolated sandbox. A task starts from a manifest and ends
with a patch.

## Quick start

Set the address of the server, and a token that `sandbox token create` printed. A server without tokens needs no
`Authorization` header.

```sh
SERVER=http://localhost:8122
TOKEN=…
```

1. Submit a manifest. The response contains the `id` of the task, and `links` to everything below.

   ```sh
   curl -X POST "$SERVER/api/v1/tasks" -H "Authorization: Bearer $TOKEN" -H "Content-Type: application/json" -d '{
     "version": "1", "kind": "Task", "metadata": {"name": "Fix the tests"},
     "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
     "AGENT_KIND": {"prompt": "Fix the failing tests."}
   }'
   ```

2. Set `ID` to this `id`, and wait for the task to end. Repeat the request until `finished_at` in the response is not
   null.

   ```sh
   ID=…
   curl "$SERVER/api/v1/tasks/$ID/wait?timeout=600" -H "Authorization: Bearer $TOKEN"
   ```

3. Download the patch, and apply it with `git apply`. It applies to the `base_commit` in the task's status,
   which is the response to `wait`.

   ```sh
   curl "$SERVER/api/v1/tasks/$ID/artifacts/$ID.patch" -H "Authorization: Bearer $TOKEN" -o changes.patch
   ```

## Errors

An error response has the content type `application/problem+json` (RFC 9457). `error` is a stable code for programs,
`message` says what happened and what to do, and `details` lists every error in the request. Retry 429 and 503 after the
time in `Retry-After`. To submit again without a second task, send the same `Idempotency-Key`.

A task that failed is not an error response: its status has `error` with `code`, `reason` and `message`.
"""
"""The description of the API, as Markdown. `build_schema` replaces AGENT_KIND with the first agent's section."""


SERVERS: list[dict[str, Any]] = [{"url": "/", "description": "The server that sends this document"}]
LICENSE: dict[str, Any] = {"name": "Apache License 2.0", "identifier": "Apache-2.0"}


def recorded_examples() -> dict[str, Any]:
    """Return the examples that `script/reference` recorded, keyed by operation or error code."""
    examples: dict[str, Any] = msgspec.json.decode(Path(__file__).with_name("examples.json").read_bytes())
    return examples


def build_schema(
    app: FastAPI, agents: Mapping[str, AgentSchema], examples: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Build the schema once per app. examples: by default, those of `recorded_examples`."""
    if app.openapi_schema is None:
        from sandbox.api.openapi_schemas import component_schemas

        description = app.description.replace("AGENT_KIND", next(iter(agents)))
        described = get_openapi(
            title=app.title,
            version=app.version,
            description=description,
            routes=app.routes,
            servers=SERVERS,
            license_info=LICENSE,
        )
        schema = deepcopy(described)  # `described` contains the routes' dicts, which all apps share
        _remove_unused(schema)
        schema["components"]["schemas"] |= component_schemas(agents)
        _add_examples(schema, recorded_examples() if examples is None else examples)
        schema["tags"] = [{"name": name, "description": description} for name, description in TAGS.items()]
        _add_security(schema)
        app.openapi_schema = schema
    return app.openapi_schema


def _add_examples(schema: dict[str, Any], examples: Mapping[str, Any]) -> None:
    """Add the recorded requests and responses to their operations, and the recorded errors as components."""
    schema["components"]["examples"] = {code: {"value": body} for code, body in examples["errors"].items()}
    for operations in schema["paths"].values():
        for operation in operations.values():
            if operation["operationId"] in examples["operations"]:
                _add_operation_example(operation, examples["operations"][operation["operationId"]])
            for response in operation["responses"].values():
                codes = set(error_codes(response)) & examples["errors"].keys()
                if codes:
                    references = {code: {"$ref": f"#/components/examples/{code}"} for code in sorted(codes)}
                    response["content"][PROBLEM_JSON]["examples"] = references


def error_codes(response: Mapping[str, Any]) -> list[str]:
    """Return the error codes in the description of a response."""
    return re.findall("`([a-z_]+)`", response["description"]) if PROBLEM_JSON in response.get("content", {}) else []


def _add_operation_example(operation: dict[str, Any], example: Mapping[str, Any]) -> None:
    request, response = example["request"], example["response"]
    values = {**request["query"], **request["path_params"], **request["headers"]}
    for parameter in operation.get("parameters", ()):
        if parameter["name"] in values:
            value = _typed_value(values[parameter["name"]], parameter["schema"])
            if parameter["required"]:
                parameter["example"] = value
            else:  # Swagger UI sends the `example` of an optional parameter too
                parameter["schema"]["examples"] = [value]
    if request["body"] is not None:
        for media_type in operation["requestBody"]["content"].values():
            media_type["example"] = request["body"]
    described = operation["responses"][str(response["status"])]
    if response["media_type"] in described.get("content", {}):
        described["content"][response["media_type"]]["example"] = response["body"]


def _typed_value(text: str, schema: Mapping[str, Any]) -> Any:
    """Return the value of a parameter, with the type that its schema declares."""
    kinds = {schema.get("type"), *(each.get("type") for each in schema.get("anyOf", ()))}
    return msgspec.json.decode(text) if kinds & {"integer", "number", "boolean"} else text


def _add_security(schema: dict[str, Any]) -> None:
    """Declare token and session authentication.

    A server without tokens requires neither; health endpoints are public.
    """
    schema["components"]["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "A token created with `sandbox token create`."},
        "session": {
            "type": "apiKey",
            "in": "cookie",
            "name": SESSION_COOKIE,
            "description": "Set when a session is opened; browsers send it automatically.",
        },
    }
    schema["security"] = [{"token": []}, {"session": []}, {}]
    for path in paths.PUBLIC_PATHS & schema["paths"].keys():
        for operation in schema["paths"][path].values():
            operation["security"] = []
            operation["responses"].pop("401", None)


def _remove_unused(schema: dict[str, Any]) -> None:
    """Remove FastAPI's own validation error response, which this API never sends, and empty defaults."""
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    for operations in schema["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["schema"].get("default") == "":  # the same as an absent parameter
                    del parameter["schema"]["default"]
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]
