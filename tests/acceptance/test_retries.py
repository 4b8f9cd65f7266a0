"""A failed attempt is followed by another where it may be: made again, retried, or resumed."""

import json
import os
import signal
import time

import msgspec
import pytest

from chaos import processes
from doubles.live_server import bash, says, until
from doubles.runners import first_process, records, runner_pid
from sandbox.demo.model_script import Fault

STATES = ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
LONG = bash("python3 -c 'import time; time.sleep(600)'")
TRIES = 6
STEP_SECONDS = 30.0


def kill_after(machine, fact, task_id, number):
    """Kill the runner of this attempt right after it has written this fact down; whether its agent had not begun then.

    The runner has no instant that is not watched: it goes on for two milliseconds at a time.
    """
    if number > 1:
        begun = f"attempt {number}"
        until(
            lambda: records(machine, task_id).count('"attempt_started"') == number, STEP_SECONDS, begun, pause_max=0.02
        )
    pid = until(lambda: runner_pid(machine, task_id), what="the runner")
    deadline = time.monotonic() + STEP_SECONDS
    is_there = processes.stop(pid)
    while is_there and fact not in records(machine, task_id):
        assert time.monotonic() < deadline, f"waited {STEP_SECONDS} s for {fact}"
        is_there = processes.step(pid)
    os.kill(pid, signal.SIGKILL)
    return "agent_started" not in records(machine, task_id)


def agents_begun(machine, task_id="task-1"):
    events = [json.loads(line) for line in machine.artifact("transcript.ndjson", task_id).splitlines()]
    return [event["session_id"] for event in events if event.get("subtype") == "init"]


@pytest.mark.parametrize("facts", [("attempt_started", "workspace_prepared"), ("sandbox_created",)])
def test_runners_killed_before_the_agent_begins_cost_nothing(world, facts):
    machine = world(bash("echo once >> once.txt"), says())
    for number in range(TRIES):
        task_id = machine.submit(f"task-{number}")
        was_early = all(kill_after(machine, fact, task_id, number) for number, fact in enumerate(facts, 1))
        status = machine.wait(task_id)
        if was_early:
            break
    assert was_early, f"the agent was always faster than the test, {TRIES} times"
    assert status["state"] == "completed", machine.tell(task_id)
    assert machine.states(task_id) == STATES
    assert [attempt["followed_by"] for attempt in status["attempts"]] == ["again" for _ in facts] + [None]
    assert {attempt["error"]["code"] for attempt in status["attempts"][:-1]} == {"runner_lost"}
    assert len(agents_begun(machine, task_id)) == 1
    assert machine.artifact(f"{task_id}.patch", task_id).count(b"+once") == 1


def test_an_agent_that_fails_is_run_again_from_a_fresh_workspace(watched):
    no = Fault("error", status=403, message="Not today.", times=1)
    machine = watched(bash("echo line >> lines.txt"), msgspec.structs.replace(says("Second time."), faults=(no,)))
    machine.submit(lifecycle={"retries": 2})
    status = machine.wait(seconds=90)
    assert status["state"] == "completed", machine.tell()
    assert machine.states() == STATES
    assert [(one["number"], (one["error"] or {}).get("code"), one["followed_by"]) for one in status["attempts"]] == [
        (1, "agent_failed", "retry"), (2, None, None),
    ]  # fmt: skip
    assert len({attempt["id"] for attempt in status["attempts"]}) == 2
    assert machine.artifact("task-1.patch").count(b"+line") == 1
    assert len(set(agents_begun(machine))) == 2
    told = [frame for frame in machine.frames() if frame["type"] == "attempt"]
    assert [(frame["attempt"], frame["resumes"]) for frame in told] == [(2, False)]
    assert json.loads(machine.artifact("metadata.json"))["attempts"][0]["error"]["code"] == "agent_failed"
    assert status["progress"]["input_tokens"] == 3000


def kill_runner(machine):
    os.kill(runner_pid(machine), signal.SIGKILL)


def kill_sandbox(machine):
    os.kill(first_process(machine), signal.SIGKILL)


def kill_server_and_runner(machine):
    """And with it the sandbox; the next server follows, resumes, and ends the task."""
    pid = runner_pid(machine)
    machine.server.stop(signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    machine.start_server()


@pytest.mark.parametrize(
    ("runtime", "strike"),
    [("bubblewrap", kill_server_and_runner), ("gvisor", kill_runner), ("bubblewrap", kill_sandbox)],
)
def test_an_agent_that_was_lost_goes_on_in_its_session(empty_world, world, runtime, strike):
    empty_world.runtime = runtime
    # Twice: Claude Code answers for the model once where the call that broke off had come to its session.
    going_on = bash("cat first.txt; echo second > second.txt")
    machine = world(bash("echo first > first.txt"), LONG, going_on, going_on, says("Both."))
    machine.submit(lifecycle={"resume": True})
    until(lambda: machine.status()["progress"]["tool_calls"] == 2, 60, "the second tool call")
    strike(machine)
    status = machine.wait(seconds=90)
    assert status["state"] == "completed", machine.tell()
    assert machine.states() == STATES
    lost = "sandbox_lost" if strike is kill_sandbox else "runner_lost"
    assert status["attempts"][0]["error"]["code"] == lost
    assert [(one["followed_by"], one["resumes"]) for one in status["attempts"]] == [("resume", False), (None, True)]
    patch = machine.artifact("task-1.patch")
    assert b"+first\n" in patch
    assert b"+second\n" in patch
    first, second = agents_begun(machine)
    assert first == second
    assert "first" in machine.tool_results()[-1]
    assert status["result"]["result"] == "Both."


def test_a_task_that_is_cancelled_between_attempts_ends_and_keeps_its_story(watched):
    machine = watched(msgspec.structs.replace(says(), faults=(Fault("error", status=403, times=99),)))
    machine.submit(lifecycle={"retries": 100})
    until(lambda: len(machine.status()["attempts"]) == 2, 60, "the second attempt")
    assert machine.status()["state"] == "running"
    answer = machine.http.delete("/api/v1/tasks/task-1?reason=enough")
    assert answer.status_code == 200, answer.text
    status = machine.wait()
    assert (status["state"], status["state_message"]) == ("cancelled", "Cancelled: enough")
    assert machine.states() == [*STATES[:-1], "cancelled"]
    assert {"metadata.json", "transcript.ndjson"} <= machine.artifact_names()
