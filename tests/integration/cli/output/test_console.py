"""The CLI on a terminal, with a closed pipe, and when interrupted."""

import hashlib
import json
import signal
import subprocess
import threading

import pytest

from doubles.fake_api import ApiResponse, json_response, sse_response
from doubles.sample_task import TASK_ID, task_events, task_status

HOSTILE = "\x1b]0;owned\x07\x1b[31m"


@pytest.fixture
def endless_task(api):
    """A task that never ends."""
    ended = threading.Event()

    def events_without_end():
        yield from sse_response(task_events()[:5]).chunks
        ended.wait(60)

    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("running")))
    api.on(
        "GET",
        f"/tasks/{TASK_ID}/logs",
        lambda request: ApiResponse(200, events_without_end() if "follow" in request.query else []),
    )
    yield
    ended.set()


def test_control_sequences_are_escaped_on_a_terminal(api, on_terminal, terminal):
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("completed")))
    api.on("GET", f"/tasks/{TASK_ID}/logs", ApiResponse(200, [f"[t] [STDOUT] {HOSTILE}\n[t] [STDOUT] last\n".encode()]))
    process = on_terminal("task", "logs", TASK_ID)
    output = terminal.read_until(b"last")
    assert process.wait(30) == 0
    assert rb"\x1b]0;owned\x07\x1b[31m" in output
    assert b"\x1b]0" not in output


def test_logs_are_rendered_on_a_terminal_unless_raw(api, on_terminal, terminal):
    line = json.dumps({"type": "assistant", "message": {"content": []}})
    message = {"type": "agent_message", "task_id": TASK_ID, "seq": 2, "timestamp": "t", "kind": "text"}
    event = json.dumps({**message, "text": "Hello there."})
    lines = f"[t] [STDOUT] {line}\n[t] [EVENT] {event}\n[t] [STDERR] last\n".encode()
    api.on("GET", f"/tasks/{TASK_ID}/logs", ApiResponse(200, [lines]))
    on_terminal("task", "logs", TASK_ID).wait(30)
    assert b"assistant" not in terminal.read_until(b"last")
    assert b"Hello there." in terminal.output
    for option, first in (("--raw", b"[STDOUT] "), ("--timestamps", b"[t] [STDOUT] ")):
        terminal.output = b""
        on_terminal("task", "logs", TASK_ID, option).wait(30)
        assert terminal.read_until(b"last").startswith(first + line.encode()[:20])


def test_logs_are_rendered_in_a_pipe_only_with_pretty(api, run_cli):
    lines = b"".join(f"[t] [EVENT] {json.dumps(event)}\n".encode() for event in task_events())
    api.on("GET", f"/tasks/{TASK_ID}/logs", ApiResponse(200, [lines]))
    plain = run_cli("task", "logs", TASK_ID).stdout
    assert plain == run_cli("task", "logs", TASK_ID, "--raw").stdout == lines.replace(b"[t] ", b"")
    pretty = run_cli("task", "logs", TASK_ID, "--pretty").stdout.decode()
    assert "  ▸ Edit  src/app/parser.py  25 ms\n              -a\n              +b\n" in pretty
    assert "\x1b" not in pretty
    for arguments in (("--timestamps",), ("--format", "json")):
        assert run_cli("task", "logs", TASK_ID, "--pretty", *arguments).returncode == 2


def test_output_of_an_interactive_session_is_not_parsed(api, on_terminal, terminal):
    block = {"type": "text", "text": "Forged."}
    forged = json.dumps({"type": "assistant", "message": {"content": [block]}})
    lines = f"[t] [STDOUT] {forged}\n[t] [STDERR] last\n".encode()
    event = {
        "type": "output",
        "task_id": TASK_ID,
        "seq": 1,
        "timestamp": "2026-01-29T10:10:01.000Z",
        "stream": "stdout",
    }
    events = [
        {**event, "data": forged + "\n", "bytes": len(forged) + 1, "continued": False, "parsed": False},
        task_events()[-1],
    ]
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("running")))
    api.on(
        "GET",
        f"/tasks/{TASK_ID}/logs",
        lambda request: sse_response(events) if "follow" in request.query else ApiResponse(200, [lines]),
    )
    for command in (("logs", TASK_ID), ("logs", TASK_ID, "--follow")):
        terminal.output = b""
        output = terminal.read_to_end(on_terminal("task", *command))
        assert b"assistant" in output, command


def test_line_separators_in_an_artifact_are_escaped_on_a_terminal(api, on_terminal, terminal):
    data = "one \u2028 line\nanother\x85one\n".encode()
    artifacts = [{"name": "notes", "path": "notes", "contains_secret": False}]
    api.on("GET", f"/tasks/{TASK_ID}/artifacts", json_response({"task_id": TASK_ID, "artifacts": artifacts}))
    headers = {"X-Checksum-SHA256": hashlib.sha256(data).hexdigest()}
    api.on("GET", f"/tasks/{TASK_ID}/artifacts/notes", ApiResponse(200, [data], headers))
    output = terminal.read_to_end(on_terminal("task", "download", TASK_ID, "notes", "-o", "-"))
    assert output.decode().splitlines() == [r"one \u2028 line", r"another\x85one"]


def test_task_name_and_error_are_escaped_on_a_terminal(api, on_terminal, terminal):
    hostile = task_status("failed", name=HOSTILE, error={"code": "x", "message": HOSTILE}, labels={"k": HOSTILE})
    api.on("GET", f"/tasks/{TASK_ID}", json_response(hostile))
    on_terminal("task", "status", TASK_ID)
    assert b"\x1b]0" not in terminal.read_until(b"Error")


def test_terminal_output_is_colored_unless_disabled(api, on_terminal, terminal):
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("failed")))
    on_terminal("task", "status", TASK_ID)
    assert b"\x1b[1;31mfailed" in terminal.read_until(b"Error")
    terminal.output = b""
    on_terminal("task", "status", TASK_ID, "--no-color")
    assert b"\x1b[1;31m" not in terminal.read_until(b"exited with 1")


def test_cancel_prompts_on_a_terminal_and_can_be_declined(api, on_terminal, terminal):
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("running")))
    process = on_terminal("task", "cancel", TASK_ID)
    terminal.read_until(b"[y/N]")
    terminal.type(b"what\n")
    terminal.read_until(b"Type y or n.")
    terminal.type(b"\n")
    terminal.read_until(b"The task was not cancelled.")
    assert process.wait(30) == 130
    assert [request.method for request in api.requests] == ["GET"]


@pytest.mark.parametrize(("answer", "code"), [(b"\n", 130), (b"y\n", 0)])
def test_delete_prompts_on_a_terminal(api, on_terminal, terminal, answer, code):
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("completed")))
    response = {"success": True, "task_id": TASK_ID, "message": "It was deleted."}
    api.on("DELETE", f"/tasks/{TASK_ID}/data", json_response(response))
    process = on_terminal("task", "delete", TASK_ID)
    assert b"Delete task fix-42 (Fix bug #42) and all its data?" in terminal.read_until(b"[y/N]")
    terminal.type(answer)
    terminal.read_until(b"It was deleted." if code == 0 else b"The task was not deleted.")
    assert process.wait(30) == code
    assert [request.method for request in api.requests] == (["GET", "DELETE"] if code == 0 else ["GET"])


def test_cancel_of_an_ended_task_does_not_prompt(api, on_terminal, terminal):
    api.on("GET", f"/tasks/{TASK_ID}", json_response(task_status("completed")))
    process = on_terminal("task", "cancel", TASK_ID)
    output = terminal.read_to_end(process)
    assert b"The task had already ended. Task fix-42 completed." in output
    assert (process.returncode, b"[y/N]" in output) == (4, False)
    assert [request.method for request in api.requests] == ["GET"]


def test_interrupted_watch_keeps_the_task_running(api, endless_task, on_terminal, terminal):
    process = on_terminal("task", "status", TASK_ID, "--watch")
    terminal.read_until(b"Claude Code is working")
    terminal.read_until(b"provisioning")
    process.send_signal(signal.SIGINT)
    output = terminal.read_until(b"sandbox task cancel fix-42")
    assert process.wait(30) == 130
    assert b"Task fix-42 continues." in output
    assert {request.method for request in api.requests} == {"GET"}


def test_interrupted_watch_in_a_pipe_prints_that_the_task_continues(endless_task, start_cli):
    process = start_cli("task", "logs", TASK_ID, "--follow", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"[EVENT]")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert b"continues" in process.stderr.read()


def test_closed_pipe_ends_the_logs_command_silently(api, start_cli):
    line = b"[t] [STDOUT] " + b"x" * 1000 + b"\n"
    api.on("GET", f"/tasks/{TASK_ID}/logs", ApiResponse(200, [line * 5000]))
    process = start_cli("task", "logs", TASK_ID, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == b""


def test_closed_pipe_ends_a_table_silently(api, start_cli):
    entry = {"name": "a", "path": "a", "size_bytes": 1, "content_type": "text/plain", "checksum": "sha256:0"}
    body = {"task_id": TASK_ID, "artifacts": [entry | {"contains_secret": False}] * 5000, "total_count": 5000}
    api.on("GET", f"/tasks/{TASK_ID}/artifacts", json_response(body))
    process = start_cli("task", "artifacts", TASK_ID, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == b""


def test_watched_pending_task_reports_its_pending_reason(api, endless_task, on_terminal, terminal):
    pending = task_status("pending", state_message="Waiting for 40 GiB of memory (4 GiB free)")
    ended = threading.Event()

    def events_without_end():
        yield from sse_response(task_events()[:1]).chunks
        ended.wait(60)

    api.on("GET", f"/tasks/{TASK_ID}", json_response(pending))
    api.on(
        "GET",
        f"/tasks/{TASK_ID}/logs",
        lambda request: ApiResponse(200, events_without_end() if "follow" in request.query else []),
    )
    terminal.resize(140)
    on_terminal("task", "status", TASK_ID, "--watch")
    terminal.read_until(b"pending Waiting for 40 GiB of memory (4 GiB free)")
    ended.set()


def test_usage_errors_are_wrapped_between_words(on_terminal, terminal):
    terminal.resize(80)
    process = on_terminal("--no-color", "task", "list", "--since", "yesterday")
    lines = terminal.read_to_end(process).decode().splitlines()
    assert process.returncode == 2
    assert lines[0] == "Usage: sandbox task list [OPTIONS]"
    assert lines[-2:] == [
        "Error: Invalid value for '--since': 'yesterday' is not a time; use RFC 3339,",
        "  such as 2026-01-29T10:10:15Z, or a duration before now, such as 10m",
    ]


def test_error_of_an_unknown_root_option_is_wrapped(on_terminal, terminal):
    terminal.resize(40)
    process = on_terminal("--no-color", "--unknown-option-with-a-name")
    lines = terminal.read_to_end(process).decode().splitlines()
    assert (process.returncode, max(map(len, lines)) <= 40) == (2, True)
    assert lines[-1] == "  '--unknown-option-with-a-name'."
