"""The reference pages for REST, WebSocket and the command line match the code."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import click
import pytest

from architecture.api_examples import api_routes, declared_examples, match_examples
from architecture.generated_docs import COMMON_OPTIONS, EXAMPLES_FILE, commands, generated
from architecture.generated_rest import SERVER
from doubles.example_requests import Example
from doubles.fake_api import PREFIX, FakeApi
from doubles.manifests import parse_manifest
from sandbox.cli.errors import ExitCode
from sandbox.model.errors import InvalidManifestError
from sandbox.model.wire import event_bodies
from sandbox.model.wire.event_conversion import log_stream_of


@pytest.mark.parametrize(
    "name",
    [
        *(EXAMPLES_FILE, "openapi.json", "docs/rest.md", "docs/rest-reference.md", "docs/cli.md"),
        "docs/python-client.md",
    ],
)
def test_generated_references_are_current(root: Path, name: str):
    assert (root / name).read_text() == generated()[name], "run script/reference"


def test_each_operation_has_one_example():
    matched = match_examples(api_routes(), declared_examples())
    assert len(matched) > 20
    assert all(route.operation_id == example.operation for route, example in matched)


@pytest.mark.parametrize(
    ("operation", "module"),
    [("list_tasks", "test_tasks.py"), ("get_task", "test_tasks.py"), ("open_session", "test_server.py")],
)
def test_error_for_an_operation_without_an_example_names_the_test_module(operation: str, module: str):
    examples = [example for example in declared_examples() if example.operation != operation]
    expected = f"{operation}: declare one Example in EXAMPLES of tests/unit/api/routes/{module}, not 0"
    with pytest.raises(AssertionError, match=f"^{re.escape(expected)}$"):
        match_examples(api_routes(), examples)


def test_repeated_and_unknown_examples_are_errors():
    examples = [*declared_examples(), Example("get_task"), Example("fly")]
    expected = (
        "get_task: declare one Example in EXAMPLES of tests/unit/api/routes/test_tasks.py, not 2\n"
        "fly: the Example has an unknown operation"
    )
    with pytest.raises(AssertionError, match=f"^{re.escape(expected)}$"):
        match_examples(api_routes(), examples)


def test_the_error_in_the_reference_is_a_response_of_the_server(root: Path):
    blocks = re.findall(r"```json\n(.*?)```", (root / "docs" / "rest.md").read_text(), re.DOTALL)
    errors = [json.loads(block) for block in blocks if block.startswith('{\n  "error"')]
    recorded = json.loads((root / EXAMPLES_FILE).read_text())["errors"]
    assert errors == [recorded["invalid_parameter"]]


def test_the_guide_has_the_anchors_of_the_reference(root: Path):
    """The reference was once part of the guide, so links to these anchors may exist."""
    reference, guide = ((root / "docs" / name).read_text() for name in ("rest-reference.md", "rest.md"))
    anchors = set(re.findall(r'<a id="([^"]+)">', reference))
    anchors |= {name.lower() for name in re.findall(r"^### (\w+)$", reference, re.MULTILINE)}
    assert len(anchors) > 40
    assert anchors - set(re.findall(r'<a id="([^"]+)">', guide)) == set()


def test_no_description_in_the_reference_repeats_its_beginning(root: Path):
    descriptions = re.findall(
        r'^<a id="[^"]+"></a>(.+)', (root / "docs" / "rest-reference.md").read_text(), re.MULTILINE
    )
    assert len(descriptions) > 20
    assert [each for each in descriptions if each.count(re.split("[.:;]", each)[0]) > 1] == []


def test_the_shortest_body_in_the_guide_has_exactly_the_required_fields(root: Path):
    section = (root / "docs" / "rest.md").read_text().partition("### The shortest body\n")[2]
    text = section.partition("```json\n")[2].partition("```")[0]
    body = json.loads(text)
    assert parse_manifest(text.encode(), is_json=True).agent.prompt == body["claude"]["prompt"]
    for name, value in body.items():
        for key in value if isinstance(value, dict) else [None]:
            part = {each: value[each] for each in value if each != key} if key else None
            with pytest.raises(InvalidManifestError, match=r"is required|must be"):
                parse_manifest(json.dumps({**body, name: part}).encode(), is_json=True)


@pytest.mark.skipif(shutil.which("curl") is None, reason="install curl")
def test_the_commands_in_the_reference_send_the_recorded_requests(root: Path):
    text = (root / "docs" / "rest-reference.md").read_text()
    commands = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    examples = json.loads((root / EXAMPLES_FILE).read_text())["operations"].values()
    with FakeApi().running() as api:
        for command in commands:
            script = f"{command.strip().replace(SERVER, api.url)} --silent --max-time 20 --noproxy '*'"
            subprocess.run(["/bin/sh", "-c", script], stdout=subprocess.DEVNULL, timeout=30, check=True)
    sent = [
        (each.method, each.path, {name: values[0] for name, values in each.query.items()}, each.body)
        for each in api.requests
    ]
    assert sorted(map(repr, sent)) == sorted(repr(_expected_request(each["request"])) for each in examples)
    keys = [each.headers.get("idempotency-key") for each in api.requests]
    assert [key for key in keys if key] == ["build-4711"]


def _expected_request(request: dict[str, Any]) -> tuple[str, str, dict[str, str], bytes]:
    path = request["path"].format(**request["path_params"]).removeprefix(PREFIX)
    body = b"" if request["body"] is None else json.dumps(request["body"], indent=2).encode()
    return request["method"], path, request["query"], body


def rows(document: Path) -> dict[str, list[str]]:
    """Return the rows of all tables, keyed by their first cell."""
    lines = [line for line in document.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0].split()[0].strip("`,"): row for row in cells}


def test_each_event_type_is_listed_with_its_properties(root: Path):
    document = root / "docs" / "websocket.md"
    listed = {name: set(re.findall(r"`(\w+)`", row[1])) for name, row in rows(document).items()}
    common = {"type", *event_bodies.BaseEvent.__required_keys__}
    assert listed == {
        event_bodies.event_type(event): event.__required_keys__ - common for event in get_args(event_bodies.Event)
    }
    prose = document.read_text()
    nested = event_bodies.MetricsBody.__required_keys__ | event_bodies.FileEditBody.__required_keys__
    mentioned = common | nested | event_bodies.OutputEvent.__optional_keys__
    assert [name for name in sorted(mentioned) if f"`{name}`" not in prose] == []


@pytest.mark.parametrize("stream", ["events", "conversation"])
def test_each_log_stream_is_listed_with_its_types(root: Path, stream: str):
    match = re.search(rf"`{stream}`: [^(]+\(((?:`\w+`[,\s]*)+)\)", (root / "docs" / "rest.md").read_text())
    assert match is not None
    types = {name for name in event_bodies.EVENT_TYPES - {"output"} if log_stream_of({"type": name}) == stream}
    assert set(re.findall(r"`(\w+)`", match[1])) == types


def test_each_exit_code_is_listed(root: Path):
    listed = {name for name in rows(root / "docs" / "cli.md") if name.isdigit()}
    assert listed == {str(code.value) for code in ExitCode}


def test_common_options_are_listed_and_consistent(root: Path):
    listed = {name for name in rows(root / "docs" / "cli.md") if name in COMMON_OPTIONS}
    assert listed == set(COMMON_OPTIONS) - {"--help", "--version"}
    for name, command in commands():
        options = {parameter.opts[0] for parameter in command.params if isinstance(parameter, click.Option)}
        assert len(options & {"--server", "--token", "--context"}) in {0, 3}, name


def test_types_of_the_python_client_have_public_names(root: Path):
    assert re.findall(r"\b\w+Body\b", (root / "docs" / "python-client.md").read_text()) == []
