"""What earlier attempts of a task left on disk."""

from pathlib import Path

from sandbox.runner.equipment import Attempt


def left_by_earlier_attempts(attempt: Attempt) -> list[Path]:
    """What runners made that died before they had a workspace, but for their logs."""
    roots = [root for root in attempt.files.root.parent.iterdir() if root != attempt.files.root]
    return [
        path for root in roots for path in root.iterdir() if path != attempt.task_files.attempt(root.name).runner_log
    ]
