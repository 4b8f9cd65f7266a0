"""A task's conversation with the real agent has the same events in every output format and for every client."""

import json

import pytest

from doubles.deployment import bash_turn, reply_turn
from sandbox.demo.scripted_model import Text, ToolUse, Turn

SECRET = "s3cret-value-of-the-customer"
READ = Turn((Text("I read it first."), ToolUse("Read", {"file_path": "/workspace/notes.txt"})))
EDIT = Turn((ToolUse("Edit", {"file_path": "/workspace/notes.txt", "old_string": "hello", "new_string": "bye"}),))
TURNS = (READ, EDIT, bash_turn('printf "%s\\n" "$TOKEN"; exit 3'), reply_turn("Said **bye**."))
TYPES = frozenset({"agent_message", "tool_call_started", "tool_result", "agent_result", "tool_call"})


@pytest.mark.parametrize("output_format", ["stream-json", "text", "json"])
def test_conversation_is_recorded_once_and_redacted(deploy, output_format):
    deployment = deploy(*TURNS, files={"notes.txt": "hello\n"}, environment={"SERVER_TOKEN": SECRET})
    secret = {"name": "TOKEN", "source": "env", "key": "SERVER_TOKEN"}
    deployment.submit(claude={"output_format": output_format}, secrets=[secret])
    assert deployment.wait()["state"] == "completed", deployment.diagnostics()
    events = deployment.wire_events()
    assert SECRET not in json.dumps(events)
    shown = [event for event in events if event["type"] in TYPES]
    notice, first, *_, last, result = [event for event in shown if event["type"] in {"agent_message", "agent_result"}]
    assert notice["kind"] == "notice"
    assert [first["text"], last["text"], result["text"]] == ["I read it first.", "Said **bye**.", "Said **bye**."]
    read, edit, command = [event for event in shown if event["type"] == "tool_call_started"]
    assert (read["tool"], read["summary"]) == ("Read", "notes.txt")
    assert edit["edits"] == [{"path": "notes.txt", "old": "hello", "new": "bye"}]
    assert command["command"] == 'printf "%s\\n" "$TOKEN"; exit 3'
    results = {event["tool_use_id"]: event for event in shown if event["type"] == "tool_result"}
    failed = results[command["tool_use_id"]]
    assert (failed["is_error"], failed["exit_code"], "[REDACTED:TOKEN]" in failed["output"]) == (True, 3, True)
    kinds = [event["type"] for event in shown if event.get("tool_use_id") == edit["tool_use_id"]]
    assert kinds == ["tool_call_started", "tool_result", "tool_call"]
    assert not [event for event in events if event["type"] == "output" and "conversation" in event]
    parsed = {event["parsed"] for event in events if event["type"] == "output" and event["stream"] == "stdout"}
    assert parsed == {True}


def test_logs_have_a_conversation_stream(deploy):
    deployment = deploy(bash_turn("echo hi"), reply_turn("Done."))
    deployment.submit()
    deployment.wait()
    text = deployment.http.get("/api/v1/tasks/task-1/logs?stream=conversation").text
    types = [json.loads(line.partition("[EVENT] ")[2])["type"] for line in text.splitlines()]
    kinds = ["agent_message", "tool_call_started", "tool_result", "agent_result"]
    assert list(dict.fromkeys(types)) == kinds
    assert "agent_message" not in deployment.http.get("/api/v1/tasks/task-1/logs?stream=events").text
    assert "agent_message" not in deployment.http.get("/api/v1/tasks/task-1/logs?stream=stdout").text
