"""Jumps of the wall clock do not affect timeouts."""

import asyncio
import itertools
import time
from datetime import UTC, datetime, timedelta

import pytest

from doubles.attempt_harness import AttemptHarness, AttemptScript
from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from doubles.server_components import GIB, TO_RUNNING, ServerComponents
from sandbox.bootstrap.clock import SystemClock
from sandbox.model.resources import Resources
from sandbox.model.task_state import TaskState
from sandbox.runner.attempt_context import read_records


@pytest.fixture(autouse=True)
def _jumping_clock(monkeypatch):
    """Shift each reading of the wall clock: one hour ahead, correct, one hour behind."""
    hours = itertools.cycle([1, 0, -1])
    monkeypatch.setattr(SystemClock, "now", lambda _: datetime.now(UTC) + timedelta(hours=next(hours)))


@pytest.mark.parametrize(
    ("lifecycle", "code"), [({"timeout": "2s"}, "timeout"), ({"hang_timeout": "2s"}, "hang"), ({}, None)]
)
async def test_agent_timeouts_ignore_clock_jumps(tmp_path, lifecycle, code):
    harness = AttemptHarness(
        tmp_path, AttemptScript(runs_until_signal=code is not None, stdout=b"a line\n" * 20), lifecycle=lifecycle
    )
    started = time.monotonic()
    await asyncio.wait_for(harness.run(), 60)
    seconds = time.monotonic() - started
    harness.writer.close()
    if code is None:
        assert harness.task.state is TaskState.COMPLETED
    else:
        assert (harness.task.failure.code, seconds > 1.9) == (code, True)
    records = list(read_records(harness.journals, "task-1"))
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    assert [record.at for record in records] != sorted(record.at for record in records)


async def test_task_order_and_waits_ignore_clock_jumps(tmp_path):
    components = ServerComponents(tmp_path, MemoryStore(), capacity=Resources(4, 100 * GIB, 100 * GIB))

    async def scenario():
        async with components.server() as service:
            for number in range(6):
                await service.submit(manifest(f"task-{number}"))
            started = time.monotonic()
            assert (await service.wait("task-0", 1.0)).state is not TaskState.COMPLETED
            assert time.monotonic() - started > 0.9
            for number in range(6):
                await components.wait_for_launch(f"task-{number}")
                components.placement.record(f"task-{number}", *TO_RUNNING, *TO_COMPLETED)
                assert (await service.wait(f"task-{number}", 30)).state is TaskState.COMPLETED

    await asyncio.wait_for(scenario(), 60)
    assert [order.task_id for order in components.placement.orders] == [f"task-{number}" for number in range(6)]
    for number in range(6):
        indexed = components.store.load(f"task-{number}").task
        assert indexed == components.journals.replay(indexed.id).task
