"""Health endpoints for users, probes and load balancers."""

from dataclasses import replace

from doubles.example_requests import Example

EXAMPLES = (
    Example("get_basic_health"),
    Example("get_liveness"),
    Example("get_health"),
    Example("get_readiness"),
    Example("get_metrics", shown_lines_contain="sandbox_tasks"),
)


def test_healthy_server_is_ready_and_live(api):
    for path in ("/api/health", "/api/v1/health/live"):
        assert api.get(path).json() == {"status": "ok", "version": "0.1.0"}
    assert api.get("/api/v1/health/ready").json() == {"status": "ready"}
    health = api.get("/api/v1/health").json()
    assert (health["status"], health["ready"], health["reasons"], health["uptime_seconds"]) == ("ok", True, [], 12.5)
    assert (health["tasks"]["running"], health["tasks"]["pending"]) == (1, 0)
    assert [runtime["name"] for runtime in health["runtimes"]] == ["bubblewrap"]
    assert (health["store"], health["disk"]) == ({"ok": True}, {"free_bytes": 10**9, "total_bytes": 10**10})


def test_unready_server_reports_reasons(api, tasks):
    reason = "No runtime works here; run sandbox doctor."
    tasks.health_report = replace(tasks.health_report, is_ready=False, reasons=[reason])
    response = api.get("/api/v1/health/ready")
    assert (response.status_code, response.json()["error"], response.json()["reasons"]) == (
        503,
        "service_unavailable",
        [reason],
    )
    assert response.headers["retry-after"] == "5"
    assert api.get("/api/v1/health").json()["status"] == "degraded"
    assert api.get("/api/v1/health/live").status_code == 200


def test_server_that_is_shutting_down_is_not_ready(api):
    api.shutting_down.set()
    assert api.get("/api/v1/health/ready").status_code == 503
