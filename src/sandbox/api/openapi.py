"""Builds the OpenAPI schema, including errors and streams."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from sandbox.api import paths
from sandbox.api.auth.sessions import SESSION_COOKIE
from sandbox.api.responses import reason_phrase
from sandbox.model.manifest.schema import Manifest

_EXAMPLE = {
    "version": "1",
    "kind": "Task",
    "metadata": {"name": "My Task"},
    "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
    "claude": {"prompt": "Your instructions here"},
}

_TAGS = {
    "Tasks": "Submit, list, watch and cancel tasks.",
    "Logs": "Output and events of a task, as a download or a live stream.",
    "Artifacts": "Results of a task: patch, transcript and files.",
    "Health": "For health probes, load balancers and Prometheus.",
    "Administration": "For operators.",
    "Sessions": "Exchanges a token for a session cookie, for browsers.",
}
"""Tags of operations, in the order of the documentation."""

Responses = dict[int | str, dict[str, Any]]

_COMPONENT_REF = "#/components/schemas/{model}"
_PROBLEM_REF = {"$ref": _COMPONENT_REF.format(model="ProblemBody")}

_RETRY_AFTER = {
    "Retry-After": {"description": "Seconds to wait before the next request", "schema": {"type": "integer"}}
}

MANIFEST_REF = {"$ref": _COMPONENT_REF.format(model=Manifest.__name__)}
"""The schema of a manifest. Dependencies between fields and text formats are documented in docs/manifest.md only."""


def responses_for(model: str, status: int = 200, **extra: Any) -> Responses:
    """Describe a JSON response by the name of its model in `schemas`, which is imported only to build the schema."""
    schema = {"$ref": _COMPONENT_REF.format(model=model)}
    return {status: {"content": {"application/json": {"schema": schema}}, **extra}}


def problem_responses(*statuses: int) -> Responses:
    """Describe the error responses of an operation: these statuses and those that every operation may return."""
    return {
        status: _response(reason_phrase(status), "application/problem+json", _PROBLEM_REF)
        | ({"headers": _RETRY_AFTER} if status in {429, 503} else {})
        for status in (*statuses, 400, 401, 403, 429, 500)
    }


def raw_content(description: str, *media_types: str) -> dict[str, Any]:
    """Describe a response that is not one JSON value: bytes or a stream, which have no schema."""
    return {"description": description, "content": {media_type: {} for media_type in media_types}}


def request_body(description: str, *, required: bool, **schemas: dict[str, Any]) -> dict[str, Any]:
    """Describe a body that the route reads itself. In a media type's name, the first `_` means `/`, others mean `-`."""
    media = {name.replace("_", "/", 1).replace("_", "-"): {"schema": schema} for name, schema in schemas.items()}
    return {"requestBody": {"description": description, "required": required, "content": media}}


def declare_parameters(*parameters: dict[str, Any]) -> dict[str, Any]:
    """Describe parameters that the route reads itself."""
    return {"parameters": list(parameters)}


def header_parameter(name: str, description: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    """Describe an optional request header."""
    value = schema or {"type": "string"}
    return {"name": name, "in": "header", "required": False, "description": description, "schema": value}


def build_schema(app: FastAPI) -> dict[str, Any]:
    """Build the schema once per app."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _remove_unused(schema)
        schema["components"]["schemas"] |= _body_schemas() | _manifest_schemas()
        _add_tags(schema)
        _add_security(schema)
        app.openapi_schema = schema
    return app.openapi_schema


def _body_schemas() -> dict[str, Any]:
    """Return the schemas of the response bodies."""
    from pydantic.json_schema import models_json_schema

    from sandbox.api.schemas import RESPONSE_BODIES

    _, definitions = models_json_schema(
        [(model, "serialization") for model in RESPONSE_BODIES], ref_template=_COMPONENT_REF
    )
    schemas: dict[str, Any] = definitions["$defs"]
    return schemas


def _manifest_schemas() -> dict[str, Any]:
    """Return the schemas of the manifest and its records.

    They allow null for absent fields, and the number 1 for the version "1".
    """
    manifest = TypeAdapter(Manifest).json_schema(ref_template=_COMPONENT_REF)
    schemas: dict[str, Any] = manifest.pop("$defs") | {Manifest.__name__: manifest | {"examples": [_EXAMPLE]}}
    for record in schemas.values():
        optional = record["properties"].keys() - set(record.get("required", ()))
        for name in optional:
            value = record["properties"][name]
            if {"type": "null"} not in value.get("anyOf", ()):
                record["properties"][name] = {"anyOf": [value, {"type": "null"}]}
    manifest["properties"]["version"] = {"enum": ["1", 1]}
    return schemas


def _add_tags(schema: dict[str, Any]) -> None:
    schema["tags"] = [{"name": name, "description": description} for name, description in _TAGS.items()]
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["tags"] = [_tag_for(path)]


def _tag_for(path: str) -> str:
    tags = {
        paths.ARTIFACTS: "Artifacts",
        paths.LOGS: "Logs",
        paths.TASKS: "Tasks",
        paths.SESSION: "Sessions",
        paths.DRAIN: "Administration",
        paths.PRUNE: "Administration",
    }
    return next((tag for prefix, tag in tags.items() if path.startswith(prefix)), "Health")


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


def _response(description: str, media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _remove_unused(schema: dict[str, Any]) -> None:
    """Remove FastAPI's own validation error response, which this API never sends."""
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    for operations in schema["paths"].values():
        for operation in operations.values():
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]
