"""Tasks survive server restarts, and are finalized when their runner is killed."""

import json
import os
import signal

import pytest

from doubles.deployment import bash_turn, reply_turn, wait_until
from doubles.leftovers import find_leftovers
from doubles.runner_processes import runner_pid

STATES = ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
COUNT_COMMAND = "for i in $(seq 1 30); do echo line-$i >> count.txt; sleep 0.1; done"
SLEEP_TURN = bash_turn("python3 -c 'import time; time.sleep(600)'")


def outputs(deployment):
    return "".join(event["data"] for event in deployment.wire_events() if event["type"] == "output")


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("without_command_fork_server")
def test_server_restarts_lose_no_task_output_or_queue_position(deploy):
    deployment = deploy(bash_turn(COUNT_COMMAND), bash_turn("wc -l < count.txt"), reply_turn("Counted."))
    for number in range(1, 4):
        deployment.submit(f"task-{number}", vm={"cpus": 16})
    wait_until(lambda: deployment.status()["progress"]["current_tool"] == "Bash", description="the tool call")
    assert deployment.status("task-2")["state"] == "pending"
    assert "behind" in deployment.status("task-3")["state_message"]
    # While the model is paused, the task cannot complete.
    deployment.model.send_signal(signal.SIGSTOP)
    deployment.server.stop(signal.SIGKILL)
    deployment.start_server()
    assert deployment.status()["state"] == "running"
    check_shutdown_with_an_open_stream(deployment)
    deployment.model.send_signal(signal.SIGCONT)
    wait_until(lambda: runner_pid(deployment) is None, 30, "the runner to end by itself")
    deployment.start_server()
    check_task_is_complete(deployment)
    statuses = [deployment.wait(f"task-{number}", 90) for number in range(1, 4)]
    assert [status["state"] for status in statuses] == ["completed"] * 3, [status["error"] for status in statuses]
    start_times = [status["started_at"] for status in statuses]
    assert start_times == sorted(start_times)


def check_shutdown_with_an_open_stream(deployment):
    with deployment.http.stream("GET", "/api/v1/tasks/task-1/logs?follow=true") as follower:
        lines = follower.iter_lines()
        next(lines)
        assert deployment.server.stop(signal.SIGTERM) < 2.0
    log = (deployment.directory / "server.log").read_text()
    assert "Stopped. 3 unfinished tasks outlive the server; running tasks continue" in log


def check_task_is_complete(deployment):
    """Check that the task has the output of exactly one agent, although three servers have followed it."""
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    assert deployment.states() == STATES
    assert deployment.tool_results()[1].strip() == "30"
    assert outputs(deployment).encode() == deployment.artifact("transcript.ndjson")
    events = [json.loads(line) for line in deployment.artifact("transcript.ndjson").splitlines()]
    assert sum(event["type"] == "system" and event.get("subtype") == "init" for event in events) == 1
    assert sum(event["type"] == "result" for event in events) == 1
    seqs = [event["seq"] for event in deployment.wire_events()]
    assert seqs == sorted(set(seqs))


def test_killed_runner_fails_its_task_and_sandbox_is_removed(deploy):
    deployment = deploy(bash_turn("echo line-1 > first.txt"), SLEEP_TURN, reply_turn())
    deployment.submit()
    wait_until(lambda: deployment.status()["progress"]["tool_calls"] == 2, 60, "the second tool call")
    assert {"processes", "sockets", "files"} <= find_leftovers(deployment.data_dir).keys()
    os.kill(runner_pid(deployment), signal.SIGKILL)
    status = deployment.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "runner_lost")
    assert deployment.states()[-2:] == ["completing", "failed"]
    assert b"+line-1\n" in deployment.artifact("task-1.patch")
    wait_until(lambda: not find_leftovers(deployment.data_dir), 5, "the removal of the sandbox")
