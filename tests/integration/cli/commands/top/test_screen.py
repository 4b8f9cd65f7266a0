"""`sandbox top` on a terminal, and where there is none."""

import json
import termios

import pytest

from doubles.recorded_api import of_error, of_frames, of_json
from doubles.recorded_task import TASK, frames, status

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
def busy(api):
    """One task works, one has ended."""
    api.on("GET", "/health", of_json(HEALTH))
    tasks = {"running": [status("running")], "completed": [status("completed", "done-1", name="Earlier")]}

    def page(asked):
        found = tasks["running" if "running" in asked.query["state"][0] else "completed"]
        return of_json({"tasks": found, "total_count": len(found), "next_cursor": None})

    api.on("GET", "/tasks", page)
    for task_id in (TASK, "done-1"):
        api.on("GET", f"/tasks/{task_id}", of_json(status("completed", task_id)))
        api.on("GET", f"/tasks/{task_id}/logs", of_frames(frames(task_id)))
    return api


def test_keys_choose_a_task_watch_it_come_back_and_leave(busy, on_terminal, terminal):
    terminal.resize(80, 24)
    before = termios.tcgetattr(terminal.theirs)
    process = on_terminal("top", "--no-color")
    terminal.read_until("▸ fix-42".encode())
    terminal.type(b"\x1b[B")
    terminal.read_until("▸ done-1".encode())
    terminal.type(b"\r")
    terminal.read_until(b"enter goes back")
    assert b"All 128 tests pass." in terminal.seen
    terminal.seen = b""
    terminal.type(b"\n")
    terminal.read_until("▸ done-1".encode())
    terminal.type(b"q")
    last = terminal.read_to_end(process)
    assert process.returncode == 0
    assert b"\x1b[?1049l" in last  # the shell's own screen is back, and so are its manners
    assert termios.tcgetattr(terminal.theirs) == before


def test_interrupting_it_is_another_way_to_leave(busy, on_terminal, terminal):
    process = on_terminal("top", "--no-color")
    terminal.read_until("▸ fix-42".encode())
    process.send_signal(2)
    terminal.read_to_end(process)
    assert process.returncode == 130
    assert b"Traceback" not in terminal.seen


def test_a_server_that_goes_away_is_asked_again_while_the_last_figures_stay(busy, on_terminal, terminal):
    terminal.resize(140, 24)
    process = on_terminal("top", "--no-color")
    terminal.read_until("▸ fix-42".encode())
    busy.on("GET", "/health", of_error(503, "service_unavailable", "It restarts."))
    terminal.read_until(b"It restarts. Asking again.")
    terminal.seen = b""
    busy.on("GET", "/health", of_json({**HEALTH, "version": "1.2.4"}))
    terminal.read_until(b"Sandbox 1.2.4")
    terminal.type(b"q")
    terminal.read_to_end(process)
    assert process.returncode == 0


def test_off_a_terminal_it_is_one_table(busy, sandbox):
    result = sandbox("top")
    assert (result.returncode, result.stderr) == (0, b"")
    heading, first, second = result.stdout.decode().splitlines()
    assert heading.split()[:3] == ["ID", "STATE", "AGE"]
    assert first.split()[:2] == ["fix-42", "running"]
    assert second.split()[:2] == ["done-1", "completed"]


def test_for_programs_it_is_one_object(busy, sandbox):
    told = json.loads(sandbox("top", "-f", "json").stdout)
    assert (told["health"]["version"], [task["id"] for task in told["tasks"]]) == ("1.2.3", ["fix-42", "done-1"])


def test_without_a_server_it_says_how_to_start_one(sandbox):
    result = sandbox("top", "--server", "http://127.0.0.1:9")
    assert (result.returncode, b"sandbox serve" in result.stderr) == (6, True)
