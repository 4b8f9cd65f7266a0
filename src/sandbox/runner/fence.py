"""Keeps a runner from what is not its own any more: an order can come late, or twice."""

from sandbox.contracts.placement import LaunchOrder
from sandbox.model.errors import SandboxError
from sandbox.model.event import AttemptStarted, Record
from sandbox.model.task import Task


class StaleOrderError(SandboxError):
    """The order is of an attempt that is over, or that somebody else has begun to carry out."""

    code = "internal_error"


def refuse_stale(order: LaunchOrder, task: Task | None, last: Record | None) -> None:
    """Whoever holds the journal's lock asks before the first step. last: the newest record.

    An attempt is begun once, directly after it was written down; a finisher's is the last one of a task that has not
    ended. Raises StaleOrderError.
    """
    if task is None or task.attempt is None or task.attempt.id != order.attempt_id or task.state.is_terminal:
        raise StaleOrderError(f"Task {order.task_id} has no attempt {order.attempt_id} under way.")
    event = last.event if last is not None else None
    if not order.finish and not (isinstance(event, AttemptStarted) and event.attempt_id == order.attempt_id):
        raise StaleOrderError(f"Attempt {order.attempt_id} was begun by another runner.")
