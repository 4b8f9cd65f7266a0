"""A forked command behaves like the same command in a new process."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from doubles.fake_api import ApiResponse, json_response, sse_response
from doubles.forked_commands import ForkedCommand
from doubles.sample_task import TASK_ID, task_events, task_status

NEW_PROCESS = (sys.executable, "-c", "from sandbox.cli.main import main; main()")


@pytest.fixture
def start_both(environment, tmp_path):
    """Start `sandbox …` as a new process, then as a fork."""

    def start(*arguments, **streams):
        keywords = {"env": environment, "cwd": tmp_path, **streams}
        for start_process, argv in ((subprocess.Popen, [*NEW_PROCESS, *arguments]), (ForkedCommand, arguments)):
            with start_process(argv, **keywords) as process:
                yield process
                process.kill()

    return start


def outcomes(processes, stdin=None):
    """Return stdout, stderr and the exit code of each process."""
    return [(*process.communicate(stdin, 60), process.returncode) for process in processes]


@pytest.mark.parametrize("command", ["task list", "task validate -", "token revoke me", "admin check", "no"])
def test_fork_has_the_same_output_and_exit_code_as_a_new_process(api, start_both, command):
    api.on("GET", "/tasks", json_response({"tasks": [task_status("running")], "total_count": 1, "next_cursor": None}))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    new, forked = outcomes(start_both(*command.split(), **streams), b"version: '1'\nkind: Tsk\n")
    assert new == forked
    assert b"Traceback" not in new[1]


def test_fork_detects_a_terminal(api, start_both, terminal):
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("failed")))
    outputs = []
    for process in start_both(
        "task", "status", TASK_ID, **dict.fromkeys(("stdin", "stdout", "stderr"), terminal.child_fd)
    ):
        outputs.append(terminal.read_to_end(process))
        assert process.returncode == 0
    assert outputs[0] == outputs[1]
    assert b"\x1b[1;31mfailed" in outputs[0]


@pytest.mark.parametrize("command", ["task list", "--help"])
def test_fork_has_the_same_exit_code_as_a_new_process_if_output_is_unwritable(api, start_both, command):
    api.on("GET", "/tasks", json_response({"tasks": [task_status("running")], "total_count": 1, "next_cursor": None}))
    with Path("/dev/full").open("w") as full:
        (_, errors, code), forked = outcomes(start_both(*command.split(), stdout=full, stderr=subprocess.PIPE))
    assert code in {10, 120}
    assert forked[2] == code
    assert forked[1].splitlines()[-1] == errors.splitlines()[-1]


def test_fork_has_the_same_exit_codes_as_a_new_process_after_closed_pipe_and_interrupt(api, start_both):
    done = threading.Event()

    def endless_events():
        yield from sse_response(task_events()[:5]).chunks
        done.wait(60)

    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("running")))
    lines = [b"[t] [STDOUT] x\n" * 100_000]
    api.on(
        "GET",
        f"/tasks/{TASK_ID}/logs",
        lambda request: ApiResponse(200, endless_events() if "follow" in request.query else lines),
    )
    pipes, results = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}, []
    for process in start_both("task", "logs", TASK_ID, **pipes):
        process.stdout.readline()
        process.stdout.close()
        results.append((process.wait(30), process.stderr.read()))
    for process in start_both("task", "logs", TASK_ID, "--follow", **pipes):
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        results.append((process.wait(30), process.stderr.read()))
    done.set()
    assert [code for code, _ in results] == [141, 141, 130, 130]
    assert (results[0], results[2]) == (results[1], results[3])


IMPORT_EACH_COMMAND = """
import os, sys
from importlib import import_module
from sandbox.cli import main

for target in [entry[0] for entries in (main.ROOT_ENTRIES, main.TASK_ENTRIES) for entry in entries.values()]:
    if os.fork() == 0:
        import_module(target.partition(":")[0])
        os._exit(0)
    print(target, os.wait()[1])
"""


def test_each_command_module_can_be_imported_alone(environment):
    imported = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH_COMMAND], env=environment, capture_output=True, timeout=60, check=True
    )
    assert imported.stderr == b""
    lines = imported.stdout.decode().splitlines()
    assert len(lines) > 25
    assert [line for line in lines if not line.endswith(" 0")] == []
