"""If the disk, a helper task or the sandbox fails, the attempt still ends and no agent runs unsupervised."""

import asyncio
import errno
import threading

import msgspec
import pytest

from doubles.attempt_harness import ATTEMPT_ID, AttemptScript
from sandbox.interfaces.disks import DiskUsage
from sandbox.interfaces.runner import CancelAttempt
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


def fail_first_record(harness, monkeypatch, kind):
    """Raise an exception when the first event of this kind is recorded."""
    append, pending = harness.writer.append, [kind]

    def append_or_fail(event, transition=None, **when):
        if isinstance(event, kind) and pending:
            pending.clear()
            raise ArithmeticError
        return append(event, transition, **when)

    monkeypatch.setattr(harness.writer, "append", append_or_fail)


@pytest.mark.parametrize(
    ("kind", "lifecycle"), [(Progress, {}), (AttemptFailed, {"timeout": "1s"}), (AttemptFailed, {"hang_timeout": "1s"})]
)
async def test_failure_of_a_helper_coroutine_stops_the_agent(make_harness, monkeypatch, kind, lifecycle):
    harness = make_harness(AttemptScript(runs_until_signal=True, stdout=b"+Bash\n"), lifecycle=lifecycle)
    fail_first_record(harness, monkeypatch, kind)
    await asyncio.wait_for(harness.run(), 10)
    assert harness.task.state is TaskState.FAILED
    assert "ArithmeticError" in harness.task.failure.message


async def test_agent_stops_when_usage_cannot_be_recorded(make_harness, monkeypatch):
    harness = make_harness(AttemptScript(runs_until_signal=True))
    fail_first_record(harness, monkeypatch, Usage)

    async def scenario():
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        harness.script.report_to_runner(Usage("a-model", 1, 1))
        await asyncio.wait_for(work, 10)

    await scenario()
    assert harness.task.state is TaskState.FAILED
    assert "ArithmeticError" in harness.task.failure.message


async def test_agent_is_killed_when_its_start_cannot_be_recorded(make_harness, monkeypatch):
    script = AttemptScript(runs_until_signal=True)
    harness = make_harness(script)
    fail_first_record(harness, monkeypatch, AgentStarted)
    await asyncio.wait_for(harness.run(), 10)
    assert harness.task.state is TaskState.FAILED
    assert script.recorded_calls == ["create", "start", "kill", "destroy"]


async def test_unkillable_sandbox_is_recorded_as_lost(make_harness, monkeypatch):
    monkeypatch.setattr("sandbox.runner.agent_process.KILL_TIMEOUT_SECONDS", 0.1)
    harness = make_harness(AttemptScript(runs_until_signal=True, survives_kill=True))

    async def scenario():
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        harness.cancel(CancelAttempt(force=True))
        await asyncio.wait_for(work, 10)

    await scenario()
    assert harness.task.state is TaskState.CANCELLED
    assert harness.task.failure.code == "sandbox_lost"
    assert "the kernel was still executing their system calls" in harness.task.failure.message


async def test_task_cancelled_before_its_runner_starts_never_runs_the_agent(make_harness):
    script = AttemptScript()
    harness = make_harness(script)
    harness.recorder.record(CancelRequested("", force=False))
    await harness.run(msgspec.structs.replace(harness.attempt, recorder=harness.make_recorder(harness.task)))
    assert harness.task.state is TaskState.CANCELLED
    assert "start" not in script.recorded_calls


async def test_output_flush_is_retried_after_an_error(make_harness, monkeypatch, caplog):
    harness = make_harness(AttemptScript(runs_until_signal=True, stdout=b"hello\n"))
    sync, calls = harness.writer.sync, []

    def sync_with_one_failure():
        if threading.current_thread() is threading.main_thread():
            return sync()
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        return sync()

    monkeypatch.setattr(harness.writer, "sync", sync_with_one_failure)

    async def scenario():
        work = asyncio.create_task(harness.run())
        async with asyncio.timeout(10):
            while len(calls) < 3:
                await asyncio.sleep(0.01)
        harness.cancel(CancelAttempt(force=True))
        await work

    await scenario()
    assert harness.task.state is TaskState.CANCELLED
    assert "Input/output error" in caplog.text


async def test_finisher_collects_a_partially_collected_attempt_once(make_harness):
    harness = make_harness(AttemptScript(), lifecycle={"artifact_patterns": ("*.md",)})
    for event in (WorkspacePrepared("c0ffee" + "0" * 34), SandboxCreated("v", "scripted", "host"), AgentStarted("s")):
        harness.recorder.record(event)
    harness.recorder.record(AgentExited(0, {"is_error": False}, None))
    harness.attempt.layout.workspace.mkdir(parents=True)
    (harness.attempt.layout.root / "task-1.patch").write_bytes(b"half a pat")
    (harness.attempt.layout.root / "handle.part").write_bytes(b"{")
    harness.attempt.layout.runner_log.write_bytes(b"a log\n")
    await harness.finish()
    assert harness.task.state is TaskState.COMPLETED
    names = [artifact.name for artifact in harness.task.artifacts]
    assert sorted(names) == ["metadata.json", "report.md", "task-1.patch", "transcript.ndjson"]
    assert [path.name for path in harness.attempt.layout.root.iterdir()] == ["runner.log"]
    assert (harness.attempt.task_layout.artifacts / "task-1.patch").read_bytes().startswith(b"diff")


async def test_collection_timeout_leaves_no_partial_files(make_harness):
    """Neither the patch nor the archive of changed files is completed, so the work is lost, but not the events."""
    harness = make_harness(
        AttemptScript(patch_seconds=60, changed_files_seconds=60), lifecycle={"collect_timeout": "5s"}
    )
    harness.attempt.layout.runner_log.write_bytes(b"a log\n")
    await asyncio.wait_for(harness.run(), 20)
    assert harness.task.failure.code == "collect_failed"
    assert "raise lifecycle.collect_timeout" in harness.task.failure.message
    assert harness.artifacts == {"task-1.patch", "transcript.ndjson", "metadata.json"}
    assert [path.name for path in harness.attempt.layout.root.iterdir()] == ["runner.log"]
    assert harness.attempt.id == ATTEMPT_ID


async def test_full_disk_without_size_enforcement_stops_the_agent(make_harness, monkeypatch):
    """The other tests cover the control: a disk with free space."""

    async def measure_and_trim(self):
        return DiskUsage(2, 1, is_full=True)

    monkeypatch.setattr("sandbox.disks.directory_disk.DirectoryDisk.measure_and_trim", measure_and_trim)
    harness = make_harness(AttemptScript(runs_until_signal=True, ignores_term=True))
    await asyncio.wait_for(harness.run(), 10)
    assert (harness.states[-1], harness.task.failure.code) == ("failed", "disk_full")
    assert "kill" in harness.script.recorded_calls
    assert "task-1.patch" in harness.artifacts


async def test_disk_usage_errors_stop_the_agent(make_harness, monkeypatch):
    async def measure_and_trim(self):
        raise OSError("The disk usage cannot be measured")

    monkeypatch.setattr("sandbox.disks.directory_disk.DirectoryDisk.measure_and_trim", measure_and_trim)
    monkeypatch.setattr("sandbox.runner.task_limits.DISK_CHECK_INTERVAL_SECONDS_MIN", 0.01)
    harness = make_harness(AttemptScript(runs_until_signal=True, ignores_term=True))
    await asyncio.wait_for(harness.run(), 10)
    assert (harness.states[-1], harness.task.failure.code) == ("failed", "sandbox_lost")
    assert "cannot be measured" in harness.task.failure.message
    assert "kill" in harness.script.recorded_calls


async def test_intermittent_disk_usage_errors_do_not_stop_the_agent(make_harness, monkeypatch):
    calls = []

    async def measure_and_trim(self):
        calls.append(self)
        if len(calls) % 3:
            raise OSError("The disk usage cannot be measured")
        return DiskUsage(1, 2, is_full=False)

    monkeypatch.setattr("sandbox.disks.directory_disk.DirectoryDisk.measure_and_trim", measure_and_trim)
    monkeypatch.setattr("sandbox.runner.task_limits.DISK_CHECK_INTERVAL_SECONDS_MIN", 0.01)
    harness = make_harness(AttemptScript(runs_until_signal=True))

    async def scenario():
        work = asyncio.create_task(harness.run())
        async with asyncio.timeout(10):
            while len(calls) < 10:
                await asyncio.sleep(0.01)
        harness.cancel(CancelAttempt(force=True))
        await work

    await scenario()
    assert harness.states[-1] == "cancelled"
    assert harness.task.failure.code == "agent_failed"


@pytest.mark.parametrize(
    ("number", "code", "advice"),
    [(errno.ENOSPC, "disk_full", "raise vm.disk"), (errno.EIO, "internal_error", "check the disk and the kernel log")],
)
async def test_disk_error_while_writing_home_files_fails_with_advice(make_harness, monkeypatch, number, code, advice):
    def refuse_home(home, files):
        raise OSError(number, "The disk")

    monkeypatch.setattr("sandbox.runner.steps.provision.write_home_files", refuse_home)
    harness = make_harness(AttemptScript())
    await harness.run()
    assert (harness.states[-1], harness.task.failure.code) == ("failed", code)
    assert advice in harness.task.failure.message


async def test_output_of_an_unkillable_agent_is_not_read_after_the_attempt(make_harness, monkeypatch):
    """The attempt has ended, so later output belongs to no attempt."""

    async def ignore_kill(self):
        pass

    monkeypatch.setattr("sandbox.runner.agent_process.KILL_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr("doubles.attempt_harness.ScriptedSandbox.kill", ignore_kill)
    harness = make_harness(AttemptScript(runs_until_signal=True, ignores_term=True))

    async def scenario():
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        harness.cancel(CancelAttempt(force=True))
        await asyncio.wait_for(work, 20)
        await asyncio.sleep(0)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert (await scenario()) == set()
    assert harness.task.state is TaskState.CANCELLED


@pytest.mark.parametrize("fault", ["the kill has no effect", "the output cannot be read"])
async def test_terminal_clients_receive_the_end_before_collection(make_harness, monkeypatch, fault):
    async def ignore_kill(self):
        pass

    async def raise_when_broken(*_):
        await broken.wait()
        raise OSError("The terminal failed")

    harness, broken, ends = (
        make_harness(AttemptScript(runs_until_signal=True), claude={"headless": False}),
        asyncio.Event(),
        [],
    )
    if fault == "the kill has no effect":
        monkeypatch.setattr("sandbox.runner.agent_process.KILL_TIMEOUT_SECONDS", 0.1)
        monkeypatch.setattr("doubles.attempt_harness.ScriptedSandbox.kill", ignore_kill)
        monkeypatch.setattr("doubles.attempt_harness.ScriptedTerminal.hang_up", ignore_kill)
    else:
        monkeypatch.setattr("sandbox.runner.agent_output.AgentOutput.read_terminal", raise_when_broken)
    monkeypatch.setattr(
        "sandbox.runner.terminals.SharedTerminal.close",
        lambda _, exit_status: ends.append((exit_status.code, harness.recorder.task.state)),
    )

    async def scenario():
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        if fault == "the kill has no effect":
            harness.cancel(CancelAttempt(force=True))
        broken.set()
        await asyncio.wait_for(work, 20)

    await scenario()
    assert ends == [(None, TaskState.RUNNING)]
