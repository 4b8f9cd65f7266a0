"""`sandbox top` with and without a terminal."""

import json
import termios

import pytest

from doubles.fake_api import error_response, json_response, sse_response
from doubles.sample_task import TASK_ID, task_events, task_status

HEALTH = {
    "status": "ok",
    "ready": True,
    "reasons": [],
    "version": "1.2.3",
    "uptime_seconds": 7265.0,
    "tasks": {"running": 1, "completed": 1},
    "disk": {"free_bytes": 3 * 1024**3},
}


@pytest.fixture
def api_with_tasks(api):
    """A server with a running and a completed task."""
    api.on("GET", "/health", json_response(HEALTH))
    tasks = {"running": [task_status("running")], "completed": [task_status("completed", "done-1", name="Earlier")]}

    def page(request):
        matching = tasks["running" if "running" in request.query["state"][0] else "completed"]
        return json_response({"tasks": matching, "total_count": len(matching), "next_cursor": None})

    api.on("GET", "/tasks", page)
    for task_id in (TASK_ID, "done-1"):
        api.on("GET", f"/tasks/{task_id}", json_response(task_status("completed", task_id)))
        api.on("GET", f"/tasks/{task_id}/logs", sse_response(task_events(task_id)))
    return api


def test_keys_select_watch_return_and_quit(api_with_tasks, on_terminal, terminal):
    terminal.resize(80, 24)
    before = termios.tcgetattr(terminal.child_fd)
    process = on_terminal("top", "--no-color")
    terminal.read_until("▸ fix-42".encode())
    terminal.type(b"\x1b[B")
    terminal.read_until("▸ done-1".encode())
    terminal.type(b"\r")
    terminal.read_until(b"Press enter to return")
    assert b"All 128 tests pass." in terminal.output
    terminal.output = b""
    terminal.type(b"\n")
    terminal.read_until("▸ done-1".encode())
    terminal.type(b"q")
    last = terminal.read_to_end(process)
    assert process.returncode == 0
    assert b"\x1b[?1049l" in last  # leaves the alternate screen and restores the terminal attributes
    assert termios.tcgetattr(terminal.child_fd) == before


def test_interrupt_exits_with_130(api_with_tasks, on_terminal, terminal):
    process = on_terminal("top", "--no-color")
    terminal.read_until("▸ fix-42".encode())
    process.send_signal(2)
    terminal.read_to_end(process)
    assert process.returncode == 130
    assert b"Traceback" not in terminal.output


def test_unavailable_server_is_polled_again(api_with_tasks, on_terminal, terminal):
    terminal.resize(140, 24)
    process = on_terminal("top", "--no-color")
    terminal.read_until("▸ fix-42".encode())
    api_with_tasks.on("GET", "/health", error_response(503, "service_unavailable", "Restarting."))
    terminal.read_until(b"Restarting. Retrying.")
    terminal.output = b""
    api_with_tasks.on("GET", "/health", json_response({**HEALTH, "version": "1.2.4"}))
    terminal.read_until(b"Sandbox 1.2.4")
    terminal.type(b"q")
    terminal.read_to_end(process)
    assert process.returncode == 0


def test_top_without_a_terminal_prints_one_table(api_with_tasks, run_cli):
    result = run_cli("top")
    assert (result.returncode, result.stderr) == (0, b"")
    heading, first, second = result.stdout.decode().splitlines()
    assert heading.split()[:3] == ["ID", "STATE", "AGE"]
    assert first.split()[:2] == ["fix-42", "running"]
    assert second.split()[:2] == ["done-1", "completed"]


def test_json_top_prints_one_object(api_with_tasks, run_cli):
    document = json.loads(run_cli("top", "-f", "json").stdout)
    assert (document["health"]["version"], [task["id"] for task in document["tasks"]]) == (
        "1.2.3",
        ["fix-42", "done-1"],
    )


def test_unreachable_server_error_suggests_serve(run_cli):
    result = run_cli("top", "--server", "http://127.0.0.1:9")
    assert (result.returncode, b"sandbox serve" in result.stderr) == (6, True)
