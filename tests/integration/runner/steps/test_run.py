"""What a runner sees of its agent, keeps of it, and never takes for something else."""

import asyncio
import itertools
import os
import socket
import time

from doubles.attempt_dependencies import ATTEMPT_ID, Script, ScriptedAgent, SilentGateway
from sandbox.interfaces.journal import Recorder
from sandbox.interfaces.placement import CancelOrder, Reply
from sandbox.interfaces.runtime import KernelUsage
from sandbox.model.events import AgentStarted, ArtifactCollected, Gap, Output, SandboxCreated, Usage, WorkspacePrepared
from sandbox.model.limits import OUTPUT_LINE_BYTES_MAX, RUNNER_CPU_CORES
from sandbox.model.task_state import TaskState
from sandbox.placements.local.runner_client import UnixRunnerClient
from sandbox.runner.agent_output import AgentOutput
from sandbox.runner.control_socket import serve_control_socket
from sandbox.runner.steps.provision import write_handle
from sandbox.runner.terminals import TerminalServer
from sandbox.system.cpu_throttle import CpuThrottle

SECRET = {"WORD": "open sesame"}


def test_an_agent_with_more_sockets_than_a_sandbox_may_have_is_ended_and_told_why(stage):
    scene = stage(Script(stays=True, kernel_usage=KernelUsage(9000)))
    asyncio.run(asyncio.wait_for(scene.life.run(), 10))
    assert scene.task.state is TaskState.FAILED
    assert scene.task.failure.code == "out_of_memory"
    assert "9000 sockets" in scene.task.failure.message


def test_an_agent_with_as_many_sockets_as_a_sandbox_may_have_works_to_its_end(stage):
    scene = stage(Script(kernel_usage=KernelUsage(8192)))
    asyncio.run(asyncio.wait_for(scene.life.run(), 10))
    assert scene.task.state is TaskState.COMPLETED


def test_the_tail_of_a_split_line_is_kept_and_not_taken_for_an_event(stage):
    long = b"x" * OUTPUT_LINE_BYTES_MAX + b"+Bash\n"
    scene = stage(Script(stdout=b"+Read\n" + long + b"-Read\n"))
    asyncio.run(scene.life.run())
    assert b"".join(scene.outputs()) == b"+Read\n" + long + b"-Read\n"
    assert scene.task.progress.tool_calls == 1


def test_a_line_that_is_kept_in_parts_is_listened_to_whole_and_without_secrets(stage, monkeypatch):
    heard, feed = [], ScriptedAgent.parse_line
    monkeypatch.setattr(ScriptedAgent, "parse_line", lambda agent, line: heard.append(line) or feed(agent, line))
    middle = OUTPUT_LINE_BYTES_MAX - 4  # the value is cut by the bound
    scene = stage(Script(stdout=b"+" + b"x" * middle + b"open sesame" + b"y" * 2_000_000 + b"\n"), secrets=SECRET)
    asyncio.run(scene.life.run())
    assert heard == [b"+" + b"x" * middle + b"[REDACTED:WORD]" + b"y" * 2_000_000 + b"\n"]
    assert b"".join(scene.outputs()) == heard[0]
    assert max(map(len, scene.outputs())) <= OUTPUT_LINE_BYTES_MAX
    assert scene.task.progress.tool_calls == 1


def test_tokens_and_dollars_are_those_that_the_gateway_counted(stage):
    scene = stage(Script(stays=True))

    async def play():
        work = asyncio.create_task(scene.life.run())
        await scene.until(TaskState.RUNNING)
        scene.script.report(Usage("a-model", 10, 5, cost_usd=0.25))
        scene.life.cancel(CancelOrder())
        await asyncio.wait_for(work, 10)

    asyncio.run(play())
    progress = scene.task.progress
    assert (progress.input_tokens, progress.output_tokens, progress.cost_usd) == (10, 5, 0.25)


def test_output_that_nobody_could_read_in_time_is_told_to_be_missing(stage, monkeypatch):
    monkeypatch.setattr("sandbox.runner.steps.run.OUTPUT_DRAIN_SECONDS", 0.1)
    monkeypatch.setattr(AgentOutput, "read_stderr", lambda *_: asyncio.Event().wait())
    scene = stage(Script())
    asyncio.run(asyncio.wait_for(scene.life.run(), 10))
    (gap,) = scene.events(Gap)
    assert gap.reason == "The end of the output is missing: nothing of it came for 0.1 s after the agent's end."


def test_what_is_ready_is_read_though_the_machine_stood_still_meanwhile(stage, monkeypatch):
    monkeypatch.setattr("sandbox.runner.steps.run.OUTPUT_DRAIN_SECONDS", 0.2)
    scene, lines = stage(Script(stdout=b"line\n" * 2000 + b"the result\n")), itertools.count(1)
    record = scene.recorder.record

    def slowly(event):
        if isinstance(event, Output) and next(lines) % 500 == 0:
            time.sleep(0.3)  # as a disk does that takes nothing for a while
        return record(event)

    monkeypatch.setattr(scene.recorder, "record", slowly)
    asyncio.run(asyncio.wait_for(scene.life.run(), 10))
    assert scene.outputs()[-1] == b"the result\n"
    assert not scene.events(Gap)


def test_what_waits_for_the_cpu_budget_after_the_agents_end_is_still_read(stage, monkeypatch):
    monkeypatch.setattr("sandbox.runner.steps.run.OUTPUT_DRAIN_SECONDS", 0.1)
    scene = stage(Script(stdout=b"line\n" * 500 + b"the result\n"))
    throttle, start = scene.attempt.dependencies.throttle, CpuThrottle.start

    def start_in_debt():
        start(throttle)
        throttle._budget._balance_seconds = -RUNNER_CPU_CORES

    monkeypatch.setattr(throttle, "start", start_in_debt)
    began = time.monotonic()
    asyncio.run(asyncio.wait_for(scene.life.run(), 20))
    assert time.monotonic() - began > 0.9
    assert scene.outputs()[-1] == b"the result\n"
    assert not scene.events(Gap)


def test_what_goes_on_for_ever_after_the_agents_end_is_given_up(stage, monkeypatch):
    """Nothing inside can: somebody else holds the pipe, or not everything died."""
    monkeypatch.setattr("sandbox.runner.steps.run.OUTPUT_DRAIN_SECONDS", 0.2)
    monkeypatch.setattr("sandbox.runner.steps.run.OUTPUT_DRAIN_SECONDS_MAX", 0.6)

    async def go_on(output, reader):
        endless = asyncio.StreamReader()

        async def write():
            while True:
                endless.feed_data(b"more\n")
                await asyncio.sleep(0.01)

        writing = asyncio.create_task(write())
        try:
            await take_stdout(output, endless)
        finally:
            writing.cancel()

    take_stdout = AgentOutput.read_stdout
    monkeypatch.setattr(AgentOutput, "read_stderr", go_on)
    scene = stage(Script())
    asyncio.run(asyncio.wait_for(scene.life.run(), 10))
    (gap,) = scene.events(Gap)
    assert gap.reason == "The end of the output is missing: it was not over 0.6 s after the agent's end."
    assert scene.states[-1] == "completed"


def test_silence_is_no_hang_while_the_model_owes_an_answer(stage, monkeypatch):
    monkeypatch.setattr(SilentGateway, "requests_in_flight", 1)
    scene = stage(Script(stays=True), lifecycle={"hang_timeout": "1s"})

    async def play():
        work = asyncio.create_task(scene.life.run())
        await scene.until(TaskState.RUNNING)
        done, _ = await asyncio.wait({work}, timeout=1.5)
        assert not done
        monkeypatch.setattr(SilentGateway, "requests_in_flight", 0)
        await asyncio.wait_for(work, 10)

    asyncio.run(play())
    assert scene.task.failure.code == "hang"


def test_the_name_of_an_artifact_is_on_disk_before_it_is_told(stage, monkeypatch):
    scene = stage(Script())
    artifacts = scene.attempt.task_files.artifacts
    on_disk, told = set(), {}
    fsync, record = os.fsync, Recorder.record

    def watched_fsync(descriptor):
        fsync(descriptor)
        if os.path.samestat(os.fstat(descriptor), artifacts.stat()):
            on_disk.update(path.name for path in artifacts.iterdir())

    def watched_record(recorder, event):
        if isinstance(event, ArtifactCollected):
            told[event.artifact.name] = event.artifact.name in on_disk
        return record(recorder, event)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Recorder, "record", watched_record)
    asyncio.run(scene.life.run())
    assert told == {"task-1.patch": True, "transcript.ndjson": True, "metadata.json": True}


def test_no_file_of_the_workspace_takes_the_name_of_what_sandbox_itself_makes(stage, monkeypatch):
    scene = stage(Script(), lifecycle={"artifact_patterns": ("**",)})
    workspaces = scene.attempt.dependencies.workspaces
    asked = []

    async def collect(workspace, patterns, target, taken_names):
        asked.append(taken_names)
        for _ in ():
            yield

    monkeypatch.setattr(workspaces, "collect", collect)
    asyncio.run(scene.life.run())
    assert asked == [{"task-1.patch", "task-1.changes.tar", "transcript.ndjson", "metadata.json"}]


def test_a_finisher_ends_the_sandbox_before_it_says_that_the_agent_is_gone(stage, monkeypatch):
    scene = stage(Script())
    for event in (WorkspacePrepared("c0ffee" + "0" * 34), SandboxCreated("v", "none", "host"), AgentStarted("s")):
        scene.recorder.record(event)
    runtime = scene.attempt.dependencies.runtime
    write_handle(scene.attempt.files.handle, runtime.prepare(ATTEMPT_ID))
    states = []

    async def destroy(handle, disk):
        states.append(scene.recorder.task.state)

    monkeypatch.setattr(runtime, "destroy", destroy)
    asyncio.run(scene.life.finish())
    assert states[0] is TaskState.RUNNING
    assert scene.task.failure.code == "runner_lost"


def test_orders_are_taken_where_a_dead_runner_left_its_socket(tmp_path):
    path = tmp_path / f"{ATTEMPT_ID}.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def play():
        async with serve_control_socket(
            path, lambda order: Reply(done=True, message=order.reason), TerminalServer(None, CpuThrottle().queue())
        ):
            return await UnixRunnerClient(tmp_path).cancel(ATTEMPT_ID, CancelOrder("enough"))

    assert asyncio.run(play()) == Reply(done=True, message="enough")
    assert not path.exists()
