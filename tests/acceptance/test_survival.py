"""Tasks outlive the server, and end well when their runner does not."""

import json
import os
import signal

from doubles.live import bash, says, until
from doubles.runners import runner_pid
from doubles.traces import left_behind

COUNTING = "for i in $(seq 1 {n}); do echo line-$i >> count.txt; python3 -c 'import time; time.sleep(0.1)'; done"


def outputs(machine):
    return "".join(frame["data"] for frame in machine.frames() if frame["type"] == "output")


def test_kill_of_the_server_costs_no_task_and_no_line(world):
    machine = world(bash(COUNTING.format(n=30)), bash("wc -l < count.txt"), says("Counted."))
    machine.submit()
    until(lambda: machine.status()["progress"]["current_tool"] == "Bash", what="the tool call")
    machine.server.stop(signal.SIGKILL)
    machine.start_server()
    status = machine.wait()
    assert status["state"] == "completed", machine.tell()
    assert machine.states() == ["pending", "staging", "provisioning", "ready", "running", "completing", "completed"]
    assert machine.tool_results()[1].strip() == "30"
    assert outputs(machine).encode() == machine.artifact("transcript.ndjson")
    events = [json.loads(line) for line in machine.artifact("transcript.ndjson").splitlines()]
    assert sum(event["type"] == "system" and event.get("subtype") == "init" for event in events) == 1
    assert sum(event["type"] == "result" for event in events) == 1
    seqs = [frame["seq"] for frame in machine.frames()]
    assert seqs == sorted(set(seqs))


def test_a_task_that_ends_while_no_server_runs_is_found_ended(world):
    machine = world(bash(COUNTING.format(n=10)), says())
    machine.submit()
    machine.until_state("running")
    machine.server.stop(signal.SIGKILL)
    until(lambda: runner_pid(machine) is None, 30, "the runner to end by itself")
    machine.start_server()
    assert machine.wait()["state"] == "completed"


def test_sigterm_stops_the_server_within_two_seconds_while_followers_listen(world):
    machine = world(bash(COUNTING.format(n=40)), says())
    machine.submit()
    machine.until_state("running")
    with machine.http.stream("GET", "/api/v1/tasks/task-1/logs?follow=true") as follower:
        lines = follower.iter_lines()
        next(lines)
        assert machine.server.stop(signal.SIGTERM) < 2.0
    told = (machine.directory / "server.log").read_text()
    assert "Stopped. 1 unfinished task outlives the server; what runs goes on" in told
    machine.start_server()
    assert machine.wait()["state"] == "completed"


def test_the_death_of_a_runner_ends_its_task_and_everything_inside(world):
    machine = world(bash("echo line-1 > first.txt"), bash(COUNTING.format(n=300)), says())
    machine.submit()
    until(lambda: machine.status()["progress"]["tool_calls"] == 2, what="the second tool call")
    assert {"processes", "sockets", "files"} <= left_behind(machine.data_dir).keys()
    os.kill(runner_pid(machine), signal.SIGKILL)
    status = machine.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "runner_lost")
    assert machine.states()[-2:] == ["completing", "failed"]
    assert b"+line-1\n" in machine.artifact("task-1.patch")
    until(lambda: not left_behind(machine.data_dir), 5, "the sandbox to be gone without a trace")


def test_a_runner_and_a_server_that_die_together_lose_nothing_that_was_written(world):
    machine = world(bash("echo line-1 > first.txt"), bash(COUNTING.format(n=300)), says())
    machine.submit()
    until(lambda: machine.status()["progress"]["tool_calls"] == 2, what="the second tool call")
    pid = runner_pid(machine)
    machine.server.stop(signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    machine.start_server()
    status = machine.wait()
    assert (status["state"], status["error"]["code"]) == ("failed", "runner_lost")
    assert b"+line-1\n" in machine.artifact("task-1.patch")


def test_waiting_tasks_start_after_a_restart_in_their_order(world):
    machine = world(bash(COUNTING.format(n=15)), says())
    for number in range(1, 5):
        machine.submit(f"task-{number}", vm={"cpus": 16})
    assert machine.status("task-3")["state"] == "pending"
    assert "behind" in machine.status("task-4")["state_message"]
    machine.server.stop(signal.SIGKILL)
    machine.start_server()
    ended = [machine.wait(f"task-{number}", 90) for number in range(1, 5)]
    assert [status["state"] for status in ended] == ["completed"] * 4, [status["error"] for status in ended]
    started = [status["started_at"] for status in ended]
    assert started == sorted(started)


def test_two_servers_never_share_a_data_directory(world):
    import pytest

    machine = world(says())
    first = machine.server
    with pytest.raises(AssertionError, match=str(first.pid)):
        machine.start_server()
    machine.server = first


def test_a_cleaned_run_directory_costs_no_task(world):
    import shutil

    from sandbox.wiring.machine import choose_run_dir

    machine = world(bash(COUNTING.format(n=100)), says())
    run_dir = choose_run_dir(machine.data_dir)
    shutil.rmtree(run_dir)
    machine.submit()
    machine.until_state("running")
    assert machine.http.delete("/api/v1/tasks/task-1?force=true").status_code == 200
    assert machine.wait()["state"] == "cancelled"
