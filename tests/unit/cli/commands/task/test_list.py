"""`sandbox task list` does not import the store, so it has a separate list of sort keys."""

from typing import get_args

from sandbox.cli.commands.task.list import SORTS
from sandbox.dashboard.pages.task_list import _SORT_LABELS
from sandbox.interfaces.store import Sort


def test_sort_keys_equal_those_of_the_store():
    assert get_args(Sort) == SORTS
    assert set(_SORT_LABELS) == set(SORTS)
