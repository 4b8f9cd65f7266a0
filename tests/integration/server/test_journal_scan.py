"""Journals that take long to look through hold up nobody but their own tasks."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING
from sandbox.interfaces.journal import replay_task
from sandbox.interfaces.tasks import UnavailableError
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import AgentExited, TaskFinished
from sandbox.model.limits import JOURNAL_SCANS_MAX
from sandbox.model.task_state import TaskState
from sandbox.server.journal_scan import JournalScanner

SHARED_THREADS = 3
LOST = (AgentExited(None, None, Failure(FailureCode.RUNNER_LOST, "lost")), TaskFinished())


class SlowOpening:
    """Opening a journal takes until `may_end` is set; it is counted how many are being opened. short: ids of others."""

    def __init__(self, journals, monkeypatch):
        self.may_end, self.count, self.most, self.short = threading.Event(), 0, 0, set()
        opening, counting = journals.open, threading.Lock()

        def open_slowly(task_id):
            if task_id in self.short:
                return opening(task_id)
            with counting:
                self.count += 1
                self.most = max(self.most, self.count)
            try:
                assert self.may_end.wait(30)
                return opening(task_id)
            finally:
                with counting:
                    self.count -= 1

        monkeypatch.setattr(journals, "open", open_slowly)

    async def has_begun(self, count=1):
        async with asyncio.timeout(10):
            while self.count < count:
                await asyncio.sleep(0.005)


@pytest.fixture
def opening(world, monkeypatch):
    made = SlowOpening(world.journals, monkeypatch)
    yield made
    made.may_end.set()


def test_many_lost_tasks_with_long_journals_keep_nobody_from_the_server(world, opening):
    task_ids = [f"lost-{number}" for number in range(SHARED_THREADS)]

    async def play():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(SHARED_THREADS))
        async with world.server() as service:
            for task_id in task_ids:
                await service.submit(manifest(task_id))
                await world.launched(task_id)
                world.runners.play(task_id, *TO_RUNNING)
                await world.until(service, task_id, TaskState.RUNNING)
            for task_id in task_ids:
                world.runners.die(task_id)
            try:
                await opening.has_begun(JOURNAL_SCANS_MAX)
                await asyncio.sleep(0.3)
                await asyncio.wait_for(service.health(), 5)
                await asyncio.wait_for(service.submit(manifest("new")), 5)
            finally:
                opening.may_end.set()
            for task_id in task_ids:
                await world.launched(task_id, 2)
                world.runners.play(task_id, *LOST)
                assert (await service.wait(task_id, 10)).failure.code == "runner_lost"

    asyncio.run(play())
    assert opening.most == JOURNAL_SCANS_MAX


def test_who_is_cancelled_leaves_no_lock_and_no_turn_taken(world, opening):
    world.journals.create("task-1").close()

    async def opened(journals):
        async with journals.slot() as turn:
            return await journals.open("task-1", turn)

    async def play():
        journals = JournalScanner(world.journals)
        for _ in range(JOURNAL_SCANS_MAX + 1):
            opening.may_end.clear()
            given_up = asyncio.create_task(opened(journals))
            await opening.has_begun()
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up
            opening.may_end.set()
            async with asyncio.timeout(10):
                while opening.count or world.journals.is_locked("task-1"):
                    await asyncio.sleep(0.005)
        writer = await asyncio.wait_for(opened(journals), 10)
        assert world.journals.is_locked("task-1")
        writer.close()

    asyncio.run(play())


def test_a_cancel_is_written_down_while_long_journals_of_other_lost_tasks_are_read(world, opening):
    """Its own task is short, and waits for a finisher behind the others."""
    opening.short.add("short")
    long = [f"long-{number}" for number in range(JOURNAL_SCANS_MAX)]

    async def play():
        async with world.server() as service:
            for task_id in [*long, "short"]:
                await service.submit(manifest(task_id))
                await world.launched(task_id)
                world.runners.play(task_id, *TO_RUNNING)
                await world.until(service, task_id, TaskState.RUNNING)
            for task_id in long:
                world.runners.die(task_id)
            await opening.has_begun(JOURNAL_SCANS_MAX)
            world.runners.die("short")
            await asyncio.sleep(0.5)  # it is found lost, and waits for its turn
            try:
                cancelled = await asyncio.wait_for(service.cancel("short", reason="no need", force=True), 2)
                assert cancelled.message == "The task is being stopped; what it made until now is kept."
                assert replay_task(world.journals, "short").task.cancel.reason == "no need"
            finally:
                opening.may_end.set()
            await world.launched("short", 2)
            world.runners.play("short", *LOST)
            assert (await service.wait("short", 10)).state is TaskState.CANCELLED

    asyncio.run(play())


def test_a_cancel_that_waits_behind_other_cancels_is_answered_in_a_bounded_time(world, opening, monkeypatch):
    monkeypatch.setattr("sandbox.server.cancellation.CANCEL_SECONDS", 1.0)
    monkeypatch.setattr("sandbox.server.journal_tailer.LOSS_CHECK_SECONDS", 60.0)
    task_ids = [f"long-{number}" for number in range(JOURNAL_SCANS_MAX + 1)]

    async def play():
        async with world.server() as service:
            for task_id in task_ids:
                await service.submit(manifest(task_id))
                await world.launched(task_id)
                world.runners.play(task_id, *TO_RUNNING)
                await world.until(service, task_id, TaskState.RUNNING)
                world.runners.die(task_id)
            first = [asyncio.create_task(service.cancel(one, reason="", force=False)) for one in task_ids[:-1]]
            await opening.has_begun(JOURNAL_SCANS_MAX)
            with pytest.raises(UnavailableError, match="still cancelling other tasks whose runners died"):
                await asyncio.wait_for(service.cancel(task_ids[-1], reason="", force=False), 5)
            opening.may_end.set()
            assert len(await asyncio.gather(*first)) == JOURNAL_SCANS_MAX
            await service.cancel(task_ids[-1], reason="", force=False)

    asyncio.run(play())
