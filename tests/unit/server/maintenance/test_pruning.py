"""Which finished tasks have to go, the oldest first."""

from datetime import UTC, datetime, timedelta

import pytest

from sandbox.interfaces.tasks import Retention
from sandbox.server.maintenance.pruning import PruneSelector

NOW = datetime(2026, 1, 29, tzinfo=UTC)
HOURS = [50, 40, 30, 20, 10]
"""How long ago five tasks ended, of 100 bytes each."""


def gone(retention, kept=()):
    need, found = PruneSelector(retention, NOW, len(HOURS), 100 * len(HOURS)), []
    for hours in HOURS:
        if not need.should_prune(NOW - timedelta(hours=hours)):
            break
        if hours not in kept:
            need.record_pruned(100)
            found.append(hours)
    return found


@pytest.mark.parametrize(
    ("retention", "expected"),
    [
        (Retention(), []),
        (Retention(older_than_seconds=35 * 3600), [50, 40]),
        (Retention(older_than_seconds=40 * 3600), [50]),
        (Retention(keep=2), [50, 40, 30]),
        (Retention(keep=5), []),
        (Retention(max_bytes=250), [50, 40, 30]),
        (Retention(max_bytes=300), [50, 40]),
        (Retention(max_bytes=0), HOURS),
        (Retention(older_than_seconds=45 * 3600, keep=4, max_bytes=300), [50, 40]),
    ],
)
def test_any_bound_is_enough_and_none_asks_for_more_than_it_needs(retention, expected):
    assert gone(retention) == expected


def test_what_must_stay_does_not_count_as_gone():
    assert gone(Retention(keep=3), kept={50}) == [40, 30]
    assert gone(Retention(older_than_seconds=35 * 3600), kept={50}) == [40]
