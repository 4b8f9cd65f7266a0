"""Lines of the text log are converted back to events."""

import json

from sandbox.cli.output.text_log_parser import mark_parsed_lines, parse_line, parse_log_events

TIME = "2026-01-29T10:10:15.123Z"


def test_line_is_split_into_time_and_stream_and_content():
    assert parse_line(f"[{TIME}] [STDERR] oh [x] y\n".encode()) == (
        f"[{TIME}] ".encode(),
        b"[STDERR] ",
        b"oh [x] y\n",
        False,
    )
    assert parse_line(b"no prefix\n") == (b"", b"", b"no prefix\n", False)


def test_log_lines_become_events():
    event = {"type": "agent_message", "task_id": "t", "seq": 7, "timestamp": TIME, "text": "Done."}
    lines = [f"[{TIME}] [EVENT] {json.dumps(event)}\n", f"[{TIME}] [STDOUT] \udcff\n", "noise\n", "[t] [EVENT] {\n"]
    assert list(parse_log_events((line.encode(errors="surrogateescape") for line in lines), "t")) == [
        event,
        {"type": "output", "task_id": "t", "timestamp": TIME, "stream": "stdout", "data": "\ufffd\n"},
    ]


def log(*contents):
    """Return a text log with one line for each item: a line of stdout or, for None, an agent's message."""
    message = json.dumps({"type": "agent_message", "task_id": "t", "seq": 7, "timestamp": TIME, "text": "Done."})
    lines = [f"[EVENT] {message}" if content is None else f"[STDOUT] {content}" for content in contents]
    return [f"[{TIME}] {line}\n".encode() for line in lines]


def marked(*contents):
    """Return the events of the log with these contents, after `mark_parsed_lines`."""
    return list(mark_parsed_lines(parse_log_events(log(*contents), "t")))


def parsed(*contents):
    """Return, for each line of stdout in the log, whether it is marked as parsed."""
    return [event["parsed"] for event in marked(*contents) if event["type"] == "output"]


def test_json_objects_are_parsed_if_the_log_has_a_conversation():
    line = '{"type":"assistant"}'
    assert parsed(line, None, line, "text", line) == [True, True, False, True]
    assert parsed(line, line, "text") == [False, False, False]
    assert parsed("text", line, None) == [False, True]
    assert [event["type"] for event in marked(line, None)] == ["output", "agent_message"]
