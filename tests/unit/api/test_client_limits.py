"""Each token has a limited number of concurrent requests and streams, and its own share of the event loop."""

from contextlib import ExitStack

import pytest

from sandbox.api import client_limits
from sandbox.api.client_limits import ClientLimits
from sandbox.api.errors import TooManyStreamsError
from sandbox.interfaces.auth import Principal, Role

LIMIT = 3
ADDRESS = "127.0.0.1"
OLGA = Principal("olga", "Olga", Role.OPERATOR)
VERA = Principal("vera", "Vera", Role.VIEWER)
LOCAL = Principal("", "local", Role.OPERATOR)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> ClientLimits:
    monkeypatch.setattr(client_limits, "CONCURRENT_REQUESTS_MAX", LIMIT)
    monkeypatch.setattr(client_limits, "ALL_TASKS_STREAMS_MAX", LIMIT)
    return ClientLimits(0, lambda: 100.0)


def test_concurrent_requests_of_a_token_are_limited(limits: ClientLimits):
    with ExitStack() as stack:
        for _ in range(LIMIT):
            assert limits.take_request_or_wait_seconds(OLGA, ADDRESS) == 0
            stack.enter_context(limits.track_request(OLGA))
        assert limits.take_request_or_wait_seconds(OLGA, ADDRESS) == 1
        assert (
            limits.take_request_or_wait_seconds(VERA, ADDRESS)
            == limits.take_request_or_wait_seconds(None, ADDRESS)
            == 0
        )


def test_finished_request_does_not_count_toward_the_limit(limits: ClientLimits):
    with limits.track_request(OLGA), limits.track_request(OLGA):
        with limits.track_request(OLGA):
            assert limits.take_request_or_wait_seconds(OLGA, ADDRESS) == 1
        for _ in range(2 * LIMIT):
            with limits.track_request(OLGA):
                pass
        assert limits.take_request_or_wait_seconds(OLGA, ADDRESS) == 0


@pytest.mark.parametrize("principal", [LOCAL, None])
def test_requests_without_a_token_are_not_counted(limits: ClientLimits, principal: Principal | None):
    with ExitStack() as stack:
        for _ in range(2 * LIMIT):
            stack.enter_context(limits.track_request(principal))
        assert limits.take_request_or_wait_seconds(principal, ADDRESS) == 0
        assert limits._requests_in_progress.total() == 0


def test_event_streams_of_all_tasks_are_limited_for_each_token(limits: ClientLimits):
    with ExitStack() as stack:
        for _ in range(LIMIT):
            stack.enter_context(limits.reserved_all_tasks_stream(OLGA))
        with pytest.raises(TooManyStreamsError, match=str(LIMIT)), limits.reserved_all_tasks_stream(OLGA):
            pass
        with limits.reserved_all_tasks_stream(VERA):
            pass


@pytest.mark.parametrize("principal", [OLGA, LOCAL, None])
def test_ended_stream_does_not_count_toward_the_limit(limits: ClientLimits, principal: Principal | None):
    with limits.reserved_all_tasks_stream(principal), limits.reserved_all_tasks_stream(principal):
        for _ in range(2 * LIMIT):
            with limits.reserved_all_tasks_stream(principal):
                pass
        with (
            limits.reserved_all_tasks_stream(principal),
            pytest.raises(TooManyStreamsError),
            limits.reserved_all_tasks_stream(principal),
        ):
            pass


def test_streams_of_anonymous_callers_are_counted_together(limits: ClientLimits):
    with ExitStack() as stack:
        for _ in range(LIMIT):
            stack.enter_context(limits.reserved_all_tasks_stream(None))
        with pytest.raises(TooManyStreamsError), limits.reserved_all_tasks_stream(None):
            pass


def test_request_is_counted_until_it_ends(limits: ClientLimits):
    with limits.track_request(OLGA):
        with limits.track_request(OLGA):
            assert list(limits._requests_in_progress.values()) == [2]
        assert list(limits._requests_in_progress.values()) == [1]
    assert dict(limits._requests_in_progress) == {}


def test_counters_of_idle_tokens_are_removed(limits: ClientLimits):
    with (
        limits.track_request(OLGA),
        limits.track_request(OLGA),
        limits.reserved_all_tasks_stream(OLGA),
        limits.reserved_all_tasks_stream(OLGA),
    ):
        pass
    assert (dict(limits._requests_in_progress), dict(limits._all_tasks_streams)) == ({}, {})


def test_each_token_has_a_separate_share_of_the_event_loop(limits: ClientLimits):
    shares = [limits.fair_share_of(principal) for principal in (OLGA, VERA, None)]
    assert len({id(share) for share in shares}) == 3
    assert [limits.fair_share_of(principal) for principal in (OLGA, VERA, None)] == shares
