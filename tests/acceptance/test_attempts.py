"""A failed attempt is followed by another where it may be: made again, retried, or resumed."""

import json
import os
import signal
import time

import msgspec
import pytest

from chaos import processes
from doubles.live import bash, says, until
from doubles.runners import first_process, records, runner_pid
from sandbox.demo.model_script import Fault

STATES = ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
LONG = bash("python3 -c 'import time; time.sleep(600)'")
TRIES = 6
STEP_SECONDS = 30.0


def kill_after(machine, fact, task_id):
    """Kill the task's runner right after it has written this fact down; whether that was before its agent began.

    The runner has no instant that is not watched: it goes on for two milliseconds at a time.
    """
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


@pytest.mark.parametrize("fact", ["attempt_started", "workspace_prepared", "sandbox_created"])
def test_a_runner_killed_before_the_agent_begins_costs_nothing(world, fact):
    machine = world(bash("echo once >> once.txt"), says())
    for number in range(TRIES):
        task_id = machine.submit(f"task-{number}")
        was_early = kill_after(machine, fact, task_id)
        status = machine.wait(task_id)
        if was_early:
            break
    assert was_early, f"the agent was always faster than the test, {TRIES} times"
    assert status["state"] == "completed", machine.tell(task_id)
    assert machine.states(task_id) == STATES
    assert [attempt["followed_by"] for attempt in status["attempts"]] == ["again", None]
    assert status["attempts"][0]["error"]["code"] == "runner_lost"
    assert len(agents_begun(machine, task_id)) == 1
    assert machine.artifact(f"{task_id}.patch", task_id).count(b"+once") == 1


def test_an_agent_that_fails_twice_is_run_three_times_from_a_fresh_workspace(watched):
    no = Fault("error", status=403, message="Not today.", times=2)
    machine = watched(bash("echo line >> lines.txt"), msgspec.structs.replace(says("Third time."), faults=(no,)))
    machine.submit(lifecycle={"retries": 2})
    status = machine.wait(seconds=90)
    assert status["state"] == "completed", machine.tell()
    assert machine.states() == STATES
    assert [(one["number"], (one["error"] or {}).get("code"), one["followed_by"]) for one in status["attempts"]] == [
        (1, "agent_failed", "retry"), (2, "agent_failed", "retry"), (3, None, None),
    ]  # fmt: skip
    assert len({attempt["id"] for attempt in status["attempts"]}) == 3
    assert machine.artifact("task-1.patch").count(b"+line") == 1
    assert len(set(agents_begun(machine))) == 3
    told = [frame for frame in machine.frames() if frame["type"] == "attempt"]
    assert [(frame["attempt"], frame["resumes"]) for frame in told] == [(2, False), (3, False)]
    assert json.loads(machine.artifact("metadata.json"))["attempts"][0]["error"]["code"] == "agent_failed"
    assert status["progress"]["input_tokens"] == 4000


def test_without_retries_an_agent_that_failed_is_not_run_again(world):
    machine = world(msgspec.structs.replace(says(), faults=(Fault("error", status=403, times=9),)))
    machine.submit()
    status = machine.wait()
    assert (status["state"], status["error"]["code"], len(status["attempts"])) == ("failed", "agent_failed", 1)


@pytest.mark.parametrize(
    ("runtime", "victim"), [("bubblewrap", runner_pid), ("gvisor", runner_pid), ("bubblewrap", first_process)]
)
def test_an_agent_that_was_lost_goes_on_in_its_session(empty_world, world, runtime, victim):
    empty_world.runtime = runtime
    # Twice: Claude Code answers for the model once where the call that broke off had come to its session.
    going_on = bash("cat first.txt; echo second > second.txt")
    machine = world(bash("echo first > first.txt"), LONG, going_on, going_on, says("Both."))
    machine.submit(lifecycle={"resume": True})
    until(lambda: machine.status()["progress"]["tool_calls"] == 2, what="the second tool call")
    os.kill(victim(machine), signal.SIGKILL)
    status = machine.wait(seconds=90)
    assert status["state"] == "completed", machine.tell()
    assert machine.states() == STATES
    lost = "runner_lost" if victim is runner_pid else "sandbox_lost"
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
    until(lambda: len(machine.status()["attempts"]) == 3, 60, "the third attempt")
    assert machine.status()["state"] == "running"
    answer = machine.http.delete("/api/v1/tasks/task-1?reason=enough")
    assert answer.status_code == 200, answer.text
    status = machine.wait()
    assert (status["state"], status["state_message"]) == ("cancelled", "Cancelled: enough")
    assert machine.states() == [*STATES[:-1], "cancelled"]
    assert {"metadata.json", "transcript.ndjson"} <= machine.artifact_names()


def test_the_end_of_everything_at_once_is_gone_on_from(world):
    """Server, runner and with it the sandbox are killed; the next server follows, resumes, and ends the task."""
    machine = world(bash("echo first > first.txt"), LONG, says("a"), says("b"))
    machine.submit(lifecycle={"resume": True})
    until(lambda: machine.status()["progress"]["tool_calls"] == 2, what="the second tool call")
    pid = runner_pid(machine)
    machine.server.stop(signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    machine.start_server()
    status = machine.wait(seconds=90)
    assert (status["state"], len(status["attempts"])) == ("completed", 2), machine.tell()
    assert b"+first\n" in machine.artifact("task-1.patch")
