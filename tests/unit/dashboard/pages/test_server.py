"""The server page."""

from datetime import UTC, datetime, timedelta

import pytest

from doubles import fake_tasks
from doubles.fake_tasks import TO_COMPLETED, TO_RUNNING
from sandbox.dashboard.pages import server


@pytest.mark.parametrize(("count", "is_marked_partial"), [(2, False), (3, True)])
def test_truncated_statistics_are_marked(pages, monkeypatch, count, is_marked_partial):
    monkeypatch.setattr(fake_tasks, "BEGINNING", datetime.now(UTC) - timedelta(hours=1))
    monkeypatch.setattr(server, "STATS_TASKS_MAX", 2)
    for number in range(count):
        pages.tasks.add(f"task-{number}", *TO_RUNNING, *TO_COMPLETED)
    text = pages.get("/server").text
    assert "<dd>2</dd>" in text
    assert ("only the latest 2" in text) == is_marked_partial
