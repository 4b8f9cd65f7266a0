"""Failures of disk, index, processes and journals: no task is lost, and none hangs."""

import asyncio
import errno
import os
import time
from pathlib import Path

import pytest

from doubles.fake_tasks import TO_COMPLETED
from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from doubles.server_components import GIB, TO_RUNNING, ServerComponents
from doubles.stored_tasks import StoredTasks
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.runner import FinishAttempt, RunnerNotStartedError
from sandbox.interfaces.server_services import ArtifactNotFoundError, TaskNotFoundError, UnavailableError
from sandbox.interfaces.store import StoreError, TaskQuery
from sandbox.interfaces.task_file_layout import TaskLayout
from sandbox.journal.writer import FileJournalWriter, JournalRecorder
from sandbox.model.artifacts import Artifact
from sandbox.model.events import (
    ArtifactCollected,
    AttemptFailed,
    AttemptStarted,
    CancelRequested,
    TaskFinished,
    TaskSubmitted,
)
from sandbox.model.failure import Failure, FailureCode
from sandbox.model.fixed_limits import FINISHERS_MAX
from sandbox.model.resources import DiskSpace, Resources
from sandbox.model.task_state import TaskState
from sandbox.server.scheduler import Scheduler
from sandbox.store.sqlite import SqliteStore


class FullDisk:
    """While the disk is full, journals accept only the event types in `accepted_event_types`."""

    def __init__(self, monkeypatch):
        self.is_full, self.accepted_event_types, self.failure_count = False, (), 0
        append = FileJournalWriter.append

        def append_unless_full(writer, event, transition=None, **when):
            if self.is_full and not isinstance(event, self.accepted_event_types):
                self.failure_count += 1
                raise OSError(28, "No space left on device")
            return append(writer, event, transition, **when)

        monkeypatch.setattr(FileJournalWriter, "append", append_unless_full)


class FailingStore(MemoryStore):
    """An index that rejects writes while `is_failing` is set."""

    is_failing = False
    failure_count = 0

    def save(self, indexed):
        self._raise_if_failing()
        super().save(indexed)

    def save_all(self, indexed):
        self._raise_if_failing()
        super().save_all(indexed)

    def _raise_if_failing(self):
        if self.is_failing:
            self.failure_count += 1
            raise StoreError("database or disk is full")


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    for name in (
        "journal_tailer.JOURNAL_SILENCE_SECONDS",
        "journal_tailer.HOST_ERROR_PAUSE_SECONDS",
        "dispatcher.HOST_ERROR_PAUSE_SECONDS",
    ):
        monkeypatch.setattr(f"sandbox.server.{name}", 0.1)


async def wait_for_failures(resource, times=2):
    """Wait for `times` more failures."""
    target = resource.failure_count + times
    async with asyncio.timeout(10):
        while resource.failure_count < target:
            await asyncio.sleep(0.005)


@pytest.fixture
def disk(monkeypatch):
    return FullDisk(monkeypatch)


@pytest.fixture
def components(tmp_path):
    instance = ServerComponents(tmp_path, FailingStore())
    yield instance
    for task_id in list(instance.placement.recorders):
        instance.placement.kill(task_id)


async def test_submit_on_a_full_disk_is_rejected_and_can_be_repeated(components, disk):
    async with components.server() as service:
        disk.is_full = True
        for _ in range(2):
            with pytest.raises(UnavailableError, match="No space left"):
                await service.submit(manifest())
            assert list((components.data_dir / "tasks").iterdir()) == []
        disk.is_full = False
        assert (await service.submit(manifest())).task.state is TaskState.PENDING
        await components.wait_for_launch("task-1")


async def test_submit_succeeds_with_a_broken_index(components):
    async def scenario():
        async with components.server() as service:
            components.store.is_failing = True
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.store.is_failing = False
            components.placement.record("task-1", *TO_RUNNING, *TO_COMPLETED)
            assert (await service.wait("task-1", 10)).state is TaskState.COMPLETED
            assert (await service.status("task-1")).state is TaskState.COMPLETED

    await scenario()
    assert components.store.load("task-1").task.state is TaskState.COMPLETED


async def test_index_that_was_temporarily_broken_is_updated_later(components):
    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.store.is_failing = True
            components.placement.record("task-1", *TO_RUNNING)
            await wait_for_failures(components.store)
            components.store.is_failing = False
            components.placement.record("task-1", *TO_COMPLETED)
            return await service.wait("task-1", 10)

    assert (await scenario()).state is TaskState.COMPLETED


async def test_launch_on_a_full_disk_is_retried(components, disk):
    async with components.server() as service:
        disk.is_full, disk.accepted_event_types = True, (TaskSubmitted,)
        await service.submit(manifest())
        await wait_for_failures(disk)
        waiting = await service.status("task-1")
        assert waiting.state is TaskState.PENDING
        assert "No space left" in waiting.state_message
        disk.is_full = False
        await components.wait_for_launch("task-1")


async def test_failing_finisher_launch_is_retried(components):
    async with components.server() as service:
        await components.start_running_task(service)
        components.placement.launch_error = OSError("no more processes")
        components.placement.kill("task-1")
        await wait_for_failures(components.placement)
        components.placement.launch_error = None
        await components.wait_for_launch("task-1", 2)
        components.placement.record("task-1", *TO_COMPLETED)
        await service.wait("task-1", 10)


async def test_end_of_a_task_is_written_once_the_disk_has_space(components, disk, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING[:1])
            await components.kill_runners("task-1", FINISHERS_MAX)
            await components.wait_for_launch("task-1", 1 + FINISHERS_MAX)
            disk.is_full = True
            components.placement.kill("task-1")
            await wait_for_failures(disk)
            disk.is_full = False
            return await service.wait("task-1", 10)

    assert (await scenario()).failure.code == "runner_lost"


async def test_cancel_persists_if_the_end_cannot_be_written(components, disk):
    components.capacity = Resources(4, 100 * GIB, 100 * GIB)

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest("first"))
            await service.submit(manifest("second"))
            disk.is_full, disk.accepted_event_types = True, (CancelRequested,)
            with pytest.raises(UnavailableError, match="No space left"):
                await service.cancel("second", reason="", force=False)
            disk.is_full = False
            await components.wait_for_launch("first")
            components.placement.record("first", *TO_RUNNING, *TO_COMPLETED)
            return (await service.wait("second", 10)).state

    assert (await scenario()) is TaskState.CANCELLED
    assert [order.task_id for order in components.placement.orders] == ["first"]


async def test_server_starts_with_a_cancelled_task_that_cannot_end_yet(components, disk):
    writer = components.journals.create("task-1")
    recorder = JournalRecorder(writer, None, components.clock.now)
    recorder.record(TaskSubmitted("task-1", manifest()))
    recorder.record(CancelRequested("", force=False))
    writer.close()

    async def scenario():
        disk.is_full = True
        async with components.server() as service:
            assert (await service.status("task-1")).state is TaskState.PENDING
            disk.is_full = False
            return (await service.wait("task-1", 10)).state

    assert (await scenario()) is TaskState.CANCELLED


def test_pending_task_with_a_busy_journal_is_launched(components):
    """A child of the killed server may still hold the lock for a moment."""

    async def before():
        components.capacity = Resources(0, 0, 0)
        async with components.server() as service:
            components.track_new_task(service)

    async def after():
        components.capacity = Resources(4, 100 * GIB, 100 * GIB)
        busy = components.journals.open("task-1")
        async with components.server() as service:
            busy.close()
            await components.wait_for_launch("task-1")
            return (await service.status("task-1")).failure

    asyncio.run(before())
    assert asyncio.run(after()) is None


def test_pending_task_with_a_busy_journal_waits_for_resources(components):
    async def before():
        components.capacity = Resources(0, 0, 0)
        async with components.server() as service:
            components.track_new_task(service)

    async def after():
        components.capacity, components.available_memory_bytes = Resources(4, 100 * GIB, 100 * GIB), 0
        busy = components.journals.open("task-1")
        async with components.server() as service:
            busy.close()
            async with asyncio.timeout(10):
                while "free memory" not in (await service.status("task-1")).state_message:
                    await asyncio.sleep(0.01)
            occupancy = (await service.health()).occupancy
            assert (occupancy.waiting, occupancy.cpus_reserved) == (1, 0)
            components.available_memory_bytes = 100 * GIB
            await components.wait_for_launch("task-1")

    asyncio.run(before())
    asyncio.run(after())


@pytest.mark.parametrize("name", ["task-1.changes.tar", "task-1.chain.patch", "transcript.ndjson"])
async def test_workspace_file_is_not_found_as_a_generated_artifact(components, name):
    """A file of the agent that has the name of a generated artifact is stored under another name."""
    renamed = Artifact(f"renamed-{name}", name, 1, "text/plain", "sha256:0")
    other = Artifact("notes.txt", "out/notes.txt", 1, "text/plain", "sha256:0")
    async with components.server() as service:
        await service.submit(manifest())
        await components.wait_for_launch("task-1")
        directory = TaskLayout(components.data_dir, "task-1").artifacts
        directory.mkdir()
        for artifact in (renamed, other):
            (directory / artifact.name).write_bytes(b"x")
        collected = map(ArtifactCollected, (renamed, other))
        components.placement.record("task-1", *TO_RUNNING, *collected, *TO_COMPLETED)
        await service.wait("task-1", 10)
        with pytest.raises(ArtifactNotFoundError):
            await service.artifact("task-1", name)
        assert (await service.artifact("task-1", renamed.name)).artifact == renamed
        assert (await service.artifact("task-1", "out/notes.txt")).artifact == other


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_pending_task_with_a_busy_journal_waits_for_the_end_of_the_drain(components, is_cancelled):
    async def before():
        components.capacity = Resources(0, 0, 0)
        async with components.server() as service:
            components.track_new_task(service)
            await service.drain()

    async def after():
        components.capacity = Resources(4, 100 * GIB, 100 * GIB)
        busy = components.journals.open("task-1")
        async with components.server() as service:
            busy.close()
            async with asyncio.timeout(10):
                while "being drained" not in (await service.status("task-1")).state_message:
                    await asyncio.sleep(0.01)
            assert (await service.status("task-1")).state is TaskState.PENDING
            draining = await service.drain_status()
            assert (draining.running, draining.waiting) == (0, 1)
            if is_cancelled:
                await service.cancel("task-1", reason="", force=False)
                assert (await service.wait("task-1", 10)).state is TaskState.CANCELLED
                return
            await service.undo_drain()
            await components.wait_for_launch("task-1")

    asyncio.run(before())
    asyncio.run(after())


async def test_invalid_journal_does_not_affect_other_tasks(components):
    """Another version may have written an invalid record."""
    writer = components.journals.create("odd")
    writer.append(TaskFinished(), at=components.clock.now())
    writer.close()

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING)
            recorder = components.placement.recorders["task-1"]
            recorder.writer.append(AttemptStarted("another", "x", "here"), at=components.clock.now())
            await service.submit(manifest("task-2"))
            await components.wait_for_launch("task-2")
            components.placement.record("task-2", *TO_RUNNING, *TO_COMPLETED)
            return (await service.wait("task-2", 10)).state

    assert (await scenario()) is TaskState.COMPLETED


async def test_unreadable_journal_does_not_affect_other_tasks(components, caplog):
    (components.data_dir / "tasks" / "broken" / "journal" / "records").mkdir(parents=True)

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest("other"))
            await components.wait_for_launch("other")
            components.placement.record("other", *TO_RUNNING, *TO_COMPLETED)
            return await service.wait("other", 10)

    assert (await scenario()).state is TaskState.COMPLETED
    assert "Task broken cannot be added to the index" in caplog.text


async def test_journal_damage_is_shown_in_the_status(components):
    async with components.server() as service:
        await components.start_running_task(service)
        records = components.data_dir / "tasks/task-1/journal/records"
        with records.open("ab") as file:
            file.write(b"00000000 {}\n")
        components.placement.record("task-1", *TO_COMPLETED)
        async with asyncio.timeout(10):
            while "checksum" not in (await service.status("task-1")).state_message:
                await asyncio.sleep(0.01)


async def test_journal_with_a_damaged_tail_is_not_reread_from_the_start(components, monkeypatch):
    offsets, read = [], components.journals.read

    def recording_read(task_id, offset=0, **bounds):
        offsets.append(offset)
        return read(task_id, offset, **bounds)

    async def scenario():
        async with components.server() as service:
            await components.start_running_task(service)
            offset = service.tracked_tasks["task-1"].offset
            monkeypatch.setattr(components.journals, "read", recording_read)
            with (components.data_dir / "tasks/task-1/journal/records").open("ab") as file:
                file.write(b"00000000 {}\n")
            components.placement.record("task-1", *TO_COMPLETED)
            offsets.clear()
            async with asyncio.timeout(10):
                while len(offsets) < 4:
                    await asyncio.sleep(0.01)
            assert "checksum" in (await service.status("task-1")).state_message
            return offset

    offset = await scenario()
    assert set(offsets) == {offset}


async def test_cancel_of_a_task_with_a_damaged_journal_is_rejected(components):
    async with components.server() as service:
        await components.start_running_task(service)
        damage(components.data_dir / "tasks/task-1/journal/records")
        components.placement.kill("task-1")
        with pytest.raises(UnavailableError, match=r"is blocked.*checksum"):
            await service.cancel("task-1", reason="", force=False)


@pytest.mark.parametrize("damage_kind", ["damaged", "inconsistent"])
async def test_submit_with_the_id_of_an_unreadable_journal_is_rejected(components, damage_kind):
    recorder = JournalRecorder(components.journals.create("task-1"), None, SystemClock().now)
    recorder.record(TaskSubmitted("task-1", manifest()))
    recorder.writer.append(TaskSubmitted("task-1", manifest()), at=components.clock.now())
    recorder.writer.close()
    if damage_kind == "damaged":
        damage(components.data_dir / "tasks/task-1/journal/records")
    async with components.server() as service:
        with pytest.raises(UnavailableError, match="task-1 already exists, but cannot be read"):
            await service.submit(manifest())


def damage(records):
    data = bytearray(records.read_bytes())
    data[50] ^= 1
    records.write_bytes(data)


def test_server_start_schedules_all_pending_tasks_in_one_pass(components, monkeypatch):
    """Thousands of tasks may be pending, and each pass schedules all of them, so a pass per task would be slow."""
    components.capacity, passes = Resources(4, 1000 * GIB, 1000 * GIB), []
    monkeypatch.setattr("sandbox.server.dispatcher.MEMORY_CHECK_INTERVAL_SECONDS", 60)

    async def before():
        async with components.server() as service:
            for number in range(20):
                await service.submit(manifest(f"task-{number:02}"))
            await components.wait_for_launch("task-00")

    asyncio.run(before())
    waiting_messages = Scheduler.waiting_messages

    def recording_reasons(scheduler, available_bytes):
        passes.append(scheduler.waiting_count)
        return waiting_messages(scheduler, available_bytes)

    monkeypatch.setattr(Scheduler, "waiting_messages", recording_reasons)

    async def after():
        async with components.server():
            return list(passes)

    assert len(asyncio.run(after())) == 1


async def test_sixty_tasks_start_roughly_in_order_and_complete_on_three_slots(components):
    components.capacity = Resources(12, 1000 * GIB, 1000 * GIB)
    names = [f"task-{number:03}" for number in range(60)]

    async def scenario():
        async with components.server() as service:
            for name in names:
                await service.submit(manifest(name))
            async with asyncio.timeout(60):
                while len(components.placement.orders) < len(names) or components.placement.recorders:
                    for name in list(components.placement.recorders):
                        components.placement.record(name, *TO_RUNNING, *TO_COMPLETED)
                    await asyncio.sleep(0.002)
            return [(await service.wait(name, 10)).state for name in names]

    assert set(await scenario()) == {TaskState.COMPLETED}
    launched = [order.task_id for order in components.placement.orders]
    assert sorted(launched) == names
    # Three launches run concurrently, so their order may vary.
    assert all(abs(launched.index(name) - number) <= 3 for number, name in enumerate(names))


def test_pending_tasks_keep_their_order_across_a_restart(components):
    components.capacity = Resources(4, 1000 * GIB, 1000 * GIB)
    names = [f"task-{number:02}" for number in range(20)]

    async def before():
        async with components.server() as service:
            for name in names:
                await service.submit(manifest(name))
            await components.wait_for_launch(names[0])

    async def after():
        async with components.server() as service:
            for name in names:
                await components.wait_for_launch(name)
                components.placement.record(name, *TO_RUNNING, *TO_COMPLETED)
            return [(await service.wait(name, 10)).state for name in names]

    asyncio.run(before())
    assert set(asyncio.run(after())) == {TaskState.COMPLETED}
    assert [order.task_id for order in components.placement.orders] == names


def test_running_task_gets_its_resources_before_an_older_pending_task(components):
    """The pending task is older if the wall clock is set back between the two submissions."""
    components.capacity = Resources(4, 100 * GIB, 100 * GIB)

    async def before():
        async with components.server() as service:
            await service.submit(manifest("running"))
            await components.wait_for_launch("running")
            components.set_clock_back()
            await service.submit(manifest("waiting"))

    async def after():
        async with components.server():
            await asyncio.sleep(0.1)
            assert len(components.placement.orders) == 1
            components.placement.record("running", *TO_RUNNING, *TO_COMPLETED)
            await components.wait_for_launch("waiting")

    asyncio.run(before())
    asyncio.run(after())


async def test_tasks_leak_no_descriptors_or_asyncio_tasks(components):

    async def scenario():
        async with components.server() as service:
            counts = []
            for number in range(60):
                await service.submit(manifest(f"task-{number}"))
                await components.wait_for_launch(f"task-{number}")
                components.placement.record(f"task-{number}", *TO_RUNNING, *TO_COMPLETED)
                await service.wait(f"task-{number}", 10)
                if number in (20, 59):
                    await asyncio.sleep(0.3)
                    counts.append((len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())))
            return counts

    first, last = await scenario()
    assert last == first


def test_rejected_task_leaves_nothing_for_the_next_server(components, disk):
    async def before():
        async with components.server() as service:
            disk.is_full = True
            with pytest.raises(UnavailableError):
                await service.submit(manifest())

    async def after():
        disk.is_full = False
        async with components.server() as service:
            await service.health()
            return list(service.tracked_tasks)

    asyncio.run(before())
    assert asyncio.run(after()) == []
    assert components.journals.task_ids() == []


async def test_temporary_launch_failure_is_followed_by_a_finisher(components):
    async with components.server() as service:
        components.placement.launch_error = RunnerNotStartedError(errno.EAGAIN, "No process to spare")
        await service.submit(manifest())
        await wait_for_failures(components.placement)
        assert not (await service.status("task-1")).state.is_final
        components.placement.launch_error = None
        await components.wait_for_launch("task-1")
        assert isinstance(components.placement.orders[-1], FinishAttempt)


async def test_task_with_a_recorded_failure_ends_after_a_restart(components):
    async def scenario():
        writer = components.journals.create("task-1")
        recorder = JournalRecorder(writer, None, SystemClock().now)
        recorder.record(TaskSubmitted("task-1", manifest()))
        recorder.record(AttemptFailed(Failure(FailureCode.SECRET_UNAVAILABLE, "The vault was unavailable.")))
        writer.close()
        async with components.server() as service:
            return await service.wait("task-1", 10)

    task = await scenario()
    assert (task.state, task.failure.code) == (TaskState.FAILED, "secret_unavailable")


async def test_failed_task_ends_on_a_full_disk(components):
    async def scenario():
        recorder = JournalRecorder(components.journals.create("task-1"), None, SystemClock().now)
        recorder.record(TaskSubmitted("task-1", manifest()))
        recorder.record(AttemptFailed(Failure(FailureCode.SECRET_UNAVAILABLE, "The vault was unavailable.")))
        recorder.writer.close()
        components.space = DiskSpace(0, 100 * GIB)
        async with components.server() as service:
            return await service.wait("task-1", 10)

    assert (await scenario()).state is TaskState.FAILED


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize("journal", ["damaged", "torn", "gone"])
async def test_task_with_a_damaged_index_row_and_journal_does_not_affect_others(tmp_path, caplog, journal, is_finished):
    stored = StoredTasks.with_three_tasks(tmp_path)
    if is_finished:
        stored.add_completed_task("lost")
    else:
        stored.add_task("lost").writer.close()
    stored.index("lost")
    stored.damage_row("lost")
    if journal == "gone":
        stored.records("lost").unlink()
    elif journal == "torn":
        stored.records("lost").write_bytes(b"torn")
    else:
        stored.records("lost").write_bytes(b"0" * 100 + stored.records("lost").read_bytes()[100:])
    instance = ServerComponents(tmp_path, SqliteStore(tmp_path / "index.sqlite"))

    async def scenario():
        async with instance.server() as service:
            with pytest.raises(TaskNotFoundError):
                await service.status("lost")
            return sorted(task.id for task in (await service.query(TaskQuery())).tasks)

    assert (await scenario()) == ["task-1", "task-2", "task-3"]
    assert "Task lost was removed from the index" in caplog.text


async def test_record_that_can_be_neither_flushed_nor_truncated_is_not_read(components, monkeypatch):
    """The record looks complete in the file until the server can truncate and rewrite it."""
    monkeypatch.setattr("sandbox.server.dispatcher.HOST_ERROR_PAUSE_SECONDS", 0.5)
    fdatasync, ftruncate, failed = os.fdatasync, os.ftruncate, []

    def refuse_once(what, work, *arguments):
        if what not in failed and b"attempt_started" in Path(f"/proc/self/fd/{arguments[0]}").read_bytes():
            failed.append(what)
            raise OSError(5, "Input/output error")
        work(*arguments)

    monkeypatch.setattr("sandbox.journal.writer.os.fdatasync", lambda fd: refuse_once("flush", fdatasync, fd))
    monkeypatch.setattr(
        "sandbox.journal.writer.os.ftruncate", lambda fd, size: refuse_once("truncate", ftruncate, fd, size)
    )

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING, *TO_COMPLETED)
            return await service.wait("task-1", 10)

    task = await scenario()
    assert failed == ["flush", "truncate"]
    assert task == components.journals.replay("task-1").task
    assert components.store.load("task-1").task == task


async def test_record_that_is_truncated_after_a_failed_flush_is_not_read(components, monkeypatch):
    """The tailer also reads between the write of a record and its failing flush."""
    monkeypatch.setattr("sandbox.server.dispatcher.HOST_ERROR_PAUSE_SECONDS", 0.0)
    fdatasync, failures = os.fdatasync, []

    def slow_failing_fdatasync(descriptor):
        if len(failures) < 3 and b"attempt_started" in Path(f"/proc/self/fd/{descriptor}").read_bytes():
            failures.append(descriptor)
            time.sleep(0.3)
            raise OSError(5, "Input/output error")
        fdatasync(descriptor)

    monkeypatch.setattr("sandbox.journal.writer.os.fdatasync", slow_failing_fdatasync)

    async def scenario():
        async with components.server() as service:
            await service.submit(manifest())
            await components.wait_for_launch("task-1")
            components.placement.record("task-1", *TO_RUNNING, *TO_COMPLETED)
            return await service.wait("task-1", 10)

    task = await scenario()
    assert len(failures) == 3
    assert task == components.journals.replay("task-1").task
    assert components.store.load("task-1").task == task


async def test_cancel_on_a_full_disk_is_rejected_and_can_be_repeated(components, disk):
    async with components.server() as service:
        await service.submit(manifest())
        await components.wait_for_launch("task-1")
        disk.is_full = True
        with pytest.raises(UnavailableError, match="No space left on device"):
            await service.cancel("task-1", reason="", force=False)
        disk.is_full = False
        await service.cancel("task-1", reason="", force=False)
        assert components.journals.replay("task-1").task.cancel is not None


@pytest.mark.parametrize("name", ["a" * 255, "a" * 256, "é" * 200])
async def test_artifact_with_an_invalid_file_name_is_missing(components, name):
    """A damaged or hostile backup may contain the record of such an artifact."""
    artifact = Artifact(name, f".sandbox/{name}", 1, "text/plain", "sha256:0")
    async with components.server() as service:
        await service.submit(manifest())
        await components.wait_for_launch("task-1")
        directory = TaskLayout(components.data_dir, "task-1").artifacts
        directory.mkdir()
        is_possible = len(name.encode()) <= 255
        if is_possible:
            (directory / name).write_bytes(b"x")
        components.placement.record("task-1", *TO_RUNNING, ArtifactCollected(artifact), *TO_COMPLETED)
        await service.wait("task-1", 10)
        assert [each.artifact.name for each in await service.artifacts("task-1")] == [name] * is_possible
