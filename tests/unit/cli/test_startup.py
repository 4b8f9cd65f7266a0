"""What stays until the end of a program is not looked through for garbage."""

import subprocess
import sys

import pytest

STORY = """
import gc
from sandbox.cli.startup import gc_frozen

before = gc.get_freeze_count()
try:
    with gc_frozen():
        collects_meanwhile, kept = gc.isenabled(), [[] for _ in range(10_000)]
        {happens}
except ImportError:
    pass
print(collects_meanwhile, gc.isenabled(), gc.get_freeze_count() - before > 10_000)
"""


@pytest.mark.parametrize("happens", ["pass", "raise ImportError"])
def test_garbage_is_looked_for_again_afterwards_and_not_in_what_was_made(happens):
    program = [sys.executable, "-c", STORY.format(happens=happens)]
    answer = subprocess.run(program, capture_output=True, text=True, timeout=30, check=True)
    assert answer.stdout.split() == ["False", "True", "True"]
