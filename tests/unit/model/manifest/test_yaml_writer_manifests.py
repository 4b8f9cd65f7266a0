"""Manifests are written as YAML without default values."""

import json

import pytest

from doubles.fake_tasks import FakeTasks
from doubles.manifests import parse_manifest
from sandbox.agents import registered_agents
from sandbox.agents.claude_code.manifest_section import MANIFEST_TEMPLATES
from sandbox.model.manifest import yaml
from sandbox.model.manifest.schema import AgentSection


def manifest_yaml(manifest, **options):
    return yaml.manifest_yaml(manifest, registered_agents(), **options)


@pytest.mark.parametrize("template", MANIFEST_TEMPLATES, ids=lambda template: template.name)
def test_template_is_unchanged_by_parsing_and_writing(template):
    manifest = parse_manifest(template.text.encode(), is_json=False)
    assert parse_manifest(manifest_yaml(manifest).encode(), is_json=False) == manifest


def test_section_that_this_version_cannot_read_is_written_unchanged():
    """A newer version may have written the section."""
    manifest = parse_manifest(MANIFEST_TEMPLATES[0].text.encode(), is_json=False)
    settings = {**manifest.agent.settings, "output_format": "new", "max_turns": "many"}
    text = manifest_yaml(manifest.replace(agent=AgentSection("claude", settings)))
    assert "output_format: new\n" in text
    assert "max_turns: many\n" in text


def test_manifest_is_written_without_defaults():
    text = manifest_yaml(parse_manifest(MANIFEST_TEMPLATES[0].text.encode(), is_json=False))
    assert text.splitlines() == [
        'version: "1"',
        "kind: Task",
        "metadata:",
        "  name: My task",
        "repository:",
        "  url: https://github.com/org/repo.git",
        "  branch: main",
        "claude:",
        "  prompt: Describe the work here",
    ]


@pytest.mark.parametrize(
    "prompt",
    [
        "#1\n  two\n",
        "- : {",
        "\u202e\x85 x",
        "a\x85b\nc",
        "yes",
        "0x1",
        "12e0345",
        "0o17",
        " a\tb \n\n",
        "'\"" * 9,
        "é" * 300,
    ],
)
def test_prompt_is_unchanged_by_writing_and_parsing(prompt):
    body = json.loads(json.dumps({"claude": {"prompt": prompt}}))
    minimal = {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "x"},
        "repository": {"url": "https://h/x", "branch": "m"},
    }
    manifest = parse_manifest(json.dumps({**minimal, **body}).encode(), is_json=True)
    assert parse_manifest(manifest_yaml(manifest).encode(), is_json=False).agent.prompt == prompt


SERVER = {"type": "stdio", "command": "npx", "args": ["-y", ""], "env": {"A": ""}}


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("metadata", {"labels": {"team": "", "a": "b"}}),
        ("metadata", {"labels": {}}),
        ("repository", {"commit": "0" * 40, "subpath": "a/b"}),
        ("claude", {"allowed_tools": []}),
        ("claude", {"allowed_tools": ["Read"]}),
        ("claude", {"headless": False, "skip_permissions": False, "output_format": "json", "max_turns": 1}),
        ("claude", {"mcp_config": {"mcpServers": {}}}),
        ("claude", {"mcp_config": {"mcpServers": {"github": SERVER, "far": {"type": "http", "url": "https://h/x"}}}}),
        ("vm", {}),
        ("vm", {"network_mode": "outbound", "allowed_hosts": ["example.org"]}),
        ("vm", {"allowed_hosts": [], "cpus": 1, "memory": "512M"}),
        ("lifecycle", {"artifact_patterns": [], "budget_usd": 0, "budget_tokens": 1, "retries": 0, "resume": True}),
        ("lifecycle", {"artifact_patterns": ["a/*"], "budget_usd": 0.5, "timeout": "90s", "retries": 2}),
    ],
)
def test_fields_are_unchanged_by_writing_and_parsing(part, fields):
    body = {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "x"},
        "repository": {"url": "https://h/x", "branch": "m"},
        "claude": {"prompt": "p"},
    }
    body[part] = body.get(part, {}) | fields
    manifest = parse_manifest(json.dumps(body).encode(), is_json=True)
    assert parse_manifest(manifest_yaml(manifest).encode(), is_json=False) == manifest


def test_id_is_written_only_on_request():
    task = FakeTasks().add("task-001")
    assert "id:" not in manifest_yaml(task.manifest)
    assert "id: task-001" in manifest_yaml(task.manifest, with_id=True)
