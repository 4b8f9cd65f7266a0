"""Prometheus comes by and is told how the server is."""

from prometheus_client.parser import text_string_to_metric_families

from doubles.fake_access import FakeAccess


def told(api):
    answer = api.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    return {(sample.name, *sorted(sample.labels.values())): sample.value for sample in samples}


def test_tasks_are_counted_by_state_and_the_server_is_described(api):
    figures = told(api)
    assert figures["sandbox_tasks", "running"] == 1
    assert figures["sandbox_tasks", "failed_preserved"] == 0
    assert figures["sandbox_build_info", "0.1.0"] == 1
    assert figures[("sandbox_ready",)] == 1
    assert figures[("sandbox_uptime_seconds",)] == 12.5
    assert figures[("sandbox_disk_free_bytes",)] == 10**9
    assert figures[("process_resident_memory_bytes",)] > 0


def test_requests_are_counted_by_route_and_not_by_address(api, tasks):
    tasks.add("task-001")
    for task_id in ("task-001", "task-001", "nobody"):
        api.get(f"/api/v1/tasks/{task_id}")
    api("HEAD", "/api/v1/tasks/task-001")
    api.get("/nowhere/at/all")
    api("BREW", "/api/v1/tasks")
    api.get("/api/v1/tasks?limit=0")
    figures = told(api)
    route = "/api/v1/tasks/{task_id}"
    assert figures["sandbox_http_requests_total", route, "200", "GET"] == 2
    assert figures["sandbox_http_requests_total", route, "404", "GET"] == 1
    assert figures["sandbox_http_requests_total", route, "200", "HEAD"] == 1
    assert figures["sandbox_http_requests_total", "404", "GET", "none"] == 1
    assert figures["sandbox_http_requests_total", "405", "none", "other"] == 1
    assert figures["sandbox_http_requests_total", "/api/v1/tasks", "400", "GET"] == 1
    assert figures["sandbox_http_answer_seconds_count", route, "GET"] == 3


def test_failures_inside_are_counted_too(api):
    api.tasks.add("task-001")
    api.tasks.failure = RuntimeError("a bug")
    assert api("DELETE", "/api/v1/tasks/task-001").status_code == 500
    assert told(api)["sandbox_http_requests_total", "/api/v1/tasks/{task_id}", "500", "DELETE"] == 1


def test_a_shutting_down_server_is_not_ready(api):
    api.shutting_down.set()
    assert told(api)[("sandbox_ready",)] == 0


def test_a_server_with_tokens_tells_viewers_only_and_counts_who_is_refused(guarded_api):
    api = guarded_api(FakeAccess(vera="viewer"))
    assert api.get("/metrics").status_code == 401
    answer = api.get("/metrics", headers={"authorization": "Bearer vera"})
    assert answer.status_code == 200
    assert 'sandbox_http_requests_total{method="GET",route="none",status="401"} 1.0' in answer.text
