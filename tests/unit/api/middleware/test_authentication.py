"""With tokens the server answers those who show one, each as their role allows."""

import pytest

from doubles.fake_access import FakeAccess

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
def access():
    return FakeAccess(olga="operator", vera="viewer")


@pytest.fixture
def api(guarded_api, access, tasks):
    tasks.add("task-001")
    return guarded_api(access, clone_hosts=frozenset({"github.com"}))


def test_an_operator_does_everything(api, tasks):
    assert api.get("/api/v1/tasks", headers=OPERATOR).status_code == 200
    assert api.post("/api/v1/tasks", content=MANIFEST, headers=OPERATOR).status_code == 202
    assert api.delete("/api/v1/tasks/task-001", headers=OPERATOR).status_code == 200


def test_a_viewer_reads_and_changes_nothing(api, tasks):
    for path in ("/api/v1/tasks", "/api/v1/tasks/task-001", "/api/v1/tasks/task-001/logs", "/openapi.json"):
        assert api.get(path, headers=VIEWER).status_code == 200
    assert api("HEAD", "/api/v1/tasks", headers=VIEWER).status_code == 200
    for method, path in (("POST", "/api/v1/tasks"), ("DELETE", "/api/v1/tasks/task-001"), ("PATCH", "/api/v1/tasks")):
        answer = api(method, path, headers=VIEWER)
        assert (answer.status_code, answer.json()["error"]) == (403, "forbidden")
    assert tasks.cancels == []
    assert list(tasks.stories) == ["task-001"]


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
def test_who_shows_no_good_token_is_asked_for_one(api, headers, challenge, method, path):
    answer = api(method, path, headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == challenge
    assert "sandbox token create" in answer.json()["message"]
    assert "mallory" not in answer.text


def test_the_scheme_is_read_in_any_case(api):
    assert api.get("/api/v1/tasks", headers={"authorization": "bearer olga"}).status_code == 200


def test_a_token_in_the_address_is_no_token(api):
    assert api.get("/api/v1/tasks?token=olga&access_token=olga").status_code == 401


@pytest.mark.parametrize("path", HEALTH)
def test_health_answers_everybody_and_only_reading(api, path):
    assert api.get(path).status_code == 200
    assert api.get(path, headers={"host": "10.0.0.7:8122"}).status_code == 200
    assert api.post(path).status_code == 401


def test_metrics_need_a_token(api):
    assert api.get("/metrics").status_code == 401
    assert api.get("/metrics", headers=VIEWER).status_code in {200, 404}


def test_a_revoked_token_is_out_at_once(api, access):
    assert api.get("/api/v1/tasks", headers=VIEWER).status_code == 200
    del access.roles["vera"]
    assert api.get("/api/v1/tasks", headers=VIEWER).status_code == 401


def test_with_a_token_any_host_name_and_page_may_be_used(api):
    elsewhere = {"host": "sandbox.example.net", "origin": "https://elsewhere.example"}
    assert api.get("/api/v1/tasks", headers={**OPERATOR, **elsewhere}).status_code == 200
    assert api.get("/api/v1/tasks", headers=elsewhere).status_code == 401


def test_an_exposed_server_lets_nobody_in_when_its_tokens_are_gone(guarded_api):
    api = guarded_api(FakeAccess(), requires_token=True)
    assert api.get("/api/v1/tasks").status_code == 401
    assert api.get("/api/health").status_code == 200


def test_without_tokens_whoever_reaches_the_port_is_the_operator(guarded_api, tasks):
    tasks.add("task-001")
    api = guarded_api(FakeAccess())
    assert api.delete("/api/v1/tasks/task-001").status_code == 200
    assert api.get("/api/v1/tasks", headers={"authorization": "Bearer of another server"}).status_code == 200
    assert api.get("/api/v1/tasks", headers={"authorization": "Bearer x", "host": "evil.example"}).status_code == 403


def test_clone_hosts_are_looked_at_as_soon_as_there_are_tokens(api, guarded_api, tasks):
    elsewhere = MANIFEST.replace("github.com", "git.example.net")
    answer = api.post("/api/v1/tasks", content=elsewhere, headers=OPERATOR)
    assert answer.status_code == 400
    assert [(m["field"], m["rule"], m["line"]) for m in answer.json()["details"]] == [
        ("repository.url", "not_offered", 5)
    ]
    assert api.post("/api/v1/tasks", content=MANIFEST, headers=OPERATOR).status_code == 202
    free = guarded_api(FakeAccess(), clone_hosts=frozenset({"github.com"}))
    assert free.post("/api/v1/tasks", content=elsewhere).status_code == 202


def cookie_of(answer) -> dict[str, str]:
    return {"cookie": answer.headers["set-cookie"].partition(";")[0]}


def test_a_browser_shows_its_token_once_and_has_a_session_then(api):
    answer = api.post("/api/v1/session", headers=VIEWER)
    assert (answer.status_code, answer.json()) == (200, {"role": "viewer", "name": "vera"})
    attributes = {part.strip() for part in answer.headers["set-cookie"].split(";")[1:]}
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= attributes
    session = cookie_of(answer)
    assert "vera" not in session["cookie"]
    assert api.get("/api/v1/tasks", headers=session).status_code == 200
    assert api.delete("/api/v1/tasks/task-001", headers=session).status_code == 403
    again = api.post("/api/v1/session", headers=session)
    assert (again.status_code, "set-cookie" in again.headers) == (200, False)
    ended = api.delete("/api/v1/session", headers=session)
    assert ended.status_code == 204
    assert 'sandbox_session=""' in ended.headers["set-cookie"]
    assert api.get("/api/v1/tasks", headers=session).status_code == 401


def test_a_cookie_that_was_given_behind_tls_is_sent_by_nothing_else(api):
    plain = api.post("/api/v1/session", headers=OPERATOR)
    behind = {**OPERATOR, "host": "sandbox.example.net", "origin": "https://sandbox.example.net"}
    encrypted = api.post("/api/v1/session", headers=behind)
    assert "secure" not in plain.headers["set-cookie"].lower()
    assert "secure" in encrypted.headers["set-cookie"].lower()


def test_a_session_ends_with_its_token(api, access):
    session = cookie_of(api.post("/api/v1/session", headers=OPERATOR))
    assert api.delete("/api/v1/tasks/task-001", headers=session).status_code == 200
    del access.roles["olga"]
    assert api.get("/api/v1/tasks", headers=session).status_code == 401


def test_a_page_of_another_site_cannot_use_a_session(api, tasks):
    session = cookie_of(api.post("/api/v1/session", headers=OPERATOR))
    for origin in ("https://evil.example", "null", "http://localhost:3000"):
        answer = api.delete("/api/v1/tasks/task-001", headers={**session, "origin": origin})
        assert (answer.status_code, answer.json()["error"]) == (403, "forbidden")
    assert tasks.cancels == []
    own = {**session, "host": "sandbox.example.net", "origin": "https://sandbox.example.net"}
    assert api.delete("/api/v1/tasks/task-001", headers=own).status_code == 200


def test_without_tokens_there_is_no_session_to_begin(guarded_api):
    answer = guarded_api(FakeAccess()).post("/api/v1/session")
    assert (answer.status_code, answer.json()["role"]) == (200, "operator")
    assert "set-cookie" not in answer.headers


def test_who_asks_too_often_is_told_when_to_come_back(guarded_api, access):
    api = guarded_api(access, requests_per_minute=3)
    assert [api.get("/api/v1/tasks", headers=OPERATOR).status_code for _ in range(4)] == [200, 200, 200, 429]
    answer = api.get("/api/v1/tasks", headers=OPERATOR)
    assert answer.json()["error"] == "rate_limit_exceeded"
    assert 1 <= int(answer.headers["retry-after"]) <= 20
    assert api.get("/api/v1/tasks", headers=VIEWER).status_code == 200


def test_pages_of_other_sites_use_up_nothing(guarded_api):
    api = guarded_api(FakeAccess(), requests_per_minute=2)
    foreign = {"origin": "https://evil.example"}
    assert {api.get("/api/v1/tasks", headers=foreign).status_code for _ in range(5)} == {403}
    assert [api.get("/api/v1/tasks").status_code for _ in range(3)] == [200, 200, 429]


def test_wrong_tokens_count_against_the_address(guarded_api, access):
    api = guarded_api(access, requests_per_minute=3)
    answers = [api.get("/api/v1/tasks", headers={"authorization": f"Bearer {n}"}).status_code for n in range(4)]
    assert answers == [401, 401, 401, 429]
    assert api.get("/api/v1/tasks", headers=OPERATOR).status_code == 200
