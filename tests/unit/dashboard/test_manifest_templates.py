"""Manifests that the form begins with, and those of tasks that run again."""

import asyncio
import dataclasses
import json

import pytest

from doubles.fake_access import FakeAccess
from doubles.fake_tasks import FakeTasks, manifest
from sandbox.dashboard.manifest_templates import MANIFEST_TEMPLATES, manifest_yaml
from sandbox.model.manifest.parser import parse_manifest
from sandbox.model.manifest.schema import Secret


@pytest.mark.parametrize("pattern", MANIFEST_TEMPLATES, ids=lambda pattern: pattern.name)
def test_a_pattern_is_a_manifest_and_is_written_as_it_was_read(pattern):
    manifest = parse_manifest(pattern.text.encode(), is_json=False)
    assert parse_manifest(manifest_yaml(manifest).encode(), is_json=False) == manifest


def test_a_manifest_is_written_without_what_the_defaults_say():
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
def test_whatever_a_prompt_says_comes_back_as_it_was(prompt):
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
    ("part", "said"),
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
def test_every_field_comes_back_as_it_was_said(part, said):
    body = {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "x"},
        "repository": {"url": "https://h/x", "branch": "m"},
        "claude": {"prompt": "p"},
    }
    body[part] = body.get(part, {}) | said
    manifest = parse_manifest(json.dumps(body).encode(), is_json=True)
    assert parse_manifest(manifest_yaml(manifest).encode(), is_json=False) == manifest


def test_a_second_task_does_not_claim_the_id_of_the_first(pages):
    task = FakeTasks().add("task-001")
    assert ("id:" in manifest_yaml(task.manifest), "id:" in manifest_yaml(task.manifest, with_id=True)) == (
        False,
        True,
    )
    pages.tasks.add("task-001")
    page = pages.get("/submit?from=task-001")
    assert "Run again: My Task" in page.text
    assert "Your instructions here" in page.text


def test_where_secrets_come_from_is_for_operators(guarded_pages):
    pages = guarded_pages(FakeAccess(ann="operator", bob="viewer"))
    secret = Secret(name="GITHUB_TOKEN", source="vault", key="teams/platform#token")
    asyncio.run(pages.tasks.submit(dataclasses.replace(manifest("task-001"), secrets=(secret,))))
    for path in ("/tasks/task-001", "/submit?from=task-001", "/tasks/task-001/proof"):
        for name, is_told in (("ann", True), ("bob", False)):
            text = pages.get(path, authorization=f"Bearer {name}").text
            assert "- name: GITHUB_TOKEN" in text
            assert ("vault" in text, "teams/platform#token" in text) == (is_told, is_told), (path, name)
