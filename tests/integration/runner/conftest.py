"""What the stories of attempts share."""

import pytest

from doubles.attempt_dependencies import Stage


@pytest.fixture
def stage(tmp_path):
    """Makes tasks that are submitted and handed to a runner."""
    stages = []

    def make(script, **parts):
        stages.append(Stage(tmp_path, script, **parts))
        return stages[-1]

    yield make
    for each in stages:
        each.writer.close()
