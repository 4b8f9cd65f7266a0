"""People, probes and balancers ask how the server is."""

from dataclasses import replace


def test_a_healthy_server(api):
    for path in ("/api/health", "/api/v1/health/live"):
        assert api.get(path).json() == {"status": "ok", "version": "0.1.0"}
    assert api.get("/api/v1/health/ready").json() == {"status": "ready"}
    health = api.get("/api/v1/health").json()
    assert (health["status"], health["ready"], health["reasons"], health["uptime_seconds"]) == ("ok", True, [], 12.5)
    assert (health["tasks"]["running"], health["tasks"]["pending"]) == (1, 0)
    assert [runtime["name"] for runtime in health["runtimes"]] == ["bubblewrap"]
    assert (health["store"], health["disk"]) == ({"ok": True}, {"free_bytes": 10**9, "total_bytes": 10**10})


def test_a_server_that_cannot_run_tasks_says_why(api, tasks):
    reason = "No runtime works here; run sandbox doctor."
    tasks.health_now = replace(tasks.health_now, is_ready=False, reasons=[reason])
    answer = api.get("/api/v1/health/ready")
    assert (answer.status_code, answer.json()["error"], answer.json()["reasons"]) == (
        503,
        "service_unavailable",
        [reason],
    )
    assert answer.headers["retry-after"] == "5"
    assert api.get("/api/v1/health").json()["status"] == "degraded"
    assert api.get("/api/v1/health/live").status_code == 200


def test_a_server_that_shuts_down_is_not_ready(api):
    api.shutting_down.set()
    assert api.get("/api/v1/health/ready").status_code == 503
