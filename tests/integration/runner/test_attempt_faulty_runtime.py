"""Attempts on a faulty runtime end with the correct failure code, within a bounded time."""

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from doubles.attempt_harness import AttemptHarness, AttemptScript
from doubles.faulty_runtime import FaultyRuntime, RuntimeFaults
from sandbox.agents.claude_code.driver import ClaudeCodeDriver
from sandbox.interfaces.runner import CancelAttempt
from sandbox.interfaces.runtime import Runtime
from sandbox.model.events import ErrorReported
from sandbox.model.task_state import TaskState

TIMEOUT_SECONDS = 20


@pytest.fixture
def run_attempt(tmp_path):
    """Run an attempt in a runtime with these faults; return its harness."""
    harnesses = []

    def run_attempt(faults, *, cancel_in=None, **options):
        harness = AttemptHarness(tmp_path, AttemptScript(), **options)
        harnesses.append(harness)
        runtime: Runtime = FaultyRuntime(faults)
        harness.agent = ClaudeCodeDriver(Path("/usr/bin/true"))
        harness.parts = replace(harness.parts, runtime=runtime)

        async def scenario():
            work = asyncio.create_task(harness.run())
            if cancel_in is not None:
                await harness.wait_for_state(cancel_in)
                async with asyncio.timeout(TIMEOUT_SECONDS):
                    while not faults.recorded_calls:  # the state changes shortly before the runtime is called
                        await asyncio.sleep(0.005)
                harness.cancel(CancelAttempt(force=True))
            await asyncio.wait_for(work, TIMEOUT_SECONDS)

        asyncio.run(scenario())
        return harness

    yield run_attempt
    for harness in harnesses:
        harness.writer.close()


def test_command_that_cannot_start_fails_with_the_reason(run_attempt):
    faults = RuntimeFaults(start_error="The disk of the image is broken.")
    harness = run_attempt(faults)
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "provision_failed")
    assert "disk of the image" in harness.task.failure.message
    assert faults.recorded_calls[-1] == "destroy"


def test_sandbox_that_dies_silently_is_lost_and_its_output_is_stored(run_attempt):
    faults = RuntimeFaults(exits_without_report=True)
    harness = run_attempt(faults)
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "sandbox_lost")
    assert harness.outputs("stdout") == [b"half a line"]
    assert "task-1.patch" in harness.artifacts
    assert faults.recorded_calls[-1] == "destroy"


def test_sandbox_that_is_never_ready_fails_with_provision_timeout(run_attempt):
    faults = RuntimeFaults(create_hangs=True)
    harness = run_attempt(faults, lifecycle={"provision_timeout": "1s"})
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "provision_timeout")
    assert faults.recorded_calls == ["create", "destroy"]


def test_sandbox_that_is_never_ready_can_be_cancelled(run_attempt):
    faults = RuntimeFaults(create_hangs=True)
    harness = run_attempt(faults, cancel_in=TaskState.PROVISIONING)
    assert harness.task.state is TaskState.CANCELLED
    assert faults.recorded_calls == ["create", "destroy"]


def test_command_that_never_starts_fails_after_the_start_timeout(run_attempt, monkeypatch):
    monkeypatch.setattr("sandbox.runner.steps.run.AGENT_START_TIMEOUT_SECONDS", 0.1)
    faults = RuntimeFaults(start_hangs=True)
    harness = run_attempt(faults)
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "provision_failed")
    assert "did not start" in harness.task.failure.message
    assert faults.recorded_calls[-1] == "destroy"


def test_slow_kill_within_the_time_limit_is_awaited(run_attempt):
    faults = RuntimeFaults(slow_stop_seconds=0.5)
    harness = run_attempt(faults, cancel_in=TaskState.RUNNING)
    assert (harness.task.state, harness.task.exit_code) == (TaskState.CANCELLED, 137)
    assert "kill" in faults.recorded_calls


def test_sandbox_is_lost_if_its_kill_exceeds_the_time_limit(run_attempt, monkeypatch):
    monkeypatch.setattr("sandbox.runner.agent_process.KILL_TIMEOUT_SECONDS", 0.1)
    faults = RuntimeFaults(slow_stop_seconds=3600)
    harness = run_attempt(faults, cancel_in=TaskState.RUNNING)
    assert (harness.task.state, harness.task.failure.code) == (TaskState.CANCELLED, "sandbox_lost")
    assert faults.recorded_calls[-1] == "destroy"


def test_destroy_timeout_does_not_change_the_outcome(run_attempt, monkeypatch):
    monkeypatch.setattr("sandbox.runner.steps.teardown.SANDBOX_TEARDOWN_SECONDS", 0.1)
    harness = run_attempt(RuntimeFaults(exits_without_report=True, slow_destroy_seconds=3600))
    assert (harness.task.state, harness.task.failure.code) == (TaskState.FAILED, "sandbox_lost")
    message = "The sandbox was not removed completely: the operation timed out"
    assert ("teardown_failed", message) in error_reports(harness)


def test_slow_sandbox_reports_its_reason(run_attempt):
    harness = run_attempt(RuntimeFaults(exits_without_report=True, slow_reason="No guest booted with KVM."))
    assert ("sandbox_slow", "No guest booted with KVM.") in error_reports(harness)


def test_normal_sandbox_reports_no_slowness(run_attempt):
    assert "sandbox_slow" not in dict(error_reports(run_attempt(RuntimeFaults(exits_without_report=True))))


def error_reports(harness):
    return [(report.error, report.message) for report in harness.events(ErrorReported)]
