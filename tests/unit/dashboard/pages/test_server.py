"""Somebody looks at how much a server gets done."""

from datetime import UTC, datetime, timedelta

import pytest

from doubles import fake_tasks
from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.dashboard.pages import server


@pytest.mark.parametrize(("count", "says_so"), [(2, False), (3, True)])
def test_figures_of_a_part_of_the_day_are_called_that(pages, monkeypatch, count, says_so):
    monkeypatch.setattr(fake_tasks, "BEGINNING", datetime.now(UTC) - timedelta(hours=1))
    monkeypatch.setattr(server, "STATS_TASKS_MAX", 2)
    for number in range(count):
        pages.tasks.add(f"task-{number}", *TO_RUNNING, *TO_COMPLETED)
    text = pages.get("/server").text
    assert "<dd>2</dd>" in text
    assert ("the last 2 of them" in text) == says_so
