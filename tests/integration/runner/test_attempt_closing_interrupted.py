"""While an attempt ends, its runner stays responsive, and killing the runner does not damage collected artifacts."""

import asyncio
import hashlib
import threading

import pytest

from doubles.attempt_harness import AttemptScript
from sandbox.interfaces.runner import CancelAttempt
from sandbox.model.failure import AttemptError, FailureCode
from sandbox.model.task_state import TaskState
from sandbox.runner.steps.collect import CollectStep
from sandbox.runner.steps.teardown import TeardownStep


class KilledError(BaseException):
    """A simulated kill of the runner."""


def kill_while_files_are_removed(harness, monkeypatch):
    async def half_removed(step, handle):
        step.attempt.layout.workspace.rmdir()
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(TeardownStep, "run", half_removed)
        with pytest.raises(KilledError):
            asyncio.run(harness.run())


def test_finisher_preserves_artifacts_when_the_workspace_is_partially_removed(make_harness, monkeypatch):
    script = AttemptScript(patch_incomplete_reason="it is too large")
    harness = make_harness(script, lifecycle={"artifact_patterns": ("*.md",)})
    kill_while_files_are_removed(harness, monkeypatch)
    collected = harness.task.artifacts
    script.patch_error = AttemptError(FailureCode.COLLECT_FAILED, "There is no workspace.")
    asyncio.run(harness.finish())
    assert harness.task.state is TaskState.COMPLETED
    assert harness.task.artifacts == collected
    assert {artifact.name for artifact in collected} >= {"task-1.patch", "task-1.changes.tar", "report.md"}
    assert not list(harness.attempt.layout.root.iterdir())


def test_collection_is_repeated_if_interrupted_before_the_metadata_is_stored(make_harness, monkeypatch):
    harness = make_harness(AttemptScript())

    async def killed(step):
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(CollectStep, "run", killed)
        with pytest.raises(KilledError):
            asyncio.run(harness.run())
    assert harness.task.artifacts == ()
    asyncio.run(harness.finish())
    assert harness.task.state is TaskState.COMPLETED
    assert harness.artifacts == {"task-1.patch", "transcript.ndjson", "metadata.json"}


async def test_runner_stays_responsive_while_it_hashes_artifacts(make_harness, monkeypatch):
    """A tar file with the changed files can be a gigabyte in size."""
    harness = make_harness(AttemptScript())
    file_digest, started, answered = hashlib.file_digest, threading.Event(), threading.Event()

    def slow_digest(file, kind):
        started.set()
        assert answered.wait(10)
        return file_digest(file, kind)

    monkeypatch.setattr("sandbox.runner.steps.collect.hashlib.file_digest", slow_digest)

    async def scenario():
        work = asyncio.create_task(harness.run())
        assert await asyncio.to_thread(started.wait, 10)
        reply = harness.cancel(CancelAttempt(force=True))
        answered.set()
        await work
        return reply

    assert "the outcome is unchanged" in (await scenario()).message
    assert harness.task.state is TaskState.COMPLETED
