"""Selection of finished tasks to prune, oldest first."""

from datetime import UTC, datetime, timedelta

import pytest

from sandbox.interfaces.server_services import Retention
from sandbox.server.pruning import PruneSelector

NOW = datetime(2026, 1, 29, tzinfo=UTC)
HOURS = [50, 40, 30, 20, 10]
"""The ages of five finished tasks of 100 bytes each."""


def pruned_hours(retention, retained=()):
    selector, pruned = PruneSelector(retention, NOW, len(HOURS), 100 * len(HOURS)), []
    for hours in HOURS:
        if not selector.should_prune(NOW - timedelta(hours=hours)):
            break
        if hours not in retained:
            selector.record_pruned(100)
            pruned.append(hours)
    return pruned


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
def test_minimum_number_of_tasks_is_pruned_for_each_limit(retention, expected):
    assert pruned_hours(retention) == expected


def test_retained_tasks_are_not_counted_as_pruned():
    assert pruned_hours(Retention(keep=3), retained={50}) == [40, 30]
    assert pruned_hours(Retention(older_than_seconds=35 * 3600), retained={50}) == [40]
