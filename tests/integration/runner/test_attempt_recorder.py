"""The server's disk fills up during a task: output is dropped, the gap is recorded, and no state is lost."""

import asyncio
import errno
from functools import partial

import pytest

from doubles.attempt_harness import AttemptScript
from sandbox.interfaces.runner import CancelAttempt, OpenTerminal, TerminalRefusedError
from sandbox.interfaces.workspace import PatchResult
from sandbox.model.events import (
    AgentExited,
    AgentStarted,
    ArtifactCollected,
    Gap,
    Output,
    Progress,
    TaskFinished,
    ToolCallEnded,
    ToolCallStarted,
    Usage,
)
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.resources import DiskSpace
from sandbox.model.task_state import TaskState
from sandbox.runner.steps.teardown import TeardownStep

FULL, AMPLE_SPACE = DiskSpace(9, 100), DiskSpace(100, 100)
LINES = b"".join(b"line %d\n" % number for number in range(50))


class FullDisk:
    """The disk that holds a harness's journal. It rejects the given kinds of events while `is_full` is set."""

    def __init__(self, harness, monkeypatch, *kinds, number=errno.ENOSPC):
        self.is_full, self.rejected_count, self._kinds, self._number = True, 0, kinds, number
        self.full_after_event_type = None
        monkeypatch.setattr(harness.writer, "append", partial(self._append, harness.writer.append))

    def _append(self, append, event, transition=None, **when):
        self.is_full = self.is_full or (
            self.full_after_event_type is not None and isinstance(event, self.full_after_event_type)
        )
        if self.is_full and isinstance(event, self._kinds):
            self.rejected_count += 1
            raise OSError(self._number, "The disk is full")
        return append(event, transition, **when)


async def wait_until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def cancel_and_wait(harness, work):
    harness.cancel(CancelAttempt(force=True))
    await asyncio.wait_for(work, 20)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("kind", [Output, Progress, AgentExited, Usage, ArtifactCollected, TaskFinished])
async def test_rejected_record_is_written_later_without_loss(make_harness, monkeypatch, kind, number):
    harness = make_harness(AttemptScript(stdout=LINES, events_when_serving=(Usage("a-model", 1, 1),)))
    disk = FullDisk(harness, monkeypatch, kind, number=number)

    async def scenario():
        work = asyncio.create_task(harness.run())
        await wait_until(lambda: disk.rejected_count > 2)
        assert not work.done()
        disk.is_full = False
        await asyncio.wait_for(work, 20)

    await scenario()
    assert harness.task.state is TaskState.COMPLETED
    assert b"".join(harness.outputs("stdout")) == LINES
    assert "metadata.json" in harness.artifacts
    assert harness.events(Gap) == []


async def test_disk_reserve_is_released_on_the_first_rejected_write(make_harness, monkeypatch):
    harness = make_harness(AttemptScript())
    disk = FullDisk(harness, monkeypatch, AgentExited)
    harness.reserve.on_released = lambda: setattr(disk, "is_full", False)
    await asyncio.wait_for(harness.run(), 20)
    assert (harness.task.state, disk.rejected_count, harness.reserve.release_count) == (TaskState.COMPLETED, 1, 1)


@pytest.mark.parametrize(
    ("lifecycle", "code"), [({"timeout": "1s"}, "timeout"), ({"hang_timeout": "1s"}, "hang")], ids=["timeout", "hang"]
)
async def test_time_limits_apply_before_the_start_of_the_agent_is_recorded(make_harness, monkeypatch, lifecycle, code):
    harness = make_harness(AttemptScript(runs_until_signal=True), lifecycle=lifecycle)
    disk = FullDisk(harness, monkeypatch, AgentStarted)

    async def scenario():
        work = asyncio.create_task(harness.run())
        await wait_until(lambda: "kill" in harness.script.recorded_calls)
        assert not harness.script.is_gateway_serving
        disk.is_full = False
        await asyncio.wait_for(work, 20)

    await scenario()
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, code)


async def test_timeout_removes_the_disk_before_the_start_of_the_agent_is_recorded(make_harness, monkeypatch):
    """The agent's disk may occupy the space that the records need."""
    harness = make_harness(AttemptScript(runs_until_signal=True), lifecycle={"timeout": "1s", "collect_timeout": "1s"})
    disk = FullDisk(harness, monkeypatch, AgentStarted)

    async def scenario():
        work = asyncio.create_task(harness.run())
        await wait_until(lambda: disk.rejected_count)
        assert harness.attempt.layout.disk.exists()
        await wait_until(lambda: not harness.attempt.layout.disk.exists())
        disk.is_full = False
        await asyncio.wait_for(work, 20)

    await scenario()
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "timeout")


async def test_gateway_and_terminals_open_only_after_the_start_of_the_agent_is_recorded(make_harness, monkeypatch):
    harness = make_harness(AttemptScript(runs_until_signal=True))
    disk = FullDisk(harness, monkeypatch, AgentStarted)
    work = asyncio.create_task(harness.run())
    await wait_until(lambda: disk.rejected_count > 2)
    with pytest.raises(TerminalRefusedError):
        harness.terminals.check_can_open(OpenTerminal(24, 80))
    assert not harness.script.is_gateway_serving
    disk.is_full = False
    await wait_until(lambda: harness.script.is_gateway_serving)
    harness.terminals.check_can_open(OpenTerminal(24, 80))
    await cancel_and_wait(harness, work)


async def test_output_is_dropped_below_the_disk_watermark_and_stored_above_it(make_harness, monkeypatch):
    monkeypatch.setattr("sandbox.runner.attempt_recorder.DISK_SPACE_CHECK_INTERVAL_SECONDS", 0.0)
    harness = make_harness(AttemptScript(runs_until_signal=True, stdout=LINES))
    harness.space = FULL

    async def scenario():
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        await wait_until(lambda: harness.events(Progress))
        assert harness.outputs("stdout") == []
        harness.space = AMPLE_SPACE
        await wait_until(lambda: len(harness.events(Gap)) == 2)
        await cancel_and_wait(harness, work)

    await scenario()
    first, second = harness.events(Gap)
    assert "is nearly full" in first.reason
    assert second.reason.startswith(f"{len(LINES)} bytes of output in 50 events were dropped")
    assert harness.task.progress.output_bytes == len(LINES)


@pytest.mark.parametrize("space", [FULL, AMPLE_SPACE], ids=["full", "ample"])
async def test_conversation_is_dropped_with_output_below_the_disk_watermark(make_harness, space):
    harness = make_harness(AttemptScript(stdout=b"+Bash\n-Bash\n"))
    harness.space = space
    await asyncio.wait_for(harness.run(), 20)
    is_stored = space is AMPLE_SPACE
    assert len(harness.events(ToolCallStarted)) == len(harness.outputs("stdout")) / 2 == int(is_stored)
    assert len(harness.events(ToolCallEnded)) == 1


async def test_task_completes_and_records_gaps_when_output_is_never_stored(make_harness):
    harness = make_harness(AttemptScript(stdout=LINES))
    harness.space = FULL
    await asyncio.wait_for(harness.run(), 20)
    assert harness.task.state is TaskState.COMPLETED
    assert harness.outputs("stdout") == []
    assert [gap.reason.partition(" ")[0] for gap in harness.events(Gap)] == ["Output", str(len(LINES))]


async def test_output_above_the_buffer_limit_is_dropped_while_the_disk_is_full(make_harness, monkeypatch):
    monkeypatch.setattr("sandbox.runner.attempt_recorder.BUFFERED_OUTPUT_BYTES_MAX", 10 * 300)
    harness = make_harness(AttemptScript(runs_until_signal=True, stdout=LINES))
    disk = FullDisk(harness, monkeypatch, object)
    disk.is_full, disk.full_after_event_type = False, AgentStarted

    async def scenario():
        work = asyncio.create_task(harness.run())
        await wait_until(lambda: disk.rejected_count > 5)
        # A cancel request that cannot be recorded immediately is rejected.
        with pytest.raises(OSError, match="is full"):
            harness.cancel(CancelAttempt(force=True))
        disk.is_full, disk.full_after_event_type = False, None
        await wait_until(lambda: len(harness.events(Gap)) == 2)
        await cancel_and_wait(harness, work)

    await scenario()
    stored = b"".join(harness.outputs("stdout"))
    assert stored
    assert LINES.startswith(stored)
    assert harness.events(Gap)[1].reason.startswith(f"{len(LINES) - len(stored)} bytes")
    assert harness.task.state is TaskState.CANCELLED


async def test_usage_is_recorded_when_the_buffer_limit_is_exceeded(make_harness, monkeypatch):
    """If the usage were lost, the next attempt would get a budget that was already spent."""
    monkeypatch.setattr("sandbox.runner.attempt_recorder.BUFFERED_OUTPUT_BYTES_MAX", 300)
    harness = make_harness(AttemptScript(runs_until_signal=True, stdout=LINES))
    disk = FullDisk(harness, monkeypatch, object)
    disk.is_full, disk.full_after_event_type = False, AgentStarted

    async def scenario():
        work = asyncio.create_task(harness.run())
        await wait_until(lambda: disk.rejected_count > 5)
        for _ in range(2):
            harness.script.report_to_runner(Usage("m", 100, 20, 0, 0, 0.25))
        disk.is_full, disk.full_after_event_type = False, None
        await wait_until(lambda: len(harness.events(Usage)) == 2)
        await cancel_and_wait(harness, work)

    await scenario()
    assert harness.task.spent.usd == harness.task.progress.cost_usd == 0.5


async def test_collection_is_retried_on_a_full_disk_until_the_collect_timeout(make_harness, monkeypatch):
    harness = make_harness(AttemptScript(), lifecycle={"collect_timeout": "10m"})
    targets = []

    async def patch(self, attempt_dir, base_commit, target, confine, detect_secret):
        targets.append(target)
        if len(targets) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        target.write_bytes(b"diff --git a/a b/a\n")
        return PatchResult()

    monkeypatch.setattr("doubles.attempt_harness.ScriptedWorkspaces.write_patch", patch)
    monkeypatch.setattr("sandbox.runner.attempt.HOST_ERROR_PAUSE_SECONDS", 0.01)
    await asyncio.wait_for(harness.run(), 20)
    assert (harness.task.state, len(targets)) == (TaskState.COMPLETED, 3)
    assert "task-1.patch" in harness.artifacts


async def test_full_disk_during_the_collection_fails_the_task_with_disk_full(make_harness, monkeypatch):
    harness = make_harness(AttemptScript(), lifecycle={"collect_timeout": "1s"})

    async def patch(self, attempt_dir, base_commit, target, confine, detect_secret):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("doubles.attempt_harness.ScriptedWorkspaces.write_patch", patch)
    await asyncio.wait_for(harness.run(), 20)
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "disk_full")
    assert "free space on the server's disk" in harness.task.failure.message


async def test_data_loss_on_the_workspace_disk_fails_the_task(make_harness, monkeypatch):
    """The other tests cover the control: a disk without data loss."""

    async def sync(self):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sandbox.disks.directory_disk.DirectoryDisk.sync", sync)
    harness = make_harness(AttemptScript())
    await asyncio.wait_for(harness.run(), 20)
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "disk_full")
    assert "task-1.patch" in harness.artifacts


@pytest.mark.parametrize("is_finisher", [False, True], ids=["runner", "finisher"])
async def test_disk_reserve_is_not_allocated_during_the_teardown(make_harness, monkeypatch, is_finisher):
    """Teardown removes the reserve with the attempt's files. If it were allocated later, nothing would remove it."""
    error = AttemptError(FailureCode.INTERNAL, "There is no sandbox.")
    harness = make_harness(AttemptScript(create_error=error))
    monkeypatch.setattr("sandbox.runner.attempt_recorder.OUTPUT_SYNC_INTERVAL_SECONDS", 0.001)

    async def slow(*_, **__):
        harness.reserve.release()
        await asyncio.sleep(0.1)

    for method in ("run_for_follow_up", "run"):
        monkeypatch.setattr(TeardownStep, method, slow)
    await asyncio.wait_for(harness.finish() if is_finisher else harness.run(), 20)
    assert not harness.reserve.is_allocated


async def test_output_is_flushed_when_the_disk_reserve_cannot_be_reallocated(make_harness, monkeypatch, caplog):
    """With a quota or a copy-on-write file system, the reserve may not fit although other writes succeed."""
    monkeypatch.setattr("sandbox.runner.attempt_recorder.OUTPUT_SYNC_INTERVAL_SECONDS", 0.001)
    harness = make_harness(AttemptScript(runs_until_signal=True, stdout=LINES))
    tries, synced = [], []

    def refuse():
        tries.append(len(synced))
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(harness.reserve, "allocate", refuse)
    monkeypatch.setattr(harness.writer, "sync", lambda: synced.append(len(tries)))

    async def scenario():
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        await wait_until(lambda: len(tries) > 5)
        await wait_until(lambda: len(synced) > 5)
        await cancel_and_wait(harness, work)

    await scenario()
    assert harness.task.state is TaskState.CANCELLED
    messages = [record.getMessage() for record in caplog.records if "could not be reserved" in record.getMessage()]
    assert messages == ["Disk space for the end of the task could not be reserved: [Errno 122] Disk quota exceeded"]


async def test_nothing_is_flushed_while_nothing_is_recorded(make_harness, monkeypatch):
    monkeypatch.setattr("sandbox.runner.attempt_recorder.OUTPUT_SYNC_INTERVAL_SECONDS", 0.001)
    monkeypatch.setattr("sandbox.runner.steps.run.METRICS_INTERVAL_SECONDS_MIN", 60.0)
    monkeypatch.setattr("sandbox.runner.steps.run.METRICS_INTERVAL_SECONDS_MAX", 60.0)
    harness = make_harness(AttemptScript(runs_until_signal=True, stdout=LINES))
    sync, records = harness.writer.sync, []

    def count():
        records.append(harness.writer.last_seq)
        sync()

    monkeypatch.setattr(harness.writer, "sync", count)

    async def scenario():
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        await wait_until(lambda: records and records[-1] == harness.writer.last_seq)
        await asyncio.sleep(1.5)
        assert len(records) - len(set(records)) <= len(set(records))
        assert records[-1] == harness.writer.last_seq
        await cancel_and_wait(harness, work)

    await scenario()


async def test_disk_reserve_is_allocated_later_although_nothing_is_recorded(make_harness, monkeypatch):
    monkeypatch.setattr("sandbox.runner.attempt_recorder.OUTPUT_SYNC_INTERVAL_SECONDS", 0.001)
    monkeypatch.setattr("sandbox.runner.steps.run.METRICS_INTERVAL_SECONDS_MIN", 60.0)
    monkeypatch.setattr("sandbox.runner.steps.run.METRICS_INTERVAL_SECONDS_MAX", 60.0)
    harness = make_harness(AttemptScript(runs_until_signal=True))
    allocate, is_full = harness.reserve.allocate, True

    def try_to_allocate():
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate()

    monkeypatch.setattr(harness.reserve, "allocate", try_to_allocate)

    async def scenario():
        nonlocal is_full
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        await asyncio.sleep(0.2)
        is_full = False
        await wait_until(lambda: harness.reserve.is_allocated)
        await cancel_and_wait(harness, work)

    await scenario()
