"""A runner that is killed while it ends its attempt: what was kept already stays as it is."""

import asyncio

import pytest

from doubles.attempt_equipment import Script, Stage
from sandbox.model.errors import AttemptError, FailureCode
from sandbox.model.state import TaskState
from sandbox.runner.life import AttemptLife


@pytest.fixture
def stage(tmp_path):
    stages = []

    def make(script, **parts):
        stages.append(Stage(tmp_path, script, **parts))
        return stages[-1]

    yield make
    for each in stages:
        each.writer.close()


class KilledError(BaseException):
    """The runner is gone at this very place."""


def kill_while_files_are_removed(scene, monkeypatch):
    async def half_removed(attempt, handle):
        (attempt.files.workspace).rmdir()
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr("sandbox.runner.life.teardown", half_removed)
        with pytest.raises(KilledError):
            asyncio.run(scene.life.carry_out())


def test_a_half_removed_workspace_is_not_collected_over_what_was_collected_of_the_whole_one(stage, monkeypatch):
    script = Script(patch_lacks="it is too large")
    scene = stage(script, lifecycle={"artifact_patterns": ("*.md",)})
    kill_while_files_are_removed(scene, monkeypatch)
    collected = scene.task.artifacts
    script.patch_error = AttemptError(FailureCode.COLLECT_FAILED, "There is no workspace.")
    asyncio.run(AttemptLife(scene.attempt).finish())
    assert scene.task.state is TaskState.COMPLETED
    assert scene.task.artifacts == collected
    assert {artifact.name for artifact in collected} >= {"task-1.patch", "task-1.changes.tar", "report.md"}
    assert not list(scene.attempt.files.root.iterdir())


def test_an_end_that_was_broken_off_before_the_metadata_is_collected_again(stage, monkeypatch):
    scene = stage(Script())

    async def killed(attempt):
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr("sandbox.runner.life.collect", killed)
        with pytest.raises(KilledError):
            asyncio.run(scene.life.carry_out())
    assert scene.task.artifacts == ()
    asyncio.run(AttemptLife(scene.attempt).finish())
    assert scene.task.state is TaskState.COMPLETED
    assert scene.artifacts == {"task-1.patch", "transcript.ndjson", "metadata.json"}
