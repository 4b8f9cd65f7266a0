"""`gc_frozen` excludes long-lived objects from garbage collection."""

import subprocess
import sys

import pytest

PROGRAM = """
import gc
from sandbox.cli.click_extensions import gc_frozen

before = gc.get_freeze_count()
try:
    with gc_frozen():
        collects_inside, kept = gc.isenabled(), [[] for _ in range(10_000)]
        {statement}
except ImportError:
    pass
print(collects_inside, gc.isenabled(), gc.get_freeze_count() - before > 10_000)
"""


@pytest.mark.parametrize("statement", ["pass", "raise ImportError"])
def test_gc_is_enabled_afterwards_and_new_objects_are_frozen(statement):
    program = [sys.executable, "-c", PROGRAM.format(statement=statement)]
    completed = subprocess.run(program, capture_output=True, text=True, timeout=30, check=True)
    assert completed.stdout.split() == ["False", "True", "True"]
