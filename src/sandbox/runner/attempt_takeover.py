"""Leftovers of a task's earlier attempts, and the fencing of stale orders."""

from collections.abc import Iterator
from pathlib import Path

from sandbox.interfaces.file_layout import AttemptLayout
from sandbox.interfaces.placement import FinishAttempt, RunAttempt
from sandbox.model.errors import SandboxError
from sandbox.model.events import AttemptStarted, Record
from sandbox.model.task import Task
from sandbox.runner.dependencies import AttemptContext
from sandbox.runner.steps.provision import read_handle
from sandbox.system.files import fsync_path


def earlier_attempt_files(attempt: AttemptContext) -> list[Path]:
    """Return the files that the teardown of earlier attempts did not remove, except their logs."""
    return [path for files in _earlier_layouts(attempt) for path in files.root.iterdir() if path != files.runner_log]


def files_for_resume(layout: AttemptLayout) -> list[Path]:
    """Return the files that a resumed attempt needs: the agent's, and those that the host compares them with."""
    return [layout.disk_image, layout.disk, layout.repository, layout.secret_fingerprint]


def take_over_files(attempt: AttemptContext) -> None:
    """Move the preserved files of an earlier attempt into this one's directory.

    Files that a dead runner of this attempt moved are already there. Raises OSError.
    """
    for files in _earlier_layouts(attempt):
        for old, new in zip(files_for_resume(files), files_for_resume(attempt.layout), strict=True):
            if old.exists() and not new.exists():
                old.rename(new)
    fsync_path(attempt.layout.root)


async def destroy_earlier_sandboxes(attempt: AttemptContext) -> None:
    """Destroy earlier sandboxes that still have processes or a control group. Raises AttemptError (sandbox_lost)."""
    for earlier in _earlier_layouts(attempt):
        handle = read_handle(earlier.handle)
        if handle is not None:
            await attempt.dependencies.runtime.destroy(handle, earlier.disk)


def _earlier_layouts(attempt: AttemptContext) -> Iterator[AttemptLayout]:
    return (files for files in attempt.task_layout.attempts() if files.root != attempt.layout.root)


class StaleOrderError(SandboxError):
    """The order belongs to an attempt that is over, or that another runner has started."""

    code = "internal_error"


def check_fencing(order: RunAttempt | FinishAttempt, task: Task | None, last_record: Record | None) -> None:
    """Check, while holding the journal's lock and before the first step, that the order is still valid.

    An attempt is started once, directly after its AttemptStarted record. A finisher's attempt is the last one of an
    unfinished task. last_record: the newest record. Raises StaleOrderError.
    """
    if task is None or task.attempt is None or task.attempt.id != order.attempt_id or task.state.is_final:
        raise StaleOrderError(f"Task {order.task_id} has no running attempt {order.attempt_id}.")
    event = last_record.event if last_record is not None else None
    is_just_started = isinstance(event, AttemptStarted) and event.attempt_id == order.attempt_id
    if isinstance(order, RunAttempt) and not is_just_started:
        raise StaleOrderError(f"Attempt {order.attempt_id} was started by another runner.")
