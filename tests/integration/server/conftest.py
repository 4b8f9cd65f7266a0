"""Fixtures: server components with simulated runners."""

import pytest

from doubles.memory_store import MemoryStore
from doubles.server_components import ServerComponents


@pytest.fixture
def components(tmp_path, monkeypatch):
    """Server components with an in-memory store and frequent checks for lost runners."""
    monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 0.1)
    instance = ServerComponents(tmp_path, MemoryStore())
    yield instance
    for task_id in list(instance.placement.recorders):
        instance.placement.kill(task_id)
