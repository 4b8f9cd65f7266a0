"""A server's rooms, with runners that are played."""

import pytest

from doubles.memory_store import MemoryStore
from doubles.server_components import Rooms


@pytest.fixture
def world(tmp_path, monkeypatch):
    """With a store in memory; a runner's loss is looked for soon."""
    monkeypatch.setattr("sandbox.server.journal_tailer.LOSS_CHECK_SECONDS", 0.1)
    made = Rooms(tmp_path, MemoryStore())
    yield made
    for task_id in list(made.runners.recorders):
        made.runners.die(task_id)
