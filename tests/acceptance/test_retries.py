"""A failed attempt is followed by another one (`again`, `retry` or `resume`) if another one is allowed."""

import json
import os
import signal
import time

import msgspec
import pytest

from chaos import processes
from doubles.deployment import bash_turn, reply_turn, wait_until
from doubles.runner_processes import first_process, read_journal, runner_pid
from sandbox.demo.scripted_model import Fault

STATES = ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
SLEEP_TURN = bash_turn("python3 -c 'import time; time.sleep(600)'")
TRIES = 6
STEP_SECONDS = 30.0


def kill_after(deployment, event_type, task_id, number):
    """Kill the runner right after it has recorded the event; return whether the agent had not started.

    The runner is resumed for only two milliseconds at a time, so that the kill follows soon after the event.
    """
    if number > 1:
        description = f"attempt {number}"
        wait_until(
            lambda: read_journal(deployment, task_id).count('"attempt_started"') == number,
            STEP_SECONDS,
            description,
            pause_max=0.02,
        )
    pid = wait_until(lambda: runner_pid(deployment, task_id), description="the runner")
    deadline = time.monotonic() + STEP_SECONDS
    is_alive = processes.stop(pid)
    while is_alive and event_type not in read_journal(deployment, task_id):
        assert time.monotonic() < deadline, f"waited {STEP_SECONDS} s for {event_type}"
        is_alive = processes.run_briefly(pid)
    os.kill(pid, signal.SIGKILL)
    return "agent_started" not in read_journal(deployment, task_id)


def agent_session_ids(deployment, task_id="task-1"):
    events = [json.loads(line) for line in deployment.artifact("transcript.ndjson", task_id).splitlines()]
    return [event["session_id"] for event in events if event.get("subtype") == "init"]


@pytest.mark.parametrize("event_types", [("attempt_started", "workspace_prepared"), ("sandbox_created",)])
def test_task_is_attempted_again_if_the_runner_is_killed_before_agent_start(deploy, event_types):
    deployment = deploy(bash_turn("echo once >> once.txt"), reply_turn())
    for number in range(TRIES):
        task_id = deployment.submit(f"task-{number}")
        is_before_agent_start = all(
            kill_after(deployment, event_type, task_id, number) for number, event_type in enumerate(event_types, 1)
        )
        status = deployment.wait(task_id)
        if is_before_agent_start:
            break
    assert is_before_agent_start, f"the agent started before the kill in all {TRIES} tries"
    assert status["state"] == "completed", deployment.diagnostics(task_id)
    assert deployment.states(task_id) == STATES
    assert [attempt["followed_by"] for attempt in status["attempts"]] == ["again" for _ in event_types] + [None]
    assert {attempt["error"]["code"] for attempt in status["attempts"][:-1]} == {"runner_lost"}
    assert len(agent_session_ids(deployment, task_id)) == 1
    assert deployment.artifact(f"{task_id}.patch", task_id).count(b"+once") == 1


def test_failed_agent_is_retried_in_a_fresh_workspace(deploy_and_check_leftovers):
    failure = Fault("error", status=403, message="Not today.", times=1)
    deployment = deploy_and_check_leftovers(
        bash_turn("echo line >> lines.txt"), msgspec.structs.replace(reply_turn("Second time."), faults=(failure,))
    )
    deployment.submit(lifecycle={"retries": 2})
    status = deployment.wait(seconds=90)
    assert status["state"] == "completed", deployment.diagnostics()
    assert deployment.states() == STATES
    attempts = [(each["number"], (each["error"] or {}).get("code"), each["followed_by"]) for each in status["attempts"]]
    assert attempts == [(1, "agent_failed", "retry"), (2, None, None)]
    assert len({attempt["id"] for attempt in status["attempts"]}) == 2
    assert deployment.artifact("task-1.patch").count(b"+line") == 1
    assert len(set(agent_session_ids(deployment))) == 2
    attempt_events = [event for event in deployment.wire_events() if event["type"] == "attempt"]
    assert [(event["attempt"], event["resumes"]) for event in attempt_events] == [(2, False)]
    assert json.loads(deployment.artifact("metadata.json"))["attempts"][0]["error"]["code"] == "agent_failed"
    assert status["progress"]["input_tokens"] == 3000


def kill_runner(deployment):
    os.kill(runner_pid(deployment), signal.SIGKILL)


def kill_sandbox(deployment):
    os.kill(first_process(deployment), signal.SIGKILL)


def kill_server_and_runner(deployment):
    """Kill the server and the runner, whose sandbox then ends; the next server resumes the task."""
    pid = runner_pid(deployment)
    deployment.server.stop(signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    deployment.start_server()


@pytest.mark.parametrize(
    ("runtime", "kill"),
    [("bubblewrap", kill_server_and_runner), ("gvisor", kill_runner), ("bubblewrap", kill_sandbox)],
)
def test_lost_agent_resumes_its_session(deployment, deploy, runtime, kill):
    deployment.runtime = runtime
    # There are two turns, because Claude Code adds a response itself if the session already contains the interrupted
    # tool call. That response counts as the first turn.
    resumed = bash_turn("cat first.txt; echo second > second.txt")
    deployment = deploy(bash_turn("echo first > first.txt"), SLEEP_TURN, resumed, resumed, reply_turn("Both."))
    deployment.submit(lifecycle={"resume": True})
    wait_until(lambda: deployment.status()["progress"]["tool_calls"] == 2, 60, "the second tool call")
    kill(deployment)
    status = deployment.wait(seconds=90)
    assert status["state"] == "completed", deployment.diagnostics()
    assert deployment.states() == STATES
    code = "sandbox_lost" if kill is kill_sandbox else "runner_lost"
    assert status["attempts"][0]["error"]["code"] == code
    assert [(each["followed_by"], each["resumes"]) for each in status["attempts"]] == [("resume", False), (None, True)]
    patch = deployment.artifact("task-1.patch")
    assert b"+first\n" in patch
    assert b"+second\n" in patch
    first, second = agent_session_ids(deployment)
    assert first == second
    assert "first" in deployment.tool_results()[-1]
    assert status["result"]["result"] == "Both."


def test_task_cancelled_between_attempts_keeps_its_history(deploy_and_check_leftovers):
    deployment = deploy_and_check_leftovers(
        msgspec.structs.replace(reply_turn(), faults=(Fault("error", status=403, times=99),))
    )
    deployment.submit(lifecycle={"retries": 100})
    wait_until(lambda: len(deployment.status()["attempts"]) == 2, 60, "the second attempt")
    assert deployment.status()["state"] == "running"
    response = deployment.http.delete("/api/v1/tasks/task-1?reason=enough")
    assert response.status_code == 200, response.text
    status = deployment.wait()
    assert (status["state"], status["state_message"]) == ("cancelled", "Cancelled: enough")
    assert deployment.states() == [*STATES[:-1], "cancelled"]
    assert {"metadata.json", "transcript.ndjson"} <= deployment.artifact_names()
