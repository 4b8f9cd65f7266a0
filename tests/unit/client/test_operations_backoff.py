"""How long a client goes on trying."""

import pytest

from sandbox.client import NotFoundError, RateLimitError, UnreachableError
from sandbox.client.operations import DELAYS_SECONDS, RETRY_AFTER_SECONDS_MAX, Backoff

GONE = UnreachableError("The connection broke.")


def test_patience_ends_with_the_error_that_ended_it():
    patience = Backoff((1, 2))
    assert [patience.next_delay_seconds(GONE) for _ in range(2)] == [1, 2]
    with pytest.raises(UnreachableError) as caught:
        patience.next_delay_seconds(GONE)
    assert caught.value is GONE


def test_success_in_between_gives_the_patience_back():
    patience = Backoff((1,))
    for _ in range(5):
        assert patience.next_delay_seconds(GONE) == 1
        patience.reset()


def test_what_no_other_try_can_mend_is_raised_at_once():
    with pytest.raises(NotFoundError):
        Backoff().next_delay_seconds(NotFoundError("Gone.", code="task_not_found"))


def test_a_restart_of_the_server_is_outlasted_and_its_death_is_not_waited_for_forever():
    assert 20 <= sum(DELAYS_SECONDS) <= 60


@pytest.mark.parametrize(("asked", "given"), [(0.5, 1), (3.0, 3), (3600.0, RETRY_AFTER_SECONDS_MAX)])
def test_a_server_that_asks_for_a_pause_gets_it_within_bounds(asked, given):
    assert Backoff((1,)).next_delay_seconds(RateLimitError("Too many.", retry_after_seconds=asked)) == given
