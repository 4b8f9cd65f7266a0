"""The context of the current attempt: its files, its sandbox's handle, and the records of its journal.

The handle is on disk before the sandbox exists.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from sandbox.interfaces.gateway import ModelUpstream
from sandbox.interfaces.images import Image
from sandbox.interfaces.journal import Journals
from sandbox.interfaces.runtime import HANDLE_VERSION, Runtime, SandboxHandle
from sandbox.interfaces.secrets import Redactor
from sandbox.interfaces.task_file_layout import AttemptLayout, TaskLayout
from sandbox.model.errors import SandboxError
from sandbox.model.events import Record
from sandbox.model.failure import Failure
from sandbox.model.state_machine import failure_event
from sandbox.model.task import Task
from sandbox.primitives.files import write_durably
from sandbox.runner.attempt_recorder import AttemptRecorder


class AttemptContext(msgspec.Struct, frozen=True):
    """The current attempt: its id, files and recorder, but not the components that only some steps use.

    secrets: values, keyed by name.
    redactor: removes those values from all output; None without secrets.
    upstream: the model API; None if the attempt will not run an agent.
    image: the root file system of the sandbox; None for the host's own /usr.
    records_conversation: whether to record conversation events. True only if the server reads them.
    keeps_session: whether to store the agent's session as an internal artifact. True only if the server hides internal
        artifacts from clients.
    """

    id: str
    data_dir: Path
    recorder: AttemptRecorder
    secrets: Mapping[str, str] = {}
    redactor: Redactor | None = None
    upstream: ModelUpstream | None = None
    image: Image | None = None
    records_conversation: bool = True
    keeps_session: bool = False

    def __repr__(self) -> str:
        """Omit the secrets."""
        return f"{type(self).__name__}({self.id!r})"

    @property
    def task(self) -> Task:
        """The current task."""
        return self.recorder.task

    def record_failure(self, failure: Failure) -> None:
        """Record a failure of the attempt, or of its agent if the agent is running."""
        self.recorder.record(failure_event(self.task, failure))

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
        """The directories of the task's other attempts. All of them are earlier: this attempt is the latest."""
        own_root = self.layout.root
        return (files for files in self.task_layout.attempts() if files.root != own_root)


def read_records(journals: Journals, task_id: str) -> Iterator[Record]:
    """Yield every record of a task up to the current end. Raises JournalDamagedError, FileNotFoundError."""
    offset = 0
    while (batch := journals.read(task_id, offset)).records:
        yield from batch.records
        offset = batch.next_offset


class HandleTooNewError(SandboxError):
    """The sandbox was created by a newer version, and only that version can destroy it."""

    code = "handle_too_new"


def prepare_handle(attempt: AttemptContext, runtime: Runtime) -> SandboxHandle:
    """Create the sandbox's handle and store it before the sandbox exists. Raises AttemptError (provision_failed)."""
    handle = runtime.prepare(attempt.id)
    if read_handle(attempt.layout.handle) != handle:
        write_handle(attempt.layout.handle, handle)
    return handle


def write_handle(path: Path, handle: SandboxHandle) -> None:
    """Write the handle to disk atomically and durably."""
    write_durably(path, msgspec.json.encode(handle))


def read_handle(path: Path) -> SandboxHandle | None:
    """Return the handle that an attempt stored, or None if it stored none. Raises HandleTooNewError."""
    try:
        handle = msgspec.json.decode(path.read_bytes(), type=SandboxHandle)
    except FileNotFoundError:
        return None
    if handle.version > HANDLE_VERSION:
        raise HandleTooNewError(
            f"A newer version of Sandbox created this sandbox ({path} has version {handle.version}); start the newer "
            "version again to remove the sandbox."
        )
    return handle
