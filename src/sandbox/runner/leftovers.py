"""What earlier attempts of a task left: runners made it that died before they had a workspace."""

from collections.abc import Iterator
from pathlib import Path

from sandbox.contracts.layout import AttemptLayout
from sandbox.runner.equipment import Attempt
from sandbox.runner.steps.provision import read_handle


def left_by_earlier_attempts(attempt: Attempt) -> list[Path]:
    """Their files, but for their logs."""
    return [path for earlier in _earlier(attempt) for path in earlier.root.iterdir() if path != earlier.runner_log]


async def end_earlier_attempts(attempt: Attempt) -> None:
    """End what of theirs still has processes or a control group. Raises AttemptError (sandbox_lost)."""
    for earlier in _earlier(attempt):
        handle = read_handle(earlier.handle)
        if handle is not None:
            await attempt.equipment.runtime.destroy(handle, earlier.disk)


def _earlier(attempt: Attempt) -> Iterator[AttemptLayout]:
    for root in attempt.files.root.parent.iterdir():
        if root != attempt.files.root:
            yield AttemptLayout(root)
