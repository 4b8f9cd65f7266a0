"""Declares routes: their parameters, bodies and responses in the OpenAPI document."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast, get_args, get_origin

from fastapi import APIRouter, Depends
from fastapi.dependencies.utils import get_typed_return_annotation
from fastapi.routing import APIRoute

from sandbox.api.errors import STATUS_BY_CODE
from sandbox.api.observability import set_api_route
from sandbox.api.request_parsing import check_params
from sandbox.api.responses import JsonResponse, reason_phrase

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


PROBLEM_JSON = "application/problem+json"
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
        "content": {PROBLEM_JSON: {"schema": component_ref("Problem")}},
        **({"headers": _RETRY_AFTER} if status in {429, 503} else {}),
    }


def raw_content(description: str, **media_types: dict[str, Any]) -> dict[str, Any]:
    """Describe a response other than a single JSON value. Takes the schema of each media type."""
    return {"description": description, "content": _content(media_types)}


ITEM_SCHEMA = "x-itemSchema"
"""The extension for the schema of the items of a stream, named after the keyword of OpenAPI 3.2."""


def with_item_schemas(response: dict[str, Any], **media_types: dict[str, Any]) -> dict[str, Any]:
    """Describe the items of each media type that is a sequence. OpenAPI 3.1 has no keyword for this; 3.2 has one."""
    items = {name: {ITEM_SCHEMA: each["schema"]} for name, each in _content(media_types).items()}
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
