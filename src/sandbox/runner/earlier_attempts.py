"""What earlier attempts of a task left: runners made it that died before they had a workspace."""

from collections.abc import Iterator
from pathlib import Path

from sandbox.interfaces.layout import AttemptLayout
from sandbox.interfaces.placement import LaunchOrder
from sandbox.model.errors import SandboxError
from sandbox.model.events import AttemptStarted, Record
from sandbox.model.task import Task
from sandbox.runner.dependencies import AttemptContext
from sandbox.runner.steps.provision import read_handle
from sandbox.system.files import fsync_path


def earlier_attempt_files(attempt: AttemptContext) -> list[Path]:
    """What was not removed when they were cleared away, but for their logs."""
    return [path for files in _earlier_layouts(attempt) for path in files.root.iterdir() if path != files.runner_log]


def files_for_resume(files: AttemptLayout) -> list[Path]:
    """What an attempt that goes on needs: what the agent wrote, and what the host compares it with."""
    return [files.disk_image, files.disk, files.repository, files.secret_fingerprint]


def take_over_files(attempt: AttemptContext) -> None:
    """Move what an earlier attempt kept into this one's directory; what a dead runner of this one moved is there.

    Raises OSError.
    """
    for files in _earlier_layouts(attempt):
        for old, new in zip(files_for_resume(files), files_for_resume(attempt.files), strict=True):
            if old.exists() and not new.exists():
                old.rename(new)
    fsync_path(attempt.files.root)


async def destroy_earlier_sandboxes(attempt: AttemptContext) -> None:
    """End what of theirs still has processes or a control group. Raises AttemptError (sandbox_lost)."""
    for earlier in _earlier_layouts(attempt):
        handle = read_handle(earlier.handle)
        if handle is not None:
            await attempt.dependencies.runtime.destroy(handle, earlier.disk)


def _earlier_layouts(attempt: AttemptContext) -> Iterator[AttemptLayout]:
    return (files for files in attempt.task_files.attempts() if files.root != attempt.files.root)


class StaleOrderError(SandboxError):
    """The order is of an attempt that is over, or that somebody else has begun to carry out."""

    code = "internal_error"


def check_fencing(order: LaunchOrder, task: Task | None, last_record: Record | None) -> None:
    """Whoever holds the journal's lock asks before the first step. last: the newest record.

    An attempt is begun once, directly after it was written down; a finisher's is the last one of a task that has not
    ended. Raises StaleOrderError.
    """
    if task is None or task.attempt is None or task.attempt.id != order.attempt_id or task.state.is_terminal:
        raise StaleOrderError(f"Task {order.task_id} has no attempt {order.attempt_id} under way.")
    event = last_record.event if last_record is not None else None
    if not order.finish and not (isinstance(event, AttemptStarted) and event.attempt_id == order.attempt_id):
        raise StaleOrderError(f"Attempt {order.attempt_id} was begun by another runner.")
