"""A slow scan of a journal delays only the task of that journal."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from doubles.manifests import manifest
from doubles.server_components import TO_RUNNING
from sandbox.interfaces.journal import LockState
from sandbox.interfaces.server_services import UnavailableError
from sandbox.model.events import AgentExited, TaskFinished
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import CONCURRENT_JOURNAL_REPLAYS_MAX
from sandbox.model.task_state import TaskState
from sandbox.server.journal_replay import JournalReplayer

SHARED_THREADS = 3
LOST = (AgentExited(None, None, Failure(FailureCode.RUNNER_LOST, "lost")), TaskFinished())


class SlowJournals:
    """Delays opening journals until `release_opens` is set, except for `fast_task_ids`, and counts concurrent opens."""

    def __init__(self, journals, monkeypatch):
        self.release_opens, self.count, self.maximum, self.fast_task_ids = threading.Event(), 0, 0, set()
        open_journal, lock = journals.open, threading.Lock()

        def open_slowly(task_id):
            if task_id in self.fast_task_ids:
                return open_journal(task_id)
            with lock:
                self.count += 1
                self.maximum = max(self.maximum, self.count)
            try:
                assert self.release_opens.wait(30)
                return open_journal(task_id)
            finally:
                with lock:
                    self.count -= 1

        monkeypatch.setattr(journals, "open", open_slowly)

    async def wait_for_opens(self, count=1):
        async with asyncio.timeout(10):
            while self.count < count:
                await asyncio.sleep(0.005)


@pytest.fixture
def slow_journals(components, monkeypatch):
    instance = SlowJournals(components.journals, monkeypatch)
    yield instance
    instance.release_opens.set()


async def test_lost_tasks_with_long_journals_do_not_block_the_server(components, slow_journals):
    task_ids = [f"lost-{number}" for number in range(SHARED_THREADS)]

    async def scenario():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(SHARED_THREADS))
        async with components.server() as service:
            for task_id in task_ids:
                await service.submit(manifest(task_id))
                await components.wait_for_launch(task_id)
                components.placement.record(task_id, *TO_RUNNING)
                await components.wait_for_state(service, task_id, TaskState.RUNNING)
            for task_id in task_ids:
                components.placement.kill(task_id)
            try:
                await slow_journals.wait_for_opens(CONCURRENT_JOURNAL_REPLAYS_MAX)
                await asyncio.sleep(0.3)
                await asyncio.wait_for(service.health(), 5)
                await asyncio.wait_for(service.submit(manifest("new")), 5)
            finally:
                slow_journals.release_opens.set()
            for task_id in task_ids:
                await components.wait_for_launch(task_id, 2)
                components.placement.record(task_id, *LOST)
                assert (await service.wait(task_id, 10)).failure.code == "runner_lost"

    await scenario()
    assert slow_journals.maximum == CONCURRENT_JOURNAL_REPLAYS_MAX


async def test_cancelled_scan_releases_its_lock_and_slot(components, slow_journals):
    writer = components.journals.create("task-1")
    writer.append(TaskFinished(), at=datetime.now(UTC))
    writer.close()

    async def open_with_slot(journals):
        async with journals.slot() as slot:
            return await journals.open("task-1", slot)

    async def scenario():
        journals = JournalReplayer(components.journals)
        for _ in range(CONCURRENT_JOURNAL_REPLAYS_MAX + 1):
            slow_journals.release_opens.clear()
            pending = asyncio.create_task(open_with_slot(journals))
            await slow_journals.wait_for_opens()
            pending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pending
            slow_journals.release_opens.set()
            async with asyncio.timeout(10):
                while slow_journals.count or components.journals.lock_state("task-1") is LockState.HELD:
                    await asyncio.sleep(0.005)
        writer = await asyncio.wait_for(open_with_slot(journals), 10)
        assert components.journals.lock_state("task-1") is LockState.HELD
        writer.close()

    await scenario()


async def test_cancel_is_recorded_during_long_scans_of_other_tasks(components, slow_journals):
    """The cancelled task has a short journal. It waits behind the others for the scan that precedes a finisher."""
    slow_journals.fast_task_ids.add("short")
    long = [f"long-{number}" for number in range(CONCURRENT_JOURNAL_REPLAYS_MAX)]
    async with components.server() as service:
        for task_id in [*long, "short"]:
            await service.submit(manifest(task_id))
            await components.wait_for_launch(task_id)
            components.placement.record(task_id, *TO_RUNNING)
            await components.wait_for_state(service, task_id, TaskState.RUNNING)
        for task_id in long:
            components.placement.kill(task_id)
        await slow_journals.wait_for_opens(CONCURRENT_JOURNAL_REPLAYS_MAX)
        components.placement.kill("short")
        await asyncio.sleep(0.5)  # the task is detected as lost and waits for a slot
        try:
            cancelled = await asyncio.wait_for(service.cancel("short", reason="no need", force=True), 2)
            assert cancelled.message == "The task is being stopped; its results so far are stored."
            assert components.journals.replay("short").task.cancel.reason == "no need"
        finally:
            slow_journals.release_opens.set()
        await components.wait_for_launch("short", 2)
        components.placement.record("short", *LOST)
        assert (await service.wait("short", 10)).state is TaskState.CANCELLED


async def test_cancel_request_that_waits_behind_other_requests_times_out(components, slow_journals, monkeypatch):
    monkeypatch.setattr("sandbox.server.task_services.CANCEL_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr("sandbox.server.journal_tailer.JOURNAL_SILENCE_SECONDS", 60.0)
    task_ids = [f"long-{number}" for number in range(CONCURRENT_JOURNAL_REPLAYS_MAX + 1)]
    async with components.server() as service:
        for task_id in task_ids:
            await service.submit(manifest(task_id))
            await components.wait_for_launch(task_id)
            components.placement.record(task_id, *TO_RUNNING)
            await components.wait_for_state(service, task_id, TaskState.RUNNING)
            components.placement.kill(task_id)
        first = [asyncio.create_task(service.cancel(task_id, reason="", force=False)) for task_id in task_ids[:-1]]
        await slow_journals.wait_for_opens(CONCURRENT_JOURNAL_REPLAYS_MAX)
        with pytest.raises(UnavailableError, match="still cancelling other tasks whose runners died"):
            await asyncio.wait_for(service.cancel(task_ids[-1], reason="", force=False), 5)
        slow_journals.release_opens.set()
        assert len(await asyncio.gather(*first)) == CONCURRENT_JOURNAL_REPLAYS_MAX
        await service.cancel(task_ids[-1], reason="", force=False)
