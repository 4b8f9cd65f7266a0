"""Pruning of finished tasks by an operator."""

import pytest

from doubles.example_requests import Example
from sandbox.interfaces.server_services import Retention

EXAMPLES = (Example("prune_tasks", query={"older_than_seconds": "604800", "dry_run": "true"}),)


def test_prune_uses_the_limits_of_the_query_and_lists_the_pruned_tasks(api, tasks):
    response = api.post("/api/v1/admin/prune?older_than_seconds=60&keep=5&max_bytes=100&dry_run=true")
    assert response.status_code == 200
    assert tasks.pruned_by == (Retention(60, 5, 100), True)
    [pruned] = response.json()["tasks"]
    assert pruned == {
        "id": "old", "name": "Fix bug #42", "state": "completed", "finished_at": "2026-01-29T00:00:00.000Z",
        "size_bytes": 4096,
    }  # fmt: skip
    assert {**response.json(), "tasks": None} == {
        "dry_run": True, "tasks": None, "total_count": 1, "total_size_bytes": 4096,
        "unexamined": [{"id": "broken", "reason": "Input/output error; check the disk"}],
    }  # fmt: skip


def test_prune_without_limits_uses_the_retention_of_the_server(api, tasks):
    response = api.post("/api/v1/admin/prune")
    assert (response.status_code, response.json()["unexamined"]) == (200, [])
    assert tasks.pruned_by == (None, False)


@pytest.mark.parametrize("query", ["keep=0", "keep=-1", "older_than_seconds=x", "max_bytes=-1", "older=1"])
def test_invalid_limits_prune_nothing(api, tasks, query):
    response = api.post(f"/api/v1/admin/prune?{query}")
    assert (response.status_code, response.json()["error"]) == (400, "invalid_parameter")
    assert not hasattr(tasks, "pruned_by")


def test_parameters_in_a_body_prune_nothing(api, tasks):
    response = api.post("/api/v1/admin/prune?older_than_seconds=60", json={"dry_run": True})
    assert (response.status_code, response.json()["error"]) == (400, "invalid_parameter")
    assert response.json()["details"][0]["location"] == "body"
    assert "only parameters in the URL" in response.json()["message"]
    assert not hasattr(tasks, "pruned_by")


def test_parameters_in_a_chunked_body_prune_nothing(api, tasks):
    async def chunks():
        yield b'{"dry_run":'
        yield b"true}"

    assert api.post("/api/v1/admin/prune", content=chunks()).status_code == 400
    assert not hasattr(tasks, "pruned_by")


def test_empty_object_as_a_body_is_accepted(api, tasks):
    assert api.post("/api/v1/admin/prune?dry_run=true", json={}).status_code == 200
    assert tasks.pruned_by == (None, True)
