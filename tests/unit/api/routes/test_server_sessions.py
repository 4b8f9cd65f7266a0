"""A browser exchanges its token for a session."""

import pytest

from doubles.example_requests import Example
from doubles.fake_token_store import FakeTokenStore

EXAMPLES = (
    Example("open_session"),
    Example("close_session"),
)
OPERATOR = {"authorization": "Bearer olga"}
VIEWER = {"authorization": "Bearer vera"}


@pytest.fixture
def api(api_with_tokens, tasks):
    tasks.add("task-001")
    return api_with_tokens(FakeTokenStore(olga="operator", vera="viewer"))


def test_browser_exchanges_token_for_a_session(api):
    response = api.post("/api/v1/session", headers=VIEWER)
    assert (response.status_code, response.json()) == (200, {"role": "viewer", "name": "vera"})
    attributes = {part.strip() for part in response.headers["set-cookie"].split(";")[1:]}
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= attributes
    session = {"cookie": response.headers["set-cookie"].partition(";")[0]}
    assert "vera" not in session["cookie"]
    assert api.get("/api/v1/tasks", headers=session).status_code == 200
    assert api.delete("/api/v1/tasks/task-001", headers=session).status_code == 403
    second_response = api.post("/api/v1/session", headers=session)
    assert (second_response.status_code, "set-cookie" in second_response.headers) == (200, False)
    closed = api.delete("/api/v1/session", headers=session)
    assert closed.status_code == 204
    assert 'sandbox_session=""' in closed.headers["set-cookie"]
    assert api.get("/api/v1/tasks", headers=session).status_code == 401


def test_cookie_over_tls_is_secure(api):
    plain = api.post("/api/v1/session", headers=OPERATOR)
    proxied = {**OPERATOR, "host": "sandbox.example.net", "origin": "https://sandbox.example.net"}
    encrypted = api.post("/api/v1/session", headers=proxied)
    assert "secure" not in plain.headers["set-cookie"].lower()
    assert "secure" in encrypted.headers["set-cookie"].lower()


def test_no_session_is_created_without_tokens(api_with_tokens):
    response = api_with_tokens(FakeTokenStore()).post("/api/v1/session")
    assert (response.status_code, response.json()["role"]) == (200, "operator")
    assert "set-cookie" not in response.headers
