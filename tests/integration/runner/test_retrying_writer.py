"""The server's disk fills up under a running task: output is cut and told, and no state is ever lost."""

import asyncio
import errno
from functools import partial

import pytest

from doubles.attempt_dependencies import Script
from sandbox.interfaces.placement import CancelOrder, TerminalOrder
from sandbox.interfaces.terminals import TerminalRefusedError
from sandbox.interfaces.workspace import PatchResult
from sandbox.model.disk_space import DiskSpace
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.events import (
    AgentExited,
    AgentStarted,
    ArtifactCollected,
    Gap,
    Output,
    Progress,
    TaskFinished,
    Usage,
)
from sandbox.model.task_state import TaskState

FULL, ROOMY = DiskSpace(9, 100), DiskSpace(100, 100)
LINES = b"".join(b"line %d\n" % number for number in range(50))


class Disk:
    """The disk of a scene's journal: takes nothing of some kinds of events while `refuses` is set."""

    def __init__(self, scene, monkeypatch, *kinds, number=errno.ENOSPC):
        self.refuses, self.refused, self._kinds, self._number = True, 0, kinds, number
        self.begins_with = None
        monkeypatch.setattr(scene.writer, "append", partial(self._append, scene.writer.append))

    def _append(self, append, event, transition=None, **when):
        self.refuses = self.refuses or (self.begins_with is not None and isinstance(event, self.begins_with))
        if self.refuses and isinstance(event, self._kinds):
            self.refused += 1
            raise OSError(self._number, "The disk says no")
        return append(event, transition, **when)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def ended(scene, work):
    scene.life.cancel(CancelOrder(force=True))
    await asyncio.wait_for(work, 20)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("kind", [Output, Progress, AgentExited, Usage, ArtifactCollected, TaskFinished])
def test_what_the_disk_refuses_for_a_while_is_written_afterwards_and_nothing_is_lost(stage, monkeypatch, kind, number):
    scene = stage(Script(stdout=LINES, reports=(Usage("a-model", 1, 1),)))
    disk = Disk(scene, monkeypatch, kind, number=number)

    async def play():
        work = asyncio.create_task(scene.life.run())
        await until(lambda: disk.refused > 2)
        assert not work.done()
        disk.refuses = False
        await asyncio.wait_for(work, 20)

    asyncio.run(play())
    assert scene.task.state is TaskState.COMPLETED
    assert b"".join(scene.outputs("stdout")) == LINES
    assert "metadata.json" in scene.artifacts
    assert scene.events(Gap) == []


def test_the_reserve_is_given_back_for_the_first_thing_that_the_disk_refuses(stage, monkeypatch):
    scene = stage(Script())
    disk = Disk(scene, monkeypatch, AgentExited)
    scene.reserve.on_given_back = lambda: setattr(disk, "refuses", False)
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert (scene.task.state, disk.refused, scene.reserve.given_back) == (TaskState.COMPLETED, 1, 1)


@pytest.mark.parametrize(
    ("lifecycle", "code"), [({"timeout": "1s"}, "timeout"), ({"hang_timeout": "1s"}, "hang")], ids=["timeout", "hang"]
)
def test_bounds_are_kept_though_the_disk_does_not_take_that_the_agent_began(stage, monkeypatch, lifecycle, code):
    scene = stage(Script(stays=True), lifecycle=lifecycle)
    disk = Disk(scene, monkeypatch, AgentStarted)

    async def play():
        work = asyncio.create_task(scene.life.run())
        await until(lambda: "kill" in scene.script.seen)
        assert not scene.script.gateway_serves
        disk.refuses = False
        await asyncio.wait_for(work, 20)

    asyncio.run(play())
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, code)


def test_what_ended_is_removed_though_the_disk_does_not_take_that_it_began(stage, monkeypatch):
    """The room that the records wait for may be what the agent itself has taken."""
    scene = stage(Script(stays=True), lifecycle={"timeout": "1s", "collect_timeout": "1s"})
    disk = Disk(scene, monkeypatch, AgentStarted)

    async def play():
        work = asyncio.create_task(scene.life.run())
        await until(lambda: disk.refused)
        assert scene.attempt.files.disk.exists()
        await until(lambda: not scene.attempt.files.disk.exists())
        disk.refuses = False
        await asyncio.wait_for(work, 20)

    asyncio.run(play())
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, "timeout")


def test_nobody_gets_at_the_model_or_a_shell_before_the_disk_has_taken_that_the_agent_began(stage, monkeypatch):
    scene = stage(Script(stays=True))
    disk = Disk(scene, monkeypatch, AgentStarted)

    async def play():
        work = asyncio.create_task(scene.life.run())
        await until(lambda: disk.refused > 2)
        with pytest.raises(TerminalRefusedError):
            scene.life.terminals.check(TerminalOrder(24, 80))
        assert not scene.script.gateway_serves
        disk.refuses = False
        await until(lambda: scene.script.gateway_serves)
        scene.life.terminals.check(TerminalOrder(24, 80))
        await ended(scene, work)

    asyncio.run(play())


def test_output_is_left_out_below_the_watermark_and_goes_on_above_it_with_a_gap(stage, monkeypatch):
    monkeypatch.setattr("sandbox.runner.retrying_writer.DISK_SPACE_CHECK_SECONDS", 0.0)
    scene = stage(Script(stays=True, stdout=LINES))
    scene.space = FULL

    async def play():
        work = asyncio.create_task(scene.life.run())
        await scene.until(TaskState.RUNNING)
        await until(lambda: scene.events(Progress))
        assert scene.outputs("stdout") == []
        scene.space = ROOMY
        await until(lambda: len(scene.events(Gap)) == 2)
        await ended(scene, work)

    asyncio.run(play())
    first, second = scene.events(Gap)
    assert "has little room" in first.reason
    assert second.reason.startswith(f"{len(LINES)} bytes of output in 50 pieces were left out")
    assert scene.task.progress.output_bytes == len(LINES)


def test_a_task_ends_completed_and_tells_what_it_lacks_though_there_is_never_room_for_output(stage):
    scene = stage(Script(stdout=LINES))
    scene.space = FULL
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert scene.task.state is TaskState.COMPLETED
    assert scene.outputs("stdout") == []
    assert [gap.reason.partition(" ")[0] for gap in scene.events(Gap)] == ["Output", str(len(LINES))]


def test_more_output_than_is_kept_is_left_out_while_the_disk_takes_nothing(stage, monkeypatch):
    monkeypatch.setattr("sandbox.runner.retrying_writer.BUFFERED_OUTPUT_BYTES_MAX", 10 * 300)
    scene = stage(Script(stays=True, stdout=LINES))
    disk = Disk(scene, monkeypatch, object)
    disk.refuses, disk.begins_with = False, AgentStarted

    async def play():
        work = asyncio.create_task(scene.life.run())
        await until(lambda: disk.refused > 5)
        with pytest.raises(OSError, match="says no"):  # a wish is written now or refused
            scene.life.cancel(CancelOrder(force=True))
        disk.refuses, disk.begins_with = False, None
        await until(lambda: len(scene.events(Gap)) == 2)
        await ended(scene, work)

    asyncio.run(play())
    kept = b"".join(scene.outputs("stdout"))
    assert kept
    assert LINES.startswith(kept)
    assert scene.events(Gap)[1].reason.startswith(f"{len(LINES) - len(kept)} bytes")
    assert scene.task.state is TaskState.CANCELLED


def test_what_was_paid_for_is_counted_however_little_the_disk_takes(stage, monkeypatch):
    """Else the next attempt has a budget that was spent."""
    monkeypatch.setattr("sandbox.runner.retrying_writer.BUFFERED_OUTPUT_BYTES_MAX", 300)
    scene = stage(Script(stays=True, stdout=LINES))
    disk = Disk(scene, monkeypatch, object)
    disk.refuses, disk.begins_with = False, AgentStarted

    async def play():
        work = asyncio.create_task(scene.life.run())
        await until(lambda: disk.refused > 5)
        for _ in range(2):
            scene.script.report(Usage("m", 100, 20, 0, 0, 0.25))
        disk.refuses, disk.begins_with = False, None
        await until(lambda: len(scene.events(Usage)) == 2)
        await ended(scene, work)

    asyncio.run(play())
    assert scene.task.spent.usd == scene.task.progress.cost_usd == 0.5


def test_artifacts_wait_for_room_as_long_as_collecting_may_take(stage, monkeypatch):
    scene = stage(Script(), lifecycle={"collect_timeout": "10m"})
    tries = []

    async def patch(self, attempt_dir, base_commit, target, confine, contains_secret):
        tries.append(target)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        target.write_bytes(b"diff --git a/a b/a\n")
        return PatchResult()

    monkeypatch.setattr("doubles.attempt_dependencies.ScriptedWorkspaces.patch", patch)
    monkeypatch.setattr("sandbox.runner.attempt.RETRY_SECONDS", 0.01)
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert (scene.task.state, len(tries)) == (TaskState.COMPLETED, 3)
    assert "task-1.patch" in scene.artifacts


def test_artifacts_for_which_there_never_is_room_fail_the_task_with_that_reason(stage, monkeypatch):
    scene = stage(Script(), lifecycle={"collect_timeout": "1s"})

    async def patch(self, attempt_dir, base_commit, target, confine, contains_secret):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("doubles.attempt_dependencies.ScriptedWorkspaces.patch", patch)
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, "disk_full")
    assert "make room on the server's disk" in scene.task.failure.message


def test_a_workspace_that_the_disk_lost_something_of_is_no_success(stage, monkeypatch):
    """Its twin is every other test: a disk that stored everything changes nothing."""

    async def verify(self, files):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sandbox.disks.directory.DirectoryDisks.verify", verify)
    scene = stage(Script())
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert (scene.task.state, scene.task.failure.code) == (TaskState.FAILED, "disk_full")
    assert "task-1.patch" in scene.artifacts


@pytest.mark.parametrize("is_finisher", [False, True], ids=["runner", "finisher"])
def test_no_room_is_kept_for_an_end_that_is_being_made(stage, monkeypatch, is_finisher):
    """Teardown removes the reserve with the attempt's other files; after that it would stay for good."""
    error = AttemptError(FailureCode.INTERNAL, "There is no sandbox.")
    scene = stage(Script(create_error=error))
    monkeypatch.setattr("sandbox.runner.attempt.OUTPUT_SYNC_SECONDS", 0.001)

    async def slow(*_, **__):
        scene.reserve.release()
        await asyncio.sleep(0.1)

    for clearing in ("teardown_for_follow_up", "teardown"):
        monkeypatch.setattr(f"sandbox.runner.attempt.{clearing}", slow)
    asyncio.run(asyncio.wait_for(scene.life.finish() if is_finisher else scene.life.run(), 20))
    assert not scene.reserve.is_allocated


def test_output_is_flushed_though_room_for_the_end_cannot_be_taken_again(stage, monkeypatch, caplog):
    """As with a quota, or on a file system that copies on write: there is room, but not so much at once."""
    monkeypatch.setattr("sandbox.runner.attempt.OUTPUT_SYNC_SECONDS", 0.001)
    scene = stage(Script(stays=True, stdout=LINES))
    tries, synced = [], []

    def refuse():
        tries.append(len(synced))
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(scene.reserve, "allocate", refuse)
    monkeypatch.setattr(scene.writer, "sync", lambda: synced.append(len(tries)))

    async def play():
        work = asyncio.create_task(scene.life.run())
        await scene.until(TaskState.RUNNING)
        await until(lambda: len(tries) > 5)
        await until(lambda: len(synced) > 5)
        await ended(scene, work)

    asyncio.run(play())
    assert scene.task.state is TaskState.CANCELLED
    told = [record.getMessage() for record in caplog.records if "no room to keep" in record.getMessage()]
    assert told == ["There is no room to keep for the end of the task: [Errno 122] Disk quota exceeded"]
