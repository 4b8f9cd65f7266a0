"""Hostile output instead of stream-json: the parser continues, and forged output is not treated as success."""

import json
import time
import tracemalloc
from itertools import count, islice

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubles.manifests import manifest
from sandbox.agents.claude_code.output_parser import (
    CLAUDE_TASKS_MAX,
    CONVERTED_EVENTS_MAX,
    INIT_SERVERS_MAX,
    INIT_TOOLS_MAX,
    LINE_TEXT_CHARACTERS_MAX,
    OPEN_CALLS_MAX,
    ClaudeOutputParser,
    convert_recorded_line,
)
from sandbox.agents.claude_code.stream_json import (
    BLOCKS_MAX,
    RESULT_BYTES_MAX,
    SHORT_TEXT_CHARACTERS_MAX,
    read_all_result_fields,
    read_blocks,
    read_event,
    read_init,
    read_message,
    replace_lone_surrogates,
)
from sandbox.interfaces.agent import ApiRetry, ParsedToolCallEnd, TurnStarted
from sandbox.interfaces.runtime import ExitStatus
from sandbox.model.events import AgentMessage, AgentResult, FileEdit, ToolCallStarted, ToolResult
from sandbox.model.failure import FailureCode
from sandbox.model.fixed_limits import CONVERSATION_TEXT_CHARACTERS_MAX, OUTPUT_LINE_BYTES_MAX

SESSION = "5ddb80a7-f209-4a6e-9cd9-29f469dd8600"
GOOD_RESULT = {"type": "result", "subtype": "success", "is_error": False, "result": "Done.", "session_id": SESSION}


def test_result_with_half_a_million_extreme_numbers_is_read_quickly():
    line = b'{"type": "result", "usage": [%s], "num_turns": 2}' % b",".join([b"1.7976931348623157e308"] * 499_000)
    started_at = time.process_time()
    result = read_all_result_fields(line)
    assert time.process_time() - started_at < 1.5
    assert result == {"type": "result", "num_turns": 2}


def line(**fields):
    return json.dumps({"session_id": SESSION, "parent_tool_use_id": None, **fields}).encode() + b"\n"


def tool_use(tool_use_id, name="Bash", message_id="msg_1", **fields):
    block = {"type": "tool_use", "id": tool_use_id, "name": name, "input": {}}
    return line(type="assistant", message={"id": message_id, "model": "m", "content": [block]}, **fields)


def tool_result(tool_use_id, **fields):
    block = {"type": "tool_result", "tool_use_id": tool_use_id, "content": "x", **fields}
    return line(type="user", message={"role": "user", "content": [block]})


def test_only_the_first_blocks_of_a_message_are_parsed():
    blocks = [{"type": "tool_use", "id": f"t{number}", "name": "Bash", "input": {}} for number in range(5_000)]
    parser = ClaudeOutputParser(SESSION)
    events = parser.parse_line(line(type="assistant", message={"id": "m", "content": blocks}))
    started = [event.tool_use_id for event in events if isinstance(event, ToolCallStarted)]
    assert started == [f"t{number}" for number in range(BLOCKS_MAX)]
    [result, ended] = parser.parse_line(tool_result(started[-1]))
    assert (result.tool_use_id, ended.tool_use_id) == (started[-1], started[-1])


def test_tool_list_of_an_init_event_is_truncated():
    flood = line(type="system", subtype="init", tools=["Bash", *(f"mcp__x__{number}" for number in range(50_000))])
    ready, _ = ClaudeOutputParser(SESSION).parse_line(flood)
    assert "Bash" in ready.tools
    assert len(ready.tools) == INIT_TOOLS_MAX


def test_server_list_of_an_init_event_is_truncated():
    servers = [{"name": f"büro{number}", "status": "connected"} for number in range(30_000)]
    ready, _ = ClaudeOutputParser(SESSION).parse_line(line(type="system", subtype="init", mcp_servers=servers))
    assert ready.mcp_servers["büro0"] == "connected"
    assert len(ready.mcp_servers) == INIT_SERVERS_MAX


def unprintable_names(size_bytes):
    """Return a line of tool calls whose names, ids and input fields are all unprintable."""
    names = (f"\x7f{'/' * 248}{number:07}" for number in count())
    blocks = []
    while len(blocks) * 26_000 < size_bytes:
        fields = dict.fromkeys(islice(names, 100), 1)
        blocks.append({"type": "tool_use", "id": next(names), "name": next(names), "input": fields})
    return line(type="assistant", message={"id": "m", "content": blocks})


def test_long_list_of_unprintable_tools_is_parsed_quickly():
    tools = [f"\x7f{'/' * 248}{number:07}" for number in range(INIT_TOOLS_MAX)]
    flood = line(type="system", subtype="init", tools=["mcp__büro__x", *tools])
    started_at = time.process_time()
    ready, _ = ClaudeOutputParser(SESSION).parse_line(flood)
    assert time.process_time() - started_at < 0.4
    assert {"mcp__büro__x", f" {'/' * 248}0000000"} < ready.tools
    assert len(ready.tools) == INIT_TOOLS_MAX


def test_line_of_unprintable_names_is_parsed_quickly():
    """The runner enforces no limits and the server answers no requests while a line is parsed."""
    flood, recorded = unprintable_names(16_000_000), unprintable_names(800_000)
    started_at = time.process_time()
    _, first, *others = ClaudeOutputParser(SESSION).parse_line(flood)
    assert time.process_time() - started_at < 1.5
    assert first.tool == f" {'/' * 248}0000101"
    assert len(others) > 600
    assert min(seconds_to_convert(recorded) for _ in range(5)) < 0.1


def seconds_to_convert(recorded):
    started_at = time.process_time()
    assert len(convert_recorded_line(manifest(), recorded)) > 30
    return time.process_time() - started_at


def test_input_fields_with_any_name_are_kept():
    fields = {"名前": "a", "住所": "b", "größe": "c", "grüße": "d", "path": "e"}
    call = tool_use("t1").replace(b'"input": {}', b'"input": ' + json.dumps(fields).encode())
    *_, started = ClaudeOutputParser(SESSION).parse_line(call)
    assert (started.input, started.omitted_fields) == (fields, 0)


def test_names_that_are_not_ascii_are_kept_up_to_a_limit():
    tools = [f"ü{number}" for number in range(1002)]
    ready, _ = ClaudeOutputParser(SESSION).parse_line(line(type="system", subtype="init", tools=tools))
    assert ready.tools == {*tools[:1000], "?1000", "?1001"}


def test_input_fields_whose_names_look_the_same_are_counted_as_omitted():
    call = tool_use("t1").replace(b'"input": {}', rb'"input": {"a\u0001": "1", "a\u0002": "2", "b": "3"}')
    *_, started = ClaudeOutputParser(SESSION).parse_line(call)
    assert (started.input, started.omitted_fields) == ({"a ": "2", "b": "3"}, 1)


def test_long_list_of_unprintable_commands_is_parsed_quickly():
    command = f"\x7f{'/' * 499}"
    blocks = [{"type": "tool_use", "id": f"t{number}", "input": {"command": command}} for number in range(30_000)]
    flood = line(type="assistant", message={"id": "m", "content": blocks})
    started_at = time.process_time()
    _, first, *_ = ClaudeOutputParser(SESSION).parse_line(flood)
    assert time.process_time() - started_at < 0.9
    assert first.summary == f" {'/' * 499}"


EXIT_SUCCESS = ExitStatus(0)


def outcome(*lines, exit_status=EXIT_SUCCESS):
    parser = ClaudeOutputParser(SESSION)
    for one in lines:
        parser.parse_line(one)
    return parser.outcome(exit_status, b"")


GARBAGE = [
    b"",
    b"\n",
    b"\xff\xfe\x00\n",
    b"null\n",
    b"[]\n",
    b"42\n",
    b'"assistant"\n',
    b"{}\n",
    b'{"type":"assistant"}\n',
    b"[" * 1_000_000,
    b'{"type":' * 200_000,
    b'{"type":"result","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"type":"result","x":' + b"9" * 100_000 + b"}",
    b'{"type":"result","x":1e999999}',
    b'{"type":"result","result":"\\ud800"}',
    line(type=["assistant"]),
    line(type="assistant", message=None),
    line(type="assistant", message=[]),
    line(type="assistant", message={"id": 5, "content": {}}),
    line(type="assistant", message={"id": "m", "content": [None, 1, "x", [], {"type": "tool_use", "id": {}}]}),
    line(type="user", message={"content": [{"type": "tool_result", "tool_use_id": 7}]}),
    line(type="user", message={"content": "just text"}),
    line(type="system", subtype="api_retry", attempt="many", max_retries=[], error={}),
    line(type="system", subtype="api_retry", attempt=10**300, error_status=10**300),
    line(type="something_new", message={"content": [{"type": "tool_use", "id": "t", "name": "n"}]}),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_skipped(garbage):
    parser = ClaudeOutputParser(SESSION)
    events = parser.parse_line(garbage) or ()
    assert not [event for event in events if isinstance(event, ToolCallStarted | ToolResult | ParsedToolCallEnd)]
    assert parser.parse_line(tool_use("t1")) in [
        (TurnStarted(), ToolCallStarted("Bash", "t1")),
        (ToolCallStarted("Bash", "t1"),),
    ]
    parser.parse_line(line(**GOOD_RESULT))
    assert parser.outcome(ExitStatus(0), b"").failure is None


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: (
    st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["type", "message", "content", "id", "name", "is_error", "subtype"]), inner)
)))  # fmt: skip
def test_parser_accepts_any_json_value(value):
    parser = ClaudeOutputParser(SESSION)
    for kind in ("assistant", "user", "result", "system"):
        parser.parse_line(line(type=kind, subtype="api_retry", message=value))
        parser.parse_line(line(**{**(value if isinstance(value, dict) else {}), "type": kind}))
    msgspec.json.encode(parser.outcome(ExitStatus(1), b"\xff").result)


@given(st.binary(max_size=200))
def test_parser_accepts_any_bytes(data):
    parser = ClaudeOutputParser(SESSION)
    assert not parser.parse_line(data)
    assert parser.outcome(ExitStatus(0), data).failure.code is FailureCode.AGENT_NO_RESULT


def test_valid_result_is_a_success():
    assert outcome(line(**GOOD_RESULT)).failure is None


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (r"cut \ud83d", "cut \ufffd"),
        (r"\uDE00 cut", "\ufffd cut"),
        (r"\ud83d\ud83d\ude00\ude00", "\ufffd\U0001f600\ufffd"),
        (r"\ud83d\ude00", "\U0001f600"),
        (r"\\ud83d", r"\ud83d"),
        (r"\\\ud83d", "\\\ufffd"),
        (r"\\\\ud83d \\\ude00", "\\\\ud83d \\\ufffd"),
        (r"\\ud83d\ude00", "\\ud83d\ufffd"),
    ],
)
def test_escape_of_half_a_character_is_replaced(written, shown):
    """JavaScript writes such an escape for a string that was cut inside an emoji."""
    result = line(**GOOD_RESULT).replace(b"Done.", written.encode())
    assert outcome(result).result["result"] == shown
    assert outcome(result).failure is None
    call = tool_use("t1").replace(b'"input": {}', b'"input": {"command": "%s"}' % written.encode())
    [started] = [one for one in ClaudeOutputParser(SESSION).parse_line(call) if isinstance(one, ToolCallStarted)]
    assert started.command == shown


@pytest.mark.parametrize("text", [rb"\ud83d", rb"\n\ud83d", b"\\\\", b"x"])
def test_escapes_are_replaced_quickly(text):
    flood = b'"%s\\ud83d"' % (text * (OUTPUT_LINE_BYTES_MAX // len(text) - 10))
    started_at = time.process_time()
    assert b"fffd" in replace_lone_surrogates(flood)
    assert time.process_time() - started_at < 0.5


def test_valid_result_without_newline_is_a_success():
    assert outcome(line(**GOOD_RESULT).rstrip()).failure is None


@pytest.mark.parametrize(
    "change",
    [
        {"is_error": True},
        {"is_error": None},
        {"is_error": 0},
        {"is_error": "false"},
        {"is_error": []},
        {"session_id": "another"},
        {"session_id": None},
        {"type": "Result"},
    ],
    ids=str,
)
def test_result_with_any_other_field_value_is_a_failure(change):
    assert outcome(line(**{**GOOD_RESULT, **change})).failure is not None


@pytest.mark.parametrize("missing", ["is_error", "session_id", "type"])
def test_result_with_missing_field_is_a_failure(missing):
    fields = {key: value for key, value in GOOD_RESULT.items() if key != missing}
    assert outcome(json.dumps(fields).encode()).failure is not None


@pytest.mark.parametrize(
    "later",
    [tool_use("t1"), tool_result("t1"), line(type="system", subtype="init"), line(**{**GOOD_RESULT, "is_error": True})],
    ids=["tool use", "tool result", "new init", "error result"],
)
def test_later_agent_events_invalidate_a_result(later):
    assert outcome(line(**GOOD_RESULT), later).failure is not None
    assert outcome(later, line(**GOOD_RESULT)).failure is None


@pytest.mark.parametrize(
    "later",
    [
        line(type="system", subtype="task_notification"),
        line(type="system", subtype="background_tasks_changed"),
        tool_use("t2", parent_tool_use_id="t1"),
        b"noise\n",
    ],
    ids=["notification", "background change", "subagent tool use", "noise"],
)
def test_permitted_events_after_a_result_do_not_invalidate_it(later):
    assert outcome(line(**GOOD_RESULT), later).failure is None


@pytest.mark.parametrize(
    ("exit_status", "code"),
    [
        (ExitStatus(1), FailureCode.AGENT_FAILED),
        (ExitStatus(137), FailureCode.AGENT_FAILED),
        (ExitStatus(137, was_oom_killed=True), FailureCode.OUT_OF_MEMORY),
        (ExitStatus(None), FailureCode.SANDBOX_LOST),
        (ExitStatus(None, was_oom_killed=True), FailureCode.OUT_OF_MEMORY),
    ],
    ids=str,
)
def test_bad_exit_overrides_a_forged_result(exit_status, code):
    assert outcome(line(**GOOD_RESULT), exit_status=exit_status).failure.code is code


def test_oom_of_a_tool_does_not_fail_the_run():
    assert outcome(line(**GOOD_RESULT), exit_status=ExitStatus(0, was_oom_killed=True)).failure is None


def test_names_are_truncated_and_printable():
    parser = ClaudeOutputParser(SESSION)
    *_, started = parser.parse_line(tool_use("t\x1b[31m" + "x" * 9999, name="\x1b]0;owned\x07\u202e" + "n" * 9999))
    assert started.tool.isprintable()
    assert started.tool_use_id.isprintable()
    assert len(started.tool) == len(started.tool_use_id) == 256
    assert started.tool.startswith(" ]0;owned ?nnn")
    result, finished = parser.parse_line(tool_result("t\x1b[31m" + "x" * 9999))
    assert result.tool_use_id == finished.tool_use_id
    assert (finished.tool_use_id, finished.tool) == (started.tool_use_id, started.tool)


def test_tool_result_counts_once_and_only_after_its_call():
    parser = ClaudeOutputParser(SESSION)
    assert not parser.parse_line(tool_result("t1"))
    parser.parse_line(tool_use("t1"))
    assert not parser.parse_line(tool_use("t1"))
    assert parser.parse_line(tool_use("t\x1b2"))
    assert not parser.parse_line(tool_use("t\x1b2"))
    assert parser.parse_line(tool_result("t1", is_error=True)) == (
        ToolResult("t1", "x", is_error=True),
        ParsedToolCallEnd("t1", "Bash", is_error=True),
    )
    assert not parser.parse_line(tool_result("t1"))


def test_open_tool_calls_are_bounded():
    parser = ClaudeOutputParser(SESSION)
    for number in range(OPEN_CALLS_MAX + 10):
        parser.parse_line(tool_use(f"t{number}"))
    assert not parser.parse_line(tool_result("t9"))
    assert parser.parse_line(tool_result("t10"))
    assert parser.parse_line(tool_result(f"t{OPEN_CALLS_MAX + 9}"))


def background_task(subtype, **fields):
    return line(type="system", subtype=subtype, **fields)


def test_later_result_of_a_background_call_is_ignored():
    parser = ClaudeOutputParser(SESSION)
    parser.parse_line(tool_use("t1"))
    parser.parse_line(background_task("task_started", task_id="a", tool_use_id="t1", is_backgrounded=True))
    (result,) = parser.parse_line(tool_result("t1"))
    assert result.in_background
    assert not parser.parse_line(tool_result("t1"))
    (end,) = parser.parse_line(background_task("task_notification", task_id="a", status="killed"))
    assert end == ParsedToolCallEnd("t1", "Bash", is_error=True)
    assert not parser.parse_line(background_task("task_notification", task_id="a", status="completed"))


def test_background_task_that_ends_before_the_result_of_its_call_does_not_end_the_call():
    parser = ClaudeOutputParser(SESSION)
    parser.parse_line(tool_use("t1"))
    parser.parse_line(background_task("task_started", task_id="a", tool_use_id="t1", is_backgrounded=True))
    assert not parser.parse_line(background_task("task_notification", task_id="a", status="completed"))
    result, end = parser.parse_line(tool_result("t1"))
    assert (result.in_background, end) == (False, ParsedToolCallEnd("t1", "Bash", is_error=False))


@pytest.mark.parametrize(
    "fields",
    [
        {"task_id": 3, "tool_use_id": "t1", "is_backgrounded": True},
        {"task_id": "a", "tool_use_id": ["t1"], "is_backgrounded": True},
        {"task_id": "a", "tool_use_id": "t1", "is_backgrounded": "yes"},
        {"task_id": "a", "tool_use_id": "other", "is_backgrounded": True},
        {"task_id": "a", "tool_use_id": None, "patch": [1]},
        {"tasks": [1, {"tasks": "x"}]},
    ],
)
@pytest.mark.parametrize("subtype", ["task_started", "task_updated", "task_notification", "background_tasks_changed"])
def test_invalid_background_task_event_moves_no_call_to_the_background(subtype, fields):
    parser = ClaudeOutputParser(SESSION)
    parser.parse_line(tool_use("t1"))
    assert parser.parse_line(background_task(subtype, **fields)) == ()
    result, end = parser.parse_line(tool_result("t1"))
    assert not result.in_background
    assert isinstance(end, ParsedToolCallEnd)


def test_tracked_background_tasks_are_bounded():
    parser = ClaudeOutputParser(SESSION)
    for number in range(CLAUDE_TASKS_MAX + 1):
        parser.parse_line(tool_use(f"t{number}"))
        started = background_task("task_started", task_id=f"a{number}", tool_use_id=f"t{number}", is_backgrounded=True)
        parser.parse_line(started)
    oldest, _ = parser.parse_line(tool_result("t0"))
    assert not oldest.in_background
    (newest,) = parser.parse_line(tool_result(f"t{CLAUDE_TASKS_MAX}"))
    assert newest.in_background
    ends = parser.parse_line(background_task("background_tasks_changed", tasks=[]))
    assert ends == (ParsedToolCallEnd(f"t{CLAUDE_TASKS_MAX}", "Bash", is_error=False),)


def test_call_of_a_restarted_background_task_is_replaced():
    parser = ClaudeOutputParser(SESSION)
    for number in range(3):
        parser.parse_line(tool_use(f"t{number}"))
        parser.parse_line(background_task("task_started", task_id="a", tool_use_id=f"t{number}", is_backgrounded=True))
    assert [parser.parse_line(tool_result(f"t{number}"))[0].in_background for number in range(3)] == [
        False,
        False,
        True,
    ]
    (end,) = parser.parse_line(background_task("task_notification", task_id="a", status="completed"))
    assert end == ParsedToolCallEnd("t2", "Bash", is_error=False)


def test_memory_for_tracked_background_tasks_is_bounded():
    parser = ClaudeOutputParser(SESSION)
    parser.parse_line(tool_use("t1"))
    tracemalloc.start()
    try:
        for number in range(10):
            task_id = f"{number} {'😀' * 50_000}"
            parser.parse_line(background_task("task_started", task_id=task_id, tool_use_id="t1", is_backgrounded=True))
            parser.parse_line(background_task("task_updated", task_id=task_id, patch={"is_backgrounded": True}))
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 1_000_000


@pytest.mark.parametrize("length", [1, SHORT_TEXT_CHARACTERS_MAX, SHORT_TEXT_CHARACTERS_MAX + 1])
def test_background_call_with_a_task_id_of_any_length_ends(length):
    parser = ClaudeOutputParser(SESSION)
    task_id = "a" * length
    for number, event in enumerate(
        (
            background_task("task_notification", task_id=task_id, status="completed"),
            background_task("background_tasks_changed", tasks=[]),
        )
    ):
        parser.parse_line(tool_use(f"t{number}"))
        parser.parse_line(background_task("task_started", task_id=task_id, tool_use_id=f"t{number}"))
        parser.parse_line(background_task("task_updated", task_id=task_id, patch={"is_backgrounded": True}))
        (result,) = parser.parse_line(tool_result(f"t{number}"))
        assert result.in_background
        assert not parser.parse_line(background_task("background_tasks_changed", tasks=[{"task_id": task_id}]))
        assert parser.parse_line(event) == (ParsedToolCallEnd(f"t{number}", "Bash", is_error=False),)


def test_retry_message_is_bounded_and_printable():
    parser = ClaudeOutputParser(SESSION)
    (retry,) = parser.parse_line(line(type="system", subtype="api_retry", error="\x1b" * 9999))
    assert isinstance(retry, ApiRetry)
    assert retry.message.isprintable()
    assert len(retry.message) < 300


def test_300_kb_line_is_parsed():
    parser = ClaudeOutputParser(SESSION)
    block = {"type": "tool_use", "id": "t1", "name": "Write", "input": {"content": "x" * 300_000}}
    content = {"id": "m", "content": [block]}
    _, started = parser.parse_line(line(type="assistant", message=content))
    assert (started.tool, started.tool_use_id) == ("Write", "t1")


def test_300_kb_result_keeps_short_fields():
    big = line(**{**GOOD_RESULT, "result": "y" * 300_000, "num_turns": 4, "usage": {"x": ["z" * 1000] * 10}})
    result = outcome(big).result
    assert result["num_turns"] == 4
    assert result["result"].startswith("yyy")
    assert len(json.dumps(result)) < RESULT_BYTES_MAX


def test_tool_result_with_a_large_image_is_parsed():
    parser = ClaudeOutputParser(SESSION)
    parser.parse_line(tool_use("t1", "Read"))
    image = {"type": "image", "source": {"type": "base64", "data": "iVBORw0K" * 500_000}}
    assert parser.parse_line(tool_result("t1", content=[image])) == (
        ToolResult("t1", "[image]"),
        ParsedToolCallEnd("t1", "Read", is_error=False),
    )


def test_result_with_large_denials_keeps_short_fields():
    denials = [{"tool_name": "Write", "tool_input": {"content": "a, b, c, d\n" * 25_000}} for _ in range(5)]
    final = outcome(line(**{**GOOD_RESULT, "permission_denials": denials, "num_turns": 4}))
    assert final.failure is None
    assert (final.result["is_error"], final.result["num_turns"]) == (False, 4)


@pytest.mark.parametrize("values", ["1," * 1_000_000, "{}," * 1_000_000, "[[[1]]]," * 200_000], ids=str.__len__)
def test_line_with_too_many_values_is_not_parsed(values):
    """Parsing the line would take a minute and half a gigabyte of memory."""
    values = values[:-1].encode()
    assert read_all_result_fields(b'{"type":"result","is_error":false,"x":[%s]}\n' % values) is None
    message = b'{"type":"user","session_id":"%s","message":{"content":[%s]}}\n' % (SESSION.encode(), values)
    assert read_blocks(read_message(read_event(message))) == []
    assert read_init(b'{"type":"system","tools":[%s]}\n' % values).tools == []


def test_result_is_always_serializable():
    deep = []
    for _ in range(300):
        deep = [deep]
    final = outcome(line(**{**GOOD_RESULT, "huge": 10**30, "deep": deep, "\x1bkey": 1}))
    assert final.failure is None
    assert msgspec.json.decode(msgspec.json.encode(final.result))["huge"] is None


def assistant(*blocks, **fields):
    return line(type="assistant", message={"id": "msg_1", "model": "m", "content": list(blocks)}, **fields)


def tool_use_block(tool, **tool_input):
    return {"type": "tool_use", "id": "t1", "name": tool, "input": tool_input}


def started(*args, **tool_input):
    _, call = ClaudeOutputParser(SESSION).parse_line(assistant(tool_use_block(*args, **tool_input)))
    return call


LONG = "x" * (CONVERSATION_TEXT_CHARACTERS_MAX + 5)
CUT = "x" * CONVERSATION_TEXT_CHARACTERS_MAX


@pytest.mark.parametrize("kind", ["text", "thinking"])
def test_message_is_truncated_and_omitted_characters_are_counted(kind):
    _, message = ClaudeOutputParser(SESSION).parse_line(assistant({"type": kind, kind: LONG}))
    assert message == AgentMessage(CUT, kind, omitted_characters=5)


def test_tool_result_is_truncated_and_omitted_characters_are_counted():
    parser = ClaudeOutputParser(SESSION)
    parser.parse_line(tool_use("t1"))
    result, _ = parser.parse_line(tool_result("t1", content=LONG))
    assert result == ToolResult("t1", CUT, omitted_characters=5)


def test_final_text_is_truncated_and_omitted_characters_are_counted():
    (result,) = ClaudeOutputParser(SESSION).parse_line(line(**{**GOOD_RESULT, "result": LONG}))
    assert (result.text, result.omitted_characters) == (CUT, 5)


def test_all_texts_in_an_input_share_one_length_limit():
    call = started("Edit", file_path="a", old_string=LONG, new_string=LONG, other=LONG)
    assert call.edits == (FileEdit("a", CUT[1:], ""),)
    assert call.input == {"other": ""}
    assert call.omitted_characters == 3 * len(LONG) + 1 - len(CUT)


def test_wide_input_has_a_limited_number_of_fields():
    call = started("Other", **{f"field-{number}": number for number in range(100_000)})
    assert (len(call.input), call.omitted_fields) == (100, 99_900)


def test_large_nested_input_is_not_indented():
    deep = b'{"a":' * 500 + b"[" + b"1," * 1000 + b"1]" + b"}" * 500
    _, call = ClaudeOutputParser(SESSION).parse_line(
        assistant(tool_use_block("Other", deep="DEEP")).replace(b'"DEEP"', deep)
    )
    assert call.input["deep"] == deep.decode()


@pytest.mark.parametrize(
    ("tool_input", "summary"),
    [
        ({"command": "ls -l", "description": "List files"}, "ls -l"),
        ({"file_path": "/workspace/src/a.py", "content": "x"}, "src/a.py"),
        ({"file_path": "/etc/passwd"}, "/etc/passwd"),
        ({"pattern": "*.py", "path": "/workspace"}, "*.py"),
        ({"command": 5, "query": "q"}, "q"),
        ({"number": 1, "unknown": "text"}, "text"),
        ({"command": "a\n\x1b[2Jb"}, "a  [2Jb"),
        ({"command": "c" * 1_000_000}, "c" * 500),
        ({}, ""),
    ],
)
def test_tool_call_is_summarized_by_its_main_field(tool_input, summary):
    assert started("Tool", **tool_input).summary == summary


def test_command_and_edits_are_separate_from_the_input():
    assert started("Bash", command="ls", timeout=5).command == "ls"
    assert started("Bash", command="ls", timeout=5).input == {"timeout": "5"}
    assert started("mcp__x__Bash", command="ls").command is None
    write = started("Write", file_path="/workspace/a.py", content="new")
    assert (write.edits, write.input) == ((FileEdit("a.py", None, "new"),), {})
    odd = started("Edit", file_path=["a"], old_string="b")
    assert odd.edits == (FileEdit('[\n  "a"\n]', "b", ""),)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
        (None, ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}, 1], "a\nb\n[image]\n[]"),
        ({"plain": 1}, '{\n  "plain": 1\n}'),
    ],
)
def test_content_of_a_tool_result_becomes_text(content, text):
    parser = ClaudeOutputParser(SESSION)
    parser.parse_line(tool_use("t1"))
    result, _ = parser.parse_line(tool_result("t1", content=content))
    assert result.output == text


@pytest.mark.parametrize("value", [{"a": 1}, [], 1, True, None, "x"], ids=str)
def test_fields_of_an_unexpected_type_are_ignored(value):
    parser = ClaudeOutputParser(SESSION)
    lines = [
        assistant({"type": "text", "text": value}, {"type": "thinking", "thinking": value}, {"type": "tool_use"}),
        assistant({"type": "tool_use", "id": "t9", "name": "Tool", "input": value}),
        line(type="result", subtype="success", is_error=value, result=value, num_turns=value, total_cost_usd=value),
        line(type="system", subtype="init", claude_code_version=value, model=value),
    ]
    events = [event for one in lines for event in parser.parse_line(one)]
    (call,) = [event for event in events if isinstance(event, ToolCallStarted)]
    assert (call.tool, call.tool_use_id, call.summary) == ("Tool", "t9", "")
    assert [event.is_error for event in events if isinstance(event, AgentResult)] == [True]
    msgspec.json.encode(events)


def test_huge_numbers_in_a_result_are_omitted():
    encoded = line(**GOOD_RESULT, num_turns=1, total_cost_usd=2).replace(b": 1,", b": 1%s," % (b"0" * 400))
    (result,) = ClaudeOutputParser(SESSION).parse_line(encoded.replace(b": 2}", b": 1e400}"))
    assert (result.turns, result.cost_usd) == (None, None)


@pytest.mark.parametrize(("reported", "cost"), [(0.10626000000000001, 0.10626), (2, 2.0), (-0.0, 0.0), (1e300, 1e300)])
def test_cost_of_a_result_is_rounded(reported, cost):
    (result,) = ClaudeOutputParser(SESSION).parse_line(line(**GOOD_RESULT, total_cost_usd=reported))
    assert result.cost_usd == cost


def test_recorded_line_yields_a_limited_number_of_events():
    few, many = ([tool_use_block("Tool", number=number) for number in range(count)] for count in (50, 5000))
    assert len(convert_recorded_line(manifest(), assistant(*few))) == 50
    assert len(convert_recorded_line(manifest(), assistant(*many))) == CONVERTED_EVENTS_MAX


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_recorded_malformed_line_has_no_tool_calls(garbage):
    events = convert_recorded_line(manifest(), garbage) or ()
    assert not [event for event in events if isinstance(event, ToolCallStarted)]


def test_line_of_an_interactive_task_is_not_converted():
    recorded = assistant(tool_use_block("Tool"))
    assert convert_recorded_line(manifest(claude={"headless": False}), recorded) is None
    assert len(convert_recorded_line(manifest(), recorded)) == 1


def test_indentation_does_not_multiply_the_size_of_a_line():
    deep, small = "[" * 450 + "]" * 450, {"todos": [{"content": "Read", "status": "done"}, {"content": "Write"}]}
    blocks = ({"type": "tool_use", "id": f"u{number}", "name": "x", "input": {"value": 0}} for number in range(50))
    flood = line(type="assistant", message={"id": "m", "content": [*blocks]}).replace(b": 0}", f": {deep}}}".encode())
    converted = convert_recorded_line(manifest(), flood)
    assert [event.input["value"] for event in converted] == [deep] * 50
    usual = {"type": "tool_use", "id": "u", "name": "x", "input": small}
    (shown,) = convert_recorded_line(manifest(), line(type="assistant", message={"id": "m", "content": [usual]}))
    assert shown.input["todos"] == json.dumps(small["todos"], indent=2)


# Memory for the events of one line: all of the events stay in memory until the last one is recorded.

WIDE = "\N{GRINNING FACE}"
"""A string that contains this character uses four bytes for each character."""


def message(*blocks, **fields):
    return line(type="assistant", message={"id": "msg_1", "model": "m", "content": blocks}, **fields)


def held_bytes(parse):
    tracemalloc.start()
    try:
        events = parse()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return held, events


def test_indented_input_of_many_calls_in_one_line_uses_little_memory():
    nested: list = [WIDE, *[1] * 185, "x" * 12_000]
    for _ in range(115):
        nested = [nested]
    blocks = [{"type": "tool_use", "id": f"t{number}", "name": "N", "input": {"a": nested}} for number in range(300)]
    text = json.dumps({"session_id": SESSION, "type": "assistant", "message": {"content": blocks}}, ensure_ascii=False)
    held, events = held_bytes(lambda: ClaudeOutputParser(SESSION).parse_line(text.encode() + b"\n"))
    calls = [event for event in events if isinstance(event, ToolCallStarted)]
    assert len(calls) == 300
    assert sum(len(call.input["a"]) for call in calls) <= LINE_TEXT_CHARACTERS_MAX
    assert calls[-1].omitted_characters > 80_000
    assert held < 5 * LINE_TEXT_CHARACTERS_MAX


@pytest.mark.parametrize("kind", ["assistant", "user"])
def test_parent_of_many_blocks_in_one_line_is_sanitized_once(kind):
    blocks = [{"type": "text", "text": "x"}] * BLOCKS_MAX
    flood = line(type=kind, message={"content": blocks}, parent_tool_use_id=WIDE * 255 + "\u200b")
    held, events = held_bytes(lambda: ClaudeOutputParser(SESSION).parse_line(flood))
    messages = [event for event in events if isinstance(event, AgentMessage)]
    assert len(messages) == BLOCKS_MAX
    assert {one.parent_tool_use_id for one in messages} == {"?" * 256}
    assert held < 5_000_000


def test_texts_of_several_blocks_in_one_line_are_complete():
    texts = [str(number) * (CONVERSATION_TEXT_CHARACTERS_MAX - 1) for number in range(8)]
    events = ClaudeOutputParser(SESSION).parse_line(message(*({"type": "text", "text": text} for text in texts)))
    messages = [event for event in events if isinstance(event, AgentMessage)]
    assert [(one.text, one.omitted_characters) for one in messages] == [(text, 0) for text in texts]
    longer = ClaudeOutputParser(SESSION).parse_line(message({"type": "text", "text": "x" * 150_000}))
    assert longer[-1].omitted_characters == 50_000
