"""A browser without a valid session is redirected to the sign-in page. Programs get an error instead."""

import pytest

from doubles.fake_token_store import FakeTokenStore

HTML = {"accept": "text/html,*/*"}


@pytest.fixture
def api(api_with_tokens):
    return api_with_tokens(FakeTokenStore(olga="operator"))


@pytest.mark.parametrize(
    ("target", "location"),
    [
        ("/", "/sign-in?to=%2F"),
        ("/tasks/task-001", "/sign-in?to=%2Ftasks%2Ftask-001"),
        ("/tasks?state=failed&page=2", "/sign-in?to=%2Ftasks%3Fstate%3Dfailed%26page%3D2"),
    ],
)
def test_browser_is_redirected_and_returns_to_the_page_afterwards(api, target, location):
    response = api.get(target, headers=HTML)
    assert (response.status_code, response.headers["location"]) == (303, location)
    assert response.headers["vary"] == "accept"


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/api/v1/tasks", HTML),
        ("GET", "/tasks/task-001", {"accept": "application/json"}),
        ("GET", "/tasks/task-001", {}),
        ("POST", "/tasks/task-001", HTML),
    ],
)
def test_other_requests_get_an_error(api, method, path, headers):
    response = api(method, path, headers=headers)
    assert response.status_code == 401
    assert "location" not in response.headers


def test_browser_that_exceeds_the_rate_limit_gets_an_error(api_with_tokens):
    api = api_with_tokens(FakeTokenStore(olga="operator"), requests_per_minute=1)
    responses = [api.get("/tasks", headers=HTML) for _ in range(2)]
    assert [response.status_code for response in responses] == [303, 429]
    assert responses[1].json()["error"] == "rate_limit_exceeded"
