"""The templates of the submit form, and manifests of tasks to run again."""

import asyncio
import dataclasses
import json

import pytest

from doubles.fake_access import FakeAccess
from doubles.fake_tasks import FakeTasks, manifest
from sandbox.dashboard.manifest_templates import MANIFEST_TEMPLATES, manifest_yaml
from sandbox.model.manifest.parser import parse_manifest
from sandbox.model.manifest.schema import Secret


@pytest.mark.parametrize("template", MANIFEST_TEMPLATES, ids=lambda template: template.name)
def test_template_survives_a_round_trip(template):
    manifest = parse_manifest(template.text.encode(), is_json=False)
    assert parse_manifest(manifest_yaml(manifest).encode(), is_json=False) == manifest


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
def test_prompt_survives_a_round_trip(prompt):
    body = json.loads(json.dumps({"claude": {"prompt": prompt}}))
    minimal = {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "x"},
        "repository": {"url": "https://h/x", "branch": "m"},
    }
    manifest = parse_manifest(json.dumps({**minimal, **body}).encode(), is_json=True)
    assert parse_manifest(manifest_yaml(manifest).encode(), is_json=False).claude.prompt == prompt


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
def test_fields_survive_a_round_trip(part, fields):
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


def test_run_again_omits_the_task_id(pages):
    task = FakeTasks().add("task-001")
    assert ("id:" in manifest_yaml(task.manifest), "id:" in manifest_yaml(task.manifest, with_id=True)) == (
        False,
        True,
    )
    pages.tasks.add("task-001")
    page = pages.get("/submit?from=task-001")
    assert "Run again: My Task" in page.text
    assert "Your instructions here" in page.text


def test_secret_sources_are_shown_to_operators_only(pages_with_tokens):
    pages = pages_with_tokens(FakeAccess(ann="operator", bob="viewer"))
    secret = Secret(name="GITHUB_TOKEN", source="vault", key="teams/platform#token")
    asyncio.run(pages.tasks.submit(dataclasses.replace(manifest("task-001"), secrets=(secret,))))
    for path in ("/tasks/task-001", "/submit?from=task-001", "/tasks/task-001/proof"):
        for name, is_visible in (("ann", True), ("bob", False)):
            text = pages.get(path, authorization=f"Bearer {name}").text
            assert "- name: GITHUB_TOKEN" in text
            assert ("vault" in text, "teams/platform#token" in text) == (is_visible, is_visible), (path, name)
