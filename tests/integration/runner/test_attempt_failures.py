"""An attempt whose disk, helpers or sandbox let it down: it always ends, and never leaves an agent unwatched."""

import asyncio
import errno
import threading

import pytest

from doubles.attempt_dependencies import ATTEMPT_ID, Script
from sandbox.interfaces.disks import DiskUsage
from sandbox.interfaces.placement import CancelOrder
from sandbox.model.events import (
    AgentExited,
    AgentStarted,
    AttemptFailed,
    CancelRequested,
    Progress,
    SandboxCreated,
    Usage,
    WorkspacePrepared,
)
from sandbox.model.task_state import TaskState
from sandbox.runner.attempt import AttemptRunner


def refuse(scene, monkeypatch, kind):
    """The first event of this kind breaks whoever records it."""
    append, left = scene.writer.append, [kind]

    def maybe(event, transition=None, **when):
        if isinstance(event, kind) and left:
            left.clear()
            raise ArithmeticError
        return append(event, transition, **when)

    monkeypatch.setattr(scene.writer, "append", maybe)


@pytest.mark.parametrize(
    ("kind", "lifecycle"), [(Progress, {}), (AttemptFailed, {"timeout": "1s"}), (AttemptFailed, {"hang_timeout": "1s"})]
)
def test_a_helper_that_breaks_ends_the_agent_at_once(stage, monkeypatch, kind, lifecycle):
    scene = stage(Script(stays=True, stdout=b"+Bash\n"), lifecycle=lifecycle)
    refuse(scene, monkeypatch, kind)
    asyncio.run(asyncio.wait_for(scene.life.run(), 10))
    assert scene.task.state is TaskState.FAILED
    assert "ArithmeticError" in scene.task.failure.message


def test_a_model_request_whose_usage_cannot_be_written_down_ends_the_agent(stage, monkeypatch):
    scene = stage(Script(stays=True))
    refuse(scene, monkeypatch, Usage)

    async def play():
        work = asyncio.create_task(scene.life.run())
        await scene.until(TaskState.RUNNING)
        scene.script.report(Usage("a-model", 1, 1))
        await asyncio.wait_for(work, 10)

    asyncio.run(play())
    assert scene.task.state is TaskState.FAILED
    assert "ArithmeticError" in scene.task.failure.message


def test_nothing_is_collected_while_the_agent_lives_though_its_start_could_not_be_written(stage, monkeypatch):
    script = Script(stays=True)
    scene = stage(script)
    refuse(scene, monkeypatch, AgentStarted)
    asyncio.run(asyncio.wait_for(scene.life.run(), 10))
    assert scene.task.state is TaskState.FAILED
    assert script.seen == ["create", "start", "kill", "destroy"]


def test_what_does_not_die_on_kill_ends_the_attempt_as_lost(stage, monkeypatch):
    monkeypatch.setattr("sandbox.runner.steps.run.KILL_SECONDS", 0.1)
    scene = stage(Script(stays=True, immortal=True))

    async def play():
        work = asyncio.create_task(scene.life.run())
        await scene.until(TaskState.RUNNING)
        scene.life.cancel(CancelOrder(force=True))
        await asyncio.wait_for(work, 10)

    asyncio.run(play())
    assert scene.task.state is TaskState.CANCELLED
    assert scene.task.failure.code == "sandbox_lost"


def test_a_task_that_is_cancelled_before_its_runner_begins_never_runs(stage):
    script = Script()
    scene = stage(script)
    scene.recorder.record(CancelRequested("", force=False))
    life = AttemptRunner(scene.attempt)
    asyncio.run(life.run())
    assert scene.task.state is TaskState.CANCELLED
    assert "start" not in script.seen


def test_output_is_flushed_again_after_a_flush_that_failed(stage, monkeypatch, caplog):
    scene = stage(Script(stays=True, stdout=b"hello\n"))
    sync, calls = scene.writer.sync, []

    def moody():
        if threading.current_thread() is threading.main_thread():
            return sync()
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        return sync()

    monkeypatch.setattr(scene.writer, "sync", moody)

    async def play():
        work = asyncio.create_task(scene.life.run())
        async with asyncio.timeout(10):
            while len(calls) < 3:
                await asyncio.sleep(0.01)
        scene.life.cancel(CancelOrder(force=True))
        await work

    asyncio.run(play())
    assert scene.task.state is TaskState.CANCELLED
    assert "Input/output error" in caplog.text


def test_what_a_dead_runner_left_half_collected_is_collected_again_and_once(stage):
    scene = stage(Script(), lifecycle={"artifact_patterns": ("*.md",)})
    for event in (WorkspacePrepared("c0ffee" + "0" * 34), SandboxCreated("v", "scripted", "host"), AgentStarted("s")):
        scene.recorder.record(event)
    scene.recorder.record(AgentExited(0, {"is_error": False}, None))
    scene.attempt.files.workspace.mkdir(parents=True)
    (scene.attempt.files.root / "task-1.patch").write_bytes(b"half a pat")
    (scene.attempt.files.root / "handle.part").write_bytes(b"{")
    scene.attempt.files.runner_log.write_bytes(b"a log\n")
    asyncio.run(scene.life.finish())
    assert scene.task.state is TaskState.COMPLETED
    names = [artifact.name for artifact in scene.task.artifacts]
    assert sorted(names) == ["metadata.json", "report.md", "task-1.patch", "transcript.ndjson"]
    assert [path.name for path in scene.attempt.files.root.iterdir()] == ["runner.log"]
    assert (scene.attempt.task_files.artifacts / "task-1.patch").read_bytes().startswith(b"diff")


def test_an_attempt_leaves_no_unfinished_file_when_collecting_takes_too_long(stage):
    """Neither patch nor files came to an end: the work is lost, but its story is not."""
    scene = stage(Script(patch_seconds=60, tar_seconds=60), lifecycle={"collect_timeout": "5s"})
    scene.attempt.files.runner_log.write_bytes(b"a log\n")
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert scene.task.failure.code == "collect_failed"
    assert "raise lifecycle.collect_timeout" in scene.task.failure.message
    assert scene.artifacts == {"task-1.patch", "transcript.ndjson", "metadata.json"}
    assert [path.name for path in scene.attempt.files.root.iterdir()] == ["runner.log"]
    assert scene.attempt.id == ATTEMPT_ID


def test_a_disk_that_cannot_tell_the_agent_that_it_is_full_ends_it_at_once(stage, monkeypatch):
    """The twin is every other test: a disk with room ends nobody."""

    async def use(self, files):
        return DiskUsage(2, 1, is_full=True)

    monkeypatch.setattr("sandbox.disks.directory.DirectoryDisks.usage", use)
    scene = stage(Script(stays=True, deaf=True))
    asyncio.run(asyncio.wait_for(scene.life.run(), 10))
    assert (scene.states[-1], scene.task.failure.code) == ("failed", "disk_full")
    assert "kill" in scene.script.seen
    assert "task-1.patch" in scene.artifacts


def test_a_disk_that_nobody_can_measure_any_more_ends_the_agent(stage, monkeypatch):
    async def use(self, files):
        raise OSError("It cannot be told how full the disk is")

    monkeypatch.setattr("sandbox.disks.directory.DirectoryDisks.usage", use)
    monkeypatch.setattr("sandbox.runner.resource_exhaustion.DISK_CHECK_SECONDS", 0.01)
    scene = stage(Script(stays=True, deaf=True))
    asyncio.run(asyncio.wait_for(scene.life.run(), 10))
    assert (scene.states[-1], scene.task.failure.code) == ("failed", "sandbox_lost")
    assert "cannot be told how full" in scene.task.failure.message
    assert "kill" in scene.script.seen


def test_a_disk_that_could_not_be_measured_now_and_then_ends_nobody(stage, monkeypatch):
    looks = []

    async def use(self, files):
        looks.append(files)
        if len(looks) % 3:
            raise OSError("It cannot be told how full the disk is")
        return DiskUsage(1, 2, is_full=False)

    monkeypatch.setattr("sandbox.disks.directory.DirectoryDisks.usage", use)
    monkeypatch.setattr("sandbox.runner.resource_exhaustion.DISK_CHECK_SECONDS", 0.01)
    scene = stage(Script(stays=True))

    async def play():
        work = asyncio.create_task(scene.life.run())
        async with asyncio.timeout(10):
            while len(looks) < 10:
                await asyncio.sleep(0.01)
        scene.life.cancel(CancelOrder(force=True))
        await work

    asyncio.run(play())
    assert scene.states[-1] == "cancelled"
    assert scene.task.failure.code == "agent_failed"


@pytest.mark.parametrize(
    ("number", "code", "advice"),
    [(errno.ENOSPC, "disk_full", "raise vm.disk"), (errno.EIO, "internal_error", "look at it and at the kernel's log")],
)
def test_a_clone_that_leaves_no_room_for_the_agents_settings_says_what_to_do(stage, monkeypatch, number, code, advice):
    def refuse_home(home, files):
        raise OSError(number, "The disk")

    monkeypatch.setattr("sandbox.runner.steps.provision.write_home_files", refuse_home)
    scene = stage(Script())
    asyncio.run(scene.life.run())
    assert (scene.states[-1], scene.task.failure.code) == ("failed", code)
    assert advice in scene.task.failure.message


def test_nobody_goes_on_reading_the_output_of_an_agent_that_would_not_die(stage, monkeypatch):
    """Its attempt is over: what it says now belongs to none."""

    async def survive(self):
        pass

    monkeypatch.setattr("sandbox.runner.steps.run.KILL_SECONDS", 0.1)
    monkeypatch.setattr("doubles.attempt_dependencies.ScriptedSandbox.kill", survive)
    scene = stage(Script(stays=True, deaf=True))

    async def play():
        work = asyncio.create_task(scene.life.run())
        await scene.until(TaskState.RUNNING)
        scene.life.cancel(CancelOrder(force=True))
        await asyncio.wait_for(work, 20)
        await asyncio.sleep(0)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(play()) == set()
    assert scene.task.state is TaskState.CANCELLED


@pytest.mark.parametrize("trouble", ["it would not die", "its output broke"])
def test_who_is_attached_is_told_of_an_end_that_is_an_error_before_collecting_begins(stage, monkeypatch, trouble):
    async def survive(self):
        pass

    async def break_down(*_):
        await broken.wait()
        raise OSError("The terminal broke")

    scene, broken, told = stage(Script(stays=True), claude={"headless": False}), asyncio.Event(), []
    if trouble == "it would not die":
        monkeypatch.setattr("sandbox.runner.steps.run.KILL_SECONDS", 0.1)
        monkeypatch.setattr("doubles.attempt_dependencies.ScriptedSandbox.kill", survive)
        monkeypatch.setattr("doubles.attempt_dependencies.ScriptedTerminal.hang_up", survive)
    else:
        monkeypatch.setattr("sandbox.runner.agent_output.AgentOutput.read_terminal", break_down)
    monkeypatch.setattr(
        "sandbox.runner.terminals.SharedTerminal.close",
        lambda _, exit_: told.append((exit_.code, scene.recorder.task.state)),
    )

    async def play():
        work = asyncio.create_task(scene.life.run())
        await scene.until(TaskState.RUNNING)
        if trouble == "it would not die":
            scene.life.cancel(CancelOrder(force=True))
        broken.set()
        await asyncio.wait_for(work, 20)

    asyncio.run(play())
    assert told == [(None, TaskState.RUNNING)]
