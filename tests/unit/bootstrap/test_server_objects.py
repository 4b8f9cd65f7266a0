"""Server limits that depend on the server's process."""

import resource

import pytest

from sandbox.bootstrap.server import unfinished_tasks_max
from sandbox.model.fixed_limits import UNFINISHED_TASKS_MAX


@pytest.mark.parametrize(
    ("descriptors", "tasks_max"),
    [(1024, 256), (4 * UNFINISHED_TASKS_MAX + 4, UNFINISHED_TASKS_MAX), (resource.RLIM_INFINITY, UNFINISHED_TASKS_MAX)],
)
def test_number_of_unfinished_tasks_is_limited_by_file_descriptors(monkeypatch, descriptors, tasks_max):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (descriptors, descriptors))
    assert unfinished_tasks_max() == tasks_max
