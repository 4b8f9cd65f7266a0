"""Describes routes for the OpenAPI schema, and builds the schema."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any, cast, get_args, get_origin

import msgspec
from fastapi import APIRouter, Depends, FastAPI
from fastapi.dependencies.utils import get_typed_return_annotation
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from sandbox.api import paths
from sandbox.api.auth.sessions import SESSION_COOKIE
from sandbox.api.errors import STATUS_BY_CODE
from sandbox.api.middleware.response_recording import set_api_route
from sandbox.api.request_parsing import check_params
from sandbox.api.responses import JsonResponse, reason_phrase
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

Responses = dict[int | str, dict[str, Any]]

_RETRY_AFTER = {
    "Retry-After": {"description": "Seconds to wait before the next request", "schema": {"type": "integer"}}
}

COMPONENT_REF = "#/components/schemas/{model}"
"""The reference to a component; `model` is the name of the component's class."""


def component_name(kind: type) -> str:
    """Return the name of a class in the schema and in the reference: `Task` for `TaskBody`."""
    return kind.__name__.removesuffix("Body")


def component_ref(model: str) -> dict[str, str]:
    """Return a reference to a component that `schemas` includes."""
    return {"$ref": COMPONENT_REF.format(model=model)}


class ApiRoute(APIRoute):
    """A route of the API. The name of its function is the operation id, and its return type describes the response.

    The first sentence of the function's docstring is the summary.

    A function that returns `JsonResponse[TaskBody]` responds with the component `Task`. The docstring of `TaskBody`
    describes it.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        responses = _json_responses(endpoint, options["status_code"] or 200) | (options["responses"] or {})
        summary = re.split(r"[.:;](?:\s|$)", inspect.getdoc(endpoint) or "")[0]
        options |= {
            "responses": responses,
            "response_model": None,
            "operation_id": endpoint.__name__,
            "summary": summary,
        }
        with _without_pydantic_v1():
            super().__init__(path, endpoint, **options)


def create_router(tag: str) -> APIRouter:
    """Create a router for routes with this tag. The routes accept only the parameters that they declare."""
    dependencies = [Depends(set_api_route), Depends(check_params)]
    return APIRouter(route_class=ApiRoute, tags=[tag], dependencies=dependencies)


@contextmanager
def _without_pydantic_v1() -> Iterator[None]:
    """Stop FastAPI from importing pydantic.v1, which takes 30 ms; this API does not use pydantic v1 models."""
    name = "pydantic.v1"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = cast("ModuleType", None)
    try:
        yield
    finally:
        del sys.modules[name]


def _json_responses(endpoint: Callable[..., Any], status: int) -> Responses:
    returned = get_typed_return_annotation(endpoint)
    bodies = [get_args(each)[0] for each in (returned, *get_args(returned)) if get_origin(each) is JsonResponse]
    return {status: json_response(bodies[0])} if bodies else {}


def json_response(body: type, **extra: Any) -> dict[str, Any]:
    """Describe a response by the docstring of its body's class, which is in `model/wire/`."""
    content = {"application/json": {"schema": component_ref(component_name(body))}}
    return {"description": inspect.getdoc(body), "content": content, **extra}


_PROBLEM = "application/problem+json"
COMMON_ERROR_CODES = (
    *("invalid_parameter", "unauthorized", "forbidden"),
    *("rate_limit_exceeded", "response_memory_exceeded", "internal_error"),
)
"""The codes of errors that every operation may return. Operations that need no token do not return `unauthorized`."""


def problem_responses(*codes: str) -> Responses:
    """Describe the error responses of an operation: these codes and those that every operation may return."""
    codes_by_status: dict[int, list[str]] = {}
    for code in (*codes, *COMMON_ERROR_CODES):
        codes_by_status.setdefault(STATUS_BY_CODE[code], []).append(code)
    return {status: _problem_response(status, codes_by_status[status]) for status in codes_by_status}


def _problem_response(status: int, codes: Sequence[str]) -> dict[str, Any]:
    """Describe an error response by its codes. `build_schema` adds an example of each code."""
    return {
        "description": f"{reason_phrase(status)}: {' or '.join(f'`{code}`' for code in codes)}",
        "content": {_PROBLEM: {"schema": component_ref("Problem")}},
        **({"headers": _RETRY_AFTER} if status in {429, 503} else {}),
    }


def raw_content(description: str, **media_types: dict[str, Any]) -> dict[str, Any]:
    """Describe a response other than a single JSON value. Takes the schema of each media type."""
    return {"description": description, "content": _content(media_types)}


def with_item_schemas(response: dict[str, Any], **media_types: dict[str, Any]) -> dict[str, Any]:
    """Describe the items of each media type that is a sequence, as OpenAPI 3.2 does."""
    items = {name: {"itemSchema": each["schema"]} for name, each in _content(media_types).items()}
    return {**response, "content": {name: each | items.get(name, {}) for name, each in response["content"].items()}}


def request_body(description: str, *, required: bool, **media_types: dict[str, Any]) -> dict[str, Any]:
    """Describe a body that the route itself reads. Takes the schema of each media type."""
    return {"requestBody": {"description": description, "required": required, "content": _content(media_types)}}


def _content(media_types: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Build the `content` of a body. In an argument's name, the first `_` means `/`, and the others mean `-`."""
    return {name.replace("_", "/", 1).replace("_", "-"): {"schema": schema} for name, schema in media_types.items()}


def declare_parameters(*parameters: dict[str, Any]) -> dict[str, Any]:
    """Describe parameters that the route itself reads."""
    return {"parameters": list(parameters)}


def header_parameter(name: str, description: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    """Describe an optional request header."""
    value = schema or {"type": "string"}
    return {"name": name, "in": "header", "required": False, "description": description, "schema": value}


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
        described = get_openapi(title=app.title, version=app.version, description=description, routes=app.routes)
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
                    response["content"][_PROBLEM]["examples"] = references


def error_codes(response: Mapping[str, Any]) -> list[str]:
    """Return the error codes in the description of a response."""
    return re.findall("`([a-z_]+)`", response["description"]) if _PROBLEM in response.get("content", {}) else []


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
