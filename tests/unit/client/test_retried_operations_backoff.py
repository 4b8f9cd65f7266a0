"""The delays between a client's retries."""

import pytest

from sandbox.client import NotFoundError, RateLimitError, UnreachableError
from sandbox.client.retried_operations import DELAYS_SECONDS, RETRY_AFTER_SECONDS_MAX, Backoff

UNREACHABLE = UnreachableError("The connection broke.")


def test_exhausted_backoff_raises_the_error():
    backoff = Backoff((1, 2))
    assert [backoff.next_delay_seconds(UNREACHABLE) for _ in range(2)] == [1, 2]
    with pytest.raises(UnreachableError) as caught:
        backoff.next_delay_seconds(UNREACHABLE)
    assert caught.value is UNREACHABLE


def test_reset_restores_the_delays():
    backoff = Backoff((1,))
    for _ in range(5):
        assert backoff.next_delay_seconds(UNREACHABLE) == 1
        backoff.reset()


def test_permanent_error_is_raised_immediately():
    with pytest.raises(NotFoundError):
        Backoff().next_delay_seconds(NotFoundError("Gone.", code="task_not_found"))


def test_total_delay_covers_a_server_restart():
    assert 20 <= sum(DELAYS_SECONDS) <= 60


@pytest.mark.parametrize(("retry_after_seconds", "expected"), [(0.5, 1), (3.0, 3), (3600.0, RETRY_AFTER_SECONDS_MAX)])
def test_retry_after_header_is_used_within_bounds(retry_after_seconds, expected):
    assert (
        Backoff((1,)).next_delay_seconds(RateLimitError("Too many.", retry_after_seconds=retry_after_seconds))
        == expected
    )
