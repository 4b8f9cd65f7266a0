"""The counters of a running task, and when they are written down."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from sandbox.interfaces.agent import AgentEvent, RetryTold, ToolEnded, ToolStarted, TurnBegan
from sandbox.interfaces.clock import Clock
from sandbox.interfaces.gateway import Budget
from sandbox.model.events import Event, Gap, Progress, ToolCall, Trouble, Usage
from sandbox.model.limits import OPEN_TOOL_CALLS_MAX, PROGRESS_INTERVAL_SECONDS, TOOL_CALLS_TOLD_MAX
from sandbox.model.task import Task

EAGER_INTERVAL_SECONDS = PROGRESS_INTERVAL_SECONDS / 10


class ProgressMeter:
    """Counts what happens and records a snapshot when it is due.

    A change of tool, turn or usage is told at most ten times as often as output bytes alone are. before: what earlier
    attempts of the task came to, which is counted on from.
    """

    def __init__(self, record: Callable[[Event], object], now: Callable[[], datetime], before: Progress) -> None:
        self._record = record
        self._now = now
        self._counters = before
        self._denied_before = before.egress_denied
        self._open_tools: dict[str, tuple[str, float]] = {}
        self._activity_at: datetime | None = before.last_activity_at
        self._told = 0
        self._output_bytes = before.output_bytes
        self._dirty = self._eager = False
        self._told_at = float("-inf")

    def output(self, byte_count: int) -> None:
        """Bytes came out of the agent."""
        self._output_bytes += byte_count
        self._activity_at = self._now()
        self._dirty = True

    def usage(self, usage: Usage) -> None:
        """A model request was answered."""
        cached = usage.cache_read_tokens + usage.cache_write_tokens
        self._change(
            input_tokens=self._counters.input_tokens + usage.input_tokens + cached,
            output_tokens=self._counters.output_tokens + usage.output_tokens,
            cost_usd=round(self._counters.cost_usd + (usage.cost_usd or 0.0), 9),
        )

    def denied(self, count: int) -> None:
        """The refusals of this attempt so far. Reported as seldom as output: a sandbox can cause any number of them."""
        count += self._denied_before
        if count != self._counters.egress_denied:
            self._counters = msgspec.structs.replace(self._counters, egress_denied=count)
            self._dirty = True

    def agent_event(self, event: AgentEvent, monotonic: float) -> None:
        """Something stood in the agent's own event stream."""
        match event:
            case ToolStarted():
                if len(self._open_tools) < OPEN_TOOL_CALLS_MAX:
                    self._open_tools[event.tool_use_id] = (event.tool, monotonic)
                self._change(tool_calls=self._counters.tool_calls + 1, current_tool=event.tool)
            case ToolEnded():
                _, started = self._open_tools.pop(event.tool_use_id, (event.tool, monotonic))
                duration_ms = round((monotonic - started) * 1000)
                self._record_claim(ToolCall(event.tool, event.tool_use_id, duration_ms, event.is_error))
                current = next(reversed(self._open_tools.values()))[0] if self._open_tools else None
                self._change(current_tool=current)
            case TurnBegan():
                self._change(turns=self._counters.turns + 1)
            case RetryTold():
                self._record_claim(Trouble("model_retry", event.message))

    def tell(self, monotonic: float) -> None:
        """Record a snapshot if one is due."""
        interval = EAGER_INTERVAL_SECONDS if self._eager else PROGRESS_INTERVAL_SECONDS
        if self._dirty and monotonic - self._told_at >= interval:
            self._tell(monotonic)

    def close(self) -> None:
        """Record the last snapshot; no tool is open any more."""
        self._open_tools.clear()
        self._change(current_tool=None)
        self._tell(float("inf"))

    def _record_claim(self, event: Event) -> None:
        """What stands in the agent's stream costs it nothing to make up, and goes on when its output is left out."""
        self._told += 1
        if self._told <= TOOL_CALLS_TOLD_MAX:
            self._record(event)
        elif self._told == TOOL_CALLS_TOLD_MAX + 1:
            self._record(Gap(0, 0, f"Over {TOOL_CALLS_TOLD_MAX} tool calls and retries are counted, and not told."))

    def _change(self, **counters: Any) -> None:
        self._counters = msgspec.structs.replace(self._counters, **counters)
        self._dirty = self._eager = True

    def _tell(self, monotonic: float) -> None:
        self._change(output_bytes=self._output_bytes, last_activity_at=self._activity_at)
        self._record(self._counters)
        self._told_at = monotonic
        self._dirty = self._eager = False


def remaining_seconds(task: Task, clock: Clock) -> float:
    """Of `lifecycle.timeout`, which counts from the first agent's start, by the monotonic clock.

    That clock begins anew when the machine does; then the wall clock is all there is.
    """
    timeout, beginning, attempt = task.manifest.lifecycle.timeout_seconds, task.beginning, task.attempt
    if beginning is None or attempt is None or task.started_at is None:
        return timeout
    if beginning.boot_id and beginning.boot_id == attempt.boot_id:
        return timeout - (clock.monotonic() - beginning.monotonic_seconds)
    return timeout - max(0.0, (clock.now() - task.started_at).total_seconds())


def budget_of(task: Task) -> Budget:
    """What the task may cost, and what the gateways of earlier attempts counted of it."""
    lifecycle, spent = task.manifest.lifecycle, task.spent
    tokens = spent.input_tokens + spent.output_tokens
    return Budget(lifecycle.budget_usd, lifecycle.budget_tokens, spent_usd=spent.usd, spent_tokens=tokens)
