"""Each token has a limited number of concurrent requests and streams, and its own share of the event loop."""

from contextlib import ExitStack

import pytest
from starlette.requests import HTTPConnection

from doubles.fake_token_store import FakeTokenStore
from sandbox.api.auth import authenticator as authenticator_module
from sandbox.api.auth.authenticator import LOCAL_OPERATOR, Authenticator, Caller, Denied
from sandbox.api.errors import TooManyStreamsError
from sandbox.api.settings import ApiSettings

LIMIT = 3


@pytest.fixture(autouse=True)
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authenticator_module, "CONCURRENT_REQUESTS_MAX", LIMIT)
    monkeypatch.setattr(authenticator_module, "ALL_TASKS_STREAMS_MAX", LIMIT)


def make_authenticator(**roles: str) -> Authenticator:
    return Authenticator(FakeTokenStore(**roles), ApiSettings("0.1.0", frozenset({8122}), agents={}), lambda: 100.0)


@pytest.fixture
def authenticator() -> Authenticator:
    return make_authenticator(olga="operator", vera="viewer")


def authenticate(authenticator: Authenticator, token: str | None) -> Caller | Denied:
    headers = [(b"host", b"localhost:8122")]
    if token is not None:
        headers.append((b"authorization", f"Bearer {token}".encode()))
    scope = {"type": "http", "path": "/api/v1/tasks", "method": "GET", "headers": headers, "client": ("127.0.0.1", 5)}
    return authenticator.authenticate(HTTPConnection(scope))


def caller(authenticator: Authenticator, token: str | None) -> Caller:
    outcome = authenticate(authenticator, token)
    assert isinstance(outcome, Caller), outcome
    return outcome


def test_concurrent_requests_of_a_token_are_limited(authenticator: Authenticator):
    with ExitStack() as stack:
        for _ in range(LIMIT):
            stack.enter_context(authenticator.count_request(caller(authenticator, "olga")))
        denied = authenticate(authenticator, "olga")
        assert isinstance(denied, Denied)
        assert (denied.status, denied.code, denied.headers) == (429, "rate_limit_exceeded", {"retry-after": "1"})
        assert denied.message == "Too many requests; try again in 1 s."
        assert denied.principal is not None
        assert denied.principal.id == "olga"
        assert isinstance(authenticate(authenticator, "vera"), Caller)


def test_finished_request_does_not_count_toward_the_limit(authenticator: Authenticator):
    operator = caller(authenticator, "olga")
    with authenticator.count_request(operator), authenticator.count_request(operator):
        with authenticator.count_request(operator):
            assert isinstance(authenticate(authenticator, "olga"), Denied)
        for _ in range(2 * LIMIT):
            with authenticator.count_request(caller(authenticator, "olga")):
                pass
        assert isinstance(authenticate(authenticator, "olga"), Caller)


def test_requests_without_a_token_are_not_counted():
    authenticator = make_authenticator()
    with ExitStack() as stack:
        for _ in range(2 * LIMIT):
            stack.enter_context(authenticator.count_request(caller(authenticator, None)))
        assert caller(authenticator, None).principal == LOCAL_OPERATOR


def test_event_streams_of_all_tasks_are_limited_for_each_token(authenticator: Authenticator):
    operator, viewer = caller(authenticator, "olga"), caller(authenticator, "vera")
    with ExitStack() as stack:
        for _ in range(LIMIT):
            stack.enter_context(authenticator.count_all_tasks_stream(operator))
        with pytest.raises(TooManyStreamsError, match=str(LIMIT)), authenticator.count_all_tasks_stream(operator):
            pass
        with authenticator.count_all_tasks_stream(viewer):
            pass


@pytest.mark.parametrize("token", ["olga", None])
def test_ended_stream_does_not_count_toward_the_limit(token: str | None):
    authenticator = make_authenticator(**({"olga": "operator"} if token else {}))
    one = caller(authenticator, token)
    with authenticator.count_all_tasks_stream(one), authenticator.count_all_tasks_stream(one):
        for _ in range(2 * LIMIT):
            with authenticator.count_all_tasks_stream(one):
                pass
        with (
            authenticator.count_all_tasks_stream(one),
            pytest.raises(TooManyStreamsError),
            authenticator.count_all_tasks_stream(one),
        ):
            pass


def test_streams_of_anonymous_callers_are_counted_together():
    authenticator = make_authenticator()
    with ExitStack() as stack:
        for _ in range(LIMIT):
            stack.enter_context(authenticator.count_all_tasks_stream(Caller(None)))
        with pytest.raises(TooManyStreamsError), authenticator.count_all_tasks_stream(Caller(None)):
            pass


def test_request_is_counted_until_it_ends(authenticator: Authenticator):
    operator = caller(authenticator, "olga")
    with authenticator.count_request(operator):
        with authenticator.count_request(operator):
            assert list(authenticator._requests_in_progress.values()) == [2]
        assert list(authenticator._requests_in_progress.values()) == [1]
    assert dict(authenticator._requests_in_progress) == {}


def test_counters_of_idle_tokens_are_removed(authenticator: Authenticator):
    operator = caller(authenticator, "olga")
    with (
        authenticator.count_request(operator),
        authenticator.count_request(operator),
        authenticator.count_all_tasks_stream(operator),
        authenticator.count_all_tasks_stream(operator),
    ):
        pass
    assert (dict(authenticator._requests_in_progress), dict(authenticator._all_tasks_streams)) == ({}, {})


def test_each_token_has_a_separate_share_of_the_event_loop(authenticator: Authenticator):
    operator, viewer = caller(authenticator, "olga").principal, caller(authenticator, "vera").principal
    shares = [authenticator.fair_share_of(one) for one in (operator, viewer, None)]
    assert len({id(share) for share in shares}) == 3
    assert [authenticator.fair_share_of(one) for one in (operator, viewer, None)] == shares
