"""Fixtures for the tests of attempts."""

import pytest

from doubles.attempt_harness import AttemptHarness


@pytest.fixture
def make_harness(tmp_path):
    """Create attempts whose task is submitted and assigned to a runner."""
    harnesses = []

    def make(script, **options):
        harnesses.append(AttemptHarness(tmp_path, script, **options))
        return harnesses[-1]

    yield make
    for harness in harnesses:
        harness.writer.close()
