"""Errors for unknown paths name the right request or a similar path."""

import pytest


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("/api/v1/task", "/api/v1/tasks"),
        ("/api/v1/tasks/", "/api/v1/tasks"),
        ("/api/v1/tasks/task-001/", "/api/v1/tasks/task-001"),
        ("/api/v1/healthz", "/api/v1/health"),
        ("/v1/tasks", "/api/v1/tasks"),
        ("/api/v1/event", "/api/v1/events"),
        ("/api/v1/tasks/task-001/log", "/api/v1/tasks/task-001/logs"),
        ("/api/v1/tasks/task-001/artifact/", "/api/v1/tasks/task-001/artifacts"),
        ("/api/v1/tasks/task-001/patch", "/api/v1/tasks/task-001/artifacts/task-001.patch"),
        ("/api/v1/tasks/task-001/diff", "/api/v1/tasks/task-001/artifacts/task-001.patch"),
        ("/api/v1/tasks/task-001/retry", "/api/v1/tasks/task-001/rerun"),
        ("/api/v1/tasks/task-001/resume", "/api/v1/tasks/task-001/continue"),
        ("/api/v1/tasks/task-001/nothing", None),
        ("/api/v1/nope", None),
        ("/api/v1/runs", None),
        ("/api/v1/projects", None),
        ("/api/v1/users", None),
        ("/api/v1/version", None),
        ("/api/v1/prune", None),
        ("/api/v1/admin/drains", None),
        ("/v2/things", None),
        ("/api/v1/tasks/a%1b%5b2J/", None),
        (f"/api/v1/tasks/{'a' * 300}/", None),
    ],
)
def test_unknown_path_is_compared_with_the_endpoints(api, path, suggestion):
    problem = api.get(path).json()
    assert problem["error"] == "not_found"
    advice = f"; did you mean '{suggestion}'?" if suggestion else "; /openapi.json lists all endpoints."
    assert problem["message"] == f"No such endpoint{advice}"


@pytest.mark.parametrize("path", ["/api/v1/tasks/task-001/cancel", "/api/v1/tasks/task-001/stop/"])
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_error_for_a_nonexistent_cancel_endpoint_names_the_right_request(api, method, path):
    response = api(method, path)
    assert (response.status_code, response.json()["error"]) == (404, "not_found")
    assert response.json()["message"] == "No such endpoint; cancel with DELETE /api/v1/tasks/task-001."


@pytest.mark.parametrize("path", ["/api/v1/tasks/cancel/x", "/api/v1/tasks/a%1Bb/cancel", "/api/v1/tasks/a/b/cancel"])
def test_errors_for_other_unknown_paths_do_not_name_a_task(api, path):
    response = api.post(path)
    assert response.status_code == 404
    assert "cancel with" not in response.json()["message"]
