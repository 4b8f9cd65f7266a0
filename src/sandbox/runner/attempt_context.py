"""The context of the current attempt, the files of earlier attempts, and the check that an order is not stale."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from sandbox.interfaces.file_layout import AttemptLayout, TaskLayout
from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.images import Image
from sandbox.interfaces.journal import Journals
from sandbox.interfaces.placement import FinishAttempt, RunAttempt
from sandbox.interfaces.secrets import Redactor
from sandbox.model.errors import SandboxError
from sandbox.model.events import AttemptStarted, Record
from sandbox.model.task import Task
from sandbox.runner.attempt_recorder import AttemptRecorder
from sandbox.system.files import fsync_path


class AttemptContext(msgspec.Struct, frozen=True):
    """The current attempt: its id, files and recorder, but not the components that only some steps use.

    secrets: values by name.
    redaction: removes those values from all output; None without secrets.
    upstream: the model API; None if the attempt will not run an agent.
    image: the root file system of the sandbox; None for the host's own /usr.
    records_conversation: whether the server reads conversation events, so they are recorded.
    """

    id: str
    data_dir: Path
    recorder: AttemptRecorder
    secrets: Mapping[str, str] = {}
    redaction: Redactor | None = None
    upstream: ModelUpstream | None = None
    image: Image | None = None
    records_conversation: bool = True

    def __repr__(self) -> str:
        """Omit the secrets."""
        return f"{type(self).__name__}({self.id!r})"

    @property
    def task(self) -> Task:
        """The current task."""
        return self.recorder.task

    @property
    def resumes(self) -> bool:
        """Whether the attempt continues with the previous attempt's disk."""
        return self.task.attempt is not None and self.task.attempt.resumes

    @property
    def layout(self) -> AttemptLayout:
        """The attempt's own directory."""
        return self.task_layout.attempt(self.id)

    @property
    def task_layout(self) -> TaskLayout:
        """The layout of the task's directory."""
        return TaskLayout(self.data_dir, self.recorder.task.id)

    @property
    def earlier_layouts(self) -> Iterator[AttemptLayout]:
        """The directories of the task's other attempts, which are all earlier."""
        own_root = self.layout.root
        return (files for files in self.task_layout.attempts() if files.root != own_root)


def read_records(journals: Journals, task_id: str) -> Iterator[Record]:
    """Yield every record of a task up to the current end. Raises JournalDamagedError, FileNotFoundError."""
    offset = 0
    while (batch := journals.read(task_id, offset)).records:
        yield from batch.records
        offset = batch.next_offset


def earlier_attempt_files(attempt: AttemptContext) -> list[Path]:
    """Return the files that the teardown of earlier attempts did not remove, except their logs."""
    return [path for files in attempt.earlier_layouts for path in files.root.iterdir() if path != files.runner_log]


def files_for_resume(layout: AttemptLayout) -> list[Path]:
    """Return the files that a resumed attempt needs: the agent's, and those that the host compares them with."""
    return [layout.disk_image, layout.disk, layout.repository, layout.secret_fingerprint]


def take_over_files(attempt: AttemptContext) -> None:
    """Move the preserved files of an earlier attempt into this one's directory.

    Files that a dead runner of this attempt has already moved are not moved again. Raises OSError.
    """
    for files in attempt.earlier_layouts:
        for old, new in zip(files_for_resume(files), files_for_resume(attempt.layout), strict=True):
            if old.exists() and not new.exists():
                old.rename(new)
    fsync_path(attempt.layout.root)


class StaleOrderError(SandboxError):
    """The order belongs to an attempt that is over, or that another runner has started."""

    code = "internal_error"


def check_fencing(order: RunAttempt | FinishAttempt, task: Task | None, last_record: Record | None) -> Task:
    """Check that the order is not stale, and return its task.

    Call it while holding the journal's lock, before the first step.

    An attempt is started once, directly after its AttemptStarted record. A finisher's attempt is the last one of an
    unfinished task. last_record: the newest record. Raises StaleOrderError.
    """
    if task is None or task.attempt is None or task.attempt.id != order.attempt_id or task.state.is_final:
        raise StaleOrderError(f"Task {order.task_id} has no running attempt {order.attempt_id}.")
    event = last_record.event if last_record is not None else None
    is_just_started = isinstance(event, AttemptStarted) and event.attempt_id == order.attempt_id
    if isinstance(order, RunAttempt) and not is_just_started:
        raise StaleOrderError(f"Attempt {order.attempt_id} was started by another runner.")
    return task
