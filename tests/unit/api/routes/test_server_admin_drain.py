"""Draining of the server by an operator."""

from doubles.example_requests import Example

EXAMPLES = (
    Example("get_drain"),
    Example("begin_drain"),
    Example("undo_drain"),
)
DRAIN = "/api/v1/admin/drain"


def test_drain_can_be_started_and_undone(api):
    idle = {"draining": False, "since": None, "running": 1, "waiting": 2}
    draining = {**idle, "draining": True, "since": "2026-01-29T10:10:15.000Z"}
    assert api.get(DRAIN).json() == idle
    assert api.post(DRAIN).json() == draining
    assert api.get(DRAIN).json() == draining
    assert api.delete(DRAIN).json() == idle
    assert api.get(DRAIN).json() == idle
