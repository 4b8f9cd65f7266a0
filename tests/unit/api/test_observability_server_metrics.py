"""Metrics for Prometheus."""

from datetime import UTC, datetime

from prometheus_client.parser import text_string_to_metric_families

from doubles.fake_token_store import FakeTokenStore
from sandbox.api.observability import HOST_LABELS_MAX
from sandbox.interfaces.placement import HostState, HostStatus
from sandbox.interfaces.server_services import HostWithTasks


def read_metrics(api):
    response = api.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]
    return {(sample.name, *sorted(sample.labels.values())): sample.value for sample in samples}


def test_metrics_have_task_states_and_server_gauges(api):
    metrics = read_metrics(api)
    assert metrics["sandbox_tasks", "running"] == 1
    assert metrics["sandbox_tasks", "failed_preserved"] == 0
    assert metrics["sandbox_build_info", "0.1.0"] == 1
    assert metrics[("sandbox_ready",)] == 1
    assert metrics[("sandbox_uptime_seconds",)] == 12.5
    assert metrics[("sandbox_disk_free_bytes",)] == 10**9
    assert metrics[("process_resident_memory_bytes",)] > 0


def test_requests_are_counted_by_route(api, tasks):
    tasks.add("task-001")
    for task_id in ("task-001", "task-001", "nobody"):
        api.get(f"/api/v1/tasks/{task_id}")
    api("HEAD", "/api/v1/tasks/task-001")
    api.get("/nowhere/at/all")
    api("BREW", "/api/v1/tasks")
    api.get("/api/v1/tasks?limit=0")
    metrics = read_metrics(api)
    route = "/api/v1/tasks/{task_id}"
    assert metrics["sandbox_http_requests_total", route, "200", "GET"] == 2
    assert metrics["sandbox_http_requests_total", route, "404", "GET"] == 1
    assert metrics["sandbox_http_requests_total", route, "200", "HEAD"] == 1
    assert metrics["sandbox_http_requests_total", "404", "GET", "none"] == 1
    assert metrics["sandbox_http_requests_total", "405", "none", "other"] == 1
    assert metrics["sandbox_http_requests_total", "/api/v1/tasks", "400", "GET"] == 1
    assert metrics["sandbox_http_response_seconds_count", route, "GET"] == 3


def test_internal_errors_are_counted(api):
    api.tasks.add("task-001")
    api.tasks.failure = RuntimeError("a bug")
    assert api("DELETE", "/api/v1/tasks/task-001").status_code == 500
    assert read_metrics(api)["sandbox_http_requests_total", "/api/v1/tasks/{task_id}", "500", "DELETE"] == 1


def test_server_that_is_shutting_down_is_not_ready(api):
    api.shutting_down.set()
    assert read_metrics(api)[("sandbox_ready",)] == 0


def test_hosts_of_a_cluster_have_metrics(api, tasks):
    """A server without a cluster exports no host metrics."""
    assert "sandbox_host" not in api.get("/metrics").text
    tasks.has_cluster = True
    at = datetime(2026, 1, 29, 10, 10, 15, tzinfo=UTC)
    seen = HostStatus("node-1", HostState.READY, last_contact_at=at)
    tasks.hosts = [HostWithTasks(seen, ["task-1", "task-2"]), *tasks.hosts]
    metrics = read_metrics(api)
    assert metrics["sandbox_host_tasks_running", "node-1"] == 2
    assert metrics["sandbox_host_last_contact_timestamp_seconds", "node-1"] == at.timestamp()
    assert metrics["sandbox_host_drained", "node-1"] == 0
    assert ("sandbox_host_tasks_running", "build-1") not in metrics
    tasks.hosts = [HostWithTasks(HostStatus("node-2", HostState.IDLE, last_contact_at=at), [])]
    metrics = read_metrics(api)
    assert metrics["sandbox_host_tasks_running", "node-2"] == 0
    assert ("sandbox_host_tasks_running", "node-1") not in metrics


def test_drained_host_has_a_metric_before_a_worker_runs_there(api, tasks):
    tasks.has_cluster = True
    at = datetime(2026, 1, 29, 10, 10, 15, tzinfo=UTC)
    other = HostStatus("node-2", HostState.IDLE)
    tasks.hosts = [HostWithTasks(HostStatus("node-1", HostState.IDLE, draining_since=at), []), HostWithTasks(other, [])]
    metrics = read_metrics(api)
    assert metrics["sandbox_host_drained", "node-1"] == 1
    assert metrics["sandbox_host_tasks_running", "node-1"] == 0
    assert ("sandbox_host_last_contact_timestamp_seconds", "node-1") not in metrics
    assert ("sandbox_host_drained", "node-2") not in metrics


def test_number_of_hosts_in_the_metrics_is_limited(api, tasks):
    """Metrics are exported for the hosts with the most recent contact."""
    tasks.has_cluster = True
    tasks.hosts = [
        HostWithTasks(
            HostStatus(f"node-{number}", HostState.IDLE, last_contact_at=datetime.fromtimestamp(number, UTC)), []
        )
        for number in range(HOST_LABELS_MAX + 10)
    ]
    hosts = {key[1] for key in read_metrics(api) if key[0] == "sandbox_host_tasks_running"}
    assert hosts == {f"node-{number}" for number in range(10, HOST_LABELS_MAX + 10)}


def test_metrics_need_a_token_and_count_denied_requests(api_with_tokens):
    api = api_with_tokens(FakeTokenStore(vera="viewer"))
    assert api.get("/metrics").status_code == 401
    response = api.get("/metrics", headers={"authorization": "Bearer vera"})
    assert response.status_code == 200
    assert 'sandbox_http_requests_total{method="GET",route="none",status="401"} 1.0' in response.text
