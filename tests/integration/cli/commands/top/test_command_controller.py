"""`sandbox top` with and without a terminal."""

import fcntl
import json
import sys
import termios
import threading

import pytest

from doubles.deployment import wait_until
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


def test_keys_select_a_task_open_and_close_its_events_and_quit(api_with_tasks, on_terminal, terminal):
    terminal.resize(80, 24)
    before = termios.tcgetattr(terminal.child_fd)
    process = on_terminal("top", "--no-color")
    terminal.read_until("▸ fix-42".encode())
    terminal.type(b"\x1b[B")
    terminal.read_until("▸ done-1".encode())
    terminal.type(b"\r")
    terminal.read_until(b"Press enter to return")
    assert terminal.output.count(b"\x1b[?1049h") == terminal.output.count(b"\x1b[?1049l") + 1  # the alternate screen
    assert b"All 128 tests pass." in terminal.output
    terminal.output = b""
    terminal.type(b"\n")
    terminal.read_until("▸ done-1".encode())
    terminal.type(b"q")
    last = terminal.read_to_end(process)
    assert process.returncode == 0
    assert b"\x1b[?1049l" in last  # leaves the alternate screen and restores the terminal attributes
    assert termios.tcgetattr(terminal.child_fd) == before


def test_question_mark_shows_the_help(api_with_tasks, on_terminal, terminal):
    terminal.resize(80, 24)
    process = on_terminal("top", "--no-color")
    terminal.read_until("▸ fix-42".encode())
    terminal.type(b"?")
    terminal.read_until(b"Press any key to return.")
    terminal.output = b""
    terminal.type(b"q")  # closes only the help
    terminal.read_until("▸ fix-42".encode())
    terminal.type(b"q")
    terminal.read_to_end(process)
    assert process.returncode == 0


@pytest.mark.parametrize("key", [b"q", b"\x1b"])
def test_key_closes_the_events_of_a_running_task_and_is_not_echoed(api_with_tasks, on_terminal, terminal, key):
    released = threading.Event()

    def events():
        yield from task_events()[:5]
        released.wait(60)

    api_with_tasks.on("GET", f"/tasks/{TASK_ID}/logs", lambda request: sse_response(events()))
    terminal.resize(80, 24)
    before = termios.tcgetattr(terminal.child_fd)
    process = on_terminal("top", "--no-color")
    try:
        terminal.read_until("▸ fix-42".encode())
        terminal.type(b"\r")
        terminal.read_until(b"running           Claude Code is working")
        terminal.output = b""
        terminal.type(b"x\n\x1b[B" + b"zzz")  # no other key returns
        wait_until(lambda: pending_input(terminal) == 0)
        terminal.type(key)
        output = terminal.read_until("▸ fix-42".encode())
        assert b"zzz" not in output
        terminal.type(b"q")
        terminal.read_to_end(process)
    finally:
        released.set()
    assert process.returncode == 0
    assert b"Traceback" not in terminal.output
    assert termios.tcgetattr(terminal.child_fd) == before


def pending_input(terminal):
    """Return the number of bytes that were typed but not yet read."""
    count = bytearray(4)
    fcntl.ioctl(terminal.child_fd, termios.FIONREAD, count)
    return int.from_bytes(count, sys.byteorder)


def queries(api):
    return [request.query for request in api.requests_to("GET", "/tasks")]


def test_search_and_filter_are_sent_to_the_server(api_with_tasks, on_terminal, terminal):
    terminal.resize(80, 24)
    process = on_terminal("top", "--no-color")
    terminal.read_until("▸ fix-42".encode())
    terminal.type(b"/flakx\x7fy \xc3\xbcber\x1b[A")
    terminal.read_until("Search: flaky über▏".encode())
    assert all("q" not in query for query in queries(api_with_tasks))
    terminal.output = b""
    terminal.type(b"\r")
    terminal.read_until("Search: flaky über".encode())
    wait_until(lambda: queries(api_with_tasks)[-1].get("q") == ["flaky über"], description="the search")
    terminal.type(b"ff")
    terminal.read_until(b"Only pending tasks")
    wait_until(lambda: queries(api_with_tasks)[-1]["state"] == ["pending"], description="the filter")
    terminal.type(b"/\x15\r")
    wait_until(lambda: "q" not in queries(api_with_tasks)[-1], description="the search without words")
    terminal.type(b"/left open")
    terminal.read_until("left open▏".encode())
    terminal.type(b"\x1b")
    terminal.read_until(b"q quit")
    terminal.type(b"q")
    terminal.read_to_end(process)
    assert (process.returncode, "q" in queries(api_with_tasks)[-1]) == (0, False)


@pytest.mark.parametrize("answer", [b"y", b"n", b"\r", b"\x1b", b"q"])
def test_cancel_needs_confirmation(api_with_tasks, on_terminal, terminal, answer):
    body = {"success": True, "task_id": TASK_ID, "previous_state": "running", "new_state": "cancelled"}
    body |= {"message": "The task is being stopped.", "cancelled_at": "2026-01-29T10:10:33.000Z"}
    api_with_tasks.on("DELETE", f"/tasks/{TASK_ID}", json_response(body))
    terminal.resize(80, 24)
    process = on_terminal("top", "--no-color")
    terminal.read_until("▸ fix-42".encode())
    terminal.type(b"c")
    terminal.read_until(b"Cancel fix-42? y/n")
    assert not api_with_tasks.requests_to("DELETE", f"/tasks/{TASK_ID}")
    terminal.type(answer)
    terminal.read_until(b"is being stopped" if answer == b"y" else b"Nothing was cancelled")
    assert len(api_with_tasks.requests_to("DELETE", f"/tasks/{TASK_ID}")) == (answer == b"y")
    terminal.type(b"q")
    terminal.read_to_end(process)
    assert process.returncode == 0


def test_confirmation_applies_to_the_task_in_the_prompt(api_with_tasks, on_terminal, terminal):
    """The selected task ends while the prompt is open. The answer still applies to the task that the prompt names."""
    api_with_tasks.on("DELETE", f"/tasks/{TASK_ID}", error_response(409, "task_finished", "It has ended."))
    process = on_terminal("top", "--no-color")
    terminal.read_until("▸ fix-42".encode())
    terminal.type(b"c")
    terminal.read_until(b"Cancel fix-42? y/n")
    done = task_status("completed", "done-1")
    api_with_tasks.on("GET", "/tasks", json_response({"tasks": [done], "total_count": 1, "next_cursor": None}))
    terminal.read_until("▸ done-1".encode())
    terminal.type(b"y")
    terminal.read_until(b"It has ended.")
    terminal.type(b"c")
    terminal.read_until(b"The task has already ended.")
    deleted = [request.path for request in api_with_tasks.requests if request.method == "DELETE"]
    assert deleted == [f"/tasks/{TASK_ID}"]
    terminal.type(b"q")
    terminal.read_to_end(process)


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
