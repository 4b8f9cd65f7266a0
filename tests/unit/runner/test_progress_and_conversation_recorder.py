"""Progress is reported when it changes, at a limited rate."""

from datetime import UTC, datetime
from itertools import groupby

import msgspec
import pytest

from sandbox.interfaces.agent import ApiRetry, ParsedToolCallEnd, TurnStarted
from sandbox.model.events import (
    AgentMessage,
    AgentResult,
    ErrorReported,
    Gap,
    Progress,
    ToolCallEnded,
    ToolCallStarted,
    ToolResult,
    Usage,
)
from sandbox.runner.progress_and_conversation_recorder import ProgressAndConversationRecorder


class RecordedEvents(list):
    def of_type(self, kind):
        return [event for event in self if isinstance(event, kind)]


NO_PROGRESS = Progress()


def create_tracker(before=NO_PROGRESS):
    events = RecordedEvents()
    return ProgressAndConversationRecorder(events.append, lambda: datetime(2026, 1, 29, tzinfo=UTC), before), events


def test_tool_is_current_while_it_runs_and_its_duration_is_recorded_when_it_ends():
    tracker, events = create_tracker()
    tracker.handle_agent_event(ToolCallStarted("Bash", "t1"), 10.0)
    tracker.record_if_due(10.0)
    tracker.handle_agent_event(ParsedToolCallEnd("t1", "Bash", is_error=True), 11.5)
    tracker.record_if_due(12.0)
    assert events.of_type(ToolCallEnded) == [ToolCallEnded("Bash", "t1", 1500, is_error=True)]
    assert [(p.current_tool, p.tool_calls) for p in events.of_type(Progress)] == [("Bash", 1), (None, 1)]


def test_most_recent_open_tool_is_current():
    tracker, events = create_tracker()
    tracker.handle_agent_event(ToolCallStarted("Agent", "t1"), 1.0)
    tracker.handle_agent_event(ToolCallStarted("Read", "t2"), 2.0)
    tracker.handle_agent_event(ParsedToolCallEnd("t2", "Read", is_error=False), 3.0)
    tracker.record_if_due(3.0)
    assert events.of_type(Progress)[-1].current_tool == "Agent"


def test_current_tool_has_the_beginning_of_its_summary():
    tracker, events = create_tracker()
    for step, event in enumerate(
        (
            ToolCallStarted("Bash", "t1", summary="npm test"),
            ToolCallStarted("Read", "t2", summary="x" * 500),
            ParsedToolCallEnd("t2", "Read", is_error=False),
            ParsedToolCallEnd("t1", "Bash", is_error=False),
            ToolCallStarted("Other", "t3"),
        )
    ):
        tracker.handle_agent_event(event, float(step))
        tracker.record_if_due(float(step))
    assert [(one.current_tool, one.current_subject) for one in events.of_type(Progress)] == [
        ("Bash", "npm test"),
        ("Read", "x" * 200),
        ("Bash", "npm test"),
        (None, None),
        ("Other", None),
    ]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"command": "for i in 1 2; do x; done", "input": {"description": "Build it\nall"}}, "command: Build it"),
        ({"command": "npm test", "summary": "npm test"}, "command: npm test"),
        ({"command": "npm test", "input": {"description": "a\x1b[8mb"}}, "command: a [8mb"),
        ({"input": {"description": "Read all"}}, "task: Read all"),
        ({}, "task: Tool"),
        ({"summary": "x" * 500}, f"task: {'x' * 169}"),
    ],
)
def test_agent_waiting_for_a_background_call_has_a_text_but_no_current_tool(call, text):
    tracker, events = create_tracker()
    for step, event in enumerate(
        (
            ToolCallStarted("Tool", "t1", **call),
            ToolResult("t1", in_background=True),
            AgentResult(text="I wait."),
            TurnStarted(),
            AgentResult(text="I wait again."),
            ParsedToolCallEnd("t1", "Tool", is_error=False),
        )
    ):
        tracker.handle_agent_event(event, float(step))
        tracker.record_if_due(float(step))
    subject = call.get("summary", "")[:200] or None
    waits = (None, f"Waiting for a background {text}")
    shown = [(one.current_tool, one.current_subject) for one in events.of_type(Progress)]
    assert [one for one, _ in groupby(shown)] == [("Tool", subject), waits, ("Tool", subject), waits, (None, None)]


def test_usage_is_summed_and_cached_tokens_count_as_input():
    tracker, events = create_tracker()
    tracker.add_usage(Usage("m", 10, 5, cache_read_tokens=100, cache_write_tokens=3, cost_usd=0.5))
    tracker.add_usage(Usage("unknown", 1, 1, cost_usd=None))
    tracker.close()
    assert (events[-1].input_tokens, events[-1].output_tokens, events[-1].cost_usd) == (114, 6, 0.5)


def test_output_is_reported_once_per_second():
    tracker, events = create_tracker()
    for step in range(31):
        tracker.add_output(10)
        tracker.record_if_due(step / 10)
    assert [p.output_bytes for p in events.of_type(Progress)] == [10, 110, 210, 310]


def test_tool_change_is_reported_sooner_than_output():
    tracker, events = create_tracker()
    tracker.add_output(10)
    tracker.record_if_due(0.0)
    tracker.handle_agent_event(ToolCallStarted("Bash", "t1"), 0.05)
    for step in range(5, 20):
        tracker.record_if_due(step / 100)
    assert [p.current_tool for p in events.of_type(Progress)] == [None, "Bash"]


def test_tools_over_the_timing_limit_are_still_counted(monkeypatch):
    monkeypatch.setattr("sandbox.runner.progress_and_conversation_recorder.OPEN_TOOL_CALLS_MAX", 2)
    tracker, events = create_tracker()
    for number in range(3):
        tracker.handle_agent_event(ToolCallStarted("Read", f"t{number}"), 0.0)
    for number in range(3):
        tracker.handle_agent_event(ParsedToolCallEnd(f"t{number}", "Read", is_error=False), 2.0)
    tracker.close()
    assert [call.duration_ms for call in events.of_type(ToolCallEnded)] == [2000, 2000, 0]
    assert events[-1].tool_calls == 3


def test_unchanged_progress_is_not_reported():
    tracker, events = create_tracker()
    tracker.handle_agent_event(TurnStarted(), 0.0)
    tracker.record_if_due(1.0)
    tracker.record_if_due(100.0)
    assert len(events) == 1


CONVERSATION = [AgentMessage("Hello."), ToolCallStarted("Bash", "t"), ToolResult("t", "x"), AgentResult("Done.")]


def test_conversation_is_recorded_in_order():
    tracker, events = create_tracker()
    for event in [*CONVERSATION[:3], ParsedToolCallEnd("t", "Bash", is_error=False), CONVERSATION[3]]:
        tracker.handle_agent_event(event, 1.0)
    assert events == [*CONVERSATION[:3], ToolCallEnded("Bash", "t", 0), CONVERSATION[3]]


def test_last_message_is_the_latest_text_of_the_main_conversation():
    tracker, _ = create_tracker()
    assert tracker.last_message == ""
    others = [
        AgentMessage("Let me think.", "thinking"),
        AgentMessage("Subagent.", "text", "t"),
        AgentMessage("Prompt of a subagent.", "prompt", "t"),
        AgentMessage("Claude Code 2 started", "notice"),
        AgentResult(" \n", is_error=True),
    ]
    for event, last in (
        (AgentMessage("One."), "One."),
        *((other, "One.") for other in others),
        (CONVERSATION[3], "Done."),
    ):
        tracker.handle_agent_event(event, 1.0)
        assert tracker.last_message == last


def test_conversation_is_not_recorded_for_a_server_that_cannot_read_it():
    events = RecordedEvents()
    tracker = ProgressAndConversationRecorder(
        events.append, lambda: datetime(2026, 1, 29, tzinfo=UTC), NO_PROGRESS, records_conversation=False
    )
    for event in [*CONVERSATION, ParsedToolCallEnd("t", "Bash", is_error=False)]:
        tracker.handle_agent_event(event, 1.0)
    assert events == [ToolCallEnded("Bash", "t", 0)]


def test_conversation_size_is_limited_over_all_attempts(monkeypatch):
    message = AgentMessage("x" * 1000)
    size_bytes = 128 + len(msgspec.json.encode(message))
    monkeypatch.setattr("sandbox.runner.progress_and_conversation_recorder.CONVERSATION_BYTES_MAX", 3 * size_bytes)
    tracker, events = create_tracker()
    tracker.handle_agent_event(message, 1.0)
    tracker.close()
    tracker, events = create_tracker(events[-1])
    for event in [*[message] * 5, ToolCallStarted("Bash", "t"), ParsedToolCallEnd("t", "Bash", is_error=False)]:
        tracker.handle_agent_event(event, 1.0)
    assert events.of_type(AgentMessage) == [message] * 2
    assert len(events.of_type(Gap)) == 1
    assert events.of_type(ToolCallEnded) == [ToolCallEnded("Bash", "t", 0)]


def test_api_retry_is_reported_as_an_event():
    tracker, events = create_tracker()
    tracker.handle_agent_event(ApiRetry("overloaded, attempt 1"), 0.0)
    assert events == [ErrorReported("model_retry", "overloaded, attempt 1")]


def test_final_progress_has_no_current_tool():
    tracker, events = create_tracker()
    tracker.handle_agent_event(ToolCallStarted("Bash", "t1"), 0.0)
    tracker.close()
    assert events[-1].current_tool is None
    assert events[-1].tool_calls == 1


def test_denied_count_of_the_gateway_is_recorded():
    tracker, events = create_tracker()
    tracker.set_denied_count(0)
    tracker.record_if_due(0.0)
    assert events == [], "nothing has changed"
    tracker.set_denied_count(41)
    tracker.record_if_due(1.0)
    tracker.close()
    assert [event.egress_denied for event in events] == [41, 41]


def test_later_attempt_continues_the_counters():
    before = Progress(output_bytes=100, tool_calls=2, turns=3, input_tokens=10, output_tokens=5, egress_denied=4)
    tracker, events = create_tracker(before)
    tracker.add_output(10)
    tracker.add_usage(Usage("m", 1, 1))
    tracker.handle_agent_event(TurnStarted(), 1.0)
    tracker.set_denied_count(1)
    tracker.close()
    progress = events[-1]
    assert (progress.output_bytes, progress.tool_calls, progress.turns) == (110, 2, 4)
    assert (progress.input_tokens, progress.output_tokens, progress.egress_denied) == (11, 6, 5)


def test_denied_count_is_reported_once_per_second():
    tracker, events = create_tracker()
    for step in range(100):
        tracker.set_denied_count(step * 1000)
        tracker.record_if_due(step / 10)
    assert len(events) <= 11


def test_usage_totals_are_capped_at_the_limits_of_records():
    """A server rejects a worker's records if their totals exceed these limits."""
    tracker, events = create_tracker(Progress(input_tokens=2**53 - 2, output_tokens=2**53 - 2, cost_usd=1e9 - 1))
    for second in range(2):
        tracker.add_usage(Usage("m", 1, 1, cost_usd=1.0))
        tracker.record_if_due(float(second))
        counters = events.of_type(Progress)[-1]
        totals = (counters.input_tokens, counters.output_tokens, counters.cost_usd)
        assert totals == (2**53 - 1, 2**53 - 1, 1e9)
        tracker.add_output(1)
