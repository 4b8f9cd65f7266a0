"""Builds the OpenAPI document, with JSON Schemas of all request and response bodies.

The schemas come from the declarations in `model/wire/` and `model/manifest/`. The server does not validate its
responses; tests do.
"""

import ast
import inspect
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints, is_typeddict

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from sandbox.api import paths
from sandbox.api.authentication import SESSION_COOKIE
from sandbox.api.errors import ERROR_CODES
from sandbox.api.route_declarations import COMPONENT_REF, PROBLEM_JSON, component_name, component_ref
from sandbox.model.events import FollowUp
from sandbox.model.failure import FailureCode, FailureReason
from sandbox.model.manifest.schema import (
    AgentSchema,
    CommonFields,
    Lifecycle,
    Manifest,
    Repository,
    Vm,
    declare_manifest,
)
from sandbox.model.task_state import TaskState
from sandbox.model.wire import event_bodies, server_and_error_bodies, task_bodies
from sandbox.model.wire.request_bodies import CancelRequest, ContinueRequest, RerunRequest

_ENUMS = (TaskState, FollowUp)
"""Enums that have a separate component in the schema. Bodies declare them as a `Literal` with the same values."""

_EXAMPLE = {
    "version": "1",
    "kind": "Task",
    "metadata": {"name": "My Task"},
    "repository": {"url": "https://github.com/org/repo.git", "branch": "main"},
}


def component_schemas(agents: Mapping[str, AgentSchema]) -> dict[str, Any]:
    """Return the schemas of all bodies and events, and of the objects in them, keyed by `component_name`."""
    kinds = (vars(task_bodies) | vars(server_and_error_bodies)).values()
    declared = tuple(kind for kind in kinds if is_typeddict(kind) and kind.__name__.endswith("Body"))
    enums = {enum.__name__: TypeAdapter(enum).json_schema() for enum in _ENUMS}
    described = _with_component_names(_schema_of(tuple.__class_getitem__((*declared, event_bodies.Event))))
    schemas: dict[str, Any] = _with_enum_refs(described["$defs"])
    schemas["Event"] = {
        "description": "An event of a task. The discriminator is `type`.",
        **described["prefixItems"][-1],
    }
    schemas = _with_discriminators(schemas, schemas)
    manifest = _manifest_schemas(agents)
    definition = component_name(task_bodies.ResolvedManifestBody)
    schemas[definition] = _definition_schema(schemas[definition], manifest, agents)
    for body, name, words in (
        (server_and_error_bodies.ProblemBody, "error", ERROR_CODES),
        (task_bodies.FailureBody, "code", FailureCode),
        (task_bodies.FailureBody, "reason", FailureReason),
    ):
        schemas[component_name(body)]["properties"][name]["examples"] = sorted(words)
    requests = {kind.__name__: _request_schema(kind) for kind in (CancelRequest, ContinueRequest, RerunRequest)}
    return schemas | enums | requests | manifest


def _definition_schema(
    declared: dict[str, Any], manifest: Mapping[str, Any], agents: Collection[str]
) -> dict[str, Any]:
    """Return the schema of a task's definition, which contains the section of exactly one agent.

    manifest: the schemas of the manifest. The definition has the same sections as the manifest, except for
        `repository.patch` and `secrets`.
    """
    common = declared["required"]
    described = declared["properties"]
    sections = manifest[Manifest.__name__]["properties"]
    repository = deepcopy(manifest[Repository.__name__])
    repository["properties"]["patch"] = {
        "anyOf": [{"type": "string"}, {"type": "null"}],
        "description": "`sha256:` and the digest of the submitted patch; null if there is none.",
    }
    properties = {name: described[name] for name in common}
    properties["repository"] = {**repository, "description": described["repository"]["description"]}
    for name, record in (("vm", Vm), ("lifecycle", Lifecycle)):
        properties[name] = {**component_ref(record.__name__), "description": described[name]["description"]}
    properties |= {kind: {**sections[kind], "description": f"The manifest's section `{kind}`."} for kind in agents}
    if len(agents) > 1:
        return {**declared, "properties": properties, "oneOf": [{"required": [kind]} for kind in agents]}
    return {**declared, "properties": properties, "required": [*common[:1], *agents, *common[1:]]}


def _request_schema(kind: Any) -> dict[str, Any]:
    """Return the schema of a request's JSON body, without defaults.

    Client generators treat a field with a default as required.
    """
    schema = TypeAdapter(kind).json_schema(ref_template=COMPONENT_REF, schema_generator=_SchemaGenerator)
    for each in schema["properties"].values():
        each.pop("default", None)
    return schema


class _SchemaGenerator(GenerateJsonSchema):
    """Describes each class by its docstring, and each property by the string below it in its class."""

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> dict[str, Any]:
        return _describe(super().typed_dict_schema(schema), schema["cls"])

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> dict[str, Any]:
        return _describe(super().dataclass_schema(schema), schema["cls"])

    def dict_schema(self, schema: core_schema.DictSchema) -> dict[str, Any]:
        """Describe values with additionalProperties even if keys have a pattern; client generators expect this form."""
        described = super().dict_schema(schema)
        for pattern, values in described.pop("patternProperties", {}).items():
            described |= {
                "additionalProperties": values,
                "propertyNames": {**described.get("propertyNames", {}), "pattern": pattern},
            }
        return described


def _schema_of(kind: Any) -> dict[str, Any]:
    """Return the schema of a type. Objects in it do not accept undeclared keys."""
    adapter = TypeAdapter(kind, config=ConfigDict(extra="forbid"))
    return adapter.json_schema(mode="serialization", ref_template=COMPONENT_REF, schema_generator=_SchemaGenerator)


def _with_component_names(schema: Any) -> Any:
    """Remove the suffix `Body` of class names from definitions, references and titles."""
    if isinstance(schema, list):
        return [_with_component_names(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    renamed = {name: _with_component_names(each) for name, each in schema.items()}
    for keyword in {"$ref", "title"} & renamed.keys():
        if isinstance(renamed[keyword], str):  # a property may have the name of a keyword
            renamed[keyword] = renamed[keyword].removesuffix("Body")
    if "$defs" in renamed:
        renamed["$defs"] = {name.removesuffix("Body"): each for name, each in renamed["$defs"].items()}
    return renamed


def _with_enum_refs(schema: Any) -> Any:
    """Replace each list of an enum's values with a reference to the enum's component."""
    if isinstance(schema, list):
        return [_with_enum_refs(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    for enum in _ENUMS:
        if schema.get("enum") == list(enum):
            others = {name: value for name, value in schema.items() if name == "description"}
            return {**component_ref(enum.__name__), **others}
    return {name: _with_enum_refs(each) for name, each in schema.items()}


def _with_discriminators(schema: Any, components: Mapping[str, Any]) -> Any:
    """Describe each choice between objects with a `type` as OpenAPI does. Generated types are then tagged unions."""
    if isinstance(schema, list):
        return [_with_discriminators(each, components) for each in schema]
    if not isinstance(schema, dict):
        return schema
    described = {name: _with_discriminators(each, components) for name, each in schema.items()}
    references = [each.get("$ref", "") for each in described.get("anyOf", ())]
    objects = [components.get(reference.rpartition("/")[2], {}) for reference in references]
    names = [each.get("properties", {}).get("type", {}).get("const") for each in objects]
    if not names or None in names:
        return described
    mapping = dict(zip(names, references, strict=True))
    return {
        **{name: each for name, each in described.items() if name != "anyOf"},
        "oneOf": described["anyOf"],
        "discriminator": {"propertyName": "type", "mapping": mapping},
    }


def _manifest_schemas(agents: Mapping[str, AgentSchema]) -> dict[str, Any]:
    """Return the schemas of the manifest and its records, as clients may send them.

    They allow null for absent fields, and a number for the version.
    """
    declared = declare_manifest({agent.kind: agent.section_type for agent in agents.values()})
    manifest = TypeAdapter(declared).json_schema(ref_template=COMPONENT_REF, schema_generator=_SchemaGenerator)
    manifest = _describe(manifest, CommonFields)
    for agent in agents.values():
        manifest["properties"][agent.kind] |= {"description": inspect.getdoc(agent.section_type)}
    if len(agents) > 1:
        manifest["required"] = [name for name in manifest["required"] if name not in agents]
        manifest["oneOf"] = [{"required": [kind]} for kind in agents]
    example = _EXAMPLE | {next(iter(agents)): {"prompt": "Your instructions here"}}
    schemas: dict[str, Any] = manifest.pop("$defs") | {Manifest.__name__: manifest | {"examples": [example]}}
    for record in schemas.values():
        for name in record["properties"].keys() - set(record.get("required", ())):
            record["properties"][name] = _nullable(record["properties"][name])
    (version,) = get_args(get_type_hints(CommonFields)["version"])
    numbers = [{"const": version, "type": "string"}, {"const": int(version), "type": "integer"}]
    others = {name: value for name, value in manifest["properties"]["version"].items() if name not in numbers[0]}
    manifest["properties"]["version"] = {"anyOf": numbers, **others}
    return schemas


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an optional field, without `default: null`.

    Client generators treat a field with a default as required.
    """
    if {"type": "null"} in schema.get("anyOf", ()):
        return {name: value for name, value in schema.items() if name != "default"}
    described = {name: schema.pop(name) for name in ("description",) if name in schema}
    return {"anyOf": [schema, {"type": "null"}], **described}


def _describe(schema: dict[str, Any], kind: type) -> dict[str, Any]:
    docs = _property_docs(kind)
    properties = {
        name: {**each, "description": docs[name]} if name in docs else each
        for name, each in schema["properties"].items()
    }
    return {**schema, "description": inspect.getdoc(kind), "properties": properties}


def _property_docs(kind: Any) -> dict[str, str]:
    """Return the description of each property of a class, including inherited properties."""
    docs: dict[str, str] = {}
    for base in getattr(kind, "__orig_bases__", kind.__bases__):
        if getattr(base, "__module__", "").startswith("sandbox."):
            docs |= _property_docs(base)
    return docs | _docs_in_module(kind.__module__).get(kind.__name__, {})


@cache
def _docs_in_module(name: str) -> dict[str, dict[str, str]]:
    """Return the strings that follow the annotated names in each class of a module."""
    nodes = ast.parse(inspect.getsource(sys.modules[name])).body
    return {node.name: dict(_docs_in_class(node)) for node in nodes if isinstance(node, ast.ClassDef)}


def _docs_in_class(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for declaration, following in zip(node.body, node.body[1:], strict=False):
        match declaration, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, inspect.cleandoc(text)


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

An error response has the content type `application/problem+json` (RFC 9457). `error` is a stable, machine-readable
code, `message` says what happened and what to do, and `details` lists every error in the request. Retry 429 and 503
after the time in `Retry-After`. To submit again without a second task, send the same `Idempotency-Key`.

A failed task does not cause an error response: its status has `error` with `code`, `reason` and `message`.
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
