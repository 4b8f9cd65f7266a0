"""A runner while it ends its attempt: it answers, and when it is killed, what was kept already stays as it is."""

import asyncio
import hashlib
import threading

import pytest

from doubles.attempt_dependencies import Script
from sandbox.interfaces.placement import CancelOrder
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.task_state import TaskState
from sandbox.runner.attempt import AttemptRunner


class KilledError(BaseException):
    """The runner is gone at this very place."""


def kill_while_files_are_removed(scene, monkeypatch):
    async def half_removed(attempt, handle):
        (attempt.files.workspace).rmdir()
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr("sandbox.runner.attempt.teardown", half_removed)
        with pytest.raises(KilledError):
            asyncio.run(scene.life.run())


def test_a_half_removed_workspace_is_not_collected_over_what_was_collected_of_the_whole_one(stage, monkeypatch):
    script = Script(patch_lacks="it is too large")
    scene = stage(script, lifecycle={"artifact_patterns": ("*.md",)})
    kill_while_files_are_removed(scene, monkeypatch)
    collected = scene.task.artifacts
    script.patch_error = AttemptError(FailureCode.COLLECT_FAILED, "There is no workspace.")
    asyncio.run(AttemptRunner(scene.attempt).finish())
    assert scene.task.state is TaskState.COMPLETED
    assert scene.task.artifacts == collected
    assert {artifact.name for artifact in collected} >= {"task-1.patch", "task-1.changes.tar", "report.md"}
    assert not list(scene.attempt.files.root.iterdir())


def test_an_end_that_was_broken_off_before_the_metadata_is_collected_again(stage, monkeypatch):
    scene = stage(Script())

    async def killed(attempt):
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr("sandbox.runner.attempt.collect", killed)
        with pytest.raises(KilledError):
            asyncio.run(scene.life.run())
    assert scene.task.artifacts == ()
    asyncio.run(AttemptRunner(scene.attempt).finish())
    assert scene.task.state is TaskState.COMPLETED
    assert scene.artifacts == {"task-1.patch", "transcript.ndjson", "metadata.json"}


def test_a_runner_answers_while_it_reads_what_it_keeps(stage, monkeypatch):
    """A tar of changes may be a gigabyte."""
    scene = stage(Script())
    file_digest, begun, answered = hashlib.file_digest, threading.Event(), threading.Event()

    def slowly(file, kind):
        begun.set()
        assert answered.wait(10)
        return file_digest(file, kind)

    monkeypatch.setattr("sandbox.runner.steps.collect.hashlib.file_digest", slowly)

    async def play():
        work = asyncio.create_task(scene.life.run())
        assert await asyncio.to_thread(begun.wait, 10)
        receipt = scene.life.cancel(CancelOrder(force=True))
        answered.set()
        await work
        return receipt

    assert "keeps its outcome" in asyncio.run(play()).message
    assert scene.task.state is TaskState.COMPLETED
