"""Generates `docs/rest-reference.md`, and its contents in `docs/rest.md`, from the schema and the recorded examples."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any
from urllib.parse import quote_plus, urlencode

from sandbox.api.openapi import error_codes
from sandbox.api.route_declarations import COMMON_ERROR_CODES
from sandbox.model.task_state import TaskState

SERVER = "http://localhost:8122"
PREFIX = "/api/v1"
"""The prefix of most paths, which headings omit."""
GUIDE = "rest.md"
REFERENCE = "rest-reference.md"
_EXAMPLE_LINES_MAX = 40
"""Longer responses are shown only for some operations."""
_LONG_EXAMPLES = ("get_task", "list_tasks", "get_health")
_FIRST_OPERATIONS = ("submit_task", "get_task", "wait_for_task", "list_tasks")
"""The operations that most readers need."""
_FAILED_STATUS_FIELDS = (
    "id",
    "state",
    "state_message",
    "exit_code",
    "error",
    "final_message",
    "attempts",
    "sandbox_kept",
)

_PROBLEM = "Problem"
_JSON_COLUMNS_MAX = 88

Schema = dict[str, Any]


def rest_reference(schema: Schema, examples: Mapping[str, Any], failed_status: Mapping[str, Any]) -> str:
    """Return the Markdown of all endpoints, and of the objects in their bodies.

    failed_status: the status of a failed task.
    """
    page = _Page(schema, failed_status)
    lines = []
    for tag, operations in groupby(page.operations(), lambda operation: operation[2]["tags"][0]):
        lines += [f"## {tag}\n", *(line for each in operations for line in page.endpoint(*each, examples))]
    return "\n".join([*lines, "## Objects\n", *page.objects()])


def reference_contents(schema: Schema, reference: str) -> str:
    """Return a table of all endpoints and a list of all objects, with links to the reference.

    The guide once contained the reference, so the contents keep the anchors of the reference.
    """
    rows = ["| endpoint | description |", "| --- | --- |"]
    for method, path, operation in _operations(schema):
        heading = f"{method} {path.removeprefix(PREFIX)}"
        anchor = _anchor(method, path)
        anchors = dict.fromkeys([anchor, _slug(heading)])
        marks = "".join(f'<a id="{each}"></a>' for each in anchors)
        rows.append(f"| {marks}[`{heading}`]({REFERENCE}#{anchor}) | {operation['summary']} |")
    objects = re.findall(r"^### (\w+)$", reference, re.MULTILINE)
    links = [f'<a id="{name.lower()}"></a>[{name}]({REFERENCE}#{name.lower()})' for name in objects]
    return "\n".join([*rows, "", '<a id="objects"></a>Objects: ' + ",\n".join(links) + ".\n"])


def cell(text: str) -> str:
    """Return the text as a cell of a Markdown table."""
    return re.sub(r"(?<!\\)\|", "\\\\|", " ".join(text.split()))


class _Page:
    def __init__(self, schema: Schema, failed_status: Mapping[str, Any]) -> None:
        self._schema = schema
        self._failed_status = failed_status
        self._components: dict[str, Schema] = schema["components"]["schemas"]
        self._uses = Counter(model for _, _, operation in self.operations() for model in _response_models(operation))
        self._linked = [_PROBLEM]
        self._manifest = _manifest_models(self._components)

    def operations(self) -> list[tuple[str, str, Schema]]:
        return _operations(self._schema)

    def endpoint(self, method: str, path: str, operation: Schema, examples: Mapping[str, Any]) -> Iterator[str]:
        example = examples["operations"][operation["operationId"]]
        # The description begins with the summary.
        first, *others = operation["description"].strip().split("\n\n", 1)
        yield f"### `{method} {path.removeprefix(PREFIX)}`\n"
        yield f'<a id="{_anchor(method, path)}"></a>{" ".join([first, *others])}\n'
        yield f"```sh\n{_curl(example['request'])}\n```\n"
        yield from _response_example(example["response"], is_shown=operation["operationId"] in _LONG_EXAMPLES)
        if operation["operationId"] == "get_task":
            shortened = {name: self._failed_status[name] for name in _FAILED_STATUS_FIELDS}
            yield "The status of a failed task, shortened:\n"
            yield f"```json\n{_json_lines(shortened)}\n```\n"
        yield from self._parameters(operation)
        yield from self._request_body(operation)
        yield from self._responses(operation)
        yield f"Errors: {_errors(operation)}.\n"

    def objects(self) -> Iterator[str]:
        """Yield a table for each linked object, sorted by name; a table may link to more objects."""
        tables: dict[str, list[str]] = {}
        while pending := {*self._linked} - tables.keys():
            for model in pending:
                tables[model] = list(self._fields(self._components[model]))
        for model in sorted(tables):
            yield f"### {model}\n"
            yield f"{self._components[model]['description']}\n"
            yield from tables[model]

    def _parameters(self, operation: Schema) -> Iterator[str]:
        parameters = [each for each in operation.get("parameters", ()) if each["in"] != "path"]
        if parameters:
            yield "| parameter | in | type | description |\n| --- | --- | --- | --- |"
            for each in parameters:
                patterns = each["schema"].get("patternProperties")
                name, type_ = ("label.KEY", "string") if patterns else (each["name"], self._type(each["schema"]))
                yield f"| `{name}` | {each['in']} | {type_} | {_purpose(each)} |"
            yield ""

    def _request_body(self, operation: Schema) -> Iterator[str]:
        if "requestBody" not in operation:
            return
        body = operation["requestBody"]
        media_types = ", ".join(f"`{media_type}`" for media_type in body["content"])
        optional = "" if body["required"] else "; optional"
        models = {media["schema"].get("$ref", "").rpartition("/")[2] for media in body["content"].values()} - {""}
        if models == {"Manifest"}:
            yield f"Body ({media_types}{optional}): {body['description']} See [manifest](manifest.md).\n"
            return
        yield f"Body ({media_types}{optional}): {body['description']}\n"
        for model in sorted(models):
            yield from self._fields(self._components[model])

    def _responses(self, operation: Schema) -> Iterator[str]:
        for status, response in sorted(operation["responses"].items()):
            if int(status) >= 400:
                continue
            media_types = ", ".join(f"`{media_type}`" for media_type in response.get("content", ()))
            described = response["description"].removesuffix(".")
            suffix = f" ({media_types})" if media_types else ""
            model = _model(response)
            if model is not None and self._uses[model] > 1:
                yield f"Response {status}{suffix}: {described}. Fields: {self._link(model)}.\n"
                continue
            yield f"Response {status}{suffix}: {described}.\n"
            if model is not None:
                yield from self._fields(self._components[model])

    def _fields(self, component: Schema) -> Iterator[str]:
        if "enum" in component:
            yield f"One of {_values(component['enum'])}.\n"
            if component["enum"] == list(TaskState):
                final = [state for state in component["enum"] if TaskState(state).is_final]
                yield f"A task in one of the states {_values(final)} has ended. These states are final.\n"
            return
        yield "| field | type | meaning |\n| --- | --- | --- |"
        required = component.get("required", ())
        for name, each in component.get("properties", {}).items():
            optional = "" if name in required else "; optional"
            deprecated = "Deprecated. " if each.get("deprecated") else ""
            yield f"| `{name}` | {self._type(each)}{optional} | {cell(deprecated + each.get('description', ''))} |"
        yield ""

    def _type(self, schema: Schema) -> str:
        if "$ref" in schema:
            return self._link(schema["$ref"].rpartition("/")[2])
        alternatives = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
        if any("$ref" in each or "type" in each for each in alternatives):
            return " or ".join(dict.fromkeys(self._type(each) for each in alternatives))
        if "const" in schema:
            return f"`{json.dumps(schema['const'])}`"
        if "enum" in schema:
            return "string"
        kind = schema.get("type", "any")
        if kind == "array":
            return f"list of {self._type(schema['items'])}"
        if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
            return f"object, values: {self._type(schema['additionalProperties'])}"
        return "time" if schema.get("format") == "date-time" else str(kind)

    def _link(self, model: str) -> str:
        if model in self._manifest:
            return "[object](manifest.md)"
        self._linked.append(model)
        return f"[{model}](#{model.lower()})"


def _operations(schema: Schema) -> list[tuple[str, str, Schema]]:
    """Return the operations in the order of the schema, with `_FIRST_OPERATIONS` first in their sections."""
    operations = [
        (method.upper(), path, operation)
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    ]
    tags = list(dict.fromkeys(operation["tags"][0] for _, _, operation in operations))

    def position(each: tuple[str, str, Schema]) -> tuple[int, int]:
        name = each[2]["operationId"]
        return tags.index(each[2]["tags"][0]), _FIRST_OPERATIONS.index(name) if name in _FIRST_OPERATIONS else len(
            _FIRST_OPERATIONS
        )

    return sorted(operations, key=position)


def _response_models(operation: Schema) -> set[str]:
    models = {_model(response) for status, response in operation["responses"].items() if int(status) < 400}
    return {model for model in models if model is not None}


def _model(response: Schema) -> str | None:
    reference = response.get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "")
    return reference.rpartition("/")[2] or None


def _manifest_models(components: Mapping[str, Schema]) -> set[str]:
    """Return the names of the manifest and of its records, which another page describes."""
    found: set[str] = set()
    pending = {"Manifest"}
    while pending:
        found |= pending
        text = json.dumps([components[model] for model in pending])
        pending = {*re.findall(r'"#/components/schemas/(\w+)"', text)} - found
    return found


def _errors(operation: Schema) -> str:
    codes = {
        code: status for status, response in sorted(operation["responses"].items()) for code in error_codes(response)
    }
    specific = [f"{status} `{code}`" for code, status in codes.items() if code not in COMMON_ERROR_CODES]
    every = f"[every request]({GUIDE}#errors)"
    return ", ".join([*specific, f"and those of {every}"] if specific else [f"those of {every}"])


def _purpose(parameter: Schema) -> str:
    declared = parameter["schema"]
    schema = {**next((each for each in declared.get("anyOf", ()) if "type" in each), {}), **declared}
    values = schema.get("enum") or schema.get("items", {}).get("enum")
    parts = [parameter.get("description") or schema.get("description", "")]
    if values:
        parts.append("one of " + _values(values))
    bounds = [str(schema[bound]) for bound in ("minimum", "maximum") if bound in schema]
    if bounds:
        parts.append(" to ".join(bounds) if len(bounds) == 2 else f"from {bounds[0]}")
    if "maxLength" in schema:
        parts.append(f"at most {schema['maxLength']} characters")
    if schema.get("default") is not None:
        parts.append(f"default `{json.dumps(schema['default']).strip(chr(34))}`")
    return cell("; ".join(part for part in parts if part))


def _values(values: list[str]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _curl(request: Mapping[str, Any]) -> str:
    """Return the command that sends a request."""
    path = request["path"].format(**{name: quote_plus(value) for name, value in request["path_params"].items()})
    url, query = f"{SERVER}{path}", request["query"]
    method = [] if request["method"] == "GET" else [f"-X {request['method']}"]
    if query:
        url += f"?{urlencode(query, safe=',')}"
    options = [f"-H {shlex.quote(f'{name}: {value}')}" for name, value in request["headers"].items()]
    if request["body"] is not None:
        options += ["-H 'Content-Type: application/json'", f"-d {shlex.quote(json.dumps(request['body'], indent=2))}"]
    return " \\\n  ".join([" ".join(["curl", *method, shlex.quote(url)]), *options])


def _anchor(method: str, path: str) -> str:
    """Return the id for links to an endpoint."""
    return _slug(f"{method} {path}")


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _json_lines(body: Any, indent: int = 0) -> str:
    """Return JSON in which each object or list that fits on one line is on one line."""
    one_line = json.dumps(body, ensure_ascii=False)
    if not isinstance(body, dict | list) or len(one_line) + indent <= _JSON_COLUMNS_MAX:
        return one_line
    names = [f"{json.dumps(name)}: " for name in body] if isinstance(body, dict) else [""] * len(body)
    values = body.values() if isinstance(body, dict) else body
    lines = [
        " " * (indent + 2) + name + _json_lines(value, indent + 2) for name, value in zip(names, values, strict=True)
    ]
    start, end = "{}" if isinstance(body, dict) else "[]"
    return "\n".join([start, ",\n".join(lines), " " * indent + end])


def _response_example(response: Mapping[str, Any], *, is_shown: bool) -> Iterator[str]:
    body = response["body"]
    is_json = response["media_type"] == "application/json"
    text = json.dumps(body, indent=2, ensure_ascii=False) if is_json else str(body).rstrip()
    if is_shown:
        text = _json_lines(body)
    if text and (is_shown or len(text.splitlines()) <= _EXAMPLE_LINES_MAX):
        yield f"```{'json' if is_json else ''}\n{text}\n```\n"
