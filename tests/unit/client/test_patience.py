"""How long a client goes on trying."""

import pytest

from sandbox.client import NotFoundError, UnreachableError
from sandbox.client.patience import PAUSES_SECONDS, Patience

GONE = UnreachableError("The connection broke.")


def test_patience_ends_with_the_error_that_ended_it():
    patience = Patience((0, 0))
    patience.pause(GONE)
    patience.pause(GONE)
    with pytest.raises(UnreachableError) as caught:
        patience.pause(GONE)
    assert caught.value is GONE


def test_success_in_between_gives_the_patience_back():
    patience = Patience((0,))
    for _ in range(5):
        patience.pause(GONE)
        patience.restore()


def test_what_no_other_try_can_mend_is_raised_at_once():
    with pytest.raises(NotFoundError):
        Patience().pause(NotFoundError("Gone.", code="task_not_found"))


def test_a_restart_of_the_server_is_outlasted_and_its_death_is_not_waited_for_forever():
    assert 20 <= sum(PAUSES_SECONDS) <= 60
