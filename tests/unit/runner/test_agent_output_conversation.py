"""Lines of stdout are converted to conversation events, which are redacted and recorded after their line."""

import asyncio
import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.agents.claude_code.output_parser import ClaudeOutputParser
from sandbox.bootstrap.clock import SystemClock
from sandbox.interfaces.agent import AgentReady, ApiRetry, ParsedToolCallEnd, TurnStarted
from sandbox.model.events import AgentMessage, Output, ToolCallStarted, ToolResult
from sandbox.primitives.runner_cpu_throttle import CpuThrottle
from sandbox.runner.agent_output import AgentOutput, OutputQuota, StdoutProcessing
from sandbox.runner.attempt_recorder import redact_event
from sandbox.secrets.redaction.redactor import SecretRedactor

SESSION = "5ddb80a7-f209-4a6e-9cd9-29f469dd8600"
UNRECORDED_TYPES = (AgentReady, ApiRetry, ParsedToolCallEnd, TurnStarted)


def encode(kind, *blocks, ensure_ascii=True):
    message = {"type": kind, "session_id": SESSION, "message": {"id": "m", "content": list(blocks)}}
    return json.dumps(message, ensure_ascii=ensure_ascii).encode() + b"\n"


def say(text, **options):
    return encode("assistant", {"type": "text", "text": text}, **options)


def process(chunks, secrets=None, *, marks_parsed=True):
    """Return the events that are recorded when the agent writes these chunks."""
    events = []
    redactor = SecretRedactor(secrets) if secrets else None
    record = events.append if redactor is None else lambda event: events.append(redact_event(event, redactor))

    def handle(event):
        if not isinstance(event, UNRECORDED_TYPES):
            record(event)

    async def read():
        output = AgentOutput(
            record,
            lambda _: None,
            StdoutProcessing("stdout", ClaudeOutputParser(SESSION).parse_line, handle, marks_parsed=marks_parsed),
            redactor=redactor,
            quota=OutputQuota(SystemClock()),
            cpu_queue=CpuThrottle().queue(),
        )
        reader = asyncio.StreamReader()
        for chunk in chunks:
            reader.feed_data(chunk)
        reader.feed_eof()
        await output.read_stdout(reader)

    asyncio.run(read())
    return events


def test_events_of_a_line_follow_its_record():
    use = {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "ls"}}
    events = process([say("Hello.") + b"noise\n" + encode("assistant", use, {"type": "text", "text": "More."})])
    assert [type(event).__name__ for event in events] == [
        *("Output", "AgentMessage", "Output", "Output", "ToolCallStarted", "AgentMessage"),
    ]
    assert [event.is_parsed for event in events if isinstance(event, Output)] == [True, False, True]


def test_only_the_last_part_of_a_long_line_is_marked_as_parsed():
    events = process([say("x" * 3_000_000)])
    parts = [(event.is_continued, event.is_parsed) for event in events if isinstance(event, Output)]
    assert parts == [(True, False), (True, False), (False, True)]
    assert isinstance(events[-1], AgentMessage)


def test_lines_are_not_marked_as_parsed_for_a_server_that_cannot_read_the_events():
    (output, _) = process([say("Hello.")], marks_parsed=False)
    assert not output.is_parsed


def test_many_events_from_one_line_do_not_starve_other_coroutines():
    turns = 0

    class CountingQueue(contextlib.nullcontext):
        async def wait(self):
            nonlocal turns
            turns += 1

    async def read():
        events = []
        processing = StdoutProcessing("stdout", lambda _: [TurnStarted()] * 1000, events.append, marks_parsed=True)
        quota = OutputQuota(SystemClock())
        output = AgentOutput(
            lambda _: None, lambda _: None, processing, redactor=None, quota=quota, cpu_queue=CountingQueue()
        )
        reader = asyncio.StreamReader()
        reader.feed_data(b"line\n")
        reader.feed_eof()
        await output.read_stdout(reader)
        return len(events)

    assert asyncio.run(read()) == 1000
    assert turns >= 10


SECRETS = st.text(st.sampled_from('aZ9"\\/\n\t<é\U0001f600-_='), min_size=8, max_size=20).filter(
    lambda value: len(set(value)) >= 4 and value == value.strip()
)


@given(SECRETS, st.sampled_from(["text", "thinking", "command", "content", "input"]), st.booleans(), st.data())
@settings(max_examples=150)
def test_no_conversation_event_contains_a_secret(secret, place, ensure_ascii, data):
    block = {
        "text": {"type": "text", "text": f"before {secret} after"},
        "thinking": {"type": "thinking", "thinking": f"before {secret} after"},
        "command": {"type": "tool_use", "id": "t2", "name": "Bash", "input": {"command": f"echo {secret}"}},
        "input": {"type": "tool_use", "id": "t2", "name": "Tool", "input": {"deep": [{"value": f"= {secret} ="}]}},
        "content": {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": f"< {secret} >"}]},
    }[place]
    start = {"type": "tool_use", "id": "t1", "name": "Bash", "input": {}}
    kind = "user" if place == "content" else "assistant"
    stream = encode("assistant", start) + encode(kind, block, ensure_ascii=ensure_ascii)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    chunks = [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True) if begin < end]
    events = process(chunks, {"KEY": secret})
    shown = [text for event in events if not isinstance(event, Output) for text in texts(event)]
    assert len(shown) > 1
    assert [text for text in shown if secret in text or json.dumps(secret)[1:-1] in text] == []
    assert any("[REDACTED:KEY]" in text for text in shown)


def texts(event):
    match event:
        case AgentMessage():
            return [event.text]
        case ToolCallStarted():
            return [event.tool, event.summary, event.command or "", *event.input.values()]
        case ToolResult():
            return [event.output]


@pytest.mark.parametrize("text", ["before {} after", "{}", "x" * 99_990 + "{}"])
def test_secret_is_redacted_before_a_text_is_truncated(text):
    secret = "s3cret-value-of-the-customer"
    (_, message) = process([say(text.format(secret))], {"KEY": secret})
    assert "s3cret" not in message.text
