"""What earlier attempts of a task left: runners made it that died before they had a workspace."""

from collections.abc import Iterator
from pathlib import Path

from sandbox.contracts.layout import AttemptLayout
from sandbox.runner.durability import flush
from sandbox.runner.equipment import Attempt
from sandbox.runner.steps.provision import read_handle


def left_by_earlier_attempts(attempt: Attempt) -> list[Path]:
    """What was not removed when they were cleared away, but for their logs."""
    return [path for files in _earlier(attempt) for path in files.root.iterdir() if path != files.runner_log]


def kept_for_resuming(files: AttemptLayout) -> list[Path]:
    """What an attempt that goes on needs: what the agent wrote, and what the host compares it with."""
    return [files.disk_image, files.disk, files.repository, files.secret_fingerprint]


def take_over(attempt: Attempt) -> None:
    """Move what an earlier attempt kept into this one's directory; what a dead runner of this one moved is there.

    Raises OSError.
    """
    for files in _earlier(attempt):
        for old, new in zip(kept_for_resuming(files), kept_for_resuming(attempt.files), strict=True):
            if old.exists() and not new.exists():
                old.rename(new)
    flush(attempt.files.root)


async def end_earlier_attempts(attempt: Attempt) -> None:
    """End what of theirs still has processes or a control group. Raises AttemptError (sandbox_lost)."""
    for earlier in _earlier(attempt):
        handle = read_handle(earlier.handle)
        if handle is not None:
            await attempt.equipment.runtime.destroy(handle, earlier.disk)


def _earlier(attempt: Attempt) -> Iterator[AttemptLayout]:
    return (files for files in attempt.task_files.attempts() if files.root != attempt.files.root)
