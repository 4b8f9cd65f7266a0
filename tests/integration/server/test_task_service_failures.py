"""What the server does when disk, index, processes or journals let it down: no task is lost, none is stuck for ever."""

import asyncio
import errno
import os
import time
from pathlib import Path

import pytest

from doubles.manifests import manifest
from doubles.memory_store import MemoryStore
from doubles.server_components import GIB, TO_END, TO_RUNNING, Rooms
from doubles.stored_tasks import KeptTasks
from sandbox.bootstrap.machine import SystemClock
from sandbox.interfaces.journal import Recorder, replay_task
from sandbox.interfaces.store import StoreError, TaskQuery
from sandbox.interfaces.tasks import TaskNotFoundError, UnavailableError
from sandbox.journal.writer import FileJournalWriter
from sandbox.model.disk_space import DiskSpace
from sandbox.model.errors import Failure, FailureCode
from sandbox.model.events import AttemptFailed, AttemptStarted, CancelRequested, TaskFinished, TaskSubmitted
from sandbox.model.limits import FINISHERS_MAX
from sandbox.model.task_state import TaskState
from sandbox.server.scheduler import Resources, Scheduler
from sandbox.store.sqlite import SqliteStore


class FullDisk:
    """Journals cannot be written while it is full, but for the events of the kinds in `spares`."""

    def __init__(self, monkeypatch):
        self.is_full, self.spares, self.refusals = False, (), 0
        append = FileJournalWriter.append

        def maybe(writer, event, transition=None, **when):
            if self.is_full and not isinstance(event, self.spares):
                self.refusals += 1
                raise OSError(28, "No space left on device")
            return append(writer, event, transition, **when)

        monkeypatch.setattr(FileJournalWriter, "append", maybe)


class MoodyStore(MemoryStore):
    """An index that cannot be written while it is broken."""

    broken = False
    refusals = 0

    def insert(self, indexed):
        self._complain()
        super().insert(indexed)

    def save(self, indexed):
        self._complain()
        super().save(indexed)

    def _complain(self):
        if self.broken:
            self.refusals += 1
            raise StoreError("database or disk is full")


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    for name in ("journal_tailer.LOSS_CHECK_SECONDS", "journal_tailer.RETRY_SECONDS", "task_service.RETRY_SECONDS"):
        monkeypatch.setattr(f"sandbox.server.{name}", 0.1)


async def refused(trouble, times=2):
    """Wait until it has refused so many tries more."""
    wanted = trouble.refusals + times
    async with asyncio.timeout(10):
        while trouble.refusals < wanted:
            await asyncio.sleep(0.005)


@pytest.fixture
def disk(monkeypatch):
    return FullDisk(monkeypatch)


@pytest.fixture
def world(tmp_path):
    made = Rooms(tmp_path, MoodyStore())
    yield made
    for task_id in list(made.runners.recorders):
        made.runners.die(task_id)


def test_a_task_that_cannot_be_written_down_is_refused_and_can_be_submitted_again(world, disk):
    async def play():
        async with world.server() as service:
            disk.is_full = True
            for _ in range(2):
                with pytest.raises(UnavailableError, match="No space left"):
                    await service.submit(manifest())
                assert list((world.data_dir / "tasks").iterdir()) == []
            disk.is_full = False
            assert (await service.submit(manifest())).task.state is TaskState.PENDING
            await world.launched("task-1")

    asyncio.run(play())


def test_a_task_that_is_in_its_journal_is_taken_though_the_index_is_broken(world):
    async def play():
        async with world.server() as service:
            world.store.broken = True
            await service.submit(manifest())
            await world.launched("task-1")
            world.store.broken = False
            world.runners.play("task-1", *TO_RUNNING, *TO_END)
            assert (await service.wait("task-1", 10)).state is TaskState.COMPLETED
            assert (await service.status("task-1")).state is TaskState.COMPLETED

    asyncio.run(play())
    assert world.store.load("task-1").task.state is TaskState.COMPLETED


def test_an_index_that_breaks_for_a_while_is_caught_up_with(world):
    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.store.broken = True
            world.runners.play("task-1", *TO_RUNNING)
            await refused(world.store)
            world.store.broken = False
            world.runners.play("task-1", *TO_END)
            return await service.wait("task-1", 10)

    assert asyncio.run(play()).state is TaskState.COMPLETED


def test_a_launch_that_cannot_be_written_down_is_tried_again(world, disk):
    async def play():
        async with world.server() as service:
            disk.is_full, disk.spares = True, (TaskSubmitted,)
            await service.submit(manifest())
            await refused(disk)
            waiting = await service.status("task-1")
            assert waiting.state is TaskState.PENDING
            assert "No space left" in waiting.state_message
            disk.is_full = False
            await world.launched("task-1")

    asyncio.run(play())


def test_a_finisher_that_cannot_be_started_is_tried_again(world):
    async def play():
        async with world.server() as service:
            await world.running(service)
            world.runners.refuses = True
            world.runners.die("task-1")
            await refused(world.runners)
            world.runners.refuses = False
            await world.launched("task-1", 2)
            world.runners.play("task-1", *TO_END)
            await service.wait("task-1", 10)

    asyncio.run(play())


def test_the_end_of_a_task_that_nobody_can_finish_is_written_once_there_is_room(world, disk, monkeypatch):
    monkeypatch.setattr("sandbox.server.tracked_task.FINISHER_BACKOFF_SECONDS", 0.0)

    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING[:1])
            await world.lose("task-1", FINISHERS_MAX)
            await world.launched("task-1", 1 + FINISHERS_MAX)
            disk.is_full = True
            world.runners.die("task-1")
            await refused(disk)
            disk.is_full = False
            return await service.wait("task-1", 10)

    assert asyncio.run(play()).failure.code == "runner_lost"


def test_a_wish_whose_task_could_not_be_ended_at_once_still_holds(world, disk):
    world.capacity = Resources(4, 100 * GIB, 100 * GIB)

    async def play():
        async with world.server() as service:
            await service.submit(manifest("first"))
            await service.submit(manifest("second"))
            disk.is_full, disk.spares = True, (CancelRequested,)
            with pytest.raises(UnavailableError, match="No space left"):
                await service.cancel("second", reason="", force=False)
            disk.is_full = False
            await world.launched("first")
            world.runners.play("first", *TO_RUNNING, *TO_END)
            return (await service.wait("second", 10)).state

    assert asyncio.run(play()) is TaskState.CANCELLED
    assert [order.task_id for order in world.runners.orders] == ["first"]


def test_a_server_starts_though_a_cancelled_task_cannot_be_ended_yet(world, disk):
    writer = world.journals.create("task-1")
    recorder = Recorder(writer, None, world.clock.now)
    recorder.record(TaskSubmitted("task-1", manifest()))
    recorder.record(CancelRequested("", force=False))
    writer.close()

    async def play():
        disk.is_full = True
        async with world.server() as service:
            assert (await service.status("task-1")).state is TaskState.PENDING
            disk.is_full = False
            return (await service.wait("task-1", 10)).state

    assert asyncio.run(play()) is TaskState.CANCELLED


def test_a_pending_task_whose_journal_was_busy_at_the_start_is_launched_not_failed(world):
    """As when a child of the killed server still holds the lock for an instant."""

    async def before():
        world.capacity = Resources(0, 0, 0)
        async with world.server() as service:
            service.track((await asyncio.to_thread(service.dependencies.submissions.add, manifest(), None))[0])

    async def after():
        world.capacity = Resources(4, 100 * GIB, 100 * GIB)
        busy = world.journals.open("task-1")
        async with world.server() as service:
            busy.close()
            await world.launched("task-1")
            return (await service.status("task-1")).failure

    asyncio.run(before())
    assert asyncio.run(after()) is None


def test_a_pending_task_whose_journal_was_busy_at_the_start_waits_for_room_as_others_do(world):
    async def before():
        world.capacity = Resources(0, 0, 0)
        async with world.server() as service:
            service.track((await asyncio.to_thread(service.dependencies.submissions.add, manifest(), None))[0])

    async def after():
        world.capacity, world.memory_available_bytes = Resources(4, 100 * GIB, 100 * GIB), 0
        busy = world.journals.open("task-1")
        async with world.server() as service:
            busy.close()
            async with asyncio.timeout(10):
                while "memory that nobody uses" not in (await service.status("task-1")).state_message:
                    await asyncio.sleep(0.01)
            occupancy = (await service.health()).occupancy
            assert (occupancy.waiting, occupancy.cpus_promised) == (1, 0)
            world.memory_available_bytes = 100 * GIB
            await world.launched("task-1")

    asyncio.run(before())
    asyncio.run(after())


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_pending_task_whose_journal_was_busy_at_the_start_waits_for_the_drain_to_be_undone(world, is_cancelled):
    async def before():
        world.capacity = Resources(0, 0, 0)
        async with world.server() as service:
            service.track((await asyncio.to_thread(service.dependencies.submissions.add, manifest(), None))[0])
            await service.drain()

    async def after():
        world.capacity = Resources(4, 100 * GIB, 100 * GIB)
        busy = world.journals.open("task-1")
        async with world.server() as service:
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
            await world.launched("task-1")

    asyncio.run(before())
    asyncio.run(after())


def test_a_journal_that_cannot_happen_stops_neither_the_server_nor_other_tasks(world):
    """A record that the rules refuse, as another version might write it."""
    writer = world.journals.create("odd")
    writer.append(TaskFinished(), at=world.clock.now())
    writer.close()

    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING)
            recorder = world.runners.recorders["task-1"]
            recorder.writer.append(AttemptStarted("another", "x", "here"), at=world.clock.now())
            await service.submit(manifest("task-2"))
            await world.launched("task-2")
            world.runners.play("task-2", *TO_RUNNING, *TO_END)
            return (await service.wait("task-2", 10)).state

    assert asyncio.run(play()) is TaskState.COMPLETED


def test_a_journal_that_its_disk_does_not_give_stops_neither_the_server_nor_other_tasks(world, caplog):
    (world.data_dir / "tasks" / "broken" / "journal" / "records").mkdir(parents=True)

    async def play():
        async with world.server() as service:
            await service.submit(manifest("other"))
            await world.launched("other")
            world.runners.play("other", *TO_RUNNING, *TO_END)
            return await service.wait("other", 10)

    assert asyncio.run(play()).state is TaskState.COMPLETED
    assert "Task broken cannot be taken into the index" in caplog.text


def test_damage_of_a_journal_is_told_in_the_status(world):
    async def play():
        async with world.server() as service:
            await world.running(service)
            records = world.data_dir / "tasks/task-1/journal/records"
            with records.open("ab") as file:
                file.write(b"00000000 {}\n")
            world.runners.play("task-1", *TO_END)
            async with asyncio.timeout(10):
                while "checksum" not in (await service.status("task-1")).state_message:
                    await asyncio.sleep(0.01)

    asyncio.run(play())


def test_for_damage_where_a_journal_goes_on_nobody_reads_it_from_its_beginning(world, monkeypatch):
    places, read = [], world.journals.read

    def watched(task_id, offset=0, **bounds):
        places.append(offset)
        return read(task_id, offset, **bounds)

    async def play():
        async with world.server() as service:
            await world.running(service)
            place = service.dependencies.journal_tailer.tracked_tasks["task-1"].offset
            monkeypatch.setattr(world.journals, "read", watched)
            with (world.data_dir / "tasks/task-1/journal/records").open("ab") as file:
                file.write(b"00000000 {}\n")
            world.runners.play("task-1", *TO_END)
            places.clear()
            async with asyncio.timeout(10):
                while len(places) < 4:
                    await asyncio.sleep(0.01)
            assert "checksum" in (await service.status("task-1")).state_message
            return place

    place = asyncio.run(play())
    assert set(places) == {place}


def test_a_task_that_is_held_up_by_its_damaged_journal_cannot_be_cancelled_and_that_is_said(world):
    async def play():
        async with world.server() as service:
            await world.running(service)
            damage(world.data_dir / "tasks/task-1/journal/records")
            world.runners.die("task-1")
            with pytest.raises(UnavailableError, match=r"held up.*checksum"):
                await service.cancel("task-1", reason="", force=False)

    asyncio.run(play())


@pytest.mark.parametrize("harm", ["damaged", "senseless"])
def test_an_id_whose_journal_cannot_be_read_is_taken_and_that_is_said(world, harm):
    recorder = Recorder(world.journals.create("task-1"), None, SystemClock().now)
    recorder.record(TaskSubmitted("task-1", manifest()))
    recorder.writer.append(TaskSubmitted("task-1", manifest()), at=world.clock.now())
    recorder.writer.close()
    if harm == "damaged":
        damage(world.data_dir / "tasks/task-1/journal/records")

    async def play():
        async with world.server() as service:
            with pytest.raises(UnavailableError, match="task-1 is there, and cannot be read"):
                await service.submit(manifest())

    asyncio.run(play())


def damage(records):
    data = bytearray(records.read_bytes())
    data[50] ^= 1
    records.write_bytes(data)


def test_a_server_that_starts_looks_once_for_whom_of_all_that_wait_there_is_room(world, monkeypatch):
    """Not once for each: thousands may wait, and each look is at all of them."""
    world.capacity, looks = Resources(4, 1000 * GIB, 1000 * GIB), []
    monkeypatch.setattr("sandbox.server.task_service.MEMORY_CHECK_SECONDS", 60)

    async def before():
        async with world.server() as service:
            for number in range(20):
                await service.submit(manifest(f"task-{number:02}"))
            await world.launched("task-00")

    asyncio.run(before())
    complaints = Scheduler.pending_reasons

    def look(room, available_bytes):
        looks.append(room.queued_count)
        return complaints(room, available_bytes)

    monkeypatch.setattr(Scheduler, "pending_reasons", look)

    async def after():
        async with world.server():
            return list(looks)

    assert len(asyncio.run(after())) == 1


def test_sixty_tasks_with_room_for_three_begin_in_their_order_and_all_end(world):
    world.capacity = Resources(12, 1000 * GIB, 1000 * GIB)
    names = [f"task-{number:03}" for number in range(60)]

    async def play():
        async with world.server() as service:
            for name in names:
                await service.submit(manifest(name))
            async with asyncio.timeout(60):
                while len(world.runners.orders) < len(names) or world.runners.recorders:
                    for name in list(world.runners.recorders):
                        world.runners.play(name, *TO_RUNNING, *TO_END)
                    await asyncio.sleep(0.002)
            return [(await service.wait(name, 10)).state for name in names]

    assert set(asyncio.run(play())) == {TaskState.COMPLETED}
    begun = [order.task_id for order in world.runners.orders]
    assert sorted(begun) == names
    # Three launches go on at once, and any of them may be the first to get to its runner.
    assert all(abs(begun.index(name) - number) <= 3 for number, name in enumerate(names))


def test_twenty_waiting_tasks_survive_a_restart_in_their_order(world):
    world.capacity = Resources(4, 1000 * GIB, 1000 * GIB)
    names = [f"task-{number:02}" for number in range(20)]

    async def before():
        async with world.server() as service:
            for name in names:
                await service.submit(manifest(name))
            await world.launched(names[0])

    async def after():
        async with world.server() as service:
            for name in names:
                await world.launched(name)
                world.runners.play(name, *TO_RUNNING, *TO_END)
            return [(await service.wait(name, 10)).state for name in names]

    asyncio.run(before())
    assert set(asyncio.run(after())) == {TaskState.COMPLETED}
    assert [order.task_id for order in world.runners.orders] == names


def test_what_is_under_way_keeps_its_room_though_a_waiting_task_is_older(world):
    """As after a wall clock went back between the two submissions."""
    world.capacity = Resources(4, 100 * GIB, 100 * GIB)

    async def before():
        async with world.server() as service:
            await service.submit(manifest("running"))
            await world.launched("running")
            world.clock_set_back()
            await service.submit(manifest("waiting"))

    async def after():
        async with world.server():
            await asyncio.sleep(0.1)
            assert len(world.runners.orders) == 1
            world.runners.play("running", *TO_RUNNING, *TO_END)
            await world.launched("waiting")

    asyncio.run(before())
    asyncio.run(after())


def test_tasks_leave_no_descriptor_and_no_asyncio_task_behind(world):

    async def play():
        async with world.server() as service:
            counts = []
            for number in range(60):
                await service.submit(manifest(f"task-{number}"))
                await world.launched(f"task-{number}")
                world.runners.play(f"task-{number}", *TO_RUNNING, *TO_END)
                await service.wait(f"task-{number}", 10)
                if number in (20, 59):
                    await asyncio.sleep(0.3)
                    counts.append((len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())))
            return counts

    first, last = asyncio.run(play())
    assert last == first


def test_a_refused_task_leaves_nothing_to_be_found_by_the_next_server(world, disk):
    async def before():
        async with world.server() as service:
            disk.is_full = True
            with pytest.raises(UnavailableError):
                await service.submit(manifest())

    async def after():
        disk.is_full = False
        async with world.server() as service:
            await service.health()
            return list(service.dependencies.journal_tailer.tracked_tasks)

    asyncio.run(before())
    assert asyncio.run(after()) == []
    assert world.journals.task_ids() == []


@pytest.mark.parametrize(
    "scarce", [errno.ENOSPC, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.EPIPE, errno.ETIMEDOUT]
)
def test_a_runner_that_cannot_be_started_now_is_followed_by_a_finisher_and_fails_nobody(world, scarce):
    async def play():
        async with world.server() as service:
            world.runners.refuses = OSError(scarce, os.strerror(scarce))
            await service.submit(manifest())
            await refused(world.runners)
            assert not (await service.status("task-1")).state.is_terminal
            world.runners.refuses = None
            await world.launched("task-1")
            assert world.runners.orders[-1].finish

    asyncio.run(play())


def test_a_task_whose_failure_is_written_and_whose_end_is_not_ends(world):
    async def play():
        writer = world.journals.create("task-1")
        recorder = Recorder(writer, None, SystemClock().now)
        recorder.record(TaskSubmitted("task-1", manifest()))
        recorder.record(AttemptFailed(Failure(FailureCode.SECRET_UNAVAILABLE, "The vault was away.")))
        writer.close()
        async with world.server() as service:
            return await service.wait("task-1", 10)

    ended = asyncio.run(play())
    assert (ended.state, ended.failure.code) == (TaskState.FAILED, "secret_unavailable")


def test_a_task_that_has_failed_waits_for_no_room_to_end(world):
    async def play():
        recorder = Recorder(world.journals.create("task-1"), None, SystemClock().now)
        recorder.record(TaskSubmitted("task-1", manifest()))
        recorder.record(AttemptFailed(Failure(FailureCode.SECRET_UNAVAILABLE, "The vault was away.")))
        recorder.writer.close()
        world.space = DiskSpace(0, 100 * GIB)
        async with world.server() as service:
            return await service.wait("task-1", 10)

    assert asyncio.run(play()).state is TaskState.FAILED


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize("journal", ["damaged", "torn", "gone"])
def test_a_task_of_which_neither_index_nor_journal_tells_keeps_nobody_from_the_others(
    tmp_path, caplog, journal, is_finished
):
    kept = KeptTasks.of_three(tmp_path)
    if is_finished:
        kept.finish("lost")
    else:
        kept.begin("lost").writer.close()
    kept.index("lost")
    kept.damage_row("lost")
    if journal == "gone":
        kept.records("lost").unlink()
    elif journal == "torn":
        kept.records("lost").write_bytes(b"torn")
    else:
        kept.records("lost").write_bytes(b"0" * 100 + kept.records("lost").read_bytes()[100:])
    made = Rooms(tmp_path, SqliteStore(tmp_path / "index.sqlite"))

    async def play():
        async with made.server() as service:
            with pytest.raises(TaskNotFoundError):
                await service.status("lost")
            return sorted(task.id for task in (await service.query(TaskQuery())).tasks)

    assert asyncio.run(play()) == ["task-1", "task-2", "task-3"]
    assert "Task lost is not in the index any more" in caplog.text


def test_nobody_reads_what_could_neither_be_flushed_nor_taken_back_yet(world, monkeypatch):
    """It looks whole in the file until the server may cut it off, and writes another one in its place."""
    monkeypatch.setattr("sandbox.server.task_service.RETRY_SECONDS", 0.5)
    fdatasync, ftruncate, refused = os.fdatasync, os.ftruncate, []

    def refuse_once(what, work, *arguments):
        if what not in refused and b"attempt_started" in Path(f"/proc/self/fd/{arguments[0]}").read_bytes():
            refused.append(what)
            raise OSError(5, "Input/output error")
        work(*arguments)

    monkeypatch.setattr("sandbox.journal.writer.os.fdatasync", lambda fd: refuse_once("flush", fdatasync, fd))
    monkeypatch.setattr("sandbox.journal.writer.os.ftruncate", lambda fd, size: refuse_once("cut", ftruncate, fd, size))

    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING, *TO_END)
            return await service.wait("task-1", 10)

    shown = asyncio.run(play())
    assert refused == ["flush", "cut"]
    assert shown == replay_task(world.journals, "task-1").task
    assert world.store.load("task-1").task == shown


def test_nobody_reads_what_the_server_takes_back_because_it_could_not_be_flushed(world, monkeypatch):
    """The follower looks all the time, also between a record that is written and its flush, which fails."""
    monkeypatch.setattr("sandbox.server.task_service.RETRY_SECONDS", 0.0)
    fdatasync, failures = os.fdatasync, []

    def slow_and_broken(descriptor):
        if len(failures) < 3 and b"attempt_started" in Path(f"/proc/self/fd/{descriptor}").read_bytes():
            failures.append(descriptor)
            time.sleep(0.3)
            raise OSError(5, "Input/output error")
        fdatasync(descriptor)

    monkeypatch.setattr("sandbox.journal.writer.os.fdatasync", slow_and_broken)

    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            world.runners.play("task-1", *TO_RUNNING, *TO_END)
            return await service.wait("task-1", 10)

    shown = asyncio.run(play())
    assert len(failures) == 3
    assert shown == replay_task(world.journals, "task-1").task
    assert world.store.load("task-1").task == shown


def test_a_wish_that_the_runners_disk_does_not_take_is_refused_with_that_reason_and_can_be_made_again(world, disk):
    async def play():
        async with world.server() as service:
            await service.submit(manifest())
            await world.launched("task-1")
            disk.is_full = True
            with pytest.raises(UnavailableError, match="No space left on device"):
                await service.cancel("task-1", reason="", force=False)
            disk.is_full = False
            await service.cancel("task-1", reason="", force=False)
            assert replay_task(world.journals, "task-1").task.cancel is not None

    asyncio.run(play())
