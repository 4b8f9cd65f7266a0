"""Pagination while tasks change."""

import base64
import json

import pytest

from sandbox.interfaces.store import Cursor

LIST = "/api/v1/tasks"


def test_cursors_link_the_pages(api, tasks):
    for number in range(5):
        tasks.add(f"task-{number}")
    ids, path = [], f"{LIST}?limit=2"
    while True:
        page = api.get(path).json()
        ids += [item["id"] for item in page["tasks"]]
        assert page["has_more"] == (page["next_cursor"] is not None)
        if not page["has_more"]:
            break
        path = f"{LIST}?limit=2&cursor={page['next_cursor']}"
    assert ids == [f"task-{number}" for number in range(5)]


def test_cursor_contains_the_order(api, tasks):
    for number in range(3):
        tasks.add(f"task-{number}", labels={"team": "a"})
    cursor = api.get(f"{LIST}?limit=1&sort=name&order=asc&label.team=a").json()["next_cursor"]
    api.get(f"{LIST}?limit=1&label.team=a&cursor={cursor}")
    api.get(f"{LIST}?limit=1&label.team=a&sort=name&order=asc&cursor={cursor}")
    first, second, third = tasks.queries
    assert (second.sort, second.order, second.labels, second.offset) == ("name", "asc", {"team": "a"}, 0)
    assert second.cursor == Cursor("2026-01-29T10:10:15.124Z", "task-0")
    assert (second, first.cursor) == (third, None)


def encode_cursor(*values):
    return base64.urlsafe_b64encode(json.dumps(values).encode()).rstrip(b"=").decode()


VALID_CURSOR = encode_cursor(1, "name", "asc", "My Task", "task-001")


def test_valid_cursor_is_accepted(api, tasks):
    tasks.add("task-001")
    assert api.get(f"{LIST}?cursor={VALID_CURSOR}").status_code == 200


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("cursor=", "cursor"),
        ("cursor=%00", "cursor"),
        ("cursor=gr%C3%BCn", "cursor"),
        (f"cursor={VALID_CURSOR}%0a", "cursor"),
        (f"cursor={'A' * 2049}", "cursor"),
        ("cursor=A", "cursor"),
        (f"cursor={encode_cursor(2, 'name', 'asc', 'x', 'y')}", "cursor"),
        (f"cursor={encode_cursor(1, 'age', 'asc', 'x', 'y')}", "cursor"),
        (f"cursor={encode_cursor(1, 'name', 'up', 'x', 'y')}", "cursor"),
        (f"cursor={encode_cursor(1, 'name', 'asc', None, 'y')}", "cursor"),
        (f"cursor={encode_cursor(1, 'name', 'asc', 7, 'y')}", "cursor"),
        (f"cursor={encode_cursor(1, 'name', 'asc', 'x')}", "cursor"),
        (f"cursor={base64.urlsafe_b64encode(b'[' * 1500).decode().rstrip('=')}", "cursor"),
        (f"cursor={VALID_CURSOR}&offset=1", "offset"),
        (f"cursor={VALID_CURSOR}&sort=created_at", "sort"),
        (f"cursor={VALID_CURSOR}&order=desc", "order"),
    ],
)
def test_invalid_cursor_is_rejected(api, tasks, query, field):
    response = api.get(f"{LIST}?{query}")
    assert (response.status_code, response.json()["error"]) == (400, "invalid_parameter")
    assert response.json()["details"][0]["field"] == field
    assert tasks.queries == []


def test_cursor_value_of_started_at_may_be_null(api, tasks):
    tasks.add("task-001")
    assert api.get(f"{LIST}?cursor={encode_cursor(1, 'started_at', 'asc', None, 'task-001')}").status_code == 200
