"""Somebody sets the machine's clock, by an hour either way, again and again: nothing ends early or late."""

import asyncio
import itertools
import time
from datetime import UTC, datetime, timedelta

import pytest

from doubles.attempt_dependencies import Script, Stage
from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from doubles.server_components import GIB, TO_END, TO_RUNNING, Rooms
from sandbox.bootstrap.machine import SystemClock
from sandbox.interfaces.journal import read_records, replay_task
from sandbox.model.task_state import TaskState
from sandbox.server.scheduler import Resources


@pytest.fixture(autouse=True)
def _jumps(monkeypatch):
    """Every look at the wall clock shows another hour: ahead, right, behind."""
    hours = itertools.cycle([1, 0, -1])
    monkeypatch.setattr(SystemClock, "now", lambda _: datetime.now(UTC) + timedelta(hours=next(hours)))


@pytest.mark.parametrize(
    ("lifecycle", "code"), [({"timeout": "2s"}, "timeout"), ({"hang_timeout": "2s"}, "hang"), ({}, None)]
)
def test_an_agents_time_is_as_long_as_it_is(tmp_path, lifecycle, code):
    scene = Stage(tmp_path, Script(stays=code is not None, stdout=b"a line\n" * 20), lifecycle=lifecycle)
    begin = time.monotonic()
    asyncio.run(asyncio.wait_for(scene.life.run(), 60))
    seconds = time.monotonic() - begin
    scene.writer.close()
    if code is None:
        assert scene.task.state is TaskState.COMPLETED
    else:
        assert (scene.task.failure.code, seconds > 1.9) == (code, True)
    records = list(read_records(scene.journals, "task-1"))
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    assert [record.at for record in records] != sorted(record.at for record in records)


def test_tasks_begin_in_the_order_in_which_they_came_and_waits_are_as_long_as_they_are(tmp_path):
    world = Rooms(tmp_path, MemoryStore(), capacity=Resources(4, 100 * GIB, 100 * GIB))

    async def play():
        async with world.server() as service:
            for number in range(6):
                await service.submit(manifest(f"task-{number}"))
            begin = time.monotonic()
            assert (await service.wait("task-0", 1.0)).state is not TaskState.COMPLETED
            assert time.monotonic() - begin > 0.9
            for number in range(6):
                await world.launched(f"task-{number}")
                world.runners.play(f"task-{number}", *TO_RUNNING, *TO_END)
                assert (await service.wait(f"task-{number}", 30)).state is TaskState.COMPLETED

    asyncio.run(asyncio.wait_for(play(), 60))
    assert [order.task_id for order in world.runners.orders] == [f"task-{number}" for number in range(6)]
    for number in range(6):
        told = world.store.load(f"task-{number}").task
        assert told == replay_task(world.journals, told.id).task
