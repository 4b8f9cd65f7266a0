"""The time and the budget that a task has left after earlier attempts."""

from sandbox.interfaces.clock import Clock
from sandbox.interfaces.gateway import Budget
from sandbox.model.task import Task


def remaining_seconds(task: Task, clock: Clock) -> float:
    """Return the seconds left of `lifecycle.timeout`, which runs from the first agent's start.

    The time is measured by the monotonic clock, or by the wall clock after a reboot.
    """
    timeout, agent_start_time, attempt = task.manifest.lifecycle.timeout_seconds, task.agent_start_time, task.attempt
    if agent_start_time is None or attempt is None or task.started_at is None:
        return timeout
    if agent_start_time.boot_id and agent_start_time.boot_id == attempt.boot_id:
        return timeout - (clock.monotonic() - agent_start_time.monotonic_seconds)
    return timeout - max(0.0, (clock.now() - task.started_at).total_seconds())


def budget_with_earlier_usage(task: Task) -> Budget:
    """Return the task's budget and the usage that the gateways of earlier attempts counted."""
    lifecycle, spent = task.manifest.lifecycle, task.spent
    tokens = spent.input_tokens + spent.output_tokens
    return Budget(lifecycle.budget_usd, lifecycle.budget_tokens, spent_usd=spent.usd, spent_tokens=tokens)
