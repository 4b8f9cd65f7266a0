"""Whatever a sandbox prints where stream-json should be: the reader goes on, and nothing false becomes a success."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.agents.claude_code.output_parser import INIT_TOOLS_MAX, OPEN_CALLS_MAX, ClaudeOutputParser
from sandbox.agents.claude_code.stream_json import (
    RESULT_BYTES_MAX,
    read_blocks,
    read_event,
    read_init,
    read_message,
    read_result,
)
from sandbox.interfaces.agent import ApiRetry, ToolFinished, ToolStarted, TurnStarted
from sandbox.interfaces.runtime import ExitStatus
from sandbox.model.errors import FailureCode

SESSION = "5ddb80a7-f209-4a6e-9cd9-29f469dd8600"
GOOD_RESULT = {"type": "result", "subtype": "success", "is_error": False, "result": "Done.", "session_id": SESSION}


def line(**fields):
    return json.dumps({"session_id": SESSION, "parent_tool_use_id": None, **fields}).encode() + b"\n"


def tool_use(tool_use_id, name="Bash", message_id="msg_1", **fields):
    block = {"type": "tool_use", "id": tool_use_id, "name": name, "input": {}}
    return line(type="assistant", message={"id": message_id, "model": "m", "content": [block]}, **fields)


def tool_result(tool_use_id, **fields):
    block = {"type": "tool_result", "tool_use_id": tool_use_id, "content": "x", **fields}
    return line(type="user", message={"role": "user", "content": [block]})


def test_an_init_with_a_flood_of_tools_is_cut():
    flood = line(type="system", subtype="init", tools=["Bash", *(f"mcp__x__{number}" for number in range(50_000))])
    [ready] = ClaudeOutputParser(SESSION).parse_line(flood)
    assert "Bash" in ready.tools
    assert len(ready.tools) == INIT_TOOLS_MAX


DONE = ExitStatus(0)


def outcome(*lines, exit_=DONE):
    conversation = ClaudeOutputParser(SESSION)
    for one in lines:
        conversation.parse_line(one)
    return conversation.outcome(exit_, b"")


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
def test_garbage_is_read_past(garbage):
    conversation = ClaudeOutputParser(SESSION)
    assert not [event for event in conversation.parse_line(garbage) if isinstance(event, ToolStarted | ToolFinished)]
    assert conversation.parse_line(tool_use("t1")) in [
        (TurnStarted(), ToolStarted("t1", "Bash")),
        (ToolStarted("t1", "Bash"),),
    ]
    conversation.parse_line(line(**GOOD_RESULT))
    assert conversation.outcome(ExitStatus(0), b"").failure is None


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: (
    st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["type", "message", "content", "id", "name", "is_error", "subtype"]), inner)
)))  # fmt: skip
def test_no_json_value_makes_it_raise(value):
    conversation = ClaudeOutputParser(SESSION)
    for kind in ("assistant", "user", "result", "system"):
        conversation.parse_line(line(type=kind, subtype="api_retry", message=value))
        conversation.parse_line(line(**{**(value if isinstance(value, dict) else {}), "type": kind}))
    msgspec.json.encode(conversation.outcome(ExitStatus(1), b"\xff").result)


@given(st.binary(max_size=200))
def test_no_bytes_make_it_raise(data):
    conversation = ClaudeOutputParser(SESSION)
    assert not conversation.parse_line(data)
    assert conversation.outcome(ExitStatus(0), data).failure.code is FailureCode.AGENT_NO_RESULT


def test_a_good_result_is_a_success():
    assert outcome(line(**GOOD_RESULT)).failure is None


def test_a_good_result_without_a_newline_is_a_success():
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
def test_anything_less_than_is_error_false_is_a_failure(change):
    assert outcome(line(**{**GOOD_RESULT, **change})).failure is not None


@pytest.mark.parametrize("missing", ["is_error", "session_id", "type"])
def test_a_result_without_its_parts_is_a_failure(missing):
    fields = {key: value for key, value in GOOD_RESULT.items() if key != missing}
    assert outcome(json.dumps(fields).encode()).failure is not None


@pytest.mark.parametrize(
    "later",
    [tool_use("t1"), tool_result("t1"), line(type="system", subtype="init"), line(**{**GOOD_RESULT, "is_error": True})],
    ids=["the agent speaks", "a tool answers", "another round begins", "a bad result"],
)
def test_a_forged_result_is_undone_by_what_really_follows(later):
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
    ids=["a note", "a change", "a subagent speaks", "noise"],
)
def test_what_may_follow_a_last_result_leaves_it_the_last(later):
    assert outcome(line(**GOOD_RESULT), later).failure is None


@pytest.mark.parametrize(
    ("exit_", "code"),
    [
        (ExitStatus(1), FailureCode.AGENT_FAILED),
        (ExitStatus(137), FailureCode.AGENT_FAILED),
        (ExitStatus(137, was_oom_killed=True), FailureCode.OUT_OF_MEMORY),
        (ExitStatus(None), FailureCode.SANDBOX_LOST),
        (ExitStatus(None, was_oom_killed=True), FailureCode.OUT_OF_MEMORY),
    ],
    ids=str,
)
def test_a_forged_result_does_not_make_up_for_the_exit(exit_, code):
    assert outcome(line(**GOOD_RESULT), exit_=exit_).failure.code is code


def test_a_tool_that_ran_out_of_memory_does_not_spoil_a_success():
    assert outcome(line(**GOOD_RESULT), exit_=ExitStatus(0, was_oom_killed=True)).failure is None


def test_names_are_cut_and_printable():
    conversation = ClaudeOutputParser(SESSION)
    *_, started = conversation.parse_line(
        tool_use("t\x1b[31m" + "x" * 9999, name="\x1b]0;owned\x07\u202e" + "n" * 9999)
    )
    assert started.tool.isprintable()
    assert started.tool_use_id.isprintable()
    assert len(started.tool) == len(started.tool_use_id) == 256
    (ended,) = conversation.parse_line(tool_result("t\x1b[31m" + "x" * 9999))
    assert (ended.tool_use_id, ended.tool) == (started.tool_use_id, started.tool)


def test_a_tool_answers_once_and_only_when_it_was_called():
    conversation = ClaudeOutputParser(SESSION)
    assert not conversation.parse_line(tool_result("t1"))
    conversation.parse_line(tool_use("t1"))
    assert not conversation.parse_line(tool_use("t1"))
    assert conversation.parse_line(tool_use("t\x1b2"))
    assert not conversation.parse_line(tool_use("t\x1b2"))
    assert conversation.parse_line(tool_result("t1", is_error=True)) == (ToolFinished("t1", "Bash", is_error=True),)
    assert not conversation.parse_line(tool_result("t1"))


def test_endless_tool_calls_take_bounded_memory():
    conversation = ClaudeOutputParser(SESSION)
    for number in range(OPEN_CALLS_MAX + 10):
        conversation.parse_line(tool_use(f"t{number}"))
    assert not conversation.parse_line(tool_result("t9"))
    assert conversation.parse_line(tool_result("t10"))
    assert conversation.parse_line(tool_result(f"t{OPEN_CALLS_MAX + 9}"))


def test_retries_with_odd_numbers_stay_short():
    conversation = ClaudeOutputParser(SESSION)
    (told,) = conversation.parse_line(line(type="system", subtype="api_retry", error="\x1b" * 9999))
    assert isinstance(told, ApiRetry)
    assert told.message.isprintable()
    assert len(told.message) < 300


def test_a_line_of_300_kb_is_read():
    conversation = ClaudeOutputParser(SESSION)
    block = {"type": "tool_use", "id": "t1", "name": "Write", "input": {"content": "x" * 300_000}}
    content = {"id": "m", "content": [block]}
    assert ToolStarted("t1", "Write") in conversation.parse_line(line(type="assistant", message=content))


def test_a_result_of_300_kb_keeps_its_short_fields():
    big = line(**{**GOOD_RESULT, "result": "y" * 300_000, "num_turns": 4, "usage": {"x": ["z" * 1000] * 10}})
    result = outcome(big).result
    assert result["num_turns"] == 4
    assert result["result"].startswith("yyy")
    assert len(json.dumps(result)) < RESULT_BYTES_MAX


def test_an_image_of_several_megabytes_is_the_answer_to_its_tool_call():
    conversation = ClaudeOutputParser(SESSION)
    conversation.parse_line(tool_use("t1", "Read"))
    image = {"type": "image", "source": {"type": "base64", "data": "iVBORw0K" * 500_000}}
    assert conversation.parse_line(tool_result("t1", content=[image])) == (ToolFinished("t1", "Read", is_error=False),)


def test_a_result_with_all_that_was_denied_keeps_its_short_fields():
    denials = [{"tool_name": "Write", "tool_input": {"content": "a, b, c, d\n" * 25_000}} for _ in range(5)]
    ended = outcome(line(**{**GOOD_RESULT, "permission_denials": denials, "num_turns": 4}))
    assert ended.failure is None
    assert (ended.result["is_error"], ended.result["num_turns"]) == (False, 4)


@pytest.mark.parametrize("values", ["1," * 1_000_000, "{}," * 1_000_000, "[[[1]]]," * 200_000], ids=str.__len__)
def test_a_long_line_of_nothing_but_values_is_not_taken_apart(values):
    """It would hold its runner up for a minute, and take half a gigabyte."""
    values = values[:-1].encode()
    assert read_result(b'{"type":"result","is_error":false,"x":[%s]}\n' % values) is None
    told = b'{"type":"user","session_id":"%s","message":{"content":[%s]}}\n' % (SESSION.encode(), values)
    assert read_blocks(read_message(read_event(told))) == []
    assert read_init(b'{"type":"system","tools":[%s]}\n' % values).tools == []


def test_a_result_can_always_be_written_down():
    deep = []
    for _ in range(300):
        deep = [deep]
    ended = outcome(line(**{**GOOD_RESULT, "huge": 10**30, "deep": deep, "\x1bkey": 1}))
    assert ended.failure is None
    assert msgspec.json.decode(msgspec.json.encode(ended.result))["huge"] is None
