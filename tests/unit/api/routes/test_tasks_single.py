"""Examples of requests for a task, and its manifest."""

import pytest

from doubles.example_requests import RUNNING_EVENTS, Example
from doubles.fake_token_store import FakeTokenStore
from doubles.manifests import parse_manifest
from sandbox.model import events as e

EXAMPLES = (
    Example("get_task"),
    Example("get_manifest"),
    Example("wait_for_task", query={"timeout": "60"}),
    Example("cancel_task", query={"reason": "Not needed"}, events=RUNNING_EVENTS),
)

PATH = "/api/v1/tasks/task-001/manifest"
MANIFEST = """
version: "1"
kind: Task
metadata: {name: "Fix it", id: task-001, labels: {team: platform}}
repository: {url: "https://github.com/org/repo.git", branch: main, patch: ZGlmZiAtLWdpdCBhL2EgYi9hCg==}
claude: {prompt: "Fix it.", max_turns: 5}
vm: {cpus: 2}
secrets: [{name: GITHUB_TOKEN, source: env, key: CI_TOKEN}]
"""


@pytest.fixture
def submitted(tasks):
    manifest = parse_manifest(MANIFEST.encode(), is_json=False)
    tasks.record("task-001", e.TaskSubmitted("task-001", manifest))
    return manifest


def test_manifest_can_be_submitted_again(api, tasks, submitted):
    manifest = api.get(PATH).json()
    assert manifest == {
        "version": "1",
        "kind": "Task",
        "metadata": {"name": "Fix it", "labels": {"team": "platform"}},
        "repository": {
            "url": "https://github.com/org/repo.git",
            "branch": "main",
            "patch": "ZGlmZiAtLWdpdCBhL2EgYi9hCg==",
        },
        "claude": {"prompt": "Fix it.", "max_turns": 5},
        "vm": {"cpus": 2},
        "secrets": [{"name": "GITHUB_TOKEN", "source": "env", "key": "CI_TOKEN"}],
    }
    response = api.post("/api/v1/tasks", json=manifest)
    assert response.status_code == 202, response.text
    again = tasks.entries[response.json()["task_id"]].task.manifest
    assert again.replace(metadata=submitted.metadata) == submitted


@pytest.mark.parametrize(("token", "status"), [("olga", 200), ("vera", 403)])
def test_manifest_requires_the_operator_role(api_with_tokens, submitted, token, status):
    api = api_with_tokens(FakeTokenStore(olga="operator", vera="viewer"))
    response = api.get(PATH, headers={"authorization": f"Bearer {token}"})
    assert response.status_code == status
    assert ("CI_TOKEN" in response.text) is (status == 200)


def test_viewer_reads_the_definition_without_secret_sources(api_with_tokens, submitted):
    api = api_with_tokens(FakeTokenStore(vera="viewer"))
    response = api.get("/api/v1/tasks/task-001", headers={"authorization": "Bearer vera"})
    assert response.json()["definition"]["secrets"] == [{"name": "GITHUB_TOKEN"}]
    assert "CI_TOKEN" not in response.text


def test_unknown_task_has_no_manifest(api):
    assert (api.get(PATH).status_code, api.get(PATH).json()["error"]) == (404, "task_not_found")
