"""How a runner handles the agent's output, usage, silence and exit."""

import asyncio
import itertools
import os
import socket
import time

import msgspec
import pytest

from doubles.attempt_harness import ATTEMPT_ID, AttemptScript, ScriptedAgentDriver, ScriptedGateway
from sandbox.interfaces.runner import CancelAttempt, Reply
from sandbox.journal.writer import JournalRecorder
from sandbox.model.events import (
    AgentStarted,
    ArtifactCollected,
    Gap,
    Output,
    SandboxCreated,
    ToolCallEnded,
    ToolCallStarted,
    Usage,
    WorkspacePrepared,
)
from sandbox.model.fixed_limits import OUTPUT_LINE_BYTES_MAX, RUNNER_CPU_CORES
from sandbox.model.task_state import TaskState
from sandbox.placements.runner_client import LocalRunnerClient
from sandbox.primitives.runner_cpu_throttle import CpuThrottle
from sandbox.runner.agent_output import AgentOutput
from sandbox.runner.attempt_context import write_handle
from sandbox.runner.control_socket import serve_control_socket
from sandbox.runner.terminals import TerminalServer

SECRET = {"WORD": "open sesame"}


async def test_agent_that_exceeds_the_socket_limit_is_stopped_with_a_reason(make_harness):
    harness = make_harness(AttemptScript(runs_until_signal=True, exceeded_limit="The sandbox had 9000 sockets."))
    await asyncio.wait_for(harness.run(), 10)
    assert harness.task.state is TaskState.FAILED
    assert harness.task.failure.code == "out_of_memory"
    assert "9000 sockets" in harness.task.failure.message


async def test_tail_of_a_split_line_is_stored_and_not_parsed_as_an_event(make_harness):
    long = b"x" * OUTPUT_LINE_BYTES_MAX + b"+Bash\n"
    harness = make_harness(AttemptScript(stdout=b"+Read\n" + long + b"-Read\n"))
    await harness.run()
    assert b"".join(harness.outputs()) == b"+Read\n" + long + b"-Read\n"
    assert harness.task.progress.tool_calls == 1


@pytest.mark.parametrize("records_conversation", [True, False])
async def test_conversation_is_recorded_only_if_the_server_reads_it(make_harness, records_conversation):
    harness = make_harness(AttemptScript(stdout=b"+Bash\nnoise\n-Bash\n"))
    attempt = msgspec.structs.replace(harness.attempt, records_conversation=records_conversation)
    await harness.run(attempt)
    assert len(harness.events(ToolCallStarted)) == int(records_conversation)
    assert [each.is_parsed for each in harness.events(Output)] == [
        records_conversation,
        False,
        records_conversation,
    ]
    assert len(harness.events(ToolCallEnded)) == 1


async def test_line_stored_in_parts_is_parsed_whole_and_redacted(make_harness, monkeypatch):
    parsed, parse_line = [], ScriptedAgentDriver.parse_line
    monkeypatch.setattr(
        ScriptedAgentDriver, "parse_line", lambda agent, line: parsed.append(line) or parse_line(agent, line)
    )
    middle = OUTPUT_LINE_BYTES_MAX - 4  # the limit splits the value
    harness = make_harness(
        AttemptScript(stdout=b"+" + b"x" * middle + b"open sesame" + b"y" * 2_000_000 + b"\n"), secrets=SECRET
    )
    await harness.run()
    assert parsed == [b"+" + b"x" * middle + b"[REDACTED:WORD]" + b"y" * 2_000_000 + b"\n"]
    assert b"".join(harness.outputs()) == parsed[0]
    assert max(map(len, harness.outputs())) <= OUTPUT_LINE_BYTES_MAX
    assert harness.task.progress.tool_calls == 1


async def test_progress_usage_comes_from_the_gateway(make_harness):
    harness = make_harness(AttemptScript(runs_until_signal=True))

    async def scenario():
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        harness.script.report_to_runner(Usage("a-model", 10, 5, cost_usd=0.25))
        harness.cancel(CancelAttempt())
        await asyncio.wait_for(work, 10)

    await scenario()
    progress = harness.task.progress
    assert (progress.input_tokens, progress.output_tokens, progress.cost_usd) == (10, 5, 0.25)


async def test_unread_output_at_the_end_is_recorded_as_a_gap(make_harness, monkeypatch):
    monkeypatch.setattr("sandbox.runner.agent_process.OUTPUT_DRAIN_IDLE_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(AgentOutput, "read_stderr", lambda *_: asyncio.Event().wait())
    harness = make_harness(AttemptScript())
    await asyncio.wait_for(harness.run(), 10)
    (gap,) = harness.events(Gap)
    assert gap.reason == "The end of the output is missing: nothing was received for 0.1 s after the agent ended."


async def test_pending_output_is_read_after_the_machine_stalls(make_harness, monkeypatch):
    monkeypatch.setattr("sandbox.runner.agent_process.OUTPUT_DRAIN_IDLE_TIMEOUT_SECONDS", 0.2)
    harness, lines = make_harness(AttemptScript(stdout=b"line\n" * 2000 + b"the result\n")), itertools.count(1)
    record = harness.recorder.record

    def record_with_stalls(event):
        if isinstance(event, Output) and next(lines) % 500 == 0:
            time.sleep(0.3)  # simulates a disk that blocks writes
        return record(event)

    monkeypatch.setattr(harness.recorder, "record", record_with_stalls)
    await asyncio.wait_for(harness.run(), 10)
    assert harness.outputs()[-1] == b"the result\n"
    assert not harness.events(Gap)


async def test_output_delayed_by_cpu_throttling_is_read_after_the_agent_exits(make_harness, monkeypatch):
    monkeypatch.setattr("sandbox.runner.agent_process.OUTPUT_DRAIN_IDLE_TIMEOUT_SECONDS", 0.1)
    harness = make_harness(AttemptScript(stdout=b"line\n" * 500 + b"the result\n"))
    throttle, start = harness.parts.throttle, CpuThrottle.start

    def start_in_debt():
        start(throttle)
        throttle._budget._balance_seconds = -RUNNER_CPU_CORES

    monkeypatch.setattr(throttle, "start", start_in_debt)
    started = time.monotonic()
    await asyncio.wait_for(harness.run(), 20)
    assert time.monotonic() - started > 0.9
    assert harness.outputs()[-1] == b"the result\n"
    assert not harness.events(Gap)


@pytest.fixture
def endless_stderr(monkeypatch):
    """A stderr that never ends. Its data arrives so often that it is never silent."""

    async def read_endless(output, reader):
        endless = asyncio.StreamReader()

        async def write():
            while True:
                endless.feed_data(b"more\n")
                await asyncio.sleep(0.01)

        writer = asyncio.create_task(write())
        try:
            await read_stdout(output, endless)
        finally:
            writer.cancel()

    read_stdout = AgentOutput.read_stdout
    monkeypatch.setattr(AgentOutput, "read_stderr", read_endless)
    monkeypatch.setattr("sandbox.runner.agent_process.OUTPUT_DRAIN_IDLE_TIMEOUT_SECONDS", 0.2)


async def test_endless_output_after_the_agent_exits_is_abandoned(make_harness, endless_stderr, monkeypatch):
    """This happens only if a process outside the sandbox has the pipe open, or a process has survived the kill."""
    monkeypatch.setattr("sandbox.runner.agent_process.OUTPUT_DRAIN_TIMEOUT_SECONDS", 0.6)
    harness = make_harness(AttemptScript())
    await asyncio.wait_for(harness.run(), 10)
    (gap,) = harness.events(Gap)
    assert gap.reason == "The end of the output is missing: the output did not end within 0.6 s after the agent ended."
    assert harness.states[-1] == "completed"


async def test_output_after_a_forced_cancellation_is_read_for_a_short_time(make_harness, endless_stderr):
    """Processing a flood of short lines takes long. A task that its user cancels must not wait for it."""
    harness = make_harness(AttemptScript(runs_until_signal=True))
    work = asyncio.create_task(harness.run())
    await harness.wait_for_state(TaskState.RUNNING)
    harness.cancel(CancelAttempt(force=True))
    await asyncio.wait_for(work, 20)
    (gap,) = harness.events(Gap)
    assert "the task was cancelled, and the output did not end within 0.2 s" in gap.reason
    assert harness.states[-1] == "cancelled"


async def test_silence_is_not_a_hang_while_a_model_request_is_in_flight(make_harness, monkeypatch):
    monkeypatch.setattr(ScriptedGateway, "requests_in_flight", 1)
    harness = make_harness(AttemptScript(runs_until_signal=True), lifecycle={"hang_timeout": "1s"})

    async def scenario():
        work = asyncio.create_task(harness.run())
        await harness.wait_for_state(TaskState.RUNNING)
        done, _ = await asyncio.wait({work}, timeout=1.5)
        assert not done
        monkeypatch.setattr(ScriptedGateway, "requests_in_flight", 0)
        await asyncio.wait_for(work, 10)

    await scenario()
    assert harness.task.failure.code == "hang"


async def test_artifact_name_is_on_disk_before_it_is_recorded(make_harness, monkeypatch):
    harness = make_harness(AttemptScript())
    artifacts = harness.attempt.task_layout.artifacts
    on_disk, recorded = set(), {}
    fsync, record = os.fsync, JournalRecorder.record

    def watched_fsync(descriptor):
        fsync(descriptor)
        if os.path.samestat(os.fstat(descriptor), artifacts.stat()):
            on_disk.update(path.name for path in artifacts.iterdir())

    def watched_record(recorder, event):
        if isinstance(event, ArtifactCollected):
            recorded[event.artifact.name] = event.artifact.name in on_disk
        return record(recorder, event)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(JournalRecorder, "record", watched_record)
    await harness.run()
    assert recorded == {"task-1.patch": True, "transcript.ndjson": True, "metadata.json": True}


async def test_workspace_files_cannot_take_generated_artifact_names(make_harness, monkeypatch):
    harness = make_harness(AttemptScript(), lifecycle={"artifact_patterns": ("**",)})
    workspaces = harness.parts.workspaces
    requested = []

    async def collect(workspace, patterns, target, taken_names):
        requested.append(taken_names)
        for _ in ():
            yield

    monkeypatch.setattr(workspaces, "collect", collect)
    await harness.run()
    names = {"task-1.patch", "task-1.chain.patch", "task-1.changes.tar"}
    assert requested == [{*names, "transcript.ndjson", "agent-session.gz", "metadata.json"}]


async def test_finisher_destroys_the_sandbox_before_it_records_the_end(make_harness, monkeypatch):
    harness = make_harness(AttemptScript())
    for event in (WorkspacePrepared("c0ffee" + "0" * 34), SandboxCreated("v", "none", "host"), AgentStarted("s")):
        harness.recorder.record(event)
    runtime = harness.parts.runtime
    write_handle(harness.attempt.layout.handle, runtime.prepare(ATTEMPT_ID))
    states = []

    async def destroy(handle, disk):
        states.append(harness.recorder.task.state)

    monkeypatch.setattr(runtime, "destroy", destroy)
    await harness.finish()
    assert states[0] is TaskState.RUNNING
    assert harness.task.failure.code == "runner_lost"


async def test_control_socket_replaces_the_stale_socket_of_a_dead_runner(tmp_path):
    path = tmp_path / f"{ATTEMPT_ID}.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def scenario():
        async with serve_control_socket(
            path, lambda request: Reply(done=True, message=request.reason), TerminalServer(None, CpuThrottle().queue())
        ):
            return await LocalRunnerClient(path).cancel(CancelAttempt("enough"))

    assert (await scenario()) == Reply(done=True, message="enough")
    assert not path.exists()
