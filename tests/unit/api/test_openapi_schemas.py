"""The schemas of all bodies match their declarations and the server's validation."""

import json
import re
from typing import Any, get_args, is_typeddict

import pytest
from jsonschema import Draft202012Validator
from pydantic import TypeAdapter

from doubles.manifests import parse_manifest
from sandbox.agents import registered_agents
from sandbox.agents.claude_code.agent import ClaudeCode
from sandbox.api.openapi import component_schemas
from sandbox.api.route_declarations import component_name
from sandbox.model.errors import InvalidManifestError
from sandbox.model.events import FollowUp
from sandbox.model.manifest.schema import declare_manifest
from sandbox.model.task_state import TaskState
from sandbox.model.wire import event_bodies, server_and_error_bodies, task_bodies


class OtherAgent(ClaudeCode):
    kind = "other"


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    return component_schemas(registered_agents())


def test_literal_types_have_the_values_of_their_enums():
    assert get_args(task_bodies.State) == tuple(TaskState)
    assert get_args(task_bodies.FollowUpName) == tuple(FollowUp)


def test_each_component_and_property_is_described(components):
    objects = {name: schema for name, schema in components.items() if "properties" in schema}
    assert [name for name, schema in components.items() if not schema.get("description")] == []
    properties = {(name, key): value for name, schema in objects.items() for key, value in schema["properties"].items()}
    assert [each for each, value in properties.items() if not value.get("description", "").endswith(".")] == []
    assert components["Task"]["properties"]["id"]["description"] == "Id of the task."  # inherited


def test_components_have_the_names_of_the_reference(components):
    assert {"Task", "TaskItem", "Problem", "FieldError", "TaskVm", "Vm"} <= components.keys()
    assert [name for name in components if name.endswith("Body")] == []
    text = json.dumps(components)
    assert re.findall(r'"title": "(\w+Body)"', text) == []
    assert set(re.findall(r'"#/components/schemas/([^"]*)"', text)) <= components.keys()


def test_bodies_and_manifest_records_have_different_names(components):
    """Of two components with the same name, one would replace the other."""
    kinds = (vars(task_bodies) | vars(server_and_error_bodies)).values()
    declared = {component_name(kind) for kind in kinds if is_typeddict(kind)}
    records = TypeAdapter(declare_manifest({})).json_schema()["$defs"].keys()
    assert declared & records == set()


def test_enums_are_components(components):
    assert components["TaskState"]["enum"] == list(TaskState)
    task = components["Task"]["properties"]
    assert task["state"]["$ref"] == "#/components/schemas/TaskState"
    assert components["Health"]["properties"]["tasks"]["propertyNames"] == {"$ref": task["state"]["$ref"]}


def test_events_are_discriminated_by_type(components):
    event = components["Event"]
    mapping = event["discriminator"]["mapping"]
    assert mapping.keys() == event_bodies.EVENT_TYPES
    assert event["oneOf"] == [{"$ref": reference} for reference in mapping.values()]
    items = components["OutputEvent"]["properties"]["conversation"]["items"]
    assert items == components["ConversationEvent"]["properties"]["conversation"]["items"]
    assert items["discriminator"]["mapping"].keys() == event_bodies.CONVERSATION_TYPES - {"conversation"}
    assert "conversation" not in components["OutputEvent"]["required"]


def test_optional_members_are_not_required(components):
    problem = components["Problem"]
    assert {"existing_task", "reasons"} <= problem["properties"].keys() - set(problem["required"])


def test_definition_has_the_sections_of_the_registered_agents():
    only_claude = component_schemas({"claude": ClaudeCode()})["ResolvedManifest"]
    assert only_claude["required"] == ["repository", "claude", "vm", "secrets", "lifecycle"]
    several = component_schemas({"claude": ClaudeCode(), "other": OtherAgent()})["ResolvedManifest"]
    assert several["required"] == ["repository", "vm", "secrets", "lifecycle"]
    assert several["oneOf"] == [{"required": ["claude"]}, {"required": ["other"]}]
    assert several["properties"]["other"]["description"] == "The manifest's section `other`."
    without_claude = component_schemas({"other": OtherAgent()})["ResolvedManifest"]
    assert list(without_claude["properties"]) == ["repository", "vm", "secrets", "lifecycle", "other"]
    assert without_claude["required"] == ["repository", "other", "vm", "secrets", "lifecycle"]


def test_fields_with_defaults_are_optional_for_client_generators(components):
    """openapi-typescript treats a property with a default as required."""
    for name in ("Claude", "Repository", "Lifecycle"):
        assert [key for key, value in components[name]["properties"].items() if "default" in value] == []


MANIFEST = """{
  "version": "1",
  "kind": "Task",
  "metadata": {"name": "A task"},
  "repository": {"url": "https://example.org/repo.git", "branch": "main"},
  "claude": {"prompt": "Do it."}
}"""

VALID = [
    ("version", 1),
    ("version", "1"),
    ("metadata.name", "Grün"),
    ("metadata.id", ""),
    ("metadata.labels", {"team/a": "b=c"}),
    ("repository.url", "git@github.com:org/repo.git"),
    ("repository.url", "ssh://user@[::1]:22/repo"),
    ("repository.branch", "feature/x@y"),
    ("repository.commit", "abcdef0"),
    ("repository.subpath", "src/app"),
    ("claude.prompt", "line\n\tline"),
    ("vm.memory", "512M"),
    ("vm.profile", None),
    ("lifecycle.timeout", "90s"),
    ("lifecycle.artifact_patterns", ["**/*.xml"]),
    ("secrets", [{"name": "TOKEN", "source": "env", "key": "TOKEN"}]),
]

INVALID = [
    ("version", "2"),
    ("version", 2),
    ("metadata.name", "a\x1bb"),
    ("metadata.id", "-a"),
    ("metadata.labels", {"a=b": "c"}),
    ("metadata.labels", {"a": "\u202e"}),
    ("repository.url", "ftp://host/repo"),
    ("repository.url", "https://host/" + "a" * 2048),
    ("repository.branch", "a b"),
    ("repository.commit", "xyz"),
    ("repository.subpath", "/etc"),
    ("claude.prompt", ""),
    ("claude.prompt", " \n"),
    ("claude.prompt", "a\x00b"),
    ("vm.memory", "8 GB"),
    ("vm.cpus", 0),
    ("lifecycle.timeout", "1d"),
    ("lifecycle.artifact_patterns", ["/etc/*"]),
    ("secrets", [{"name": "1X", "source": "env", "key": "TOKEN"}]),
]


@pytest.mark.parametrize(("path", "value"), [*VALID, *INVALID], ids=lambda value: json.dumps(value)[:40])
def test_schema_and_parser_accept_the_same_values(components, path, value):
    data = json.loads(MANIFEST)
    *sections, name = path.split(".")
    record = data
    for section in sections:
        record = record.setdefault(section, {})
    record[name] = value
    schema = {"$ref": "#/components/schemas/Manifest", "components": {"schemas": components}}
    is_accepted = Draft202012Validator(schema).is_valid(data)
    try:
        parse_manifest(json.dumps(data).encode(), is_json=True)
    except InvalidManifestError:
        assert not is_accepted
    else:
        assert is_accepted
    assert is_accepted == ((path, value) in VALID)
