"""A task's limits apply to the total across all its attempts."""

import asyncio
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from doubles.manifests import manifest
from sandbox.interfaces.gateway import Budget
from sandbox.model.events import Progress
from sandbox.model.task import AgentStartTime, Attempt, StateHistoryEntry, Task, TotalUsage
from sandbox.model.task_state import TaskState
from sandbox.runner import agent_output
from sandbox.runner.task_limits import budget_with_earlier_usage, remaining_seconds

START_TIME = datetime(2026, 1, 29, 10, 0, tzinfo=UTC)


class FakeClock:
    def __init__(self, monotonic, now):
        self._monotonic, self._now = monotonic, now

    def monotonic(self):
        return self._monotonic

    def now(self):
        return self._now


FIRST_AGENT = AgentStartTime(100.0, "boot")


def task(*, boot_id="boot", agent_start_time=FIRST_AGENT, **fields):
    history = (StateHistoryEntry(TaskState.PENDING, START_TIME), StateHistoryEntry(TaskState.RUNNING, START_TIME))
    task_manifest = manifest(lifecycle={"timeout": "60s", "budget_usd": 2.0, "budget_tokens": 1000})
    attempt = Attempt("bcdefghi2345", "bubblewrap", "here", number=2, boot_id=boot_id)
    return Task(
        "t",
        task_manifest,
        TaskState.RUNNING,
        "",
        history,
        9,
        attempt=attempt,
        attempt_count=2,
        agent_start_time=agent_start_time,
        **fields,
    )


def test_full_time_remains_before_the_first_agent_starts():
    assert remaining_seconds(task(agent_start_time=None), FakeClock(500.0, START_TIME)) == 60


@pytest.mark.parametrize("jump", [timedelta(), timedelta(hours=1), timedelta(hours=-1)])
def test_remaining_time_uses_the_monotonic_clock(jump):
    assert remaining_seconds(task(), FakeClock(125.0, START_TIME + jump)) == 35


@pytest.mark.parametrize(("later", "left"), [(20, 40), (80, -20), (-3600, 60)])
def test_remaining_time_uses_the_wall_clock_after_a_reboot(later, left):
    assert remaining_seconds(task(boot_id="another"), FakeClock(3.0, START_TIME + timedelta(seconds=later))) == left


def test_usage_of_earlier_attempts_reduces_the_budget():
    spent = TotalUsage(input_tokens=300, output_tokens=20, usd=0.5)
    assert budget_with_earlier_usage(task(spent=spent)) == Budget(2.0, 1000, spent_usd=0.5, spent_tokens=320)


def test_output_quota_counts_lines_of_earlier_attempts(monkeypatch):
    monkeypatch.setattr(agent_output, "OUTPUT_BYTES_MAX", 1024**2)
    task_with_many_lines = msgspec.structs.replace(task(progress=Progress(output_bytes=9000)), last_seq=9000)
    exhausted = agent_output.OutputQuota(
        FakeClock(0.0, START_TIME), agent_output.earlier_output_bytes(task_with_many_lines)
    )
    assert not asyncio.run(exhausted.acquire(1))
    fresh = agent_output.OutputQuota(FakeClock(0.0, START_TIME), agent_output.earlier_output_bytes(task()))
    assert asyncio.run(fresh.acquire(1))


def test_final_progress_includes_every_reported_request():
    progress = Progress(turns=3, current_tool="Bash", input_tokens=100, output_tokens=10, cost_usd=0.25)
    before = task(progress=progress, spent=TotalUsage(300, 20, 0.5)).final_progress
    expected = msgspec.structs.replace(progress, current_tool=None, input_tokens=300, output_tokens=20, cost_usd=0.5)
    assert before == expected
