"""`sandbox task attach` and `sandbox task shell` wait for a task that has not started yet."""

import shlex
import signal

import pytest

from doubles.fake_api import error_response, json_response
from doubles.sample_task import TASK_ID, task_status

INTERACTIVE = {"claude": {"prompt": "Fix it.", "headless": False}}
HEADLESS = {"claude": {"prompt": "Fix it.", "headless": True}}


def waiting(state, message, definition=None):
    return json_response(task_status(state, state_message=message, definition=definition or INTERACTIVE))


@pytest.mark.parametrize(("command", "target"), [("attach", "the agent starts"), ("shell", "the sandbox is running")])
def test_command_waits_until_the_task_has_started_or_ended(api, on_terminal, terminal, command, target):
    cloning = waiting("staging", "Cloning https://example.org/x.git")
    failed = waiting("failed", "")
    api.on("GET", f"/tasks/{TASK_ID}", waiting("pending", "Waiting for memory"), cloning, cloning, failed)
    api.on("GET", f"/tasks/{TASK_ID}/terminal", error_response(409, "no_terminal", "Its sandbox was removed."))
    process = on_terminal("task", command, TASK_ID)
    output = terminal.read_to_end(process).decode().replace("\r", "")
    assert output.splitlines() == [
        f"Waiting until {target}. Press ^C to stop waiting.",
        "  pending       Waiting for memory",
        "  staging       Cloning https://example.org/x.git",
        "Error: Its sandbox was removed.",
        f"  Output:  sandbox task logs {TASK_ID}",
        f"  Changes: sandbox task diff {TASK_ID}",
    ]
    assert process.returncode == 4


def test_terminal_is_requested_again_until_the_sandbox_accepts_it(api, on_terminal, terminal):
    api.on("GET", f"/tasks/{TASK_ID}", waiting("running", "Claude Code is working"))
    refused = error_response(409, "no_terminal", "The task's sandbox is not running.")
    unreachable = error_response(503, "service_unavailable", "The runner is not responding; try again.")
    unauthorized = error_response(403, "forbidden", "Only operators open terminals.")
    api.on("GET", f"/tasks/{TASK_ID}/terminal", refused, unreachable, unauthorized)
    process = on_terminal("task", "attach", TASK_ID)
    output = terminal.read_to_end(process)
    assert (process.returncode, output.count(b"Error"), b"Only operators" in output) == (5, 1, True)


def test_interrupted_wait_leaves_the_task_alone(api, on_terminal, terminal):
    api.on("GET", f"/tasks/{TASK_ID}", waiting("pending", "Waiting for memory"))
    process = on_terminal("task", "attach", TASK_ID)
    terminal.read_until(b"Waiting for memory")
    process.send_signal(signal.SIGINT)
    output = terminal.read_to_end(process).decode().replace("\r", "")
    assert (process.returncode, output.splitlines()[-3:]) == (
        130,
        [
            f"Stopped waiting. Task {TASK_ID} continues.",
            f"  Wait again: sandbox task attach {TASK_ID}",
            f"  Cancel it:  sandbox task cancel {TASK_ID}",
        ],
    )
    assert {request.method for request in api.requests} == {"GET"}


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("state", ["pending", "running", "completed"])
def test_headless_agent_error_suggests_a_rerun_with_a_terminal(api, on_terminal, terminal, run_cli, state, resumes):
    definition = {**HEADLESS, "lifecycle": {"resume": True}} if resumes else HEADLESS
    api.on("GET", f"/tasks/{TASK_ID}", waiting(state, "Waiting", definition))
    process = on_terminal("task", "attach", TASK_ID)
    output = terminal.read_to_end(process).decode().replace("\r", "")
    assert process.returncode == 4
    error, remedy, *_ = output.splitlines()
    assert error == f"Error: The agent of task {TASK_ID} has no terminal, because headless is true."
    label, _, command = remedy.partition(": ")
    also = " --set lifecycle.resume=false" if resumes else ""
    assert label == "  Run it again with a terminal"
    assert command == f"sandbox task rerun {TASK_ID} --set claude.headless=false{also}"
    api.on("POST", f"/tasks/{TASK_ID}/rerun", json_response({"task_id": "new", "state": "pending"}, 202))
    assert run_cli(*shlex.split(command)[1:]).returncode == 0
