"""If tokens exist, a request needs a valid token whose role allows the request."""

import pytest

from doubles.fake_token_store import FakeTokenStore

OPERATOR = {"authorization": "Bearer olga"}
VIEWER = {"authorization": "Bearer vera"}
HEALTH = ["/api/health", "/api/v1/health", "/api/v1/health/ready", "/api/v1/health/live"]
MANIFEST = """
version: "1"
kind: Task
metadata: {name: My Task}
repository: {url: "https://github.com/org/repo.git", branch: main}
claude: {prompt: Do it.}
"""


@pytest.fixture
def token_store():
    return FakeTokenStore(olga="operator", vera="viewer")


@pytest.fixture
def api(api_with_tokens, token_store, tasks):
    tasks.add("task-001")
    return api_with_tokens(token_store, clone_hosts=frozenset({"github.com"}))


def test_operator_may_do_everything(api, tasks):
    assert api.get("/api/v1/tasks", headers=OPERATOR).status_code == 200
    assert api.post("/api/v1/tasks", content=MANIFEST, headers=OPERATOR).status_code == 202
    assert api.delete("/api/v1/tasks/task-001", headers=OPERATOR).status_code == 200


def test_viewer_may_read_but_not_change(api, tasks):
    for path in ("/api/v1/tasks", "/api/v1/tasks/task-001", "/api/v1/tasks/task-001/logs", "/openapi.json"):
        assert api.get(path, headers=VIEWER).status_code == 200
    assert api("HEAD", "/api/v1/tasks", headers=VIEWER).status_code == 200
    for method, path in (("POST", "/api/v1/tasks"), ("DELETE", "/api/v1/tasks/task-001"), ("PATCH", "/api/v1/tasks")):
        response = api(method, path, headers=VIEWER)
        assert (response.status_code, response.json()["error"]) == (403, "forbidden")
    assert tasks.cancels == []
    assert list(tasks.entries) == ["task-001"]


@pytest.mark.parametrize(
    ("headers", "challenge"),
    [
        ({}, 'Bearer realm="sandbox"'),
        ({"authorization": "Basic b2xnYTo="}, 'Bearer realm="sandbox"'),
        ({"authorization": "Bearer mallory"}, 'Bearer realm="sandbox", error="invalid_token"'),
        ({"authorization": "Bearer "}, 'Bearer realm="sandbox"'),
        ({"authorization": "Bearer " + "x" * 5000}, 'Bearer realm="sandbox", error="invalid_token"'),
        ({"cookie": "sandbox_session=olga"}, 'Bearer realm="sandbox", error="invalid_token"'),
        ({"authorization": "bearer mallory", "cookie": "a=b"}, 'Bearer realm="sandbox", error="invalid_token"'),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/api/v1/tasks"), ("POST", "/api/v1/tasks"), ("GET", "/nowhere")])
def test_request_with_a_missing_or_invalid_token_is_challenged(api, headers, challenge, method, path):
    response = api(method, path, headers=headers)
    assert (response.status_code, response.json()["error"]) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == challenge
    assert "sandbox token create" in response.json()["message"]
    assert "mallory" not in response.text


def test_auth_scheme_is_case_insensitive(api):
    assert api.get("/api/v1/tasks", headers={"authorization": "bearer olga"}).status_code == 200


def test_token_in_the_url_is_ignored(api):
    assert api.get("/api/v1/tasks?token=olga&access_token=olga").status_code == 401


@pytest.mark.parametrize("path", HEALTH)
def test_health_endpoint_is_public_and_read_only(api, path):
    assert api.get(path).status_code == 200
    assert api.get(path, headers={"host": "10.0.0.7:8122"}).status_code == 200
    assert api.post(path).status_code == 401


def test_metrics_need_a_token(api):
    assert api.get("/metrics").status_code == 401
    assert api.get("/metrics", headers=VIEWER).status_code in {200, 404}


def test_revoked_token_is_rejected_immediately(api, token_store):
    assert api.get("/api/v1/tasks", headers=VIEWER).status_code == 200
    del token_store.roles["vera"]
    assert api.get("/api/v1/tasks", headers=VIEWER).status_code == 401


def test_token_allows_any_host_and_origin(api):
    other_host = {"host": "sandbox.example.net", "origin": "https://elsewhere.example"}
    assert api.get("/api/v1/tasks", headers={**OPERATOR, **other_host}).status_code == 200
    assert api.get("/api/v1/tasks", headers=other_host).status_code == 401


def test_required_token_denies_all_requests_if_no_tokens_exist(api_with_tokens):
    api = api_with_tokens(FakeTokenStore(), requires_token=True)
    assert api.get("/api/v1/tasks").status_code == 401
    assert api.get("/api/health").status_code == 200


def test_without_tokens_each_caller_is_the_operator(api_with_tokens, tasks):
    tasks.add("task-001")
    api = api_with_tokens(FakeTokenStore())
    assert api.delete("/api/v1/tasks/task-001").status_code == 200
    assert api.get("/api/v1/tasks", headers={"authorization": "Bearer of another server"}).status_code == 200
    assert api.get("/api/v1/tasks", headers={"authorization": "Bearer x", "host": "evil.example"}).status_code == 403


def test_clone_hosts_are_checked_on_a_server_with_tokens(api, api_with_tokens, tasks):
    other_manifest = MANIFEST.replace("github.com", "git.example.net")
    response = api.post("/api/v1/tasks", content=other_manifest, headers=OPERATOR)
    assert response.status_code == 400
    assert [(m["field"], m["rule"], m["line"]) for m in response.json()["details"]] == [
        ("repository.url", "not_offered", 5)
    ]
    assert api.post("/api/v1/tasks", content=MANIFEST, headers=OPERATOR).status_code == 202
    open_api = api_with_tokens(FakeTokenStore(), clone_hosts=frozenset({"github.com"}))
    assert open_api.post("/api/v1/tasks", content=other_manifest).status_code == 202


def session_cookie(response) -> dict[str, str]:
    return {"cookie": response.headers["set-cookie"].partition(";")[0]}


def test_session_ends_with_its_token(api, token_store):
    session = session_cookie(api.post("/api/v1/session", headers=OPERATOR))
    assert api.delete("/api/v1/tasks/task-001", headers=session).status_code == 200
    del token_store.roles["olga"]
    assert api.get("/api/v1/tasks", headers=session).status_code == 401


def test_request_from_another_site_cannot_use_a_session(api, tasks):
    session = session_cookie(api.post("/api/v1/session", headers=OPERATOR))
    for origin in ("https://evil.example", "null", "http://localhost:3000"):
        response = api.delete("/api/v1/tasks/task-001", headers={**session, "origin": origin})
        assert (response.status_code, response.json()["error"]) == (403, "forbidden")
    assert tasks.cancels == []
    same_origin = {**session, "host": "sandbox.example.net", "origin": "https://sandbox.example.net"}
    assert api.delete("/api/v1/tasks/task-001", headers=same_origin).status_code == 200


def test_rate_limit_response_has_a_retry_after_header(api_with_tokens, token_store):
    api = api_with_tokens(token_store, requests_per_minute=3)
    assert [api.get("/api/v1/tasks", headers=OPERATOR).status_code for _ in range(4)] == [200, 200, 200, 429]
    response = api.get("/api/v1/tasks", headers=OPERATOR)
    assert response.json()["error"] == "rate_limit_exceeded"
    assert 1 <= int(response.headers["retry-after"]) <= 20
    assert api.get("/api/v1/tasks", headers=VIEWER).status_code == 200


def test_cross_site_requests_do_not_consume_the_rate_limit(api_with_tokens):
    api = api_with_tokens(FakeTokenStore(), requests_per_minute=2)
    foreign = {"origin": "https://evil.example"}
    assert {api.get("/api/v1/tasks", headers=foreign).status_code for _ in range(5)} == {403}
    assert [api.get("/api/v1/tasks").status_code for _ in range(3)] == [200, 200, 429]


def test_wrong_tokens_count_against_the_client_address(api_with_tokens, token_store):
    api = api_with_tokens(token_store, requests_per_minute=3)
    statuses = [api.get("/api/v1/tasks", headers={"authorization": f"Bearer {n}"}).status_code for n in range(4)]
    assert statuses == [401, 401, 401, 429]
    assert api.get("/api/v1/tasks", headers=OPERATOR).status_code == 200
