"""What earlier attempts of a task have used of what holds for all of them together."""

from sandbox.contracts.clock import Clock
from sandbox.contracts.gateway import Budget
from sandbox.model.task import Task


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
