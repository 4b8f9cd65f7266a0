"""Progress is reported when it changes, at a limited rate."""

from datetime import UTC, datetime

from sandbox.interfaces.agent import ApiRetry, ToolFinished, ToolStarted, TurnStarted
from sandbox.model.events import ErrorReported, Progress, ToolCall, Usage
from sandbox.runner.progress import ProgressTracker


class RecordedEvents(list):
    def of_type(self, kind):
        return [event for event in self if isinstance(event, kind)]


NO_PROGRESS = Progress()


def create_tracker(before=NO_PROGRESS):
    events = RecordedEvents()
    return ProgressTracker(events.append, lambda: datetime(2026, 1, 29, tzinfo=UTC), before), events


def test_tool_is_current_while_it_runs_and_timed_when_it_ends():
    tracker, events = create_tracker()
    tracker.handle_agent_event(ToolStarted("t1", "Bash"), 10.0)
    tracker.record_if_due(10.0)
    tracker.handle_agent_event(ToolFinished("t1", "Bash", is_error=True), 11.5)
    tracker.record_if_due(12.0)
    assert events.of_type(ToolCall) == [ToolCall("Bash", "t1", 1500, is_error=True)]
    assert [(p.current_tool, p.tool_calls) for p in events.of_type(Progress)] == [("Bash", 1), (None, 1)]


def test_most_recent_open_tool_is_current():
    tracker, events = create_tracker()
    tracker.handle_agent_event(ToolStarted("t1", "Agent"), 1.0)
    tracker.handle_agent_event(ToolStarted("t2", "Read"), 2.0)
    tracker.handle_agent_event(ToolFinished("t2", "Read", is_error=False), 3.0)
    tracker.record_if_due(3.0)
    assert events.of_type(Progress)[-1].current_tool == "Agent"


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
    tracker.handle_agent_event(ToolStarted("t1", "Bash"), 0.05)
    for step in range(5, 20):
        tracker.record_if_due(step / 100)
    assert [p.current_tool for p in events.of_type(Progress)] == [None, "Bash"]


def test_tools_over_the_timing_limit_are_still_counted(monkeypatch):
    monkeypatch.setattr("sandbox.runner.progress.OPEN_TOOL_CALLS_MAX", 2)
    tracker, events = create_tracker()
    for number in range(3):
        tracker.handle_agent_event(ToolStarted(f"t{number}", "Read"), 0.0)
    for number in range(3):
        tracker.handle_agent_event(ToolFinished(f"t{number}", "Read", is_error=False), 2.0)
    tracker.close()
    assert [call.duration_ms for call in events.of_type(ToolCall)] == [2000, 2000, 0]
    assert events[-1].tool_calls == 3


def test_unchanged_progress_is_not_reported():
    tracker, events = create_tracker()
    tracker.handle_agent_event(TurnStarted(), 0.0)
    tracker.record_if_due(1.0)
    tracker.record_if_due(100.0)
    assert len(events) == 1


def test_api_retry_is_reported_as_an_event():
    tracker, events = create_tracker()
    tracker.handle_agent_event(ApiRetry("overloaded, attempt 1"), 0.0)
    assert events == [ErrorReported("model_retry", "overloaded, attempt 1")]


def test_final_progress_has_no_current_tool():
    tracker, events = create_tracker()
    tracker.handle_agent_event(ToolStarted("t1", "Bash"), 0.0)
    tracker.close()
    assert events[-1].current_tool is None
    assert events[-1].tool_calls == 1


def test_denied_count_comes_from_the_gateway():
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
