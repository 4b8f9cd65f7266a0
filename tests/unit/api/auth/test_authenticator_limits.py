"""Each token has a limited number of concurrent requests and streams, and its own share of the event loop."""

from contextlib import ExitStack

import pytest
from starlette.requests import HTTPConnection

from doubles.fake_access import FakeAccess
from sandbox.api.auth import authenticator
from sandbox.api.auth.authenticator import LOCAL_OPERATOR, Authenticator, Caller, Denied
from sandbox.api.errors import TooManyStreamsError
from sandbox.api.settings import ApiSettings

LIMIT = 3


@pytest.fixture(autouse=True)
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authenticator, "REQUESTS_AT_ONCE_MAX", LIMIT)
    monkeypatch.setattr(authenticator, "STREAMS_OF_ALL_MAX", LIMIT)


def make_authenticator(**roles: str) -> Authenticator:
    return Authenticator(FakeAccess(**roles), ApiSettings("0.1.0", frozenset({8122})), lambda: 100.0)


@pytest.fixture
def token_authenticator() -> Authenticator:
    return make_authenticator(olga="operator", vera="viewer")


def authenticate(token_authenticator: Authenticator, token: str | None) -> Caller | Denied:
    headers = [(b"host", b"localhost:8122")]
    if token is not None:
        headers.append((b"authorization", f"Bearer {token}".encode()))
    scope = {"type": "http", "path": "/api/v1/tasks", "method": "GET", "headers": headers, "client": ("127.0.0.1", 5)}
    return token_authenticator.authenticate(HTTPConnection(scope))


def caller(token_authenticator: Authenticator, token: str | None) -> Caller:
    outcome = authenticate(token_authenticator, token)
    assert isinstance(outcome, Caller), outcome
    return outcome


def test_a_token_has_a_limited_number_of_concurrent_requests(token_authenticator: Authenticator):
    with ExitStack() as stack:
        for _ in range(LIMIT):
            stack.enter_context(token_authenticator.count_request(caller(token_authenticator, "olga")))
        denied = authenticate(token_authenticator, "olga")
        assert isinstance(denied, Denied)
        assert (denied.status, denied.code, denied.headers) == (429, "rate_limit_exceeded", {"retry-after": "1"})
        assert denied.message == "Too many requests; try again in 1 s."
        assert denied.principal is not None
        assert denied.principal.id == "olga"
        assert isinstance(authenticate(token_authenticator, "vera"), Caller)


def test_a_finished_request_makes_room_for_another(token_authenticator: Authenticator):
    operator = caller(token_authenticator, "olga")
    with token_authenticator.count_request(operator), token_authenticator.count_request(operator):
        with token_authenticator.count_request(operator):
            assert isinstance(authenticate(token_authenticator, "olga"), Denied)
        for _ in range(2 * LIMIT):
            with token_authenticator.count_request(caller(token_authenticator, "olga")):
                pass
        assert isinstance(authenticate(token_authenticator, "olga"), Caller)


def test_requests_without_a_token_are_not_counted():
    token_authenticator = make_authenticator()
    with ExitStack() as stack:
        for _ in range(2 * LIMIT):
            stack.enter_context(token_authenticator.count_request(caller(token_authenticator, None)))
        assert caller(token_authenticator, None).principal == LOCAL_OPERATOR


def test_a_token_has_a_limited_number_of_streams_of_all_tasks(token_authenticator: Authenticator):
    operator, viewer = caller(token_authenticator, "olga"), caller(token_authenticator, "vera")
    with ExitStack() as stack:
        for _ in range(LIMIT):
            stack.enter_context(token_authenticator.count_all_tasks_stream(operator))
        with pytest.raises(TooManyStreamsError, match=str(LIMIT)), token_authenticator.count_all_tasks_stream(operator):
            pass
        with token_authenticator.count_all_tasks_stream(viewer):
            pass


@pytest.mark.parametrize("token", ["olga", None])
def test_an_ended_stream_makes_room_for_another(token: str | None):
    token_authenticator = make_authenticator(**({"olga": "operator"} if token else {}))
    one = caller(token_authenticator, token)
    with token_authenticator.count_all_tasks_stream(one), token_authenticator.count_all_tasks_stream(one):
        for _ in range(2 * LIMIT):
            with token_authenticator.count_all_tasks_stream(one):
                pass
        with (
            token_authenticator.count_all_tasks_stream(one),
            pytest.raises(TooManyStreamsError),
            token_authenticator.count_all_tasks_stream(one),
        ):
            pass


def test_streams_of_anonymous_callers_are_counted_together():
    token_authenticator = make_authenticator()
    with ExitStack() as stack:
        for _ in range(LIMIT):
            stack.enter_context(token_authenticator.count_all_tasks_stream(Caller(None)))
        with pytest.raises(TooManyStreamsError), token_authenticator.count_all_tasks_stream(Caller(None)):
            pass


def test_nothing_is_kept_for_tokens_without_requests_and_streams(token_authenticator: Authenticator):
    operator = caller(token_authenticator, "olga")
    with (
        token_authenticator.count_request(operator),
        token_authenticator.count_request(operator),
        token_authenticator.count_all_tasks_stream(operator),
        token_authenticator.count_all_tasks_stream(operator),
    ):
        pass
    assert (dict(token_authenticator._requests_in_progress), dict(token_authenticator._all_tasks_streams)) == ({}, {})


def test_each_token_has_its_own_share_of_the_event_loop(token_authenticator: Authenticator):
    operator, viewer = caller(token_authenticator, "olga").principal, caller(token_authenticator, "vera").principal
    shares = [token_authenticator.share_of(one) for one in (operator, viewer, None)]
    assert len({id(share) for share in shares}) == 3
    assert [token_authenticator.share_of(one) for one in (operator, viewer, None)] == shares
