"""Somebody walks through a list while tasks come and go."""

import base64
import json

import pytest

from sandbox.interfaces.store import Cursor

LIST = "/api/v1/tasks"


def test_pages_hang_together_by_their_cursors(api, tasks):
    for number in range(5):
        tasks.add(f"task-{number}")
    seen, path = [], f"{LIST}?limit=2"
    while True:
        page = api.get(path).json()
        seen += [item["id"] for item in page["tasks"]]
        assert page["has_more"] == (page["next_cursor"] is not None)
        if not page["has_more"]:
            break
        path = f"{LIST}?limit=2&cursor={page['next_cursor']}"
    assert seen == [f"task-{number}" for number in range(5)]


def test_a_cursor_brings_its_own_order(api, tasks):
    for number in range(3):
        tasks.add(f"task-{number}", labels={"team": "a"})
    cursor = api.get(f"{LIST}?limit=1&sort=name&order=asc&label.team=a").json()["next_cursor"]
    api.get(f"{LIST}?limit=1&label.team=a&cursor={cursor}")
    api.get(f"{LIST}?limit=1&label.team=a&sort=name&order=asc&cursor={cursor}")
    first, second, third = tasks.queries
    assert (second.sort, second.order, second.labels, second.offset) == ("name", "asc", {"team": "a"}, 0)
    assert second.cursor == Cursor("2026-01-29T10:10:15.124Z", "task-0")
    assert (second, first.cursor) == (third, None)


def written(*values):
    return base64.urlsafe_b64encode(json.dumps(values).encode()).rstrip(b"=").decode()


GOOD = written(1, "name", "asc", "My Task", "task-001")


def test_the_good_one_of_those_below_is_taken(api, tasks):
    tasks.add("task-001")
    assert api.get(f"{LIST}?cursor={GOOD}").status_code == 200


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("cursor=", "cursor"),
        ("cursor=%00", "cursor"),
        ("cursor=gr%C3%BCn", "cursor"),
        (f"cursor={GOOD}%0a", "cursor"),
        (f"cursor={'A' * 2049}", "cursor"),
        ("cursor=A", "cursor"),
        (f"cursor={written(2, 'name', 'asc', 'x', 'y')}", "cursor"),
        (f"cursor={written(1, 'age', 'asc', 'x', 'y')}", "cursor"),
        (f"cursor={written(1, 'name', 'up', 'x', 'y')}", "cursor"),
        (f"cursor={written(1, 'name', 'asc', None, 'y')}", "cursor"),
        (f"cursor={written(1, 'name', 'asc', 7, 'y')}", "cursor"),
        (f"cursor={written(1, 'name', 'asc', 'x')}", "cursor"),
        (f"cursor={base64.urlsafe_b64encode(b'[' * 1500).decode().rstrip('=')}", "cursor"),
        (f"cursor={GOOD}&offset=1", "offset"),
        (f"cursor={GOOD}&sort=created_at", "sort"),
        (f"cursor={GOOD}&order=desc", "order"),
    ],
)
def test_a_cursor_that_was_never_given_is_refused(api, tasks, query, field):
    answer = api.get(f"{LIST}?{query}")
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_parameter")
    assert answer.json()["details"][0]["field"] == field
    assert tasks.queries == []


def test_only_a_start_may_be_missing_at_a_place(api, tasks):
    tasks.add("task-001")
    assert api.get(f"{LIST}?cursor={written(1, 'started_at', 'asc', None, 'task-001')}").status_code == 200
