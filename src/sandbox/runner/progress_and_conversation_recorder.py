"""Records the counters and the conversation of a running task."""

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple, Self, get_args

import msgspec

from sandbox.interfaces.agent import AgentEvent, ApiRetry, ParsedToolCallEnd, TurnStarted
from sandbox.model.display_text import replace_unprintable
from sandbox.model.events import (
    COST_USD_MAX,
    TOKENS_TOTAL_MAX,
    AgentMessage,
    AgentResult,
    ConversationEvent,
    ErrorReported,
    Event,
    Gap,
    Progress,
    ToolCallEnded,
    ToolCallStarted,
    ToolResult,
    Usage,
)
from sandbox.model.fixed_limits import (
    CONVERSATION_BYTES_MAX,
    CURRENT_SUBJECT_CHARACTERS_MAX,
    OPEN_TOOL_CALLS_MAX,
    PROGRESS_INTERVAL_SECONDS,
    TOOL_CALL_EVENTS_MAX,
)

URGENT_INTERVAL_SECONDS = PROGRESS_INTERVAL_SECONDS / 10

_RECORD_OVERHEAD_BYTES = 128
"""Size of a record in the journal without its event."""

_CONVERSATION_TYPES = get_args(ConversationEvent)


class _Call(NamedTuple):
    """A tool call. subject: the beginning of the call's summary; None if there is no summary.

    waiting_text: the text while the agent waits for the call, which continues in the background. The task's page builds
    the same text.
    """

    tool: str
    subject: str | None
    waiting_text: str

    @classmethod
    def of(cls, event: ToolCallStarted) -> Self:
        subject = event.summary[:CURRENT_SUBJECT_CHARACTERS_MAX] or None
        description = event.input.get("description", "")[:CURRENT_SUBJECT_CHARACTERS_MAX].partition("\n")[0]
        about = replace_unprintable(description, lambda _: " ").strip() or subject or event.tool
        kind = "task" if event.command is None else "command"
        waiting_text = f"Waiting for a background {kind}: {about}"[:CURRENT_SUBJECT_CHARACTERS_MAX]
        return cls(event.tool, subject, waiting_text)


def _current(call: _Call | None) -> dict[str, str | None]:
    """Return the fields that show the current tool call."""
    return {"current_tool": call.tool if call else None, "current_subject": call.subject if call else None}


class ProgressAndConversationRecorder:
    """Counts events and records a snapshot when one is due.

    A snapshot is due URGENT_INTERVAL_SECONDS after the last one if the tool, turn or usage has changed, and
    PROGRESS_INTERVAL_SECONDS after the last one if only other counters have changed, such as output bytes.

    baseline: the counters of earlier attempts, from which counting continues.
    records_conversation: whether to record conversation events too.
    last_message: the agent's last message in the main conversation; empty before the first one.
    changed: set when the next snapshot becomes due earlier; cleared by the caller.
    """

    def __init__(
        self,
        record: Callable[[Event], object],
        now: Callable[[], datetime],
        baseline: Progress,
        *,
        records_conversation: bool = True,
    ) -> None:
        self.last_message = ""
        self.changed = asyncio.Event()
        self._record = record
        self._records_conversation = records_conversation
        self._has_recorded_conversation_gap = False
        self._now = now
        self._counters = baseline
        self._baseline_denied = baseline.egress_denied
        self._open_tools: dict[str, tuple[_Call, float]] = {}
        self._background_calls: dict[str, _Call] = {}
        self._has_ended_round = False
        self._last_activity_at: datetime | None = baseline.last_activity_at
        self._bounded_event_count = 0
        self._output_bytes = baseline.output_bytes
        self._is_dirty = self._is_urgent = False
        self._recorded_at = float("-inf")

    def add_output(self, byte_count: int) -> None:
        """Count output bytes of the agent."""
        self._output_bytes += byte_count
        self._last_activity_at = self._now()
        self._mark_dirty()

    def add_usage(self, usage: Usage) -> None:
        """Count the usage of a model request."""
        before, cached = self._counters, usage.cache_read_tokens + usage.cache_write_tokens
        self._update(
            input_tokens=min(before.input_tokens + usage.input_tokens + cached, TOKENS_TOTAL_MAX),
            output_tokens=min(before.output_tokens + usage.output_tokens, TOKENS_TOTAL_MAX),
            cost_usd=min(round(before.cost_usd + (usage.cost_usd or 0.0), 9), COST_USD_MAX),
        )

    def set_denied_count(self, count: int) -> None:
        """Set the number of this attempt's denied connections.

        The count is recorded no more often than output bytes, because a sandbox can cause any number of denials.
        """
        count += self._baseline_denied
        if count != self._counters.egress_denied:
            self._counters = msgspec.structs.replace(self._counters, egress_denied=count)
            self._mark_dirty()

    def handle_agent_event(self, event: AgentEvent, monotonic: float) -> None:
        """Count an event of the agent's own event stream, and record it if it is part of the conversation."""
        if isinstance(event, _CONVERSATION_TYPES):
            self._record_conversation(event)
        match event:
            case AgentMessage(text=text, kind="text", parent_tool_use_id=None) | AgentResult(text=text):
                self.last_message = text if text.strip() else self.last_message
            case ToolResult(tool_use_id=id_, in_background=True) if id_ in self._open_tools:
                self._background_calls[id_] = self._open_tools[id_][0]
        match event:
            case AgentResult() if self._background_calls:
                self._has_ended_round = True
                self._update(**self._current_activity())
            case ToolCallStarted():
                self._has_ended_round = False
                if len(self._open_tools) < OPEN_TOOL_CALLS_MAX:
                    self._open_tools[event.tool_use_id] = (_Call.of(event), monotonic)
                self._update(tool_calls=self._counters.tool_calls + 1, **_current(_Call.of(event)))
            case ParsedToolCallEnd():
                _, started = self._open_tools.pop(event.tool_use_id, (None, monotonic))
                duration_ms = round((monotonic - started) * 1000)
                self._record_bounded(ToolCallEnded(event.tool, event.tool_use_id, duration_ms, event.is_error))
                self._background_calls.pop(event.tool_use_id, None)
                self._update(**self._current_activity())
            case TurnStarted():
                self._has_ended_round = False
                self._update(turns=self._counters.turns + 1, **self._current_activity())
            case ApiRetry():
                self._record_bounded(ErrorReported("model_retry", event.message))

    def _current_activity(self) -> dict[str, str | None]:
        """Return the fields that show the latest open call, or the background call that the agent waits for."""
        if self._has_ended_round and self._background_calls:
            latest = next(reversed(self._background_calls.values()))
            return {"current_tool": None, "current_subject": latest.waiting_text}
        return _current(next(reversed(self._open_tools.values()))[0] if self._open_tools else None)

    def record_if_due(self, monotonic: float) -> float:
        """Record a snapshot if one is due. Returns the seconds until the next one is due, if nothing else changes."""
        if not self._is_dirty:
            return PROGRESS_INTERVAL_SECONDS
        interval = URGENT_INTERVAL_SECONDS if self._is_urgent else PROGRESS_INTERVAL_SECONDS
        remaining_seconds = self._recorded_at + interval - monotonic
        if remaining_seconds > 0:
            return remaining_seconds
        self._record_snapshot(monotonic)
        return PROGRESS_INTERVAL_SECONDS

    def close(self) -> None:
        """Record the last snapshot, which shows no running tool."""
        self._open_tools.clear()
        self._update(**_current(None))
        self._record_snapshot(float("inf"))

    def _record_bounded(self, event: Event) -> None:
        """Record an event, up to a limit: an agent can cause any number of events, even while its output is dropped."""
        self._bounded_event_count += 1
        if self._bounded_event_count <= TOOL_CALL_EVENTS_MAX:
            self._record(event)
        elif self._bounded_event_count == TOOL_CALL_EVENTS_MAX + 1:
            self._record(Gap(0, 0, f"Tool calls and retries beyond {TOOL_CALL_EVENTS_MAX} are counted but not listed."))

    def _record_conversation(self, event: ConversationEvent) -> None:
        """Record an event, up to a total size. Output contains the same texts, but has a separate limit."""
        if not self._records_conversation:
            return
        size_bytes = _RECORD_OVERHEAD_BYTES + len(msgspec.json.encode(event))
        total_bytes = self._counters.conversation_bytes + size_bytes
        if total_bytes <= CONVERSATION_BYTES_MAX:
            self._record(event)
            self._counters = msgspec.structs.replace(self._counters, conversation_bytes=total_bytes)
            self._mark_dirty()
        elif not self._has_recorded_conversation_gap:
            self._has_recorded_conversation_gap = True
            limit = f"{CONVERSATION_BYTES_MAX // 1024**2} MiB"
            self._record(
                Gap(0, 0, f"Only the first {limit} of the conversation is recorded; the output may contain the rest.")
            )

    def _update(self, **counters: Any) -> None:
        self._counters = msgspec.structs.replace(self._counters, **counters)
        if not self._is_urgent:
            self._is_dirty = self._is_urgent = True
            self.changed.set()

    def _mark_dirty(self) -> None:
        if not self._is_dirty:
            self._is_dirty = True
            self.changed.set()

    def _record_snapshot(self, monotonic: float) -> None:
        self._update(output_bytes=self._output_bytes, last_activity_at=self._last_activity_at)
        self._record(self._counters)
        self._recorded_at = monotonic
        self._is_dirty = self._is_urgent = False
