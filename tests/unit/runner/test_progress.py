"""The counters of a task are told when they change, and not too often."""

from datetime import UTC, datetime

from sandbox.interfaces.agent import ApiRetry, ToolFinished, ToolStarted, TurnStarted
from sandbox.model.events import ErrorReported, Progress, ToolCall, Usage
from sandbox.runner.progress import ProgressTracker


class Notes(list):
    def of(self, kind):
        return [event for event in self if isinstance(event, kind)]


NOTHING = Progress()


def meter(before=NOTHING):
    notes = Notes()
    return ProgressTracker(notes.append, lambda: datetime(2026, 1, 29, tzinfo=UTC), before), notes


def test_a_tool_is_current_while_it_runs_and_timed_when_it_ends():
    meter_, notes = meter()
    meter_.handle_agent_event(ToolStarted("t1", "Bash"), 10.0)
    meter_.record_if_due(10.0)
    meter_.handle_agent_event(ToolFinished("t1", "Bash", is_error=True), 11.5)
    meter_.record_if_due(12.0)
    assert notes.of(ToolCall) == [ToolCall("Bash", "t1", 1500, is_error=True)]
    assert [(p.current_tool, p.tool_calls) for p in notes.of(Progress)] == [("Bash", 1), (None, 1)]


def test_with_two_tools_open_the_younger_one_is_current():
    meter_, notes = meter()
    meter_.handle_agent_event(ToolStarted("t1", "Agent"), 1.0)
    meter_.handle_agent_event(ToolStarted("t2", "Read"), 2.0)
    meter_.handle_agent_event(ToolFinished("t2", "Read", is_error=False), 3.0)
    meter_.record_if_due(3.0)
    assert notes.of(Progress)[-1].current_tool == "Agent"


def test_tokens_and_dollars_add_up_and_cached_tokens_count_as_input():
    meter_, notes = meter()
    meter_.add_usage(Usage("m", 10, 5, cache_read_tokens=100, cache_write_tokens=3, cost_usd=0.5))
    meter_.add_usage(Usage("unknown", 1, 1, cost_usd=None))
    meter_.close()
    assert (notes[-1].input_tokens, notes[-1].output_tokens, notes[-1].cost_usd) == (114, 6, 0.5)


def test_output_alone_is_told_once_a_second():
    meter_, notes = meter()
    for tenth in range(31):
        meter_.add_output(10)
        meter_.record_if_due(tenth / 10)
    assert [p.output_bytes for p in notes.of(Progress)] == [10, 110, 210, 310]


def test_a_change_of_tool_is_told_sooner_than_output_alone():
    meter_, notes = meter()
    meter_.add_output(10)
    meter_.record_if_due(0.0)
    meter_.handle_agent_event(ToolStarted("t1", "Bash"), 0.05)
    for hundredth in range(5, 20):
        meter_.record_if_due(hundredth / 100)
    assert [p.current_tool for p in notes.of(Progress)] == [None, "Bash"]


def test_more_tools_at_once_than_are_timed_are_still_counted(monkeypatch):
    monkeypatch.setattr("sandbox.runner.progress.OPEN_TOOL_CALLS_MAX", 2)
    meter_, notes = meter()
    for number in range(3):
        meter_.handle_agent_event(ToolStarted(f"t{number}", "Read"), 0.0)
    for number in range(3):
        meter_.handle_agent_event(ToolFinished(f"t{number}", "Read", is_error=False), 2.0)
    meter_.close()
    assert [call.duration_ms for call in notes.of(ToolCall)] == [2000, 2000, 0]
    assert notes[-1].tool_calls == 3


def test_nothing_new_tells_nothing():
    meter_, notes = meter()
    meter_.handle_agent_event(TurnStarted(), 0.0)
    meter_.record_if_due(1.0)
    meter_.record_if_due(100.0)
    assert len(notes) == 1


def test_a_retry_of_the_agent_is_an_event():
    meter_, notes = meter()
    meter_.handle_agent_event(ApiRetry("overloaded, attempt 1"), 0.0)
    assert notes == [ErrorReported("model_retry", "overloaded, attempt 1")]


def test_at_the_end_no_tool_is_current():
    meter_, notes = meter()
    meter_.handle_agent_event(ToolStarted("t1", "Bash"), 0.0)
    meter_.close()
    assert notes[-1].current_tool is None
    assert notes[-1].tool_calls == 1


def test_refusals_are_counted_as_the_gateway_counts_them():
    meter_, told = meter()
    meter_.set_denied_count(0)
    meter_.record_if_due(0.0)
    assert told == [], "nothing has changed"
    meter_.set_denied_count(41)
    meter_.record_if_due(1.0)
    meter_.close()
    assert [event.egress_denied for event in told] == [41, 41]


def test_a_further_attempt_counts_on_from_the_one_before():
    before = Progress(output_bytes=100, tool_calls=2, turns=3, input_tokens=10, output_tokens=5, egress_denied=4)
    meter_, notes = meter(before)
    meter_.add_output(10)
    meter_.add_usage(Usage("m", 1, 1))
    meter_.handle_agent_event(TurnStarted(), 1.0)
    meter_.set_denied_count(1)
    meter_.close()
    told = notes[-1]
    assert (told.output_bytes, told.tool_calls, told.turns) == (110, 2, 4)
    assert (told.input_tokens, told.output_tokens, told.egress_denied) == (11, 6, 5)


def test_refusals_are_told_no_more_often_than_output():
    meter_, told = meter()
    for tenth in range(100):
        meter_.set_denied_count(tenth * 1000)
        meter_.record_if_due(tenth / 10)
    assert len(told) <= 11
