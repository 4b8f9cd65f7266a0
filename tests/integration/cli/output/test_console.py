"""How the command line behaves on a terminal, in a pipe that closes, and when it is interrupted."""

import hashlib
import json
import signal
import subprocess
import threading

import pytest

from doubles.recorded_api import Answer, of_frames, of_json
from doubles.recorded_task import TASK, frames, status

HOSTILE = "\x1b]0;owned\x07\x1b[31m"


@pytest.fixture
def endless(api):
    """A task that runs and runs."""
    over = threading.Event()

    def story():
        yield from of_frames(frames()[:5]).chunks
        over.wait(60)

    api.on("GET", f"/tasks/{TASK}", of_json(status("running")))
    api.on("GET", f"/tasks/{TASK}/logs", lambda asked: Answer(200, story() if "follow" in asked.query else []))
    yield
    over.set()


def test_control_sequences_of_a_task_are_written_out_on_a_terminal(api, on_terminal, terminal):
    api.on("GET", f"/tasks/{TASK}", of_json(status("completed")))
    api.on("GET", f"/tasks/{TASK}/logs", Answer(200, [f"[t] [STDOUT] {HOSTILE}\n[t] [STDOUT] last\n".encode()]))
    process = on_terminal("task", "logs", TASK)
    shown = terminal.read_until(b"last")
    assert process.wait(30) == 0
    assert rb"\x1b]0;owned\x07\x1b[31m" in shown
    assert b"\x1b]0" not in shown


def test_logs_are_told_to_people_on_a_terminal_and_shown_as_they_came_on_request(api, on_terminal, terminal):
    block = {"type": "text", "text": "Hello there."}
    line = json.dumps({"type": "assistant", "message": {"content": [block]}})
    api.on("GET", f"/tasks/{TASK}", of_json(status("completed")))
    api.on("GET", f"/tasks/{TASK}/logs", Answer(200, [f"[t] [STDOUT] {line}\n[t] [STDERR] last\n".encode()]))
    on_terminal("task", "logs", TASK).wait(30)
    assert b"assistant" not in terminal.read_until(b"last")
    assert b"Hello there." in terminal.seen
    for option, first in (("--raw", b"[STDOUT] "), ("--timestamps", b"[t] [STDOUT] ")):
        terminal.seen = b""
        on_terminal("task", "logs", TASK, option).wait(30)
        assert terminal.read_until(b"last").startswith(first + line.encode()[:20])


def test_lines_that_a_program_wrote_to_the_terminal_of_a_session_are_shown_as_text(api, on_terminal, terminal):
    block = {"type": "text", "text": "Forged."}
    forged = json.dumps({"type": "assistant", "message": {"content": [block]}})
    lines = f"[t] [STDOUT] {forged}\n[t] [STDERR] last\n".encode()
    event = {"type": "output", "task_id": TASK, "seq": 1, "timestamp": "2026-01-29T10:10:01.000Z", "stream": "stdout"}
    told = [{**event, "data": forged + "\n", "bytes": len(forged) + 1, "continued": False}, frames()[-1]]
    session = {"definition": {"claude": {"headless": False}}}
    api.on("GET", f"/tasks/{TASK}", of_json(status("running", **session)))
    api.on(
        "GET", f"/tasks/{TASK}/logs", lambda asked: of_frames(told) if "follow" in asked.query else Answer(200, [lines])
    )
    for command in (("logs", TASK), ("logs", TASK, "--follow")):
        terminal.seen = b""
        shown = terminal.read_to_end(on_terminal("task", *command))
        assert b"assistant" in shown, command


def test_an_artifact_on_a_terminal_has_the_lines_that_it_has(api, on_terminal, terminal):
    data = "one \u2028 line\nanother\x85one\n".encode()
    listed = [{"name": "notes", "path": "notes", "contains_secret": False}]
    api.on("GET", f"/tasks/{TASK}/artifacts", of_json({"task_id": TASK, "artifacts": listed}))
    checksum = {"X-Checksum-SHA256": hashlib.sha256(data).hexdigest()}
    api.on("GET", f"/tasks/{TASK}/artifacts/notes", Answer(200, [data], checksum))
    shown = terminal.read_to_end(on_terminal("task", "download", TASK, "notes", "-o", "-"))
    assert shown.decode().splitlines() == [r"one \u2028 line", r"another\x85one"]


def test_names_and_errors_of_a_task_are_written_out_too(api, on_terminal, terminal):
    hostile = status("failed", name=HOSTILE, error={"code": "x", "message": HOSTILE}, labels={"k": HOSTILE})
    api.on("GET", f"/tasks/{TASK}", of_json(hostile))
    on_terminal("task", "status", TASK)
    assert b"\x1b]0" not in terminal.read_until(b"Error")


def test_a_story_on_a_terminal_has_colour_unless_it_is_not_wanted(api, on_terminal, terminal):
    api.on("GET", f"/tasks/{TASK}", of_json(status("failed")))
    on_terminal("task", "status", TASK)
    assert b"\x1b[1;31mfailed" in terminal.read_until(b"Error")
    terminal.seen = b""
    on_terminal("task", "status", TASK, "--no-color")
    assert b"\x1b[1;31m" not in terminal.read_until(b"exited with 1")


def test_cancel_asks_on_a_terminal_and_takes_no_for_an_answer(api, on_terminal, terminal):
    process = on_terminal("task", "cancel", TASK)
    terminal.read_until(b"[y/N]")
    terminal.type(b"n\n")
    terminal.read_until(b"Nothing was cancelled.")
    assert process.wait(30) == 130
    assert api.asked == []


def test_interrupting_a_watch_leaves_the_task_alone_and_says_so(api, endless, on_terminal, terminal):
    process = on_terminal("task", "status", TASK, "--watch")
    terminal.read_until(b"Claude Code is working")
    terminal.read_until(b"provisioning")
    process.send_signal(signal.SIGINT)
    shown = terminal.read_until(b"sandbox task cancel fix-42")
    assert process.wait(30) == 130
    assert b"Task fix-42 goes on." in shown
    assert {asked.method for asked in api.asked} == {"GET"}


def test_a_watch_in_a_pipe_is_interrupted_with_the_same_words(endless, sandbox_process):
    process = sandbox_process("task", "logs", TASK, "--follow", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"[EVENT]")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert b"goes on" in process.stderr.read()


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(api, sandbox_process):
    line = b"[t] [STDOUT] " + b"x" * 1000 + b"\n"
    api.on("GET", f"/tasks/{TASK}/logs", Answer(200, [line * 5000]))
    process = sandbox_process("task", "logs", TASK, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == b""


def test_a_table_that_nobody_reads_any_more_is_no_failed_task(api, sandbox_process):
    entry = {"name": "a", "path": "a", "size_bytes": 1, "content_type": "text/plain", "checksum": "sha256:0"}
    told = {"task_id": TASK, "artifacts": [entry | {"contains_secret": False}] * 5000, "total_count": 5000}
    api.on("GET", f"/tasks/{TASK}/artifacts", of_json(told))
    process = sandbox_process("task", "artifacts", TASK, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == b""


def test_who_watches_a_pending_task_is_told_what_it_waits_for(api, endless, on_terminal, terminal):
    waiting = status("pending", state_message="Waiting for 40 GiB of memory (4 GiB free)")
    over = threading.Event()

    def story():
        yield from of_frames(frames()[:1]).chunks
        over.wait(60)

    api.on("GET", f"/tasks/{TASK}", of_json(waiting))
    api.on("GET", f"/tasks/{TASK}/logs", lambda asked: Answer(200, story() if "follow" in asked.query else []))
    terminal.resize(140)
    on_terminal("task", "status", TASK, "--watch")
    terminal.read_until(b"pending Waiting for 40 GiB of memory (4 GiB free)")
    over.set()
