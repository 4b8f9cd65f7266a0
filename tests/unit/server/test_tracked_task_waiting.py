"""Waiting for the changes and for the end of a task."""

import asyncio

import pytest

from doubles.manifests import manifest
from sandbox.interfaces.store import IndexedTask
from sandbox.model.task import Task
from sandbox.model.task_state import FINAL_STATES, TaskState
from sandbox.server.tracked_task import NoKnownOwner, TrackedTask


def task_in(state):
    return Task("t", manifest("t"), state, "Status", (), last_seq=1)


def tracked_in(state):
    return TrackedTask(IndexedTask(task_in(state), 0), NoKnownOwner())


@pytest.mark.parametrize("final", sorted(FINAL_STATES))
async def test_only_the_end_of_a_task_wakes_those_who_wait_for_it(final):
    tracked = tracked_in(TaskState.PENDING)
    change, end = (asyncio.ensure_future(wait(60)) for wait in (tracked.wait_for_change, tracked.wait_for_end))
    await asyncio.sleep(0)
    tracked.update(task_in(TaskState.RUNNING), 1)
    await change
    assert not end.done()
    tracked.update(task_in(final), 2)
    await end


async def test_wait_for_the_end_ends_at_the_timeout():
    tracked = tracked_in(TaskState.RUNNING)
    await tracked.wait_for_end(0.01)
    assert tracked.task.state is TaskState.RUNNING


async def test_end_of_a_task_that_has_ended_is_not_awaited():
    await asyncio.wait_for(tracked_in(TaskState.COMPLETED).wait_for_end(60), 5)
